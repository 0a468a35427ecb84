"""Checks an engine's results before they leave: every sequence once, complete, finite, never above 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jdistill.wire.errors import TeacherError
from jdistill.wire.types import ModelInfo, SequenceToScore, TokenScores


class EngineResultError(TeacherError):
    """The engine returned an impossible result: the request may be retried, but the engine is suspect."""

    reason = "ENGINE_RESULT"


class ResultChecker:
    """Checks that an engine scores each of `sequences` exactly once, with valid scores.

    Args:
        engine: its name, for error messages.
        sequences: the sequences of one call of `Engine.score`.
        names: the number by which error messages refer to each sequence, such as its index in the client's request.
        top_k: as requested.
        info: the model that scores them.
    """

    def __init__(
        self, engine: str, sequences: Sequence[SequenceToScore], names: Sequence[int], *, top_k: int, info: ModelInfo
    ):
        self._engine = engine
        self._sequences = sequences
        self._names = names
        self._top_k = top_k
        self._info = info
        self._unscored = set(range(len(sequences)))

    def check(self, index: int, scores: TokenScores) -> None:
        """Checks one result of `Engine.score`; raises EngineResultError."""
        if index not in self._unscored:
            name = self._names[index] if 0 <= index < len(self._names) else index
            raise EngineResultError(f"the {self._engine} engine scored sequence {name} twice, or it does not exist")
        self._unscored.remove(index)
        check_scores(self._sequences[index], scores, top_k=self._top_k, info=self._info, index=self._names[index])

    def check_complete(self) -> None:
        """Raises EngineResultError if a sequence has no result."""
        if self._unscored:
            raise EngineResultError(
                f"the {self._engine} engine left {len(self._unscored)} of {len(self._sequences)} sequences unscored"
            )


def check_scores(sequence: SequenceToScore, scores: TokenScores, *, top_k: int, info: ModelInfo, index: int) -> None:
    """Checks the scores of one sequence: all values present, finite and at most 0; ids inside the vocabulary.

    Raises:
        EngineResultError: names the field and the sequence (`index`).
    """
    num_scored = sequence.num_scored
    num_candidates = 0 if sequence.candidate_ids is None else sequence.candidate_ids.shape[1]
    expected: dict[str, tuple[int, ...] | None] = {
        "logprobs": (num_scored,),
        "top_ids": (num_scored, top_k) if top_k else None,
        "top_logprobs": (num_scored, top_k) if top_k else None,
        "candidate_logprobs": (num_scored, num_candidates) if num_candidates else None,
    }
    for name, shape in expected.items():
        values = getattr(scores, name)
        got = None if values is None else values.shape
        if got != shape:
            raise EngineResultError(f"the engine returned {name} of shape {got} for sequence {index}, expected {shape}")
        if values is None:
            continue
        if name == "top_ids":
            if values.min() < 0 or values.max() >= info.vocab_size:
                raise EngineResultError(f"the engine returned {name} outside the vocabulary for sequence {index}")
        # NaN fails too: an array with NaN has NaN as minimum and maximum, and every comparison with NaN is false.
        elif not (values.min() > -np.inf and values.max() <= 0):
            raise EngineResultError(f"the engine returned {name} for sequence {index} that are not finite or above 0")
