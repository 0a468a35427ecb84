"""The engine interface: scores token sequences under one model."""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Mapping, Sequence

from jdistill.config import TeacherServerConfig
from jdistill.wire.errors import UnsupportedError
from jdistill.wire.types import ModelInfo, SequenceToScore, TokenScores


class Engine(abc.ABC):
    """Scores sequences under one model; one instance lives as long as its sidecar.

    The service validates requests against `info` before an engine sees them (lengths, ids inside the vocabulary, spans,
    top_k, candidates, temperature), because an id outside the vocabulary kills vLLM's and SGLang's engines for good.
    """

    name: str  # the key in ENGINES
    version: str  # of the wrapped library
    info: ModelInfo
    adapters: Mapping[str, ModelInfo] = {}  # LoRA adapters served beside the base model, by name
    can_sleep: bool = False  # whether sleep() and wake() are supported

    @classmethod
    @abc.abstractmethod
    async def create(cls, config: TeacherServerConfig) -> Engine:
        """Loads the model without blocking the event loop, so that health checks are answered meanwhile.

        Raises:
            ValueError: the checkpoint or an entry of `config.engine_args` cannot be used; the message has the remedy.
        """

    @abc.abstractmethod
    def score(
        self, sequences: Sequence[SequenceToScore], *, top_k: int = 0, temperature: float = 1.0, adapter: str = ""
    ) -> AsyncIterator[tuple[int, TokenScores]]:
        """Yields (index into `sequences`, scores) as sequences finish, each exactly once.

        Closing the iterator early cancels the remaining work. Calls may run concurrently. `adapter` is a key of
        `adapters`, or "" for the base model. A sequence never has a teacher_prefix: the service has applied it.

        Raises:
            UnsupportedError: the engine cannot do this.
            EngineDeadError: the engine has died for good.
        """

    async def check(self) -> None:  # noqa: B027  (most engines cannot die apart from their process)
        """Checks cheaply that the engine is alive; called about once per second.

        Raises:
            EngineDeadError: it has died for good.
        """

    async def sleep(self) -> None:
        """Frees the accelerator's memory; called only while nothing is being scored; idempotent."""
        raise UnsupportedError(self._no_sleep())

    async def wake(self) -> None:
        """Restores the model as it was; idempotent."""
        raise UnsupportedError(self._no_sleep())

    def _no_sleep(self) -> str:
        return f"the {self.name} engine ({self.version}) was not started with offload, or cannot free its memory"

    @abc.abstractmethod
    async def close(self) -> None:
        """Frees all resources; idempotent."""
