"""The numpy types that client, service and engines share.

Dimension key: S tokens of one sequence, P scored positions of it (ascending), K teacher top-k, C candidates.

A worked example: token_ids = [7, 3, 9, 4, 2], spans = ((2, 3), (4, 5)) scores the tokens at positions 2 and 4; P = 2:
logprobs[0] = log p(9 | 7 3) and logprobs[1] = log p(2 | 7 3 9 4).
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SequenceToScore:
    """One token sequence and which of its tokens to score.

    Args:
        token_ids: int32 [S], S >= 2.
        spans: half-open spans (start, stop) of token positions, ascending and disjoint, 1 <= start < stop <= S.
            Empty means the whole sequence, ((1, S),).
        candidate_ids: int32 [P, C], tokens to score at every scored position beside the token itself; or None.
    """

    token_ids: np.ndarray
    spans: tuple[tuple[int, int], ...] = ()
    candidate_ids: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not self.spans:
            object.__setattr__(self, "spans", ((1, len(self.token_ids)),))

    @property
    def num_scored(self) -> int:
        """P, the number of scored positions."""
        return sum(stop - start for start, stop in self.spans)

    def scored_positions(self) -> np.ndarray:
        """int32 [P]: the token positions that are scored, ascending."""
        return np.concatenate([np.arange(start, stop, dtype=np.int32) for start, stop in self.spans])


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TokenScores:
    """What the teacher says of the scored positions of one sequence; float32 nats, never NaN, never above 0.

    Args:
        logprobs: [P], of the tokens themselves.
        top_ids: int32 [P, K], the teacher's most likely tokens, most likely first; None unless asked.
        top_logprobs: [P, K]; None unless asked.
        candidate_logprobs: [P, C], in the order of `candidate_ids`; None unless asked.
        token_crc: CRC-32 of the token ids (little-endian int32 bytes) that the engine says it scored.
    """

    logprobs: np.ndarray
    top_ids: np.ndarray | None
    top_logprobs: np.ndarray | None
    candidate_logprobs: np.ndarray | None
    token_crc: int


@dataclasses.dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a teacher serves; the fields of the proto's ModelInfo, with the same meanings."""

    model: str
    fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int
    max_sequence_length: int
    max_top_k: int
    max_candidate_count: int
    any_temperature: bool
    dtype: str


@dataclasses.dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a sidecar says of itself; the fields of the proto's GetServerInfoResponse."""

    server_version: str
    instance_id: str
    engine: str
    engine_version: str
    model: ModelInfo
    max_request_bytes: int
