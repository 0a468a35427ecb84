"""From the sidecar's configuration to a started vLLM: checked engine_args, environment variables, AsyncLLM."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import vllm
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.peft_helper import PEFTHelper
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM

from jdistill.checkpoint_files import read_config
from jdistill.config import ConfigError, TeacherServerConfig
from jdistill.sidecar.engines.adapters import Adapter, check_applied, read_adapter
from jdistill.sidecar.engines.options import check_engine_args
from jdistill.sidecar.engines.own_loader import check_model_args
from jdistill.sidecar.engines.vllm import worker
from jdistill.weight_files import stored_tensors
from jdistill.wire.errors import EngineDeadError
from jdistill.wire.types import ModelInfo

# engine_args that would contradict the sidecar's own configuration -> what to set instead.
RESERVED = {
    "data_parallel_size": "data_parallel_size",
    "dtype": "dtype",
    "enable_lora": "adapters",
    "enable_return_routed_experts": None,
    "enable_sleep_mode": "offload",
    "gpu_memory_utilization": "memory_fraction",
    "logprobs_mode": None,  # raw_logits would come back in the same field, looking like log-probabilities
    "max_model_len": "max_sequence_length",
    "max_lora_rank": "adapters",
    "max_loras": "adapters",
    "model": "model",
    "pipeline_parallel_size": "pipeline_parallel_size",
    "quantization": "quantization",
    "runner": None,
    "served_model_name": "served_name",
    "skip_tokenizer_init": None,
    "tensor_parallel_size": "tensor_parallel_size",
    "worker_extension_cls": None,
}
# Up to this size the whole vocabulary is requested at every position; above it, Python objects would dominate the cost.
SMALL_VOCAB_SIZE = 1024
MAX_LOGPROBS = 256  # default limit of top_k and candidates with a larger vocabulary
# Tokens per step. The plain way holds float32 logits of all of them: 1.2 GB with a vocabulary of 152,000. A smaller
# vocabulary gets longer steps, with no more logits (a third faster with a vocabulary of 512, where steps dominate).
MIN_BATCHED_TOKENS, MAX_BATCHED_TOKENS = 2048, 8192
STEP_LOGITS = 1 << 28


def check_args(config: TeacherServerConfig) -> tuple[str, dict[str, Any]]:
    """Checks `config.engine_args`; returns the way of scoring asked for and the arguments that go to vLLM.

    Raises:
        ValueError: an argument is unknown, invalid, or set by the sidecar itself; names the remedy.
    """
    args = dict(config.engine_args)
    scoring = args.pop("scoring", "auto")
    ways = ("auto", "fields", "extension", "plain")
    if scoring not in ways:
        raise ValueError(f"engine_args: scoring: expected one of {', '.join(ways)}, got {scoring!r}")
    check_engine_args("vllm", args, _field_names() | {"scoring", "sleep_level"})
    _check_sleep(config, args.pop("sleep_level", 1))
    check_model_args("vLLM", args)
    for name in RESERVED.keys() & args:
        instead = f"; set {RESERVED[name]} instead" if RESERVED[name] else ""
        raise ValueError(f"engine_args: {name} is set by the sidecar itself{instead}")
    return scoring, args


def arguments(config: TeacherServerConfig, info: ModelInfo, given: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of AsyncEngineArgs: defaults, then `given`, then what the sidecar itself decides."""
    args = dict(given)
    if args.get("max_logprobs", 0) == -1:
        args["max_logprobs"] = info.vocab_size
    if args.get("load_format") == "auto":
        del args["load_format"]
    default_max_logprobs = info.vocab_size if info.vocab_size <= SMALL_VOCAB_SIZE else MAX_LOGPROBS
    args = {
        "max_logprobs": default_max_logprobs,
        "max_num_batched_tokens": max(MIN_BATCHED_TOKENS, min(MAX_BATCHED_TOKENS, STEP_LOGITS // info.vocab_size)),
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "generation_config": "vllm",
        # The default, "auto", prefers Mistral's own files (consolidated*.safetensors, params.json).
        "load_format": "safetensors",
        "config_format": "hf",
        "enforce_eager": current_platform.is_cpu(),  # compiling for a CPU costs a minute
        **args,
        "model": config.model,
        "dtype": info.dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "data_parallel_size": config.data_parallel_size,
        "quantization": config.quantization,
        # One more than the longest sequence, since one token is generated.
        "max_model_len": info.max_sequence_length + 1,
        "skip_tokenizer_init": True,
        "logprobs_mode": "raw_logprobs",
    }
    if config.memory_fraction is not None:
        args["gpu_memory_utilization"] = config.memory_fraction
    if config.offload:
        args["enable_sleep_mode"] = True
    if config.adapters:
        tensors = stored_tensors(config.model)
        adapters = [read_adapter(path, tensors) for path in config.adapters.values()]
        for adapter in adapters:
            _check_adapter(adapter)
        rank = max(adapter.max_rank for adapter in adapters)
        args |= {"enable_lora": True, "max_lora_rank": _lora_rank(rank), "max_loras": len(adapters) + 1}
    args["worker_extension_cls"] = f"{worker.__name__}.{worker.ScoringWorker.__name__}"
    names = _field_names()
    return {name: value for name, value in args.items() if name in names}


def _field_names() -> set[str]:
    return {field.name for field in dataclasses.fields(AsyncEngineArgs)}


def _check_sleep(config: TeacherServerConfig, level: Any) -> None:
    """Raises ValueError if `offload` or `sleep_level` is impossible here, or they contradict each other."""
    if level not in (1, 2):
        raise ValueError(f"engine_args: sleep_level: expected 1 or 2, got {level!r}")
    if "sleep_level" in config.engine_args and not config.offload:
        raise ValueError("engine_args: sleep_level is for offload: set offload too, or leave sleep_level out")
    if level == 2 and config.adapters:
        raise ValueError("engine_args: sleep_level 2 forgets the adapters' weights; use sleep_level 1")
    if config.offload and not current_platform.is_sleep_mode_available():
        raise ValueError(
            f"offload: vLLM {vllm.__version__} has no sleep mode on this platform ({current_platform.device_type}); "
            "leave offload out, or use the transformers engine"
        )


def _check_adapter(adapter: Adapter) -> None:
    """Raises ConfigError unless this vLLM applies the adapter as PEFT does; asks vLLM's own reader."""
    try:
        helper = PEFTHelper.from_local_dir(str(adapter.path), None)
    except (ValueError, TypeError) as e:
        raise ConfigError(f"adapters: vLLM {vllm.__version__} does not read {adapter.path}: {e}") from None

    def uniform(name: str) -> tuple[int, float]:  # versions that do not know rank_pattern and alpha_pattern
        return helper.r, helper.vllm_lora_scaling_factor

    rank_and_scale = getattr(helper, "get_rank_and_scaling", uniform)
    check_applied(adapter, f"vLLM {vllm.__version__}", rank_and_scale, remedy="use the transformers engine")


def _lora_rank(rank: int) -> int:
    """Returns the smallest rank with vLLM kernels that is at least `rank`."""
    return next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= rank), rank)


def set_environment(config: TeacherServerConfig, info: ModelInfo, args: dict[str, Any]) -> None:
    """Sets options that vLLM reads only from the environment; variables that are already set keep their values."""
    # vLLM forks by default. A fork of the sidecar may hang on gRPC's threads, and keeps its port if it outlives it.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    # max_model_len may be one above the checkpoint's limit; no token is ever scored or read at that position.
    os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    if not current_platform.is_cpu():
        return
    if "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        # vLLM keeps one core for itself, which halves a machine of two; here each rank gets its share of all cores.
        cores = sorted(os.sched_getaffinity(0))
        num_ranks = (
            config.tensor_parallel_size * args.get("pipeline_parallel_size", 1) * args.get("data_parallel_size", 1)
        )
        share = len(cores) // num_ranks
        if share:
            shares = [cores[rank * share : (rank + 1) * share] for rank in range(num_ranks)]
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, s)) for s in shares)
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ and "kv_cache_memory_bytes" not in args:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(_kv_cache_gib(config, info))


def _kv_cache_gib(config: TeacherServerConfig, info: ModelInfo) -> int:
    """Returns the room for four of the longest sequences, at least 1 GiB; vLLM's default is half of the memory."""
    hf = read_config(config.model)
    hf = {**hf, **(hf.get("text_config") or {})}
    num_heads = hf.get("num_attention_heads") or 1
    head_dim = hf.get("head_dim") or hf.get("hidden_size", 0) // num_heads
    num_kv_heads = hf.get("num_key_value_heads") or num_heads
    value_bytes = 4 if info.dtype == "float32" else 2
    token_bytes = 2 * hf.get("num_hidden_layers", 0) * num_kv_heads * head_dim * value_bytes
    return max(1, math.ceil(4 * info.max_sequence_length * token_bytes / 2**30))


def start(args: dict[str, Any]) -> AsyncLLM:
    """Starts vLLM; raises ValueError for arguments it refuses, EngineDeadError if it fails to start."""
    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**args))
    except (ValueError, TypeError) as e:
        raise ValueError(f"vLLM {vllm.__version__} does not start with this model and these engine_args: {e}") from e
    except RuntimeError as e:
        raise EngineDeadError(f"vLLM {vllm.__version__} failed to start ({e}); its log above says why") from e
