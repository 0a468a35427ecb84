"""Layouts of one tensor: how a parameter's dims map to those of its tensor in a Hugging Face checkpoint.

A linear weight is [outputs, inputs] in the checkpoint and [inputs, outputs...] here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

# Layouts of the parameter of one layer (and expert).
TABLE = "table"  # same dims
VECTOR = "vector"  # all dims flattened into one
LINEAR = "linear"  # here [input, outputs..], there [outputs, input]
LINEAR_FROM_HEADS = "linear_from_heads"  # here [heads, head_dim, output], there [output, heads * head_dim]

Tensors = Mapping[str, tuple[str, str]]  # parameter -> (name pattern with {layer} and {expert}, layout)


def hf_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Shape of the tensor that holds a parameter of this shape."""
    if layout == TABLE:
        return shape
    if layout == VECTOR:
        return (math.prod(shape),)
    inputs, outputs = _split(shape, layout)
    return math.prod(outputs), math.prod(inputs)


def _split(dims: tuple, layout: str) -> tuple[tuple, tuple]:
    num_inputs = 2 if layout == LINEAR_FROM_HEADS else 1
    return dims[:num_inputs], dims[num_inputs:]


def hf_index(shape: tuple[int, ...], layout: str, ranges: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    """Slices of the tensor that hold the part `ranges` ((start, stop) per dim) of its parameter."""

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
    """Converts a tensor of the checkpoint to a parameter of this shape."""
    return (value if layout in (TABLE, VECTOR) else value.T).reshape(shape)


def to_hf(value: np.ndarray, layout: str) -> np.ndarray:
    """Converts a parameter to the contiguous tensor of the checkpoint."""
    rows_columns = hf_shape(value.shape, layout)
    if layout in (TABLE, VECTOR):
        return np.ascontiguousarray(value.reshape(rows_columns))
    return np.ascontiguousarray(value.reshape(rows_columns[::-1]).T)
