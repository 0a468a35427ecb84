"""The numpy types that client, service and engines share.

Dimension key: S tokens of one sequence, P scored positions of it (ascending), K teacher top-k, C candidates.

A worked example: token_ids = [7, 3, 9, 4, 2], spans = ((2, 3), (4, 5)) scores the tokens at positions 2 and 4; P = 2:
logprobs[0] = log p(9 | 7 3) and logprobs[1] = log p(2 | 7 3 9 4).
"""

from __future__ import annotations

import dataclasses
import enum

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SequenceToScore:
    """One token sequence, with the spans of tokens to score.

    Args:
        token_ids: int32 [S], S >= 2.
        spans: half-open spans (start, stop) of token positions, ascending and disjoint, 1 <= start < stop <= S.
            Empty means the whole sequence, ((1, S),).
        candidate_ids: int32 [P, C], tokens to score at each scored position besides its own token; or None.
        teacher: name of the client's teacher that scores it; "" if the client has only one. Not sent.
        teacher_prefix: int32 [R], tokens that the teacher sees in place of the first `num_replaced` (privileged
            context, another chat template); None: nothing is replaced. Spans remain positions of `token_ids`.
        num_replaced: number of leading tokens that the prefix replaces; none of them may be scored.
    """

    token_ids: np.ndarray
    spans: tuple[tuple[int, int], ...] = ()
    candidate_ids: np.ndarray | None = None
    teacher: str = ""
    teacher_prefix: np.ndarray | None = None
    num_replaced: int = 0

    def __post_init__(self) -> None:
        if not self.spans:
            object.__setattr__(self, "spans", ((max(1, self.num_replaced), len(self.token_ids)),))

    @property
    def num_scored(self) -> int:
        """Number of scored positions, P."""
        return sum(stop - start for start, stop in self.spans)

    def scored_positions(self) -> np.ndarray:
        """Returns the scored token positions, int32 [P], ascending."""
        return np.concatenate([np.arange(start, stop, dtype=np.int32) for start, stop in self.spans])

    def as_scored(self) -> SequenceToScore:
        """Returns the sequence that an engine sees: prefix applied, spans shifted, the same scored tokens."""
        if self.teacher_prefix is None:
            return self
        moved_by = len(self.teacher_prefix) - self.num_replaced
        return SequenceToScore(
            np.concatenate([self.teacher_prefix, self.token_ids[self.num_replaced :]]).astype(np.int32, copy=False),
            tuple((start + moved_by, stop + moved_by) for start, stop in self.spans),
            self.candidate_ids,
            self.teacher,
        )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TokenScores:
    """A teacher's scores of one sequence at its scored positions; float32 nats, never NaN, never above 0.

    Args:
        logprobs: [P], log-probabilities of the sequence's own tokens.
        top_ids: int32 [P, K], the teacher's most likely tokens, most likely first; None unless requested.
        top_logprobs: [P, K]; None unless requested.
        candidate_logprobs: [P, C], in the order of `candidate_ids`; None unless requested.
        token_crc: CRC-32 of the token ids (little-endian int32 bytes) that the engine reports to have scored.
    """

    logprobs: np.ndarray
    top_ids: np.ndarray | None
    top_logprobs: np.ndarray | None
    candidate_logprobs: np.ndarray | None
    token_crc: int


@dataclasses.dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served model; the fields of the proto's ModelInfo, documented there."""

    model: str
    fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int
    max_sequence_length: int
    max_top_k: int
    max_candidate_count: int
    any_temperature: bool
    dtype: str
    base_model: str = ""


class ServerState(enum.IntEnum):
    """Lifecycle state of a sidecar; the values of the proto's ServerState."""

    LOADING = 1
    SERVING = 2
    SLEEPING = 3
    DRAINING = 4


@dataclasses.dataclass(frozen=True, slots=True)
class ServerInfo:
    """A sidecar's description of itself; the fields of the proto's GetServerInfoResponse, documented there."""

    server_version: str
    instance_id: str
    engine: str
    engine_version: str
    models: tuple[ModelInfo, ...]
    max_request_bytes: int
    state: ServerState = ServerState.SERVING
    can_sleep: bool = False
    wake_on_score: bool = False
    max_queued_tokens: int = 0

    @property
    def model(self) -> ModelInfo:
        """The base model, selected by an empty model name."""
        return self.models[0]
