"""Engines to measure with: precomputed answers, waiting instead of computing, and vLLM that also scores in process."""

from __future__ import annotations

import asyncio
import json
import pathlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from benchmarks.service import work
from jdistill.config import TeacherServerConfig
from jdistill.sidecar.engines.base import Engine
from jdistill.wire.codec import token_crc
from jdistill.wire.types import ModelInfo, SequenceToScore, TokenScores

MAX_TOP_K = 64
MAX_LENGTH = 8192
VOCAB_SIZE = 32768


def prepared_scores(num_scored: int, top_k: int, *, seed: int = 2) -> TokenScores:
    """Makes plausible scores; the caller sets the checksum."""
    rng = np.random.default_rng(seed)
    top = -np.sort(rng.exponential(3.0, (num_scored, top_k)).astype(np.float32), axis=1)
    return TokenScores(
        logprobs=-rng.exponential(3.0, num_scored).astype(np.float32),
        top_ids=rng.integers(0, VOCAB_SIZE, (num_scored, top_k)).astype(np.int32) if top_k else None,
        top_logprobs=top if top_k else None,
        candidate_logprobs=None,
        token_crc=0,
    )


class ReadyEngine(Engine):
    """Answers at once with prepared arrays, which leaves only the cost of the service and the wire."""

    name = "ready"
    version = "1"

    def __init__(self, config: TeacherServerConfig):
        self.info = ModelInfo("ready", "0" * 64, "1" * 64, VOCAB_SIZE, MAX_LENGTH, MAX_TOP_K, 0, False, "float32")
        self._scores = {top_k: prepared_scores(MAX_LENGTH, top_k) for top_k in (0, MAX_TOP_K)}

    @classmethod
    async def create(cls, config: TeacherServerConfig) -> ReadyEngine:
        """See Engine.create."""
        return cls(config)

    async def score(
        self, sequences: Sequence[SequenceToScore], *, top_k: int = 0, temperature: float = 1.0, adapter: str = ""
    ) -> AsyncIterator[tuple[int, TokenScores]]:
        """See Engine.score."""
        for index, sequence in enumerate(sequences):
            yield index, self.answer(sequence, top_k)

    def answer(self, sequence: SequenceToScore, top_k: int) -> TokenScores:
        """Returns views of the prepared arrays with the checksum of the received tokens."""
        scores, part = self._scores[top_k], slice(sequence.num_scored)
        return TokenScores(
            logprobs=scores.logprobs[part],
            top_ids=scores.top_ids[part] if top_k else None,
            top_logprobs=scores.top_logprobs[part] if top_k else None,
            candidate_logprobs=None,
            token_crc=token_crc(sequence.token_ids),
        )

    async def close(self) -> None:
        """See Engine.close."""


class WaitingEngine(ReadyEngine):
    """Waits for each token's time (engine_args.tokens_per_s), one sequence after another, without using the CPU."""

    name = "waiting"

    def __init__(self, config: TeacherServerConfig):
        super().__init__(config)
        self._tokens_per_s = float(config.engine_args["tokens_per_s"])
        self._free_at = 0.0

    async def score(
        self, sequences: Sequence[SequenceToScore], *, top_k: int = 0, temperature: float = 1.0, adapter: str = ""
    ) -> AsyncIterator[tuple[int, TokenScores]]:
        """See Engine.score."""
        for index, sequence in enumerate(sequences):
            # By the clock, not by the length of sleeps: a timer that is late must not make the engine slower.
            self._free_at = max(self._free_at, time.monotonic()) + len(sequence.token_ids) / self._tokens_per_s
            await asyncio.sleep(self._free_at - time.monotonic())
            yield index, self.answer(sequence, top_k)


async def create_measured_vllm(config: TeacherServerConfig) -> Engine:
    """The vLLM engine, and a Unix socket beside the port file by which this very process can be told to score with it.

    So what is compared are two ways to one engine, in one process, on one event loop. A line of JSON in, one out.
    """
    from jdistill.sidecar.engines.vllm.engine import VllmEngine

    engine = await VllmEngine.create(config)
    assert config.port_file is not None
    path = pathlib.Path(config.port_file).with_suffix(".door")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(json.dumps(await _score_in_process(engine, **json.loads(line))).encode() + b"\n")
            await writer.drain()

    engine.door = await asyncio.start_unix_server(answer, path)
    return engine


class MeasuredVllm:
    """Factory for the table of engines."""

    create = staticmethod(create_measured_vllm)


async def _score_in_process(engine: Any, way: str, count: int, one_by_one: bool, **kwargs: Any) -> dict[str, Any]:
    """Scores like a program with the engine in its own process; returns seconds and scores."""
    from jdistill.sidecar.engines.vllm.ways import PlainWay

    sequences = work.sequences(count, vocab_size=engine.info.vocab_size, **kwargs)

    async def with_engine(some: list[SequenceToScore]) -> list[np.ndarray]:
        found: dict[int, np.ndarray] = {}
        async for index, scores in engine.score(some):
            found[index] = scores.logprobs
        return [found[index] for index in range(len(some))]

    async def plain(some: list[SequenceToScore]) -> list[np.ndarray]:
        asked = PlainWay(engine.info.vocab_size, max_logprobs=20)

        async def one(sequence: SequenceToScore) -> np.ndarray:
            prompt = {"prompt_token_ids": sequence.token_ids.tolist()}
            params = asked.params(sequence, top_k=0, temperature=1.0)
            async for output in engine._llm.generate(prompt, params, request_id=f"plain-{id(sequence)}"):
                reply = output
            return asked.read(reply, sequence, top_k=0, temperature=1.0).logprobs

        return await asyncio.gather(*map(one, some))

    score = {"engine": with_engine, "plain": plain}[way]
    groups = [[sequence] for sequence in sequences] if one_by_one else [sequences]
    found, times_s = [], []
    for group in groups:
        begin = time.perf_counter()
        found += await score(group)
        times_s.append(time.perf_counter() - begin)
    return {"way": engine.way, "times_s": times_s, "sums": [float(logprobs.sum()) for logprobs in found]}
