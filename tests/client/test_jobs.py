"""The queue against a plain list, and the cost of a job in time and memory."""

import gc
import sys
import tracemalloc
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill.client import SequenceToScore
from jdistill.client.jobs import JobQueue, make_job
from jdistill.wire import codec
from jdistill.wire.errors import VerificationError
from tests.waiting import wait_until

ENDPOINTS = ("a", "b")


class PlainQueue:
    """The queue in ten lines, with scans of a list."""

    def __init__(self):
        self.jobs = []

    def add(self, job):
        self.jobs = sorted([*self.jobs, job], key=lambda job: job.order)

    def take(self, endpoint, max_tokens, max_bytes):
        may = [job for job in self.jobs if endpoint not in job.bad_replies]
        taken = []
        for job in [job for job in may if job.kind == may[0].kind]:
            tokens = sum(j.num_tokens for j in [*taken, job])
            num_bytes = sum(j.num_bytes for j in [*taken, job])
            if taken and (tokens > max_tokens or num_bytes > max_bytes):
                break
            taken.append(job)
        self.jobs = [job for job in self.jobs if job not in taken]
        return taken


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_queue_equals_a_scan_of_a_plain_list(data):
    queue, plain = JobQueue(), PlainQueue()
    out, num_made = [], 0
    for _ in range(data.draw(st.integers(1, 40))):
        what = data.draw(st.sampled_from(["new", "new", "new", "take", "back", "cancel", "overdue"]))
        if what == "new":
            sequence = SequenceToScore(np.arange(data.draw(st.integers(2, 30))))
            top_k = data.draw(st.sampled_from([0, 0, 1]))
            job = make_job(sequence, index=0, top_k=top_k, temperature=1.0, deadline=float(num_made))
            job.order = num_made
            num_made += 1
            queue.add(job), plain.add(job)
        elif what == "take":
            arguments = (
                data.draw(st.sampled_from(ENDPOINTS)),
                data.draw(st.integers(0, 60)),
                data.draw(st.integers(0, 300)),
            )
            taken = queue.take(*arguments)
            assert taken == plain.take(*arguments)
            out += taken
        elif what == "back" and out:
            job = out.pop(data.draw(st.integers(0, len(out) - 1)))
            if data.draw(st.booleans()):
                job.bad_replies[data.draw(st.sampled_from(ENDPOINTS))] = VerificationError("bad")
            queue.add(job), plain.add(job)
        elif what == "cancel" and plain.jobs:
            job = plain.jobs.pop(data.draw(st.integers(0, len(plain.jobs) - 1)))
            job.future.cancel()
            if data.draw(st.booleans()):  # the queue is told, or finds out when it gets there
                queue.discard(job)
            else:
                queue._fronts(), queue.discard(job)
        elif what == "overdue":
            now = data.draw(st.integers(0, max(0, num_made))) - 0.5
            late = [job for job in plain.jobs if job.deadline <= now]
            assert sorted(queue.take_overdue(now), key=lambda job: job.order) == late
            plain.jobs = [job for job in plain.jobs if job not in late]
        assert len(queue) == len(plain.jobs) and queue.num_tokens == sum(job.num_tokens for job in plain.jobs)
        assert queue.oldest() is (plain.jobs[0] if plain.jobs else None)
    assert queue.take_all() == plain.jobs and not queue


def test_the_cost_of_a_job_does_not_grow_with_the_queue():
    def lines_per_job(num_jobs):
        """Counts Python lines executed in the queue: unlike times, they do not depend on the machine's load."""
        jobs = [
            make_job(SequenceToScore(np.arange(8)), index=i, top_k=i % 2, temperature=1.0, deadline=1.0)
            for i in range(num_jobs)
        ]
        queue, num_lines = JobQueue(), 0

        def trace(frame, event, _):
            nonlocal num_lines
            num_lines += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            for order, job in enumerate(jobs):
                job.order = order
                queue.add(job)
            while queue:
                queue.take_overdue(0.0)
                assert len(queue.take("a", 80, 1 << 20)) == 10
        finally:
            sys.settrace(before)
        return num_lines / num_jobs

    assert lines_per_job(3200) < 1.5 * lines_per_job(200)  # a scan would be 16 times as many


def test_a_job_with_a_prefix_counts_the_tokens_that_the_teacher_sees():
    sequence = SequenceToScore(np.arange(10), teacher_prefix=np.arange(7), num_replaced=4)
    job = make_job(sequence, index=0, top_k=0, temperature=1.0, deadline=1.0)
    assert job.num_tokens == 13 and job.crc == codec.token_crc(np.r_[0:7, 4:10])
    assert job.num_bytes == codec.request_bytes(sequence)


# ---- memory ----


@pytest.fixture
def no_garbage_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_unreferenced_scores_are_freed_without_the_garbage_collector(start_teacher, connect, no_garbage_collection):
    client = connect(start_teacher())
    asked = [SequenceToScore(np.arange(20) + i) for i in range(5)]
    got = client.score(asked)
    futures = [client.submit(sequence) for sequence in asked]
    got += [future.result(timeout=60) for future in futures]
    arrays = [weakref.ref(scores.logprobs) for scores in got]
    del got, futures
    # The background thread may still hold the last.
    wait_until(lambda: not any(array() is not None for array in arrays))


def wait_until_held(num_bytes):
    """Waits until at most `num_bytes` are traced: the background thread frees a call only after its result."""
    wait_until(lambda: tracemalloc.get_traced_memory()[0] < num_bytes)


def test_large_replies_are_decoded_into_the_final_arrays_without_a_second_copy(start_teacher, connect):
    """8 sequences of 16k tokens with top-64: 8.5 MB each."""
    teacher = start_teacher(max_sequence_length=40_000, max_top_k=64)
    client = connect(teacher, max_in_flight=1)
    asked = [SequenceToScore((np.arange(16_384) * 7 + i) % 97) for i in range(8)]
    client.score(asked[:1], top_k=64)
    tracemalloc.start()
    try:
        got = client.score(asked, top_k=64)
        peak = tracemalloc.get_traced_memory()[1]
        final = sum(s.logprobs.nbytes + s.top_ids.nbytes + s.top_logprobs.nbytes for s in got)
        assert 67e6 < final < 69e6
        wait_until_held(final + 5e6)
    finally:
        tracemalloc.stop()
    # In addition: one sequence in the fake teacher, a few 1 MB messages in flight, one message's checks.
    assert peak < final + 45e6
    for sequence, scores in zip(asked, got, strict=True):
        teacher.assert_scores(scores, sequence, top_k=64)


def test_a_batch_is_not_held_twice_while_it_is_aligned(start_teacher, connect):
    teacher = start_teacher(max_sequence_length=40_000, max_top_k=64)
    client = connect(teacher, max_in_flight=1)
    tokens_BS = np.arange(8 * 16_384).reshape(8, -1) * 7 % 97
    mask_BT = np.ones((8, 16_383), bool)
    client.score_batch(tokens_BS[:1], mask_BT[:1], top_k=64)
    tracemalloc.start()
    try:
        got = client.score_batch(tokens_BS, mask_BT, top_k=64)
        peak = tracemalloc.get_traced_memory()[1]
        final = got.logprobs.nbytes + got.top_ids.nbytes + got.top_logprobs.nbytes
        assert 67e6 < final < 69e6
        wait_until_held(final + 5e6)
    finally:
        tracemalloc.stop()
    assert peak < final + 50e6
    np.testing.assert_array_equal(got.logprobs, teacher.expected_logprobs(tokens_BS[:, 1:], np.arange(1, 16_384)[None]))


def test_a_grid_that_does_not_fit_in_memory_is_an_error(start_teacher, connect, monkeypatch):
    def full(*_):
        raise MemoryError("no room")

    client = connect(start_teacher())
    client.info()
    monkeypatch.setattr(np, "full", full)
    with pytest.raises(MemoryError, match="no room"):
        client.score_batch(np.ones((2, 4), int), np.ones((2, 3), bool))
