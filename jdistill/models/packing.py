"""Packs ragged rows: real tokens are computed side by side without padding, and unpacked into rows only for attention.

Outside attention, a transformer processes each token independently. So the tokens of B rows are stored in one line of
P < B * S places, and matrix products run over P tokens. Attention sees [B, S], where the causal mask hides the padding
from every real token: packed rows cannot see each other on any backend, and no kernel needs to support packing.

Dimension key: G groups of rows (devices that share a batch), B rows per group, rows = G * B, S tokens per row, P places
per line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int, Shaped

from jdistill import buckets


class Packing(NamedTuple):
    """Maps the tokens of rows to places in a line, and back."""

    token_of: Int[Array, "G P"]  # b * S + s; B * S: an empty place
    place_of: Int[Array, "G B S"]  # P: padding, which has no place

    def pack(self, x: Shaped[Array, "rows S *rest"]) -> Shaped[Array, "G P *rest"]:
        """Converts rows to one line per group; empty places hold 0 (false)."""
        G, B, S = self.place_of.shape
        return _take(x.reshape(G, B * S, *x.shape[2:]), self.token_of, self.place_of.reshape(G, B * S))

    def unpack(self, x: Shaped[Array, "G P *rest"]) -> Shaped[Array, "rows S *rest"]:
        """Converts one line per group to rows; padding holds 0 (false)."""
        G, B, S = self.place_of.shape
        return _take(x, self.place_of.reshape(G, B * S), self.token_of).reshape(G * B, S, *x.shape[2:])


@jax.custom_vjp
def _take(x, index, inverse):
    return jax.vmap(lambda rows, i: rows.at[i].get(mode="fill", fill_value=0))(x, index)


def _take_forward(x, index, inverse):
    return _take(x, index, inverse), (index, inverse)


def _take_backward(indices, grad):
    index, inverse = indices
    # Each token has one place, so the transpose is the inverse gather, not a scatter, which would add one by one.
    return _take(grad, inverse, index), None, None


_take.defvjp(_take_forward, _take_backward)


def pack_rows(lengths: Sequence[int], row_length: int, *, num_groups: int = 1, places: int | None = None) -> Packing:
    """Returns the packing of rows whose first `lengths[b]` tokens are real.

    Args:
        lengths: number of real tokens of each row.
        row_length: S.
        num_groups: G; each group takes the next len(lengths) / G rows.
        places: P; None: `buckets.packed_places` of the group with the most tokens.

    Raises:
        ValueError: a length is below 0 or above S, G does not divide the number of rows, or tokens exceed places.
    """
    lengths_GB = np.asarray(lengths, np.int64)
    if lengths_GB.size % num_groups:
        raise ValueError(f"{lengths_GB.size} rows do not split into {num_groups} groups")
    if lengths_GB.min() < 0 or lengths_GB.max() > row_length:
        raise ValueError(f"rows of {lengths_GB.min()} to {lengths_GB.max()} tokens, expected 0 to {row_length}")
    lengths_GB = lengths_GB.reshape(num_groups, -1)
    B, S = lengths_GB.shape[1], row_length
    most = int(lengths_GB.sum(axis=1).max())
    P = buckets.packed_places(most, B * S) if places is None else places
    if most > P:
        raise ValueError(f"{most} tokens do not fit {P} places")
    real_GBS = np.arange(S) < lengths_GB[:, :, None]
    place_GBS = np.where(real_GBS, np.cumsum(real_GBS.reshape(num_groups, -1), axis=1).reshape(real_GBS.shape) - 1, P)
    token_GP = np.full((num_groups, P), B * S)
    for group, real_BS in enumerate(real_GBS):
        tokens = np.flatnonzero(real_BS)
        token_GP[group, : len(tokens)] = tokens
    return Packing(token_GP.astype(np.int32), place_GBS.astype(np.int32))
