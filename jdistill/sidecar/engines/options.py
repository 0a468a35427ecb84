"""Checks a sidecar's configuration against engine and checkpoint, and describes the served model (ModelInfo)."""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from jdistill.checkpoint_files import (
    check_checkpoint,
    checkpoint_dtype,
    context_length,
    read_config,
    tokenizer_fingerprint,
    vocab_size,
)
from jdistill.config import TeacherServerConfig
from jdistill.fingerprint import model_fingerprint
from jdistill.wire.types import ModelInfo

DTYPES = ("float32", "bfloat16", "float16")


def check_engine_args(engine: str, given: Mapping[str, Any], valid: Iterable[str]) -> None:
    """Raises ValueError if `given` (engine_args of the configuration) has a name that `engine` does not know."""
    valid = sorted(valid)
    for name in given:
        if name in valid:
            continue
        near = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
        hint = (
            f"did you mean {near[0]!r}?"
            if near
            else f"it knows {', '.join(valid[:20])}{', ...' if len(valid) > 20 else ''}"
        )
        raise ValueError(f"engine_args: the {engine} engine does not know {name!r}; {hint}")


def check_sizes(engine: str, config: TeacherServerConfig, *supported: str) -> None:
    """Raises ValueError, with field and remedy, if the configuration asks for something that `engine` lacks.

    Args:
        engine: the engine's name.
        config: configuration of the sidecar.
        supported: the fields below that this engine supports.
    """
    remedies = {
        "tensor_parallel_size": "use the vllm or sglang engine to spread a model, or one sidecar per GPU as replicas",
        "pipeline_parallel_size": "use the vllm or sglang engine to spread a model",
        "data_parallel_size": "start several sidecars and give the client all their addresses",
        "quantization": "use the vllm or sglang engine, or a checkpoint that is already quantized",
        "memory_fraction": "leave it out: this engine takes what the model needs; max_batch_tokens bounds the rest",
        "adapters": "use the vllm engine, or merge the adapter into the checkpoint",
    }
    for name, remedy in remedies.items():
        value = getattr(config, name)
        if name not in supported and value not in (1, None, {}):
            raise ValueError(f"{name}: the {engine} engine cannot do that (got {value!r}); {remedy}")


def model_info(
    config: TeacherServerConfig,
    *,
    max_top_k: int | None = None,
    max_candidate_count: int | None = None,
    any_temperature: bool = True,
) -> ModelInfo:
    """Checks the checkpoint and describe it as this configuration serves it.

    Args:
        config: configuration of the sidecar.
        max_top_k, max_candidate_count: the engine's limits; None: the whole vocabulary.
        any_temperature: whether the engine can score at a temperature other than 1.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is incomplete, or the configuration does not fit it.
    """
    path = pathlib.Path(config.model)
    check_checkpoint(path)
    hf_config = read_config(path)
    dtype = checkpoint_dtype(path) if config.dtype == "auto" else config.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected auto or one of {', '.join(DTYPES)}, got {dtype!r}")
    if config.max_sequence_length is None:
        max_sequence_length = context_length(hf_config)
    else:
        max_sequence_length = config.max_sequence_length
        longest = context_length(hf_config)
        if not 2 <= max_sequence_length <= longest:
            raise ValueError(
                f"max_sequence_length: expected 2 to {longest} (the limit of {path}), got {max_sequence_length}"
            )
    size = vocab_size(hf_config)
    # Quantizing at load changes the scores, as the dtype does.
    computed = dtype if config.quantization is None else f"{dtype}, {config.quantization}"
    return ModelInfo(
        model=config.served_name or path.resolve().name,
        fingerprint=model_fingerprint(path, computed),
        tokenizer_fingerprint=tokenizer_fingerprint(path),
        vocab_size=size,
        max_sequence_length=max_sequence_length,
        max_top_k=size if max_top_k is None else max_top_k,
        max_candidate_count=size if max_candidate_count is None else max_candidate_count,
        any_temperature=any_temperature,
        dtype=dtype,
    )
