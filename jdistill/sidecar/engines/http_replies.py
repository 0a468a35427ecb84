"""Builds TokenScores from a server's reply; refuses wrong token ids and values that are no log-probabilities.

Dimension key: P scored positions of one sequence, K top-k, C candidates.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jdistill.sidecar.engines.http_connection import ServerRefusedError
from jdistill.wire.types import SequenceToScore, TokenScores


def token_scores(
    sequence: SequenceToScore,
    scored_ids: np.ndarray,
    logprobs_P: list[float],
    top: tuple[list[list[int]], list[list[float]]] | None,
    candidate_logprobs: np.ndarray | None,
    crc: int,
) -> TokenScores:
    """Builds TokenScores from a reply; raises ServerRefusedError unless the server scored the sequence's own ids."""
    expected_P = sequence.token_ids[sequence.scored_positions()]
    if not np.array_equal(np.asarray(scored_ids), expected_P):
        raise ServerRefusedError("the server scored other tokens than requested")
    return TokenScores(
        logprobs=_clamp(logprobs_P),
        top_ids=None if top is None else _ids(top[0]),
        top_logprobs=None if top is None else _clamp(top[1]),
        candidate_logprobs=None if candidate_logprobs is None else _clamp(candidate_logprobs),
        token_crc=crc,
    )


def _clamp(values: Any) -> np.ndarray:
    """Converts to float32 and clamps at 0, since rounding can exceed it by a few 1e-7; refuses impossible values."""
    array = np.asarray(values, np.float32)  # None becomes NaN
    if not (array <= 1e-4).all():  # also NaN
        raise ServerRefusedError(
            "the server returned a log-probability that is missing, NaN or above 0 (are its logprobs those of the raw "
            "logits? vLLM: --logprobs-mode raw_logprobs)"
        )
    return np.minimum(array, np.float32(0))


def _ids(values: Any) -> np.ndarray:
    array = np.asarray(values, np.int64)
    if ((array < 0) | (array > np.iinfo(np.int32).max)).any():
        raise ServerRefusedError("the server returned a token id that is negative or above int32")
    return array.astype(np.int32)
