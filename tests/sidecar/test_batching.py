"""Batches are formed fairly, within the budget and reproducibly; a failure affects only its own call."""

import asyncio
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill.config import TeacherServerConfig
from jdistill.sidecar.batching import LENGTH_FLOOR, BatchedEngine, Work, form_batch, split_scores
from jdistill.wire.codec import token_crc
from jdistill.wire.errors import EngineDeadError, TeacherError, UnavailableError
from jdistill.wire.types import SequenceToScore, TokenScores
from tests.sidecar.services import until


def sequence(length, *, first=0, candidates=0):
    ids = np.arange(first, first + length, dtype=np.int32)
    return SequenceToScore(ids, candidate_ids=np.zeros((length - 1, candidates), np.int32) if candidates else None)


class RecordingEngine(BatchedEngine):
    """Scores a token as minus its id; records batches; waits on `gate` if there is one."""

    name = "recording"
    version = "0"

    def load(self):
        self.load_thread = threading.current_thread()
        self.batches, self.threads, self.gate, self.adapters_used = [], set(), None, []
        self.unloaded = False

    def score_batch(self, sequences, *, top_k, temperature, adapter):
        self.threads.add(threading.current_thread())
        self.adapters_used.append(adapter)
        self.batches.append([(len(s.token_ids), int(s.token_ids[0])) for s in sequences])
        if self.gate is not None:
            assert self.gate.wait(60)
        if any(s.token_ids[0] == 666 for s in sequences):
            raise RuntimeError("a batch that fails")
        if any(s.token_ids[0] == 777 for s in sequences):
            raise EngineDeadError("dead")
        return [
            TokenScores(-s.token_ids[s.scored_positions()].astype(np.float32), None, None, None, token_crc(s.token_ids))
            for s in sequences
        ]

    def unload(self):
        self.unloaded = True


def run_with_engine(test, max_batch_tokens=4096):
    async def main():
        config = TeacherServerConfig(engine="fake", model="m", max_batch_tokens=max_batch_tokens)
        engine = await RecordingEngine.create(config)
        try:
            return await asyncio.wait_for(test(engine), 20)
        finally:
            await engine.close()

    return asyncio.run(main())


async def collect(engine, sequences, **options):
    return dict([item async for item in engine.score(sequences, **options)])


works = st.lists(
    st.tuples(
        st.integers(2, 3000),
        st.integers(0, 3),
        st.sampled_from([(0, 1.0, "", 0), (4, 1.0, "", 0), (0, 0.5, "", 8), (0, 1.0, "math", 0)]),
    ),
    min_size=1,
    max_size=60,
)


@settings(deadline=None, max_examples=200)
@given(works, st.integers(1, 8192), st.booleans())
def test_every_batch_fits_the_budget_with_similar_lengths_and_each_sequence_is_scored_once(items, budget, packed):
    calls = sorted({call for _, call, _ in items})
    waiting = [
        Work(calls.index(call), i, sequence(length), key)
        for i, (length, call, key) in enumerate(sorted(items, key=lambda item: item[1]))
    ]
    # A call has one top_k, temperature, adapter and number of candidates.
    keys = {work.call: work.key for work in waiting}
    waiting = [Work(w.call, w.index, w.sequence, keys[w.call]) for w in waiting]
    left, seen = list(waiting), []
    while left:
        batch = form_batch(left, budget, packed=packed)
        assert batch == form_batch(list(left), budget, packed=packed)
        lengths = [work.num_tokens for work in batch]
        assert len(batch) == 1 or (sum(lengths) if packed else len(batch) * max(lengths)) <= budget
        assert len({work.key for work in batch}) == 1
        if packed:
            assert batch[0] is left[0]
        else:
            assert max(lengths) <= LENGTH_FLOOR or 2 * min(lengths) >= max(lengths) - 1
        assert any(work.call == left[0].call for work in batch), "the oldest call was passed over"
        seen += batch
        left = [work for work in left if work not in batch]
    assert sorted(work.index for work in seen) == list(range(len(waiting)))


def test_a_single_call_is_cut_into_batches_of_similar_length_longest_first():
    lengths = [100, 1000, 300, 990, 310, 120]

    async def test(engine):
        scores = await collect(engine, [sequence(n) for n in lengths])
        assert sorted(scores) == list(range(6))
        return engine.batches

    batches = run_with_engine(test, max_batch_tokens=2000)
    assert batches == [[(1000, 0), (990, 0)], [(310, 0), (300, 0)], [(120, 0), (100, 0)]]


def test_a_packed_batch_is_filled_in_order_of_arrival_skipping_sequences_that_do_not_fit():
    waiting = [Work(0, i, sequence(n), (0, 1.0, "", 0)) for i, n in enumerate([100, 1000, 300, 990, 310, 120])]
    batches = []
    while waiting:
        batch = form_batch(waiting, 1500, packed=True)
        batches.append([work.num_tokens for work in batch])
        waiting = [work for work in waiting if work not in batch]
    assert batches == [[100, 1000, 300], [990, 310, 120]]


def test_concurrent_calls_share_a_batch_and_each_gets_its_own_scores():
    async def test(engine):
        engine.gate = threading.Event()
        calls = []
        for c in range(4):
            calls.append(asyncio.create_task(collect(engine, [sequence(5, first=10 * c) for _ in range(2)])))
            await until(lambda c=c: engine.batches and len(engine._waiting) == 2 * c)
        engine.gate.set()
        results = await asyncio.gather(*calls)
        for c, scores in enumerate(results):
            for index in (0, 1):
                np.testing.assert_array_equal(
                    scores[index].logprobs, -np.arange(10 * c + 1, 10 * c + 5, dtype=np.float32)
                )
        # The first call had the engine to itself; the other three arrived while it was busy.
        assert [len(batch) for batch in engine.batches] == [2, 6]
        assert engine.threads == {engine.load_thread}

    run_with_engine(test)


def test_calls_with_other_options_never_share_a_batch():
    async def test(engine):
        await asyncio.gather(
            collect(engine, [sequence(4)], top_k=0),
            collect(engine, [sequence(4)], top_k=2),
            collect(engine, [sequence(4)], temperature=0.5),
            collect(engine, [sequence(4, candidates=3)]),
            collect(engine, [sequence(4)], adapter="math"),
        )
        assert [len(batch) for batch in engine.batches] == [1, 1, 1, 1, 1]
        assert engine.adapters_used == ["", "", "", "", "math"]

    run_with_engine(test)


def test_a_failing_batch_fails_only_its_own_calls():
    async def test(engine):
        bad = asyncio.create_task(collect(engine, [sequence(50, first=666)]))
        good = asyncio.create_task(collect(engine, [sequence(3)], top_k=1))
        with pytest.raises(RuntimeError, match="a batch that fails"):
            await bad
        assert list(await good) == [0]
        assert list(await collect(engine, [sequence(3)])) == [0]

    run_with_engine(test)


def test_a_dead_engine_fails_waiting_and_later_calls():
    async def test(engine):
        dying = asyncio.create_task(collect(engine, [sequence(50, first=777)]))
        waiting = asyncio.create_task(collect(engine, [sequence(3)], top_k=1))
        for call in (dying, waiting):
            with pytest.raises(EngineDeadError, match="dead"):
                await call
        with pytest.raises(EngineDeadError, match="dead"):
            await collect(engine, [sequence(3)])
        assert len(engine.batches) == 1

    run_with_engine(test)


def test_work_of_a_closed_call_never_reaches_the_engine():
    async def test(engine):
        engine.gate = threading.Event()
        running = asyncio.create_task(collect(engine, [sequence(9, first=1)]))
        await until(lambda: engine.batches)
        cancelled = asyncio.create_task(collect(engine, [sequence(9, first=2)]))
        after = asyncio.create_task(collect(engine, [sequence(9, first=3)]))
        await until(lambda: len(engine._waiting) == 2)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        engine.gate.set()
        await asyncio.gather(running, after)
        assert engine.batches == [[(9, 1)], [(9, 3)]]

    run_with_engine(test)


def test_closing_fails_waiting_calls_and_frees_in_the_worker():
    async def test(engine):
        engine.gate = threading.Event()
        running = asyncio.create_task(collect(engine, [sequence(9)]))
        await until(lambda: engine.batches)
        waiting = asyncio.create_task(collect(engine, [sequence(9)]))
        await until(lambda: engine._waiting)
        closing = asyncio.create_task(engine.close())
        with pytest.raises(UnavailableError, match="closed"):
            await waiting
        assert not engine.unloaded, "freed while a batch ran"
        engine.gate.set()
        await closing
        assert list(await running) == [0]
        with pytest.raises(UnavailableError, match="closed"):
            await collect(engine, [sequence(9)])
        assert engine.unloaded

    run_with_engine(test)


def test_a_load_that_fails_raises_its_own_error():
    class Broken(RecordingEngine):
        def load(self):
            raise ValueError("no such checkpoint")

    with pytest.raises(ValueError, match="no such checkpoint"):
        asyncio.run(Broken.create(TeacherServerConfig(engine="fake", model="m")))


def test_flat_results_are_cut_at_each_sequences_scored_positions():
    sequences = [
        SequenceToScore(np.arange(5, dtype=np.int32), spans=((2, 3), (4, 5))),
        SequenceToScore(np.arange(4, dtype=np.int32)),
    ]
    flat_N = np.arange(-5.0, 0.0, dtype=np.float64)
    pairs_N2 = np.stack([flat_N, flat_N - 10], axis=1)
    scored = [np.arange(5), np.arange(4)]
    first, second = split_scores(
        sequences, scored, flat_N, top_ids_NK=np.arange(10).reshape(5, 2), top_logprobs_NK=pairs_N2
    )
    np.testing.assert_array_equal(first.logprobs, [-5, -4])
    np.testing.assert_array_equal(second.logprobs, [-3, -2, -1])
    np.testing.assert_array_equal(second.top_ids, [[4, 5], [6, 7], [8, 9]])
    np.testing.assert_array_equal(second.top_logprobs, [[-3, -13], [-2, -12], [-1, -11]])
    assert first.candidate_logprobs is None
    assert (first.logprobs.dtype, first.top_ids.dtype, first.top_logprobs.dtype) == (np.float32, np.int32, np.float32)
    assert first.token_crc == token_crc(np.arange(5, dtype=np.int32))
    with pytest.raises(TeacherError, match="4 log-probabilities for 5 scored positions"):
        split_scores(sequences, scored, flat_N[:4])
