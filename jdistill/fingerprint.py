"""Which model is this: a hash over configuration, weights (sampled when large) and compute dtype; adapters' too."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib

from jdistill.checkpoint_files import read_config, stored_tensors, tokenizer_fingerprint

__all__ = ["adapter_fingerprint", "model_fingerprint", "tokenizer_fingerprint"]

# Of config.json, what no log-probability depends on: who wrote it, how it is stored, how it generates or trains.
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
# Of adapter_config.json.
IRRELEVANT_ADAPTER_KEYS = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision"}
)
WHOLE_BYTES = 64 << 20  # smaller checkpoints are hashed whole: 0.05 s
STRIDE_BYTES = 1 << 20  # of larger ones a sample every so many bytes of each tensor: 110 MB of a 14B model in bfloat16
SAMPLE_BYTES = 4 << 10  # one page of a disk's cache


def model_fingerprint(path: str | os.PathLike[str], dtype: str) -> str:
    """sha256 (hex) of a checkpoint computed in `dtype`; the same for every engine and every way to shard the files.

    A change of one weight in a large checkpoint can be missed; an optimizer step changes weights everywhere and cannot.

    Args:
        path: Hugging Face checkpoint directory.
        dtype: what the engine computes in, e.g. "bfloat16"; scores differ between dtypes.

    Raises:
        FileNotFoundError, ValueError: not a whole checkpoint (`jdistill.checkpoint_files.check_checkpoint`).
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
                    raise ValueError(f"{tensor.file} became shorter while it was read: is it being written?")
                digest.update(data)
    finally:
        for descriptor in files.values():
            os.close(descriptor)
    return digest.hexdigest()


def adapter_fingerprint(base: str, path: str | os.PathLike[str]) -> str:
    """sha256 (hex) of a LoRA adapter on the model of fingerprint `base`; wherever adapter and base model lie.

    Args:
        base: of model_fingerprint, which tells the dtype too.
        path: directory that PEFT has saved.
    """
    path = pathlib.Path(path)
    config = json.loads((path / "adapter_config.json").read_text())
    config = {key: value for key, value in config.items() if key not in IRRELEVANT_ADAPTER_KEYS}
    digest = hashlib.sha256(json.dumps([base, config], sort_keys=True).encode())
    with open(path / "adapter_model.safetensors", "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()
