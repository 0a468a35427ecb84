"""Fingerprints models and adapters: a hash over configuration, weights (sampled if large) and compute dtype."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib

from jdistill.checkpoint_files import read_config, tokenizer_fingerprint
from jdistill.weight_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, stored_tensors

__all__ = ["adapter_fingerprint", "model_fingerprint", "tokenizer_fingerprint"]

# Keys of config.json that no log-probability depends on: provenance, storage, generation, training.
IRRELEVANT_KEYS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "_attn_implementation",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "pad_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
# The same for adapter_config.json.
IRRELEVANT_ADAPTER_KEYS = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision"}
)
WHOLE_BYTES = 64 << 20  # checkpoints up to this size are hashed whole: 0.05 s
STRIDE_BYTES = 1 << 20  # larger ones: one sample per stride of each tensor, 110 MB of a 14B model in bfloat16
SAMPLE_BYTES = 4 << 10  # one page of the page cache


def model_fingerprint(path: str | os.PathLike[str], dtype: str) -> str:
    """Hashes a checkpoint that is computed in `dtype`: sha256 in hex, independent of engine and sharding.

    A change of a single weight in a large checkpoint can be missed; an optimizer step changes every tensor, and is not.

    Args:
        path: Hugging Face checkpoint directory.
        dtype: the engine's compute dtype, e.g. "bfloat16"; scores differ between dtypes.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is incomplete (`jdistill.checkpoint_files.check_checkpoint`).
    """
    config = {key: value for key, value in read_config(path).items() if key not in IRRELEVANT_KEYS}
    tensors = stored_tensors(path)
    digest = hashlib.sha256(json.dumps([dtype, config], sort_keys=True).encode())
    whole = sum(tensor.size_bytes for tensor in tensors.values()) <= WHOLE_BYTES
    files: dict[pathlib.Path, int] = {}
    try:
        for name, tensor in sorted(tensors.items()):
            digest.update(json.dumps([name, tensor.dtype, tensor.shape, tensor.size_bytes]).encode())
            if tensor.file not in files:
                files[tensor.file] = os.open(tensor.file, os.O_RDONLY)
            last = tensor.size_bytes - SAMPLE_BYTES
            if whole or last <= 0:
                samples = [(0, tensor.size_bytes)]
            else:
                samples = [(offset, SAMPLE_BYTES) for offset in (*range(0, last, STRIDE_BYTES), last)]
            for offset, size_bytes in samples:
                data = os.pread(files[tensor.file], size_bytes, tensor.start + offset)
                if len(data) != size_bytes:
                    raise ValueError(f"{tensor.file} shrank while it was read: is another process writing it?")
                digest.update(data)
    finally:
        for descriptor in files.values():
            os.close(descriptor)
    return digest.hexdigest()


def adapter_fingerprint(base: str, path: str | os.PathLike[str]) -> str:
    """Hashes a LoRA adapter together with its base model: sha256 in hex, independent of both directories' paths.

    Args:
        base: the base model's `model_fingerprint`, which covers the dtype too.
        path: adapter directory in PEFT's format.
    """
    path = pathlib.Path(path)
    config = json.loads((path / ADAPTER_CONFIG).read_text())
    config = {key: value for key, value in config.items() if key not in IRRELEVANT_ADAPTER_KEYS}
    digest = hashlib.sha256(json.dumps([base, config], sort_keys=True).encode())
    with open(path / ADAPTER_WEIGHTS, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()
