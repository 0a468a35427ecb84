"""Chooses the files that hold a checkpoint's weights, and locates every tensor in them by the safetensors headers.

The loaders of transformers, vLLM and SGLang choose for themselves. transformers prefers model.safetensors to an index;
without an index, vLLM and SGLang read every *.safetensors; transformers also applies an adapter that lies beside the
weights. So a directory is refused here where two of them would read different files: what the fingerprint describes is
what every engine reads. Needs only the standard library.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import struct
from collections.abc import Mapping
from typing import Any

SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS_FILE = "model.safetensors"
# Mistral's own format, which is published beside the Hugging Face files.
MISTRAL_FILES = "consolidated*.safetensors"
# A LoRA adapter as PEFT saves it.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit that the safetensors library itself sets
DTYPE_OF_SAFETENSORS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
COMPARED_BYTES = 16 << 20  # read at once when two tensors are compared
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """Location of one tensor: its file, offset of its first byte there, and size; dtype as safetensors names it."""

    file: pathlib.Path
    start: int
    size_bytes: int
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Locates every tensor of a checkpoint by name, from the safetensors headers alone.

    The weights are model.safetensors, or the files that the index names, or shards without an index.

    Raises:
        FileNotFoundError: the weights or a shard are missing.
        ValueError: a file is damaged or half written, or engines would read different files.
    """
    path = pathlib.Path(path)
    if (path / ADAPTER_CONFIG).exists():
        raise ValueError(
            f"{path} holds {ADAPTER_CONFIG} beside a model: transformers adds that adapter to the weights, other "
            "engines do not. Move the adapter to its own directory (a teacher serves it with --adapter NAME=DIR); if "
            "it is merged into the weights, delete its files"
        )
    index = _read_index(path)
    files = _indexed_files(path, index) if index else _files_without_index(path)
    headers = [read_header(file) for file in files]
    # Engines read whole files, so a tensor may be in another indexed file than the index says.
    if lost := sorted(set(index).difference(*headers)):
        raise ValueError(
            f"{path} is incomplete: {SAFETENSORS_INDEX} lists {lost[0]!r} and {len(lost) - 1} more tensors that no "
            "shard holds. The index belongs to another checkpoint, or a shard is outdated: copy the checkpoint again"
        )
    tensors: dict[str, StoredTensor] = {}
    for header in headers:
        for name in tensors.keys() & header.keys():
            raise ValueError(
                f"{path}: tensor {name} is stored in {tensors[name].file.name} and in {header[name].file.name}, so "
                "files of two checkpoints are mixed: copy the checkpoint again"
            )
        tensors |= header
    return tensors


def _read_index(path: pathlib.Path) -> dict[str, str]:
    """Returns the index, tensor -> file name; {} without one."""
    file = path / SAFETENSORS_INDEX
    if not file.exists():
        return {}
    try:
        index = {str(name): str(where) for name, where in json.loads(file.read_text("utf-8"))["weight_map"].items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{file} is damaged ({e!r}): copy the checkpoint again") from None
    if not index:
        raise ValueError(f"{file} is damaged (its weight_map is empty): copy the checkpoint again")
    return index


def _indexed_files(path: pathlib.Path, index: Mapping[str, str]) -> list[pathlib.Path]:
    names = sorted(set(index.values()))
    if outside := [name for name in names if pathlib.PurePath(name).name != name]:
        raise ValueError(f"{path / SAFETENSORS_INDEX} names {outside[0]}, which is not a file of this directory")
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path} is incomplete: {SAFETENSORS_INDEX} names {len(names)} shards, {len(missing)} are missing "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Copy or download it again"
        )
    if names != [SAFETENSORS_FILE] and (path / SAFETENSORS_FILE).exists():
        raise ValueError(
            f"{path} holds two sets of weights: {SAFETENSORS_FILE}, which transformers reads, and {SAFETENSORS_INDEX} "
            f"with {names[0]}, ..., which vLLM and SGLang read. Delete the one that is out of date"
        )
    return [path / name for name in names]


def _files_without_index(path: pathlib.Path) -> list[pathlib.Path]:
    mistral = set(path.glob(MISTRAL_FILES))
    files = sorted(file for file in path.glob("*.safetensors") if file not in mistral)
    single = path / SAFETENSORS_FILE
    if single in files:
        if others := [file.name for file in files if file != single]:
            raise ValueError(
                f"{path} holds {SAFETENSORS_FILE} and {others[0]} ({len(others)} such files) without an index: "
                f"transformers reads {SAFETENSORS_FILE} alone, vLLM and SGLang all of them. Delete or move the files "
                "that are not the model's"
            )
        return [single]
    if mistral and not files:
        raise FileNotFoundError(
            f"{path} has weights in Mistral's own format only ({min(mistral).name}), which cannot be read here: "
            "download the Hugging Face files too (model*.safetensors, config.json)"
        )
    if not files:
        raise FileNotFoundError(
            f"{path} has no *.safetensors files. Weights in another format (pytorch_model.bin) have to be "
            "converted once: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    _check_numbering(path, files)
    return files


def _check_numbering(path: pathlib.Path, files: list[pathlib.Path]) -> None:
    """Raises an error unless the files are one file, or all shards NAME-00001-of-0000N of one model."""
    if len(files) == 1 and not _SHARD.fullmatch(files[0].name):
        return
    found = [_SHARD.fullmatch(file.name) for file in files]
    odd = [file.name for file, match in zip(files, found, strict=True) if match is None]
    kinds = {(match["stem"], int(match["count"])) for match in found if match}
    if odd or len(kinds) > 1:
        raise ValueError(
            f"{path} has {len(files)} *.safetensors files and no {SAFETENSORS_INDEX}, and they are not the shards of "
            f"one model ({', '.join(file.name for file in files[:4])}). Copy the index, or delete what is not its own"
        )
    ((_, count),) = kinds
    numbers = {int(match["number"]) for match in found if match}
    if numbers != set(range(1, count + 1)):
        raise FileNotFoundError(
            f"{path} is incomplete: it has {len(numbers)} of {count} shards (NAME-00001-of-{count:05d}.safetensors, "
            "...). Copy or download it again"
        )


def read_header(file: pathlib.Path) -> dict[str, StoredTensor]:
    """Reads one safetensors header: 8 bytes of length, JSON, then the data.

    Raises:
        ValueError: the file is damaged or half written.
    """
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


def embedding_and_head(tensors: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Returns the names of the input embeddings and the output head; None where there is none, or more than one."""
    found = []
    for suffix in ("embed_tokens.weight", "lm_head.weight"):
        names = [name for name in tensors if name == suffix or name.endswith("." + suffix)]
        found.append(names[0] if len(names) == 1 else None)
    return found[0], found[1]


def has_separate_head(tensors: Mapping[str, StoredTensor]) -> bool:
    """Returns whether embeddings and head are both stored, with different values.

    transformers 5 then does not tie them, whatever config.json says.
    """
    embedding, head = embedding_and_head(tensors)
    return embedding is not None and head is not None and not _equal(tensors[embedding], tensors[head])


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    if (a.dtype, a.shape, a.size_bytes) != (b.dtype, b.shape, b.size_bytes):
        return False
    with a.file.open("rb") as file_a, b.file.open("rb") as file_b:
        file_a.seek(a.start)
        file_b.seek(b.start)
        left = a.size_bytes
        while left:
            size = min(left, COMPARED_BYTES)
            if file_a.read(size) != file_b.read(size):
                return False
            left -= size
    return True
