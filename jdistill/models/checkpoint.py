"""Reads and writes the safetensors of a checkpoint. Each device reads only the slices that it holds.

Parameters are stacked over layers and experts, while the checkpoint has one tensor per layer and expert. Shapes with
"hf" in their name are those of the checkpoint (see layouts).
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.sharding import Mesh

from jdistill import checkpoint_files, weight_files
from jdistill.models.decoder import Decoder
from jdistill.models.layouts import Tensors, from_hf, hf_index, hf_shape, to_hf
from jdistill.models.params import ParamSpec, param_specs
from jdistill.models.partitioning import param_shardings

COPIED_FILES = (
    *checkpoint_files.TOKENIZER_FILES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
)
MAX_SHARD_BYTES = 5_000_000_000  # what transformers and the Hub use
SAFETENSORS_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def read(
    path: str | pathlib.Path, abstract: Decoder, tensors: Tensors, *, mesh: Mesh | None, param_dtype: str
) -> nnx.State:
    """Reads the parameters of a checkpoint directory, without adapters.

    Args:
        path: checkpoint directory.
        abstract: decoder of shapes only.
        tensors: the family's TENSORS.
        mesh: shards the parameters; each device reads only its shard. None: one device.
        param_dtype: dtype in which the parameters are stored.

    Returns:
        The parameters, in the structure of `nnx.state(abstract, nnx.Param)`.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is incomplete or damaged; tensors are missing, unexpected or
            misshapen.
    """
    specs = param_specs(abstract.config)
    files = _Files(weight_files.stored_tensors(path))
    embed, head = tensors["embed"], tensors["head"]
    if abstract.config.tie_word_embeddings and embed[0] not in files.stored and head[0] in files.stored:
        # Tying is symmetric in transformers 5: the tensor that is stored serves as both.
        tensors = {**tensors, "embed": (head[0], embed[1])}
    _check_names(path, specs, tensors, set(files.stored), tied=abstract.config.tie_word_embeddings)
    shardings = (
        {}
        if mesh is None
        else {".".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(param_shardings(abstract, mesh))}
    )

    def load(path_in_state: tuple, variable: nnx.Variable) -> nnx.Variable:
        name = ".".join(map(str, path_in_state))
        part, shape = _reader(files, name, specs[name], *tensors[name], jnp.dtype(param_dtype)), specs[name].shape
        if mesh is None:
            return variable.replace(jnp.asarray(part(tuple(slice(0, n) for n in shape))))
        return variable.replace(jax.make_array_from_callback(shape, shardings[name], part))

    try:
        return nnx.map_state(load, nnx.state(abstract, nnx.Param))
    except safetensors.SafetensorError as e:
        raise ValueError(f"{path}: damaged safetensors file ({e}): copy the checkpoint again") from None


class _Files:
    """The tensors of a checkpoint; each file is opened once."""

    def __init__(self, stored: Mapping[str, weight_files.StoredTensor]):
        self.stored = stored
        self._handles: dict[pathlib.Path, Any] = {}

    def read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        file = self.stored[name].file
        if file not in self._handles:
            self._handles[file] = safetensors.safe_open(file, framework="numpy")
        return self._handles[file].get_slice(name)[index]

    def check(self, name: str, parameter: str, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless the tensor has this shape and a supported dtype."""
        tensor = self.stored[name]
        if tensor.shape != shape:
            raise ValueError(
                f"{tensor.file}: {name} has shape {list(tensor.shape)}, config.json asks for {list(shape)} "
                f"({parameter}): weights and config.json belong to different models"
            )
        if tensor.dtype not in weight_files.DTYPE_OF_SAFETENSORS:
            raise ValueError(
                f"{tensor.file}: {name} is stored as {tensor.dtype}, expected F32, BF16 or F16: "
                "a quantized checkpoint has to be dequantized first"
            )


def _reader(
    files: _Files, parameter: str, spec: ParamSpec, pattern: str, layout: str, dtype: np.dtype
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """Checks the tensors of one parameter; returns the function that reads any part of it, by its index."""
    num_stacked = len(spec.stacked)
    shape = spec.shape[num_stacked:]
    names = _names(spec, pattern)
    for name in names.values():
        files.check(name, parameter, hf_shape(shape, layout))
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        ranges = tuple(s.indices(size)[:2] for s, size in zip(index, spec.shape, strict=True))
        if ranges not in parts:  # replicas ask for the same part
            tensor_index = hf_index(shape, layout, ranges[num_stacked:])
            local = tuple(stop - start for start, stop in ranges)
            value = np.empty(local, dtype)
            for place in np.ndindex(local[:num_stacked]):
                name = names[tuple(i + start for i, (start, _) in zip(place, ranges, strict=False))]
                value[place] = from_hf(files.read_slice(name, tensor_index), local[num_stacked:], layout)
            parts[ranges] = value
        return parts[ranges]

    return part


def _check_names(
    path: str | pathlib.Path, specs: Mapping[str, ParamSpec], tensors: Tensors, stored: set[str], *, tied: bool
) -> None:
    expected = set()
    for parameter, spec in specs.items():
        expected.update(_names(spec, tensors[parameter][0]).values())
    if missing := sorted(expected - stored):
        raise ValueError(
            f"{path}: tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are): "
            "not this model's checkpoint, or an incomplete one"
        )
    # The stored head of a tied model equals the embeddings; old Llama checkpoints stored their rotary table.
    ignored = {tensors["head"][0]} if tied else set()
    odd = sorted(n for n in stored - expected - ignored if not n.endswith("rotary_emb.inv_freq"))
    if odd:
        raise ValueError(
            f"{path}: unexpected tensor {odd[0]} ({len(odd)} of them): config.json describes a model without it. "
            "Is a flag missing there (attention_bias, tie_word_embeddings), or is it another architecture?"
        )


def _names(spec: ParamSpec, pattern: str) -> dict[tuple[int, ...], str]:
    """Maps each index into the stacked dims to its tensor's name; a parameter that is not stacked has one entry, ()."""
    places = np.ndindex(spec.shape[: len(spec.stacked)])
    return {place: pattern.format(**dict(zip(spec.stacked, place, strict=True))) for place in places}


def write(
    decoder: Decoder,
    path: str | pathlib.Path,
    tensors: Tensors,
    config_json: dict[str, Any],
    *,
    source: str | pathlib.Path | None,
    dtype: Literal["float32", "bfloat16"],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the directory `path` atomically: builds it under another name beside it, then renames it.

    On several hosts every process calls this (tensors are gathered one at a time) and the first one writes.

    Raises:
        ValueError: `path` exists and is not an empty directory, or an unknown dtype.
    """
    path = pathlib.Path(path)
    if dtype not in SAFETENSORS_DTYPES:
        raise ValueError(f"dtype = {dtype!r}: expected {' or '.join(SAFETENSORS_DTYPES)}")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an empty directory: remove it, or write somewhere else")
    writer = jax.process_index() == 0
    temporary = path.parent / f".{path.name}.{os.getpid()}.partial"
    if writer:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        _write_tensors(decoder, temporary, tensors, SAFETENSORS_DTYPES[dtype], max_shard_bytes, writer)
        if writer:
            (temporary / "config.json").write_text(json.dumps(config_json, indent=2) + "\n", encoding="utf-8")
            for name in COPIED_FILES if source is not None else ():
                if (file := pathlib.Path(source) / name).is_file():
                    shutil.copyfile(file, temporary / name)
            temporary.rename(path)
    finally:
        if writer:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_tensors(
    decoder: Decoder, directory: pathlib.Path, tensors: Tensors, dtype: np.dtype, max_shard_bytes: int, writer: bool
) -> None:
    state = {".".join(map(str, p)): v[...] for p, v in nnx.to_flat_state(nnx.state(decoder, nnx.Param))}
    plan: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]  # shards of (name in the file, parameter, place)
    size = 0
    for parameter, spec in param_specs(decoder.config).items():
        num_bytes = math.prod(spec.shape[len(spec.stacked) :]) * dtype.itemsize
        for place, name in _names(spec, tensors[parameter][0]).items():
            if plan[-1] and size + num_bytes > max_shard_bytes:
                plan.append([])
                size = 0
            size += num_bytes
            plan[-1].append((name, parameter, place))
    weight_map, total_bytes = {}, 0
    for i, shard in enumerate(plan, start=1):
        values = {}
        for name, parameter, place in shard:
            values[name] = to_hf(on_host(state[parameter][place]).astype(dtype), tensors[parameter][1])
            total_bytes += values[name].nbytes
        file = weight_files.SAFETENSORS_FILE if len(plan) == 1 else f"model-{i:05d}-of-{len(plan):05d}.safetensors"
        weight_map.update(dict.fromkeys(values, file))
        if writer:
            safetensors.numpy.save_file(values, directory / file, metadata={"format": "pt"})
    if writer and len(plan) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / weight_files.SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def on_host(array: jax.Array) -> np.ndarray:
    """Gathers a sharded array on every host."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
