"""Hugging Face safetensors -> sharded decoder, and back. Only the slices that a device needs are read.

Parameters are stacked over layers, and over experts where there are any; the file has a tensor for each of them. Below,
"one" is the part of a parameter that is one tensor there.

Dimension key: L layers; shapes with "hf" are those of the file (a linear weight is [outputs, inputs] there).
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

from jdistill import checkpoint_files
from jdistill.models.decoder import Decoder, ParamSpec, param_specs
from jdistill.models.partitioning import param_shardings

# How one layer's (and expert's) parameter lies in the file.
TABLE = "table"  # as it is
VECTOR = "vector"  # all dims flattened into one
LINEAR = "linear"  # here [input, outputs..], there [outputs, input]
LINEAR_FROM_HEADS = "linear_from_heads"  # here [heads, head_dim, output], there [output, heads * head_dim]

Tensors = Mapping[str, tuple[str, str]]  # parameter -> (name pattern with {layer} and {expert}, layout)

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
    """The parameters of a checkpoint directory, in the structure of `nnx.state(abstract, nnx.Param)`; no adapters.

    Raises:
        FileNotFoundError, ValueError: an incomplete or damaged checkpoint; missing, unexpected or misshapen tensors.
    """
    specs = param_specs(abstract.config)
    stored = checkpoint_files.stored_tensors(path)
    _check_names(path, specs, tensors, set(stored), tied=abstract.config.tie_word_embeddings)
    handles: dict[pathlib.Path, Any] = {}

    def read_slice(name: str, index: tuple[slice, ...]) -> np.ndarray:
        file = stored[name].file
        if file not in handles:
            handles[file] = safetensors.safe_open(file, framework="numpy")
        return handles[file].get_slice(name)[index]

    def check(file_name: str, parameter: str, hf_shape: tuple[int, ...]) -> None:
        tensor = stored[file_name]
        if tensor.shape != hf_shape:
            raise ValueError(
                f"{tensor.file}: {file_name} has shape {list(tensor.shape)}, config.json asks for {list(hf_shape)} "
                f"({parameter}): weights and config.json belong to different models"
            )
        if tensor.dtype not in checkpoint_files.DTYPE_OF_SAFETENSORS:
            raise ValueError(
                f"{tensor.file}: {file_name} is stored as {tensor.dtype}, expected F32, BF16 or F16: "
                "a quantized checkpoint has to be dequantized first"
            )

    def load_param(parameter: str) -> Callable[[tuple[slice, ...]], np.ndarray]:
        spec, (pattern, layout) = specs[parameter], tensors[parameter]
        num_stacked = len(spec.stacked)
        shape = spec.shape[num_stacked:]
        for name in _names(spec, pattern).values():
            check(name, parameter, hf_shape(shape, layout))
        parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

        def part(index: tuple[slice, ...]) -> np.ndarray:
            ranges = tuple(s.indices(size)[:2] for s, size in zip(index, spec.shape, strict=True))
            if ranges not in parts:  # replicas ask for the same part
                ranges_in_one = ranges[num_stacked:]
                hf_index = _hf_index(shape, layout, ranges_in_one)
                local = tuple(stop - start for start, stop in ranges)
                value = np.empty(local, jnp.dtype(param_dtype))
                names = _names(spec, pattern)
                for place in np.ndindex(local[:num_stacked]):
                    name = names[tuple(i + start for i, (start, _) in zip(place, ranges, strict=False))]
                    value[place] = from_hf(read_slice(name, hf_index), local[num_stacked:], layout)
                parts[ranges] = value
            return parts[ranges]

        return part

    def load(path_in_state: tuple, variable: nnx.Variable) -> nnx.Variable:
        parameter = ".".join(map(str, path_in_state))
        part, shape = load_param(parameter), specs[parameter].shape
        if mesh is None:
            return variable.replace(jnp.asarray(part(tuple(slice(0, n) for n in shape))))
        return variable.replace(jax.make_array_from_callback(shape, shardings[parameter], part))

    shardings = (
        {}
        if mesh is None
        else {".".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(param_shardings(abstract, mesh))}
    )
    try:
        return nnx.map_state(load, nnx.state(abstract, nnx.Param))
    except safetensors.SafetensorError as e:
        raise ValueError(f"{path}: damaged safetensors file ({e}): copy the checkpoint again") from None


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
    # A tied model's own copy of the head is ignored by transformers and vLLM too; old Llamas stored their rotary table.
    ignored = {tensors["head"][0]} if tied else set()
    odd = sorted(n for n in stored - expected - ignored if not n.endswith("rotary_emb.inv_freq"))
    if odd:
        raise ValueError(
            f"{path}: unexpected tensor {odd[0]} ({len(odd)} of them): config.json describes a model without it. "
            "Is a flag missing there (attention_bias, tie_word_embeddings), or is it another architecture?"
        )


def _names(spec: ParamSpec, pattern: str) -> dict[tuple[int, ...], str]:
    """Index into the stacked dims -> the tensor's name; one entry with () where nothing is stacked."""
    places = np.ndindex(spec.shape[: len(spec.stacked)])
    return {place: pattern.format(**dict(zip(spec.stacked, place, strict=True))) for place in places}


def hf_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Shape in the file of one parameter."""
    if layout == TABLE:
        return shape
    if layout == VECTOR:
        return (math.prod(shape),)
    inputs, outputs = _split(shape, layout)
    return math.prod(outputs), math.prod(inputs)


def _split(dims: tuple, layout: str) -> tuple[tuple, tuple]:
    num_inputs = 2 if layout == LINEAR_FROM_HEADS else 1
    return dims[:num_inputs], dims[num_inputs:]


def _hf_index(shape: tuple[int, ...], layout: str, ranges: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    """Where the part `ranges` of one parameter lies in the file."""

    def flat(dims: tuple[int, ...], dim_ranges: tuple[tuple[int, int], ...]) -> slice:
        assert all(r == (0, n) for n, r in zip(dims[1:], dim_ranges[1:], strict=True)), "only heads are sharded"
        rest = math.prod(dims[1:])
        return slice(dim_ranges[0][0] * rest, dim_ranges[0][1] * rest)

    if layout == TABLE:
        return tuple(slice(*r) for r in ranges)
    if layout == VECTOR:
        return (flat(shape, ranges),)
    (in_dims, out_dims), (in_ranges, out_ranges) = _split(shape, layout), _split(ranges, layout)
    return flat(out_dims, out_ranges), flat(in_dims, in_ranges)


def from_hf(value: np.ndarray, shape: tuple[int, ...], layout: str) -> np.ndarray:
    """The file's layout -> ours."""
    return (value if layout in (TABLE, VECTOR) else value.T).reshape(shape)


def to_hf(value: np.ndarray, layout: str) -> np.ndarray:
    """Our layout -> the file's, contiguous."""
    rows_columns = hf_shape(value.shape, layout)
    if layout in (TABLE, VECTOR):
        return np.ascontiguousarray(value.reshape(rows_columns))
    return np.ascontiguousarray(value.reshape(rows_columns[::-1]).T)


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
    """Writes the directory `path` whole or not at all: built beside it, then renamed.

    On several hosts all call this (shards are gathered, a tensor at a time) and the first one writes.

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
        file = checkpoint_files.SAFETENSORS_FILE if len(plan) == 1 else f"model-{i:05d}-of-{len(plan):05d}.safetensors"
        weight_map.update(dict.fromkeys(values, file))
        if writer:
            safetensors.numpy.save_file(values, directory / file, metadata={"format": "pt"})
    if writer and len(plan) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / checkpoint_files.SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def on_host(array: jax.Array) -> np.ndarray:
    """All of an array, on every host."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
