"""A small exact model in numpy for tests, whose log-probabilities identify position, token and preceding token.

The logits at position t for token v after token u are 4 sin(0.9 t + 2.1 v + 0.37 u): a score at the wrong position,
token or sequence is another number. It is a true distribution over its vocabulary, so top-k, candidates and temperature
can be checked against `logprobs_PV`.

Dimension key: P scored positions of one sequence, V vocabulary, K teacher top-k.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import pathlib
import zlib
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pydantic

import jdistill
from jdistill.config import Section, TeacherServerConfig, parse
from jdistill.sidecar.engines.base import Engine
from jdistill.wire.codec import token_crc
from jdistill.wire.errors import EngineDeadError
from jdistill.wire.types import ModelInfo, SequenceToScore, TokenScores


class FakeOptions(Section):
    """`engine_args` of fake, which needs no checkpoint and simulates delays and failures."""

    vocab_size: int = pydantic.Field(64, ge=2, description="number of tokens")
    delay_s: float = pydantic.Field(0.0, ge=0, description="seconds before each sequence's scores")
    load_s: float = pydantic.Field(0.0, ge=0, description="simulated loading time in seconds")
    fingerprint: str | None = pydantic.Field(
        None, description="model fingerprint; null: a hash of the options that change scores"
    )
    tokenizer_fingerprint: str = pydantic.Field("", description="tokenizer fingerprint")
    any_temperature: bool = pydantic.Field(True, description="score at any temperature; false: only at 1")
    max_top_k: int | None = pydantic.Field(None, description="highest top_k; null: the vocabulary")
    max_candidate_count: int | None = pydantic.Field(None, description="candidates per position; null: the vocabulary")
    tokens_per_s: float | None = pydantic.Field(
        None, gt=0, description="simulated speed of a machine that scores sequences one after another; null: unlimited"
    )
    sleeps: bool = pydantic.Field(True, description="can sleep with offload; false: like an engine that cannot")
    wakes_as: str | None = pydantic.Field(
        None, description="model fingerprint after a wake, as if the checkpoint had changed; null: unchanged"
    )
    hang_on_token: int | None = pydantic.Field(None, description="token on which the engine never answers")
    die_on_token: int | None = pydantic.Field(None, description="token on which the engine dies")
    fail_on_token: int | None = pydantic.Field(None, description="token on which it raises an unexpected exception")


def logprobs_PV(  # noqa: N802  (a shape suffix)
    token_ids: np.ndarray, positions: np.ndarray, *, vocab_size: int, temperature: float = 1.0, adapter: str = ""
) -> np.ndarray:
    """Returns the whole distribution at each of `positions` of the sequence, float64 [P, V] in nats."""
    previous_P = np.asarray(token_ids, np.float64)[np.asarray(positions) - 1]
    angles_PV = 0.9 * positions[:, None] + 2.1 * np.arange(vocab_size) + 0.37 * previous_P[:, None]
    logits_PV = 4.0 * np.sin(angles_PV + zlib.crc32(adapter.encode()) % 6.28)
    logits_PV /= temperature
    return logits_PV - np.logaddexp.reduce(logits_PV, axis=1, keepdims=True)


class FakeEngine(Engine):
    """See the module. `num_cancelled` counts calls that were closed before their end."""

    name = "fake"
    version = jdistill.__version__

    def __init__(self, config: TeacherServerConfig):
        self.options = parse(FakeOptions, config.engine_args, source="engine_args of the fake engine")
        vocab_size = self.options.vocab_size
        max_top_k, max_candidates = self.options.max_top_k, self.options.max_candidate_count
        self.info = ModelInfo(
            model=config.served_name or pathlib.Path(config.model).resolve().name,
            fingerprint=self.options.fingerprint or hashlib.sha256(f"fake {vocab_size}".encode()).hexdigest(),
            tokenizer_fingerprint=self.options.tokenizer_fingerprint,
            vocab_size=vocab_size,
            max_sequence_length=config.max_sequence_length or 4096,
            max_top_k=vocab_size if max_top_k is None else max_top_k,
            max_candidate_count=vocab_size if max_candidates is None else max_candidates,
            any_temperature=self.options.any_temperature,
            dtype="float32",
        )
        self.adapters = {
            name: dataclasses.replace(
                self.info,
                model=name,
                base_model=self.info.model,
                fingerprint=hashlib.sha256(f"{self.info.fingerprint} {name}".encode()).hexdigest(),
            )
            for name in config.adapters
        }
        self.can_sleep = config.offload and self.options.sleeps
        self.num_cancelled = self.num_sleeps = self.num_wakes = 0
        self.asleep = False
        self._free_at = 0.0  # loop time at which all accepted work is done (tokens_per_s)
        self._dead = False

    @classmethod
    async def create(cls, config: TeacherServerConfig) -> FakeEngine:
        """See Engine.create; reads nothing from `config.model`."""
        engine = cls(config)
        if config.offload and not engine.can_sleep:
            raise ValueError("offload: this fake engine cannot sleep (sleeps=false)")
        await asyncio.sleep(engine.options.load_s)
        return engine

    async def score(
        self, sequences: Sequence[SequenceToScore], *, top_k: int = 0, temperature: float = 1.0, adapter: str = ""
    ) -> AsyncIterator[tuple[int, TokenScores]]:
        """See Engine.score. Sequences finish in their own order, the last one first; with tokens_per_s in turn."""
        assert not self.asleep, "scored in sleep"
        finished, ready_at = False, asyncio.get_running_loop().time()
        try:
            order = range(len(sequences))
            for index in order if self.options.tokens_per_s is not None else reversed(order):
                ready_at = await self._wait(sequences[index], ready_at)
                yield index, self._score(sequences[index], top_k, temperature, adapter)
            finished = True
        finally:
            self.num_cancelled += not finished

    async def _wait(self, sequence: SequenceToScore, ready_at: float) -> float:
        """Waits as long as the simulated machine needs; returns its loop time when the sequence was done."""
        if self.options.hang_on_token in sequence.token_ids:
            await asyncio.Event().wait()
        await asyncio.sleep(self.options.delay_s)
        if self.options.tokens_per_s is not None:
            # Counted from when machine and call were ready, not from now: a late timer costs no throughput.
            done_at = max(ready_at, self._free_at) + len(sequence.token_ids) / self.options.tokens_per_s
            self._free_at = done_at
            try:
                await asyncio.sleep(done_at - asyncio.get_running_loop().time())
            except BaseException:
                if self._free_at == done_at:  # cancelled, and no other sequence is queued behind it
                    self._free_at = asyncio.get_running_loop().time()
                raise
            return done_at
        return asyncio.get_running_loop().time()

    async def check(self) -> None:
        """See Engine.check."""
        if self._dead:
            raise EngineDeadError("the fake engine is dead")

    async def sleep(self) -> None:
        """See Engine.sleep."""
        if not self.can_sleep:
            await super().sleep()
        self.num_sleeps += not self.asleep
        self.asleep = True

    async def wake(self) -> None:
        """See Engine.wake."""
        if not self.can_sleep:
            await super().wake()
        if self.options.wakes_as is not None:
            self.info = dataclasses.replace(self.info, fingerprint=self.options.wakes_as)
        self.num_wakes += self.asleep
        self.asleep = False

    async def close(self) -> None:
        """See Engine.close."""
        self._dead = True

    def _score(self, sequence: SequenceToScore, top_k: int, temperature: float, adapter: str) -> TokenScores:
        if self._dead or self.options.die_on_token in sequence.token_ids:
            self._dead = True
            raise EngineDeadError("the fake engine died")
        if self.options.fail_on_token in sequence.token_ids:
            raise RuntimeError("the fake engine failed as it was told to")
        positions_P = sequence.scored_positions()
        full_PV = logprobs_PV(
            sequence.token_ids,
            positions_P,
            vocab_size=self.options.vocab_size,
            temperature=temperature,
            adapter=adapter,
        ).astype(np.float32)
        full_PV = np.minimum(full_PV, 0.0)
        top_ids_PK = np.argsort(-full_PV, axis=1, kind="stable")[:, :top_k].astype(np.int32) if top_k else None
        candidates = sequence.candidate_ids
        return TokenScores(
            logprobs=full_PV[np.arange(len(positions_P)), sequence.token_ids[positions_P]],
            top_ids=top_ids_PK,
            top_logprobs=None if top_ids_PK is None else np.take_along_axis(full_PV, top_ids_PK, axis=1),
            candidate_logprobs=None if candidates is None else np.take_along_axis(full_PV, candidates, axis=1),
            token_crc=token_crc(sequence.token_ids),
        )
