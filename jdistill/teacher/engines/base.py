"""What an engine is: something that scores token sequences under one model."""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Sequence

from jdistill.config import TeacherServerConfig
from jdistill.wire.types import ModelInfo, SequenceToScore, TokenScores


class Engine(abc.ABC):
    """Scores sequences under one model; one instance lives as long as its sidecar.

    The service validates requests against `info` before an engine sees them (lengths, ids inside the vocabulary, spans,
    top_k, candidates, temperature), because an id outside the vocabulary kills vLLM's and SGLang's engines for good.
    """

    name: str  # the key in ENGINES
    version: str  # of the wrapped library
    info: ModelInfo

    @classmethod
    @abc.abstractmethod
    async def create(cls, config: TeacherServerConfig) -> Engine:
        """Loads the model without blocking the event loop for long: health checks are answered meanwhile.

        Raises:
            ValueError: the checkpoint or an entry of `config.engine_args` cannot be used; the message has the remedy.
        """

    @abc.abstractmethod
    def score(
        self, sequences: Sequence[SequenceToScore], *, top_k: int = 0, temperature: float = 1.0
    ) -> AsyncIterator[tuple[int, TokenScores]]:
        """Yields (index into `sequences`, scores) as sequences finish, each exactly once.

        Closing the iterator early cancels the work that is left. Calls may run concurrently.

        Raises:
            UnsupportedError: the engine cannot do this.
            EngineDeadError: the engine is gone for good.
        """

    @abc.abstractmethod
    async def close(self) -> None:
        """Frees everything; idempotent."""
