"""Slow, hung and overloaded replicas: work is hedged, abandoned or held back, and scored once in the result."""

import concurrent.futures
import dataclasses
import re
import statistics
import threading
import time

import numpy as np
import pytest

from jdistill.client import SequenceToScore
from jdistill.client.calls import Call
from jdistill.client.replica import Pace
from jdistill.wire import codec, errors
from tests.client.factories import hang, hang_after, replicas, score_first_at, wait_until_ready
from tests.waiting import wait_until


def sequences(num, num_tokens=40, seed=0):
    rng = np.random.default_rng(seed)
    return [SequenceToScore(rng.integers(0, 97, num_tokens)) for _ in range(num)]


def check(asked, got, teacher):
    for sequence, scores in zip(asked, got, strict=True):
        teacher.assert_scores(scores, sequence)


def assert_idle(client):
    """Checks that the accounting is back at 0 once no call is in flight."""
    wait_until(lambda: all(r.calls == 0 and r.outstanding_tokens == 0 for r in replicas(client)))


# ---- hedging ----


def test_a_straggler_is_hedged_and_each_sequence_is_scored_once_in_the_result(start_teacher, connect):
    teachers = [start_teacher() for _ in range(4)]
    for teacher in teachers:
        teacher.delay_s = 0.005
    straggler = teachers[1]
    straggler.always = hang_after(1)  # of the 8 sequences of a call
    asked = sequences(128)
    client = connect(*teachers, batch_tokens=320, hedge_after_s=0.1)
    wait_until_ready(client)
    check(asked, client.score(asked), teachers[0])  # without a hedge it would end at the deadline
    assert straggler.requests
    assert sum(len(call) for t in teachers for call in t.requests) > len(asked)
    wait_until(lambda: straggler.num_cancelled == len(straggler.requests))
    assert_idle(client)


def test_only_unscored_sequences_are_hedged_and_the_late_call_is_cancelled(start_teacher, connect):
    slow, fast = start_teacher(), start_teacher()
    slow.faults.append(hang_after(2))
    client = connect(slow, fast, hedge_after_s=0.2)
    asked = [SequenceToScore(np.arange(n) % 97) for n in (10, 11, 12, 13)]
    check(asked, score_first_at(client, slow, asked, once=lambda call: len(call.unscored()) == 2), fast)
    assert [len(s.token_ids) for s in slow.requests[0]] == [10, 11, 12, 13]  # answered from the last to the first
    assert [[len(s.token_ids) for s in call] for call in fast.requests] == [[10, 11]]
    assert len(slow.requests) == 1
    wait_until(lambda: slow.num_cancelled == 1)
    assert_idle(client)


def test_a_hedged_sequence_comes_whole_from_the_winner(start_teacher, connect):
    slow, fast = start_teacher(), start_teacher()
    fast.model_number = 1  # "rounding", made visible
    slow.chunk_bytes = fast.chunk_bytes = 16 + 4 * 5  # five scores a message
    slow.faults.append(hang_after(12 // 5 + 1 + 1))  # the last sequence whole, and five scores of the one before it
    client = connect(slow, fast, hedge_after_s=0.2)
    asked = [SequenceToScore(np.arange(13) % 97), SequenceToScore((np.arange(13) + 5) % 97)]
    got = score_first_at(client, slow, asked, once=lambda call: call.reply._num_missing == 12 - 5)
    slow.assert_scores(got[1], asked[1], model=0)
    fast.assert_scores(got[0], asked[0], model=1)


def test_a_late_call_that_still_ends_first_wins(start_teacher, connect):
    first, second = start_teacher(), start_teacher()
    second.model_number = 1

    def late(teacher, context, chunks):
        assert second.served.wait(60)
        yield from chunks

    first.faults.append(late)
    second.always = hang
    client = connect(first, second, hedge_after_s=0.1)
    asked = sequences(3)
    check(asked, score_first_at(client, first, asked), first)
    wait_until(lambda: second.num_cancelled == 1)
    assert_idle(client)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_nothing_is_hedged_with_one_replica_or_without_hedging(start_teacher, connect, num_replicas):
    teachers = [start_teacher() for _ in range(num_replicas)]
    for teacher in teachers:
        teacher.delay_s = 0.3
    client = connect(*teachers, hedge_after_s=0.05 if num_replicas == 1 else None)
    check(asked := sequences(2), client.score(asked), teachers[0])
    assert sum(len(call) for t in teachers for call in t.requests) == 2


def test_nothing_is_hedged_while_all_replicas_are_equally_slow(start_teacher, connect):
    teachers = [start_teacher() for _ in range(3)]
    for teacher in teachers:
        teacher.delay_s = 0.3
    client = connect(*teachers, hedge_after_s=0.05)
    asked = sequences(6)
    check(asked, client.score(asked), teachers[0])
    assert sum(len(call) for t in teachers for call in t.requests) == 6


def test_a_hedge_that_fails_costs_nothing(start_teacher, connect):
    slow, broken = start_teacher(), start_teacher()

    def late(teacher, context, chunks):
        wait_until(lambda: replicas(client)[1].failures)
        yield from chunks

    def refuse(teacher, context, chunks):
        teacher.abort(context, errors.OverloadedError("full"))
        yield

    slow.always, broken.always = late, refuse
    client = connect(slow, broken, hedge_after_s=0.1)
    check(asked := sequences(2), score_first_at(client, slow, asked), slow)
    assert broken.requests and len(slow.requests) == 1
    assert_idle(client)


def test_a_bad_reply_of_the_late_call_does_not_fail_hedged_sequences(start_teacher, connect):
    slow, fast = start_teacher(), start_teacher()
    hedged = threading.Event()

    def wrong(teacher, context, chunks):
        assert hedged.wait(60)
        yield b"\xff\xff"

    def slowly(teacher, context, chunks):
        hedged.set()
        wait_until(lambda: replicas(client)[0].calls == 0)  # until the client has the bad reply
        yield from chunks

    slow.faults.append(wrong)
    fast.faults.append(slowly)
    client = connect(slow, fast, hedge_after_s=0.1)
    check(asked := sequences(3), score_first_at(client, slow, asked), fast)
    assert (len(slow.requests), len(fast.requests)) == (1, 1)


def test_cancelling_a_hedged_sequence_ends_both_calls(start_teacher, connect):
    teachers = [start_teacher(), start_teacher()]
    for teacher in teachers:
        teacher.always = hang
    client = connect(*teachers, hedge_after_s=0.1)
    wait_until_ready(client)
    future = client.submit(sequences(1)[0])
    assert all(teacher.served.wait(60) for teacher in teachers)
    assert future.cancel()
    wait_until(lambda: [t.num_cancelled for t in teachers] == [1, 1])
    assert_idle(client)


def test_a_replica_that_always_loses_gets_less_and_less_work(start_teacher, connect):
    hung, good = start_teacher(), start_teacher()
    hung.always = hang
    client = connect(hung, good, hedge_after_s=0.05)
    wait_until_ready(client)
    asked = sequences(6)
    with_it_s, without_it_s = [], []  # durations of the rounds that asked the hung one too, and of the others
    start = time.monotonic()

    def asked_often():
        begin, num_before = time.monotonic(), len(hung.requests)
        check(asked, client.score(asked), good)
        (without_it_s if len(hung.requests) == num_before else with_it_s).append(time.monotonic() - begin)
        return len(hung.requests) >= 6 and len(without_it_s) > len(with_it_s)

    wait_until(asked_often)
    # Pauses of at least 0.05, 0.1, 0.2, 0.4 and 0.8 s, and another for each further request.
    assert time.monotonic() - start >= 0.05 * (2 ** (len(hung.requests) - 1) - 1)
    assert statistics.median(without_it_s) < statistics.median(with_it_s)  # those rounds did not wait


# ---- hung servers ----


def test_a_hung_call_is_abandoned_and_repeated_even_on_the_only_server(start_teacher, connect, caplog):
    teacher = start_teacher()
    teacher.faults += [hang, hang_after(1)]
    client = connect(teacher, stall_s=0.5)
    asked = sequences(3)
    start = time.monotonic()
    check(asked, client.score(asked), teacher)
    assert time.monotonic() - start >= 0.5 + 1.0  # the second time with twice the patience
    assert [len(call) for call in teacher.requests] == [3, 3, 2]  # what had come whole is kept
    said = re.search(
        f"{teacher.endpoint}: is connected, but has sent no scores for (.*) s: 3 sequences will be scored again",
        caplog.text,
    )
    assert float(said[1]) >= 0.5
    assert_idle(client)


def test_work_does_not_alternate_with_a_hanging_replica(start_teacher, connect):
    hung, good = start_teacher(), start_teacher()
    hung.always = hang
    client = connect(hung, good, hedge_after_s=None, stall_s=0.4, batch_tokens=40)
    wait_until_ready(client)
    asked = sequences(8)
    start = time.monotonic()
    while len(hung.requests) < 4 + 2:  # at first max_in_flight calls, then one after each pause
        check(asked, client.score(asked), good)
        assert time.monotonic() - start < 60
    # Each pause is twice the previous one; each call was abandoned after 0.4 s at the earliest.
    assert time.monotonic() - start >= 0.4 * (1 + 2) + 0.4 * 2
    hung.always = None
    replicas(client)[0].paused_until = 0.0

    def trusted_again():
        check(asked, client.score(asked), good)
        return replicas(client)[0].stalls == 0 and int(replicas(client)[0]._limit) > 1

    wait_until(trusted_again)


def test_a_slow_server_that_sends_results_is_never_abandoned(start_teacher, connect, caplog):
    teacher = start_teacher()
    teacher.delay_s = 0.2
    client = connect(teacher, stall_s=1.0)  # the call takes 1.6 s, and is never silent for more than a fifth of stall_s
    check(asked := sequences(8), client.score(asked), teacher)
    assert len(teacher.requests) == 1 and "scored again" not in caplog.text


def test_late_and_hung_are_relative_to_the_usual_time():
    pace = Pace()
    assert pace.s_per_token is None
    for _ in range(50):
        pace.add(0.1, 10)
    pace.add(0.2, 1)  # mostly overhead: hardly counts
    # Decaying sums over about five calls: 0.5 s and 50 tokens, then 0.8 times that plus the last call.
    assert pace.s_per_token == pytest.approx((0.4 + 0.2) / (40 + 1), rel=1e-3)

    class At:  # a replica, as far as a Call looks at it
        pace = Pace()

    At.pace.add(2.0, 100)
    job = dataclasses.make_dataclass("J", ["stalls"])(1)
    call = Call(At, [job], None, started_at=100.0, load=50)
    call.progress_at = 107.0
    assert call.late_at(1.0, None) == 108.0
    assert call.late_at(1.0, 0.05) == 100 + 4 * 0.05 * 50
    assert call.late_at(15.0, 0.05) == 115.0
    call.progress_at = 100.0
    assert call.hung_at(3.0) == 100 + 10 * 0.02 * 50 * 2
    assert call.hung_at(120.0) == 100 + 120 * 2


# ---- overload ----


def test_concurrent_calls_halve_with_each_overload_and_recover_one_by_one(connect):
    (replica,) = replicas(connect(["127.0.0.1:1"], max_in_flight=8))

    def room():
        calls = 0
        while True:
            replica.calls = calls
            if not replica.has_room:
                return calls
            calls += 1

    assert room() == 8
    replica.calls = 7
    for _ in range(8):  # all eight that were under way are refused: one event
        replica.overloaded(10.0, 9.0, None)
    assert room() == 4
    replica.calls = 3
    replica.overloaded(12.0, 11.0, 5.0)
    assert room() == 2 and replica.failures == 2
    assert 17.0 <= replica.paused_until <= 17.75  # never before the server says, and not all clients at once
    for _ in range(100):
        replica.succeeded()
    assert room() == 8 and replica.failures == 0


RETRY_AFTER_S = 0.05


class Bounded:
    """A server with one engine and room for `num_places` calls; refuses what does not fit, and counts."""

    def __init__(self, num_places, s_per_sequence):
        self.places, self.engine = threading.Semaphore(num_places), threading.Lock()
        self.s_per_sequence = s_per_sequence
        self.num_refused = 0
        self.work_s = []

    @property
    def mean_s(self):
        """Seconds per sequence, idle times included."""
        return (self.work_s[-1] - self.work_s[0]) / (len(self.work_s) - 1)

    def __call__(self, teacher, context, chunks):
        if not self.places.acquire(blocking=False):
            self.num_refused += 1
            error = errors.OverloadedError("full")
            error.retry_after_s = RETRY_AFTER_S
            teacher.abort(context, error)
        try:
            with self.engine:
                for data in chunks:
                    time.sleep(self.s_per_sequence)
                    self.work_s.append(time.monotonic())
                    yield data
        finally:
            self.places.release()


def test_ten_clients_at_several_times_capacity_lose_nothing_and_keep_the_engine_busy(start_teacher, connect):
    teacher = start_teacher()
    clients = [connect(teacher, batch_tokens=160, deadline_s=60) for _ in range(10)]
    asked = [sequences(40, seed=i) for i in range(10)]

    # The engine's rate on this machine now, for one client that is never refused.
    teacher.always = alone = Bounded(num_places=4, s_per_sequence=0.004)
    check(asked[0], clients[0].score(asked[0]), teacher)
    assert not alone.num_refused

    teacher.always = bounded = Bounded(num_places=2, s_per_sequence=0.004)

    def work(i):
        check(asked[i], clients[i].score(asked[i]), teacher)

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        list(pool.map(work, range(10)))
    assert len(bounded.work_s) == 400  # each sequence was scored once: refused calls cost no work
    busy = alone.mean_s / bounded.mean_s
    print(f"{busy:.0%} of the throughput alone, {bounded.num_refused} calls refused, {len(teacher.requests)} sent")
    assert busy > 0.4  # 0.8 to 0.9 on a quiet machine; an exponential backoff had 0.33
    # No call is repeated before the pause that the server asks for, and each client has at most 4 calls in flight.
    assert 0 < bounded.num_refused <= 10 * 4 * (1 + (bounded.work_s[-1] - bounded.work_s[0]) / RETRY_AFTER_S)


# ---- large work ----


def test_a_sequence_above_the_size_of_a_call_is_sent_alone(start_teacher, connect):
    """3,000 positions with 100 candidates each: 1.2 MB, where calls of several sequences stay below 1 MiB."""
    teacher = start_teacher(max_candidate_count=100, max_request_bytes=2 << 20)
    rng = np.random.default_rng(0)
    asked = [
        SequenceToScore(rng.integers(0, 97, n), candidate_ids=rng.integers(0, 97, (n - 1, 100))) for n in (50, 3000, 60)
    ]
    assert codec.request_bytes(asked[1]) > 1 << 20
    client = connect(teacher, max_in_flight=1)
    check(asked, client.score(asked), teacher)
    assert [[len(s.token_ids) for s in call] for call in teacher.requests] == [[50], [3000], [60]]
    too_large = SequenceToScore(rng.integers(0, 97, 4000), candidate_ids=rng.integers(0, 97, (3999, 140)))
    teacher.info = dataclasses.replace(
        teacher.info, models=(dataclasses.replace(teacher.info.model, max_candidate_count=200),)
    )
    with pytest.raises(errors.InvalidRequestError, match=r"makes a request of .* bytes, the teacher accepts 2097152"):
        connect(teacher).score([too_large])


def test_no_call_is_larger_than_the_servers_queue(start_teacher, connect):
    teacher = start_teacher(max_queued_tokens=100)
    check(asked := sequences(10), connect(teacher).score(asked), teacher)
    assert {len(call) for call in teacher.requests} == {2}
