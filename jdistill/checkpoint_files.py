"""Inspects a checkpoint directory without loading it: completeness, limits, dtype, tokenizer.

Both sides of the wire use this module, so it needs only the standard library; transformers is imported only for
tokenizers without a tokenizer.json.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import struct
from typing import Any

from jdistill.weight_files import (
    ADAPTER_CONFIG,
    DTYPE_OF_SAFETENSORS,
    SAFETENSORS_INDEX,
    embedding_and_head,
    stored_tensors,
)

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
# What transformers' configuration class of an architecture takes for an absent tie_word_embeddings.
TIED_BY_DEFAULT = {
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), True),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "qwen3_moe"), False),
}
# A checkpoint with any of these has a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def read_config(path: str | pathlib.Path) -> dict[str, Any]:
    """Reads config.json of a checkpoint directory.

    Raises:
        FileNotFoundError: the directory does not exist, or has no config.json.
        ValueError: config.json is not a JSON object.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        hint = "it is a file" if path.exists() else "it does not exist"
        raise FileNotFoundError(
            f"no checkpoint directory {path}: {hint}. Give a local directory with config.json and *.safetensors; "
            "a name on the Hugging Face Hub has to be downloaded first (`hf download NAME --local-dir DIR`)"
        )
    config = _read_json_object(path / CONFIG)
    if config is None and (path / ADAPTER_CONFIG).exists():
        raise FileNotFoundError(
            f"{path} holds a LoRA adapter ({ADAPTER_CONFIG}) and no model: give the base model's directory (a teacher "
            "serves the adapter with --adapter NAME=DIR), or merge the adapter into the base model"
        )
    if config is None:
        raise FileNotFoundError(
            f"{path} has no config.json, so it is not a Hugging Face checkpoint. "
            "`jdistill export RUN --to DIR` writes a training run as one"
        )
    return config


def read_generation_config(path: str | pathlib.Path) -> dict[str, Any]:
    """Reads generation_config.json of a checkpoint directory; {} if there is none.

    Raises:
        ValueError: the file is not a JSON object.
    """
    return _read_json_object(pathlib.Path(path) / GENERATION_CONFIG) or {}


def _read_json_object(file: pathlib.Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{file} is not JSON ({e}): half written? Copy the checkpoint again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def check_checkpoint(path: str | pathlib.Path) -> None:
    """Checks that a checkpoint directory is complete: config.json, every shard, and every shard at its full size.

    Raises:
        FileNotFoundError: the directory, config.json, the weights or a shard is missing.
        ValueError: a file is damaged or half written, or engines would read different weights.
    """
    config = read_config(path)
    tensors = stored_tensors(path)
    files = {tensor.file.name for tensor in tensors.values()}
    if ties_head(config) is False:
        embedding, _ = embedding_and_head(tensors)
        if embedding is not None and not any("lm_head" in name for name in tensors):
            raise ValueError(
                f"{path} has no lm_head.weight, and config.json does not say tie_word_embeddings: true: some "
                "engines would score with a random head. If the embeddings are also the head, say so in config.json; "
                "otherwise copy the checkpoint again"
            )
    chosen = config.get("transformers_weights")
    if chosen not in (None, SAFETENSORS_INDEX) and files != {chosen}:
        raise ValueError(
            f"{path}: config.json names transformers_weights = {chosen!r}, which only transformers reads; the other "
            f"engines read {', '.join(sorted(files)[:3])}. Delete the field, and the files that are not the model's"
        )


def ties_head(config: dict[str, Any]) -> bool | None:
    """Returns whether config.json ties the head to the embeddings; None if it depends on an unknown architecture."""
    config = _text_config(config)
    said = config.get("tie_word_embeddings")
    if isinstance(said, bool):
        return said
    return TIED_BY_DEFAULT.get(str(config.get("model_type")))


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the language model's fields, which a multimodal configuration nests under text_config."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def context_length(config: dict[str, Any]) -> int:
    """Returns the longest sequence that a checkpoint supports, in tokens, from its `read_config`.

    Raises:
        ValueError: the configuration names no limit.
    """
    config = _text_config(config)
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    raise ValueError(
        "config.json has no max_position_embeddings, so the longest sequence is unknown: set max_sequence_length"
    )


def vocab_size(config: dict[str, Any]) -> int:
    """Returns the exclusive upper bound of token ids; raises ValueError if the configuration names none."""
    value = _text_config(config).get("vocab_size")
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: expected vocab_size to be a positive integer, got {value!r}")
    return value


def checkpoint_dtype(path: str | pathlib.Path) -> str:
    """Returns "float32", "bfloat16" or "float16": the dtype in config.json, else that of most bytes of the weights.

    Raises:
        FileNotFoundError, ValueError: as `check_checkpoint`, or neither is a dtype to compute in.
    """
    config = _text_config(read_config(path))
    named = config.get("dtype") or config.get("torch_dtype")
    if named is not None:
        named = str(named).removeprefix("torch.")
        if named in DTYPE_OF_SAFETENSORS.values():
            return named
    bytes_of_dtype: dict[str, int] = {}
    for tensor in stored_tensors(path).values():
        bytes_of_dtype[tensor.dtype] = bytes_of_dtype.get(tensor.dtype, 0) + tensor.size_bytes
    most = max(bytes_of_dtype, key=lambda name: bytes_of_dtype[name], default="")
    if most not in DTYPE_OF_SAFETENSORS:
        raise ValueError(
            f"{path}: cannot choose a compute dtype (config.json names {named!r}, the weights are stored as {most!r}): "
            "set dtype to float32, bfloat16 or float16"
        )
    return DTYPE_OF_SAFETENSORS[most]


def has_tokenizer(path: str | pathlib.Path) -> bool:
    """Returns whether the directory holds a tokenizer."""
    return any((pathlib.Path(path) / name).exists() for name in TOKENIZER_FILES)


def tokenizer_fingerprint(path: str | pathlib.Path) -> str:
    """Hashes the table id -> token, added tokens included: sha256 in hex, or "" if there is no tokenizer.

    The 0.6B and the 14B model of one family have equal fingerprints, whichever files store their tokenizers. Two
    tokenizers with the same table may split text differently, but scoring only needs ids to mean the same tokens.

    Raises:
        ValueError: the tokenizer files are damaged.
    """
    path = pathlib.Path(path)
    if not has_tokenizer(path):
        return ""
    table = _token_table(path)
    digest = hashlib.sha256()
    for token_id in sorted(table):
        token = table[token_id].encode("utf-8", "surrogatepass")
        digest.update(struct.pack("<II", token_id, len(token)))
        digest.update(token)
    return digest.hexdigest()


def _token_table(path: pathlib.Path) -> dict[int, str]:
    """Reads the table id -> token, equal to the inverse of transformers' `tokenizer.get_vocab()`."""
    file = path / "tokenizer.json"
    if not file.exists():
        from transformers import AutoTokenizer

        vocab = AutoTokenizer.from_pretrained(str(path), local_files_only=True).get_vocab()
        return {token_id: token for token, token_id in vocab.items()}
    try:
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        vocab = tokenizer["model"]["vocab"]
        if isinstance(vocab, dict):  # BPE, WordLevel, WordPiece: token -> id
            table = {int(token_id): token for token, token_id in vocab.items()}
        else:  # Unigram: a list of [token, score], indexed by id
            table = {token_id: token for token_id, (token, _) in enumerate(vocab)}
        table.update({int(added["id"]): added["content"] for added in tokenizer.get("added_tokens", [])})
        # transformers also adds tokens that only tokenizer_config.json names.
        config_file = path / "tokenizer_config.json"
        if config_file.exists():
            config = json.loads(config_file.read_text(encoding="utf-8"))
            for token_id, added in config.get("added_tokens_decoder", {}).items():
                table.setdefault(int(token_id), added["content"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError) as e:
        raise ValueError(
            f"{file}: cannot read the tokenizer ({e!r}): half written? Copy the checkpoint again"
        ) from None
    return table
