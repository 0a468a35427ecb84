"""Several replicas, and a rollout that hides the teacher, with an engine that waits instead of computing."""

from __future__ import annotations

import time

import numpy as np

from benchmarks.service import work
from benchmarks.service.engines import VOCAB_SIZE
from jdistill.client import TeacherClient
from jdistill.wire.types import SequenceToScore

TOKENS_PER_S = 100_000  # of one replica that waits


def ragged(count: int) -> list[SequenceToScore]:
    """Makes sequences of 64 to 1,088 tokens."""
    rng = np.random.default_rng(5)
    ids = [rng.integers(0, VOCAB_SIZE, length).astype(np.int32) for length in rng.integers(64, 1089, count)]
    return [SequenceToScore(row) for row in ids]


def tokens_per_s(endpoints: list[str], sequences: list[SequenceToScore]) -> float:
    """Throughput of one batch over these replicas with a new client."""
    with TeacherClient(endpoints) as client:
        client.info()
        begin = time.perf_counter()
        client.score(sequences)
        return sum(len(s.token_ids) for s in sequences) / (time.perf_counter() - begin)


def exposed_s(endpoint: str, *, count: int = 32, length: int = 4096) -> dict[str, float]:
    """Time not hidden by a rollout that yields sequences one by one, slightly slower than the teacher scores them."""
    sequences = work.sequences(count, vocab_size=VOCAB_SIZE, length=length, first_scored=1)
    one_s = length / TOKENS_PER_S
    with TeacherClient([endpoint]) as client:
        client.info()
        begin = time.perf_counter()
        client.score(sequences)
        afterwards_s = time.perf_counter() - begin
        futures = []
        for sequence in sequences:
            time.sleep(1.2 * one_s)  # the student generates
            futures.append(client.submit(sequence))
        begin = time.perf_counter()
        for future in futures:
            future.result()
        exposed = time.perf_counter() - begin
    return {"exposed_s": exposed, "one_sequence_s": one_s, "afterwards_s": afterwards_s}
