"""Bytes that the network changes, loses, swaps, cuts or delays cause an error or a retry, never a wrong number."""

import concurrent.futures
import struct
import time

import grpc
import numpy as np
import pytest

from jdistill.client import SequenceToScore, TeacherClient, pool
from jdistill.wire import errors
from jdistill.wire.v1 import teacher_pb2, teacher_pb2_grpc
from tests.faults import proxy as faults
from tests.faults.harness import FULL, assert_scores, batch, expected, good_calls
from tests.faults.proxy import DOWN, UP
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(3600 if FULL else 900)
TOP_K, TEMPERATURE = 3, 0.5
ASKED = batch(40, candidates=2)
PREFLIGHT_BYTES = 200  # of the connection and GetServerInfo, at least, either way
NUM_SEEDS = 2000 if FULL else 80


@pytest.fixture(scope="module")
def stream_bytes(steady_sidecar):
    """Number of bytes in each direction while one client scores ASKED."""
    proxy = faults.FaultProxy(steady_sidecar.port)
    try:
        with clean_client(proxy) as client:
            assert_scores(score(client), ASKED, top_k=TOP_K, temperature=TEMPERATURE)
        assert min(proxy.fault.seen.values()) > PREFLIGHT_BYTES
        return dict(proxy.fault.seen)
    finally:
        proxy.close()


def clean_client(proxy, **arguments):
    # A frame with a changed length leaves both sides waiting for the rest; abandoned after stall_s.
    return TeacherClient([proxy.endpoint], **{"deadline_s": 30.0, "stall_s": 0.7, "batch_tokens": 300} | arguments)


def score(client):
    return client.score(ASKED, top_k=TOP_K, temperature=TEMPERATURE)


def outcome(sidecar, fault, **arguments):
    """Returns "right" or the name of the error; a wrong number fails the test here."""
    proxy = faults.FaultProxy(sidecar.port, fault)
    try:
        with clean_client(proxy, **arguments) as client:
            begin = time.monotonic()
            try:
                got = score(client)
            except errors.TeacherError as e:
                print(f"{type(e).__name__}: {str(e)[:300]}")
                return type(e).__name__
            finally:
                assert time.monotonic() - begin < 60, "it hangs"
        assert_scores(got, ASKED, top_k=TOP_K, temperature=TEMPERATURE)
        return "right"
    finally:
        proxy.close()


def outcomes(sidecar, seeds, make_fault, **arguments):
    """Returns {outcome: count} over the faults that struck."""
    made = [make_fault(np.random.default_rng(seed)) for seed in seeds]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:  # some wait for a timeout
        found = list(threads.map(lambda fault: outcome(sidecar, fault, **arguments), made))
    struck = [one for one, fault in zip(found, made, strict=True) if fault.struck.is_set()]
    counts = {one: struck.count(one) for one in sorted(set(struck))}
    print(f"{len(struck)} of {len(made)} faults struck: {counts}")
    assert len(struck) > 0.7 * len(made)
    assert sidecar.process.poll() is None
    return counts


@pytest.mark.parametrize("direction", [UP, DOWN])
def test_a_flipped_bit_never_gives_a_wrong_number(steady_sidecar, stream_bytes, direction):
    def flip(rng):
        at = int(rng.integers(PREFLIGHT_BYTES, stream_bytes[direction]))
        return faults.FlipBit(direction, at, int(rng.integers(8)))

    counts = outcomes(steady_sidecar, range(NUM_SEEDS // 2), flip)
    assert counts["right"] > 0.7 * sum(counts.values()), "a single flipped bit should cost a retry, not the batch"


def test_a_flipped_bit_of_the_first_bytes_of_a_connection_never_gives_a_wrong_number(steady_sidecar):
    def flip(rng):
        direction = (UP, DOWN)[int(rng.integers(2))]
        return faults.FlipBit(direction, int(rng.integers(PREFLIGHT_BYTES)), int(rng.integers(8)))

    outcomes(steady_sidecar, range(NUM_SEEDS // 5), flip, deadline_s=2.0)


@pytest.mark.parametrize("direction", [UP, DOWN])
@pytest.mark.parametrize("kind", ["Drop", "Repeat", "Reorder", "Overwrite"])
def test_bytes_that_are_lost_repeated_swapped_or_overwritten_never_give_a_wrong_number(
    steady_sidecar, stream_bytes, kind, direction
):
    def fault(rng):
        # The sizes of a float, of a row of floats, of a TCP segment.
        size = int(rng.choice([1, 4, 12, 100, 1460]))
        at = int(rng.integers(PREFLIGHT_BYTES, stream_bytes[direction] - size))
        return getattr(faults, kind)(direction, at, size)

    outcomes(steady_sidecar, range(NUM_SEEDS // 10), fault, deadline_s=2.0)


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_cut_anywhere_costs_only_a_retry(steady_sidecar, stream_bytes, reset):
    def cut(rng):
        direction = (UP, DOWN)[int(rng.integers(2))]
        return faults.Cut(direction, int(rng.integers(stream_bytes[direction])), reset=reset)

    counts = outcomes(steady_sidecar, range(NUM_SEEDS // 8), cut)
    assert set(counts) == {"right"}


@pytest.mark.parametrize(
    "fault",
    [faults.Delay(0.02), faults.Throttle(37, 0.0002), faults.Throttle(2000, 0.005)],
    ids=["late", "bits", "slow"],
)
def test_a_slow_network_is_not_an_error(steady_sidecar, connect, proxy, fault):
    client = connect(proxy(steady_sidecar, fault), batch_tokens=300)
    assert_scores(score(client), ASKED, top_k=TOP_K, temperature=TEMPERATURE)
    assert fault.seen[DOWN] > 0


def test_only_the_checksum_detects_a_flipped_bit_of_a_float(steady_sidecar, connect, proxy):
    sequence = SequenceToScore(np.array([5, 11, 17, 23], np.int32))
    right = expected(sequence).logprobs
    pattern = struct.pack("<f", right[1])
    for bit in (0, 10, 20):  # of the mantissa: the number stays finite, below 0 and plausible
        # A client without checks beyond gRPC's gets a wrong number, and status OK.
        path = proxy(steady_sidecar, faults.FlipBitOf(pattern, bit))
        message = teacher_pb2.ScoreSequencesRequest(sequence_lengths=[4], token_ids=sequence.token_ids.tolist())
        with grpc.insecure_channel(path.endpoint) as channel:
            (chunk,) = teacher_pb2_grpc.TeacherServiceStub(channel).ScoreSequences(message, timeout=60)
        assert path.fault.struck.is_set()
        assert chunk.logprobs[0] == right[0] and chunk.logprobs[2] == right[2]
        assert chunk.logprobs[1] != right[1] and 0.5 < chunk.logprobs[1] / right[1] < 2
        # TeacherClient detects it and asks again.
        path = proxy(steady_sidecar, faults.FlipBitOf(pattern, bit))
        assert_scores(connect(path).score([sequence]), [sequence])
        assert path.fault.struck.is_set()


def test_a_network_that_always_corrupts_is_an_error_that_names_it(steady_sidecar, connect, proxy):
    class Bad(faults.Fault):
        async def carry(self, direction, data, out):
            if direction == DOWN and len(data) > 1000:  # scores, not the preflight
                self.struck.set()
                data = data[:500] + bytes([data[500] ^ 4]) + data[501:]
            await super().carry(direction, data, out)

    path = proxy(steady_sidecar, Bad())
    asked = [SequenceToScore(np.arange(2000, dtype=np.int32) % 64)]
    with pytest.raises(errors.DeadlineError, match="was changed on its way"):
        connect(path, deadline_s=3.0).score(asked)
    assert path.fault.struck.is_set()
    # With another connection to the same teacher, nothing is lost.
    client = connect(proxy(steady_sidecar, Bad()), proxy(steady_sidecar))
    for _ in range(5):
        assert_scores(client.score(asked), asked)


# ---- connections that are held open and silent ----


def test_a_server_that_accepts_and_never_answers_is_an_error_at_the_deadline(steady_sidecar, connect, proxy):
    silent = proxy(steady_sidecar, faults.Freeze(DOWN, 0))
    begin = time.monotonic()
    with pytest.raises(errors.DeadlineError, match=silent.endpoint):
        connect(silent, deadline_s=1.5).score(ASKED)
    assert 1.4 < time.monotonic() - begin < 60
    assert silent.num_connections


def test_a_server_that_never_answers_does_not_hold_up_the_others(steady_sidecar, connect, proxy, monkeypatch):
    monkeypatch.setattr(pool, "PROBE_TIMEOUT_S", 60.0)  # until GetServerInfo is given up
    silent, other = proxy(steady_sidecar, faults.Freeze(DOWN, 0)), proxy(steady_sidecar)
    begin = time.monotonic()
    assert_scores(connect(silent, other, deadline_s=120.0).score(ASKED), ASKED)
    assert time.monotonic() - begin < 60  # it takes GRACE_S, 2 s
    assert silent.num_connections


@pytest.mark.parametrize("hedge_after_s", [None, 0.5])
def test_a_connection_that_falls_silent_within_a_stream_is_replaced(
    steady_sidecar, connect, proxy, start_sidecar, stream_bytes, hedge_after_s
):
    freeze = faults.Freeze(DOWN, stream_bytes[DOWN] // 3)
    silent, other = proxy(steady_sidecar, freeze), start_sidecar()
    client = connect(silent, other, batch_tokens=300, stall_s=1.0, hedge_after_s=hedge_after_s)

    def struck():
        assert_scores(score(client), ASKED, top_k=TOP_K, temperature=TEMPERATURE)
        return freeze.struck.is_set()

    wait_until(struck)
    begin = time.monotonic()
    assert_scores(score(client), ASKED, top_k=TOP_K, temperature=TEMPERATURE)
    assert time.monotonic() - begin < 30  # half of the deadline
    freeze.thaw()  # what comes late now is of calls that are over
    assert_scores(score(client), ASKED, top_k=TOP_K, temperature=TEMPERATURE)


def test_a_connection_that_falls_silent_for_good_is_an_error_at_the_deadline(
    steady_sidecar, connect, proxy, stream_bytes
):
    silent = proxy(steady_sidecar, faults.Freeze(DOWN, stream_bytes[DOWN] // 2))
    client = connect(silent, batch_tokens=300, deadline_s=2.0)
    begin = time.monotonic()
    with pytest.raises(errors.DeadlineError):
        score(client)
    assert 1.9 < time.monotonic() - begin < 60


def test_a_connection_that_is_silent_for_a_while_continues(steady_sidecar, connect, proxy, stream_bytes):
    freeze = faults.Freeze(DOWN, stream_bytes[DOWN] // 2)
    client = connect(proxy(steady_sidecar, freeze), batch_tokens=300)
    before = good_calls(steady_sidecar)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        future = thread.submit(score, client)
        assert freeze.struck.wait(60)
        time.sleep(1.0)
        assert not future.done()
        freeze.thaw()
        assert_scores(future.result(timeout=60), ASKED, top_k=TOP_K, temperature=TEMPERATURE)
    num_calls = -(-sum(len(s.token_ids) for s in ASKED) // 300)
    wait_until(lambda: good_calls(steady_sidecar) > before)
    assert good_calls(steady_sidecar) - before <= 2 * num_calls, "it was asked again although nothing was lost"
