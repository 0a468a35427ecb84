"""The probe: a short sequence by which engines compare a way of scoring, or a server, with the numbers at start."""

from __future__ import annotations

import numpy as np

from jdistill.wire.types import ModelInfo, TokenScores

PROBE_LENGTH = 12  # tokens; shorter for a model with a shorter limit


def probe_ids(info: ModelInfo) -> np.ndarray:
    """Returns token ids spread over the whole vocabulary, int32 [S]."""
    length = min(PROBE_LENGTH, info.max_sequence_length)
    return (np.arange(1, length + 1) * max(1, info.vocab_size // 13) % info.vocab_size).astype(np.int32)


def distance(got: TokenScores, expected: TokenScores) -> float:
    """Returns the largest difference in nats between two scores of the probe; NaN if either holds NaN.

    Args:
        got: scores of the last positions that `expected` covers; its candidates are the first columns of
            `expected.top_ids`.
        expected: with top-k wherever `got` has top-k or candidates.
    """
    begin = len(expected.logprobs) - len(got.logprobs)
    pairs = [(got.logprobs, expected.logprobs[begin:])]
    if got.top_logprobs is not None:
        assert expected.top_logprobs is not None
        pairs.append((got.top_logprobs, expected.top_logprobs[begin:]))
    if got.candidate_logprobs is not None:
        assert expected.top_logprobs is not None
        num_candidates = got.candidate_logprobs.shape[1]
        pairs.append((got.candidate_logprobs, expected.top_logprobs[begin:, :num_candidates]))
    return float(np.max([np.abs(ours - theirs).max() for ours, theirs in pairs]))  # np.max keeps NaN, max() may not
