"""Spans and teacher prefixes of a request: decoded from its columns and checked for consistency, without a model.

Dimension key: B sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

from jdistill.wire.errors import InvalidRequestError

Columns: TypeAlias = Mapping[str, np.ndarray]  # packed fields by name


def decode_prefixes(columns: Columns, lengths_B: np.ndarray) -> tuple[list[np.ndarray | None], np.ndarray]:
    """Returns each sequence's teacher prefix (None: nothing is replaced) and how many tokens it replaces, int64 [B]."""
    counts_B, replaced_B = read_counts(columns, "prefix_lengths"), read_counts(columns, "prefix_replaced")
    ids = columns["prefix_token_ids"].view("<i4").astype(np.int32)
    if not len(counts_B) and not len(replaced_B) and not len(ids):
        return [None] * len(lengths_B), np.zeros(len(lengths_B), np.int64)
    for name, column in (("prefix_lengths", counts_B), ("prefix_replaced", replaced_B)):
        if len(column) != len(lengths_B):
            raise InvalidRequestError(f"{name} has {len(column)} values for {len(lengths_B)} sequences", field=name)
    if counts_B.sum() != len(ids):
        raise InvalidRequestError(
            f"prefix_lengths add up to {counts_B.sum()} tokens, prefix_token_ids has {len(ids)}",
            field="prefix_token_ids",
        )
    if (long := np.flatnonzero(replaced_B >= lengths_B)).size:
        b = int(long[0])
        raise InvalidRequestError(
            f"prefix_replaced of sequence {b} is {replaced_B[b]} of its {lengths_B[b]} tokens: nothing is left",
            field="prefix_replaced",
            sequence=b,
        )
    parts = np.split(ids, np.cumsum(counts_B)[:-1])
    used_B = (counts_B > 0) | (replaced_B > 0)
    return [part if used else None for part, used in zip(parts, used_B.tolist(), strict=True)], replaced_B


def decode_spans(columns: Columns, lengths_B: np.ndarray, replaced_B: np.ndarray) -> list[tuple[tuple[int, int], ...]]:
    """Returns the spans of each sequence; raises InvalidRequestError unless they are ascending, disjoint and inside."""
    counts_B = read_counts(columns, "span_counts")
    starts, ends = read_counts(columns, "span_starts"), read_counts(columns, "span_ends")
    if not len(counts_B):
        if len(starts) or len(ends):
            raise InvalidRequestError("span_starts or span_ends without span_counts", field="span_counts")
        if (short := np.flatnonzero(lengths_B < 2)).size:
            b = int(short[0])
            raise InvalidRequestError(
                f"sequence {b} has {lengths_B[b]} tokens; at least 2 are needed, since the first has no score",
                field="sequence_lengths",
                sequence=b,
            )
        starts_B = np.maximum(1, replaced_B)
        return [((start, length),) for start, length in zip(starts_B.tolist(), lengths_B.tolist(), strict=True)]
    if len(counts_B) != len(lengths_B):
        raise InvalidRequestError(
            f"span_counts has {len(counts_B)} values for {len(lengths_B)} sequences", field="span_counts"
        )
    for name, column in (("span_starts", starts), ("span_ends", ends)):
        if len(column) != counts_B.sum():
            raise InvalidRequestError(
                f"{name} has {len(column)} values, span_counts add up to {counts_B.sum()}", field=name
            )
    if (empty := np.flatnonzero(counts_B == 0)).size:
        b = int(empty[0])
        raise InvalidRequestError(
            f"sequence {b} has no span: nothing to score; leave it out of the request", field="span_counts", sequence=b
        )
    owner = np.repeat(np.arange(len(counts_B)), counts_B)
    # A span starts at or after the end of the previous span of its sequence; the first one starts at 1 or later.
    first = np.concatenate([[True], owner[1:] != owner[:-1]])
    floor = np.where(first, 1, np.concatenate([[1], ends[:-1]]))
    bad = np.flatnonzero((starts < floor) | (ends <= starts) | (ends > lengths_B[owner]))
    if bad.size:
        i, b = int(bad[0]), int(owner[bad[0]])
        raise InvalidRequestError(
            f"span [{starts[i]}, {ends[i]}) of sequence {b} ({lengths_B[b]} tokens): spans are ascending, disjoint, "
            f"not empty and inside [1, {lengths_B[b]})",
            field="spans",
            sequence=b,
        )
    pairs = list(zip(starts.tolist(), ends.tolist(), strict=True))
    stops = np.cumsum(counts_B).tolist()
    return [tuple(pairs[stop - count : stop]) for stop, count in zip(stops, counts_B.tolist(), strict=True)]


def read_counts(columns: Columns, name: str) -> np.ndarray:
    """Returns a column of counts or positions as int64."""
    return columns[name].astype(np.int64)  # sums of uint32 would wrap around
