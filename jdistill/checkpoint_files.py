"""What a Hugging Face checkpoint directory holds, without loading it: is it whole, its limits, dtype, tokenizer.

Both sides of the wire use this module, so it needs the standard library only; transformers is imported only for
tokenizers that have no tokenizer.json.
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
# Any of these and the checkpoint has a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
MAX_HEADER_BYTES = 100_000_000  # the limit that the safetensors library itself sets
DTYPE_OF_SAFETENSORS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: `file`, its first byte there, its size in bytes, dtype (safetensors' word) and shape."""

    file: pathlib.Path
    start: int
    size_bytes: int
    dtype: str
    shape: tuple[int, ...]


def read_config(path: str | pathlib.Path) -> dict[str, Any]:
    """config.json of a checkpoint directory.

    Raises:
        FileNotFoundError: no such directory, or no config.json in it.
        ValueError: config.json is not a JSON object.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        hint = "it is a file" if path.exists() else "nothing is there"
        raise FileNotFoundError(
            f"no checkpoint directory {path}: {hint}. Give a local directory with config.json and *.safetensors; "
            "a name on the Hugging Face Hub has to be downloaded first (`hf download NAME --local-dir DIR`)"
        )
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} has no config.json, so it is not a Hugging Face checkpoint. "
            "A training run is written as one by `jdistill export RUN --to DIR`"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path / 'config.json'} is not JSON ({e}): half written? Copy the checkpoint again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.json'}: expected a JSON object, got {type(config).__name__}")
    return config


def check_checkpoint(path: str | pathlib.Path) -> None:
    """Raises unless the directory holds a whole checkpoint: config.json, every shard, every byte of every shard.

    Raises:
        FileNotFoundError: the directory, config.json, the weights or a shard is missing.
        ValueError: a file is damaged or half written.
    """
    read_config(path)
    stored_tensors(path)


def stored_tensors(path: str | pathlib.Path) -> dict[str, StoredTensor]:
    """Name -> where it lies, of every tensor of a checkpoint, from the safetensors headers alone.

    Raises:
        FileNotFoundError, ValueError: as `check_checkpoint`, the configuration apart.
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
            f"{path} is incomplete: {SAFETENSORS_INDEX} promises {lost[0]!r} and {len(lost) - 1} more tensors that no "
            "shard holds. The index belongs to another checkpoint, or a shard is an old one: copy it again"
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
                f"{file} is no safetensors file ({size_bytes} bytes, header length {header_bytes}), {again}"
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
        raise ValueError(f"{file} has {size_bytes} bytes, its header promises {end}: {again}")
    return tensors


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a configuration; that of a multimodal one is nested."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def context_length(config: dict[str, Any]) -> int:
    """Longest sequence of a checkpoint, in tokens, from its configuration (`read_config`).

    Raises:
        ValueError: the configuration does not say.
    """
    config = _text_config(config)
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    raise ValueError(
        "config.json names no longest sequence (max_position_embeddings): give max_sequence_length yourself"
    )


def vocab_size(config: dict[str, Any]) -> int:
    """Token ids of a checkpoint are below this. Raises ValueError if the configuration does not say."""
    value = _text_config(config).get("vocab_size")
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: expected vocab_size to be a positive integer, got {value!r}")
    return value


def checkpoint_dtype(path: str | pathlib.Path) -> str:
    """ "float32", "bfloat16" or "float16": what config.json names, else what most weights are stored in.

    Raises:
        FileNotFoundError, ValueError: as `check_checkpoint`, or no dtype that can be computed in.
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
            f"{path}: cannot tell the dtype to compute in (configuration {named!r}, weights stored as {most!r}): "
            "give dtype float32, bfloat16 or float16 yourself"
        )
    return DTYPE_OF_SAFETENSORS[most]


def has_tokenizer(path: str | pathlib.Path) -> bool:
    """Whether the directory holds tokenizer files."""
    return any((pathlib.Path(path) / name).exists() for name in TOKENIZER_FILES)


def tokenizer_fingerprint(path: str | pathlib.Path) -> str:
    """sha256 (hex) over the table id -> token, added tokens included; "" if the checkpoint has no tokenizer.

    Equal for a 0.6B and a 14B model of one family, whatever files their tokenizers are stored in. Two tokenizers with
    the same table may still split text differently; token ids mean the same, and that is what scoring needs.

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
    """Id -> token, as `tokenizer.get_vocab()` of transformers has it."""
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
        else:  # Unigram: [token, score] in the order of ids
            table = {token_id: token for token_id, (token, _) in enumerate(vocab)}
        table.update({int(added["id"]): added["content"] for added in tokenizer.get("added_tokens", [])})
        # transformers adds what only tokenizer_config.json names.
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
