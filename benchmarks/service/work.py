"""The sequences to score, made from a seed so that every process makes the same ones."""

from __future__ import annotations

import numpy as np

from jdistill.wire.types import SequenceToScore

PROMPT_TOKENS, RESPONSE_TOKENS = 128, 384


def sequences(
    count: int,
    *,
    vocab_size: int,
    length: int = PROMPT_TOKENS + RESPONSE_TOKENS,
    first_scored: int = PROMPT_TOKENS,
    seed: int = 1,
) -> list[SequenceToScore]:
    """Makes `count` sequences of `length` random tokens, scored from position `first_scored` on."""
    ids = np.random.default_rng(seed).integers(2, vocab_size, (count, length)).astype(np.int32)
    return [SequenceToScore(row, ((first_scored, length),)) for row in ids]
