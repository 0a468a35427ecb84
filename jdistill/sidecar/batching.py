"""Batches the sequences of concurrent calls: base of the engines that score one batch at a time (transformers, jax).

Sequences of all calls wait in one list. A padded batch starts with the longest remaining sequence of the oldest call,
so that no call waits forever and a single call is cut into the same batches every time; it is filled with sequences of
similar length, the oldest call's first, up to a budget of padded tokens. A packed batch has no padding: it is filled in
order of arrival, up to a budget of tokens. One worker thread loads, scores and frees, so an engine may keep
thread-local state (a mesh, an inference mode) and never sees two batches at once.

Dimension key: N scored positions of a whole batch, sequence after sequence; K teacher top-k; C candidates.
"""

from __future__ import annotations

import abc
import asyncio
import concurrent.futures
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

import numpy as np

from jdistill.config import TeacherServerConfig
from jdistill.sidecar.engines.base import Engine
from jdistill.wire.codec import token_crc
from jdistill.wire.errors import EngineDeadError, TeacherError, UnavailableError
from jdistill.wire.types import SequenceToScore, TokenScores

# Lengths are compared as multiples of this: padding 3 tokens to 60 costs less than another forward pass.
LENGTH_FLOOR = 128

R = TypeVar("R")
E = TypeVar("E", bound="BatchedEngine")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """One call of `score`; its results go to `results`."""

    key: tuple[int, float, str]  # top_k, temperature, adapter
    results: asyncio.Queue[list[tuple[int, TokenScores]] | BaseException]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One waiting sequence; sequences with equal `key` may share a batch, `call` identifies the call."""

    call: object
    index: int
    sequence: SequenceToScore
    key: tuple[int, float, str, int]  # top_k, temperature, adapter, candidates per position

    @property
    def num_tokens(self) -> int:
        """Length of the sequence."""
        return len(self.sequence.token_ids)


def form_batch(waiting: Sequence[Work], max_batch_tokens: int, *, packed: bool = False) -> list[Work]:
    """Chooses the next batch from `waiting`, which is in order of arrival and is not changed.

    Its padded size, sequences x longest, or if `packed` its number of tokens, is at most `max_batch_tokens`, unless a
    single sequence is longer than that.
    """
    if packed:
        batch, room = waiting[:1], max_batch_tokens - waiting[0].num_tokens
        for work in waiting[1:]:
            if work.key == batch[0].key and work.num_tokens <= room:
                batch.append(work)
                room -= work.num_tokens
        return batch
    oldest = waiting[0].call
    leader = max((work for work in waiting if work.call is oldest), key=lambda work: work.num_tokens)
    room = max(1, max_batch_tokens // leader.num_tokens)
    # At least half as long as the leader: padding is then less than half of the batch.
    shortest = 0 if leader.num_tokens <= LENGTH_FLOOR else leader.num_tokens // 2
    alike = [w for w in waiting if w.key == leader.key and shortest <= w.num_tokens <= leader.num_tokens]
    # sort() is stable: equal lengths stay in order of arrival.
    alike.sort(key=lambda work: (work.call is not oldest, -work.num_tokens))
    return alike[:room]


class BatchedEngine(Engine):
    """An engine that scores one batch at a time in its own thread.

    A subclass implements `load` (blocking; sets `version`, `info`, and `packs` if it takes packed batches),
    `score_batch`, and `unload` if it has memory to free; all three run in the one worker thread. `await
    SubClass.create(config)` returns a loaded engine.
    """

    packs = False

    def __init__(self, config: TeacherServerConfig):
        self.config = config
        self._max_batch_tokens = config.max_batch_tokens
        self._waiting: list[Work] = []
        self._dispatcher: asyncio.Task[None] | None = None
        self._dead: EngineDeadError | None = None
        self._closed = False
        self._asleep = False
        self.can_sleep = config.offload
        self._worker = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    @classmethod
    async def create(cls: type[E], config: TeacherServerConfig) -> E:
        """Creates the engine and loads its model without blocking the event loop.

        Raises:
            ValueError: the checkpoint or an entry of `config.engine_args` cannot be used.
        """
        engine = cls(config)
        try:
            await engine._in_worker(engine.load)
        except BaseException:
            engine._worker.shutdown(wait=False, cancel_futures=True)
            raise
        return engine

    @abc.abstractmethod
    def load(self) -> None:
        """Loads the model and sets `version` and `info`."""

    @abc.abstractmethod
    def score_batch(
        self, sequences: list[SequenceToScore], *, top_k: int, temperature: float, adapter: str
    ) -> list[TokenScores]:
        """Scores one batch in order; its sequences all have the same number of candidates, or none.

        Raises:
            EngineDeadError: the engine has died for good. Any other exception fails these sequences only.
        """

    def unload(self) -> None:
        """Frees what `load` allocated; default: left to the garbage collector."""

    async def score(
        self, sequences: Sequence[SequenceToScore], *, top_k: int = 0, temperature: float = 1.0, adapter: str = ""
    ) -> AsyncIterator[tuple[int, TokenScores]]:
        """See Engine.score."""
        call = _Call((top_k, temperature, adapter), asyncio.Queue())
        if self._dead is not None:
            raise self._dead
        if self._closed:
            raise UnavailableError(f"the {self.name} engine is closed")
        if self._asleep:
            raise UnavailableError(f"the {self.name} engine is asleep: wake it first")
        for index, sequence in enumerate(sequences):
            num_candidates = 0 if sequence.candidate_ids is None else sequence.candidate_ids.shape[1]
            self._waiting.append(Work(call, index, sequence, (*call.key, num_candidates)))
        if self._dispatcher is None or self._dispatcher.done():
            self._dispatcher = asyncio.get_running_loop().create_task(self._dispatch())
        try:
            num_left = len(sequences)
            while num_left:
                result = await call.results.get()
                if isinstance(result, BaseException):
                    raise result
                num_left -= len(result)
                for item in result:
                    yield item
        finally:  # closed early, cancelled or failed: waiting sequences are dropped
            self._waiting = [work for work in self._waiting if work.call is not call]

    async def sleep(self) -> None:
        """See Engine.sleep: frees the weights; `wake` loads them again."""
        if not self.can_sleep:
            await super().sleep()
        if not self._asleep:
            self._asleep = True
            await self._in_worker(self.unload)

    async def wake(self) -> None:
        """See Engine.wake; afterwards `info` describes the checkpoint as it is now."""
        if not self.can_sleep:
            await super().wake()
        if self._asleep:
            await self._in_worker(self.load)
            self._asleep = False

    async def close(self) -> None:
        """See Engine.close."""
        if self._closed:
            return
        self._closed = True
        self._fail_waiting(UnavailableError(f"the {self.name} engine was closed"))
        if self._dispatcher is not None:
            await asyncio.gather(self._dispatcher, return_exceptions=True)
        await self._in_worker(self.unload)
        self._worker.shutdown(wait=True)

    def _in_worker(self, function: Callable[[], R]) -> asyncio.Future[R]:
        return asyncio.get_running_loop().run_in_executor(self._worker, function)

    async def _dispatch(self) -> None:
        while self._waiting and self._dead is None:
            batch = form_batch(self._waiting, self._max_batch_tokens, packed=self.packs)
            taken = set(map(id, batch))
            self._waiting = [work for work in self._waiting if id(work) not in taken]
            try:
                scores = await self._in_worker(lambda batch=batch: self._score(batch))
            except EngineDeadError as e:
                self._dead = e
                for work in batch:
                    work.call.results.put_nowait(e)
                self._fail_waiting(e)
                return
            except Exception as e:
                for call in dict.fromkeys(work.call for work in batch):
                    call.results.put_nowait(e)
                continue
            by_call: dict[_Call, list[tuple[int, TokenScores]]] = {}
            for work, score in zip(batch, scores, strict=True):
                by_call.setdefault(work.call, []).append((work.index, score))
            for call, items in by_call.items():
                call.results.put_nowait(items)

    def _score(self, batch: list[Work]) -> list[TokenScores]:
        top_k, temperature, adapter, _ = batch[0].key
        scores = self.score_batch(
            [work.sequence for work in batch], top_k=top_k, temperature=temperature, adapter=adapter
        )
        if len(scores) != len(batch):
            raise TeacherError(f"the {self.name} engine returned {len(scores)} scores for {len(batch)} sequences")
        return scores

    def _fail_waiting(self, error: Exception) -> None:
        for call in dict.fromkeys(work.call for work in self._waiting):
            call.results.put_nowait(error)
        self._waiting = []


def split_scores(
    sequences: Sequence[SequenceToScore],
    scored_ids: Sequence[np.ndarray],
    logprobs_N: np.ndarray,
    *,
    top_ids_NK: np.ndarray | None = None,
    top_logprobs_NK: np.ndarray | None = None,
    candidate_logprobs_NC: np.ndarray | None = None,
) -> list[TokenScores]:
    """Splits a batch's flat results into one TokenScores per sequence.

    Args:
        sequences: B sequences.
        scored_ids: B arrays, the ids that went through the model (read them back from the batch that the engine built,
            not from `sequences`: by their checksum a client detects mixed-up sequences).
        logprobs_N: log-probabilities of the tokens at the scored positions, sequence after sequence, in nats.
        top_ids_NK, top_logprobs_NK: most likely first, or None.
        candidate_logprobs_NC: in the order of the sequences' candidates, or None.
    """
    counts = [sequence.num_scored for sequence in sequences]
    if sum(counts) != len(logprobs_N):
        raise TeacherError(f"{len(logprobs_N)} log-probabilities for {sum(counts)} scored positions")
    stops = np.cumsum(counts)
    scores = []
    for stop, count, ids in zip(stops, counts, scored_ids, strict=True):
        run = slice(stop - count, stop)
        scores.append(
            TokenScores(
                logprobs=np.asarray(logprobs_N[run], np.float32),
                top_ids=None if top_ids_NK is None else np.asarray(top_ids_NK[run], np.int32),
                top_logprobs=None if top_logprobs_NK is None else np.asarray(top_logprobs_NK[run], np.float32),
                candidate_logprobs=(
                    None if candidate_logprobs_NC is None else np.asarray(candidate_logprobs_NC[run], np.float32)
                ),
                token_crc=token_crc(ids),
            )
        )
    return scores
