"""Inspects a checkpoint directory without loading it: weight files, completeness, limits, dtype, tokenizer.

Both sides of the wire use this module, so it needs only the standard library; transformers is imported only for
tokenizers without a tokenizer.json.

`stored_tensors` decides which files make the weights, for our loader (hence the jax engine) and for the fingerprint.
The loaders of transformers, vLLM and SGLang choose for themselves: transformers prefers model.safetensors to an index,
and without an index vLLM and SGLang read every *.safetensors, so a stray file beside the weights can make them load
other bytes than the fingerprint describes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import struct
from typing import Any

SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS_FILE = "model.safetensors"
# A LoRA adapter as PEFT saves it.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
GENERATION_CONFIG = "generation_config.json"
# A checkpoint with any of these has a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
MAX_HEADER_BYTES = 100_000_000  # the limit that the safetensors library itself sets
DTYPE_OF_SAFETENSORS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """Location of one tensor: its file, offset of its first byte there, and size; dtype as safetensors names it."""

    file: pathlib.Path
    start: int
    size_bytes: int
    dtype: str
    shape: tuple[int, ...]


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
    config = _read_json_object(path / "config.json")
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
        ValueError: a file is damaged or half written.
    """
    read_config(path)
    stored_tensors(path)


def stored_tensors(path: str | pathlib.Path) -> dict[str, StoredTensor]:
    """Locates every tensor of a checkpoint by name, from the safetensors headers alone.

    The weights are the files that the index names; without an index model.safetensors, else every *.safetensors.

    Raises:
        FileNotFoundError, ValueError: as `check_checkpoint`, but config.json is not read.
    """
    path = pathlib.Path(path)
    index_path = path / SAFETENSORS_INDEX
    expected: dict[str, str] | None = None
    if index_path.exists():
        try:
            expected = dict(json.loads(index_path.read_text(encoding="utf-8"))["weight_map"])
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{index_path} is damaged ({e!r}): copy the checkpoint again") from None
        files = [path / name for name in sorted(set(expected.values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise FileNotFoundError(
                f"{path} is incomplete: {SAFETENSORS_INDEX} names {len(files)} shards, {len(missing)} are missing "
                f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Copy or download it again"
            )
    else:
        files = [path / SAFETENSORS_FILE] if (path / SAFETENSORS_FILE).exists() else sorted(path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"{path} has no *.safetensors files. Weights in another format (pytorch_model.bin) have to be "
                "converted once: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
            )
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors.update(_read_header(file))
    lost = sorted(set(expected or ()) - set(tensors))
    if lost:
        raise ValueError(
            f"{path} is incomplete: {SAFETENSORS_INDEX} lists {lost[0]!r} and {len(lost) - 1} more tensors that no "
            "shard holds. The index belongs to another checkpoint, or a shard is outdated: copy the checkpoint again"
        )
    return tensors


def _read_header(file: pathlib.Path) -> dict[str, StoredTensor]:
    """Reads one safetensors header: 8 bytes of length, JSON, then the data."""
    size_bytes = file.stat().st_size
    again = "half written or damaged: copy or export the checkpoint again"
    with file.open("rb") as f:
        prefix = f.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, size_bytes - 8):
            raise ValueError(
                f"{file} is not a safetensors file ({size_bytes} bytes, header length {header_bytes}), {again}"
            )
        try:
            header = json.loads(f.read(header_bytes))
            tensors = {}
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                start, stop = entry["data_offsets"]
                shape = tuple(int(n) for n in entry["shape"])
                tensors[name] = StoredTensor(file, 8 + header_bytes + start, stop - start, entry["dtype"], shape)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError) as e:
            raise ValueError(f"{file} has a damaged safetensors header ({e!r}), {again}") from None
    end = max((tensor.start + tensor.size_bytes for tensor in tensors.values()), default=8 + header_bytes)
    if end != size_bytes:
        raise ValueError(f"{file} has {size_bytes} bytes, but its header describes {end}: {again}")
    return tensors


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
