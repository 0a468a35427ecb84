"""Replies corrupted above the transport: a correct result or an error, never a hang, for any reply."""

import collections
import concurrent.futures
import time

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from jdistill.client import SequenceToScore
from jdistill.wire import codec, errors, status
from tests.client.factories import FakeTeacher
from tests.faults.harness import FULL, change_bytes

pytestmark = pytest.mark.timeout(3600 if FULL else 900)
NUM_SEEDS = 1000 if FULL else 60
ASKED = [SequenceToScore(np.arange(3 + i, dtype=np.int32) % 97) for i in range(12)]


@pytest.fixture
def teacher():
    """A scripted server whose scores encode position and token."""
    one = FakeTeacher().start()
    one.chunk_bytes = 40  # several chunks a sequence
    yield one
    one.stop()


def outcome(teacher, client, **options):
    """Returns "right" or the name of the TeacherError; fails if neither comes long after every deadline here."""
    begin = time.monotonic()
    try:
        got = client.score(ASKED, **options)
    except errors.TeacherError as e:
        found = type(e).__name__
    else:
        for sequence, scores in zip(ASKED, got, strict=True):
            teacher.assert_scores(scores, sequence, options.get("top_k", 0))
        found = "right"
    assert time.monotonic() - begin < 60, "it hangs"
    return found


@pytest.mark.parametrize("sealed", [False, True], ids=["any bytes", "a right checksum"])
def test_fuzzed_replies_are_errors_or_requested_again(teacher, connect, sealed):
    rng = np.random.default_rng(0)

    def garble(teacher, context, chunks):
        place = int(rng.integers(10))
        for i, data in enumerate(chunks):
            if i != place:
                yield data
            elif sealed:
                yield from structure_of(rng, data)
            else:
                yield change_bytes(rng, data)

    counts = {}
    client = connect(teacher, deadline_s=3.0)
    client.info()
    for _ in range(NUM_SEEDS):
        teacher.faults.append(garble)
        found = outcome(teacher, client, top_k=2)
        counts[found] = counts.get(found, 0) + 1
    again = len(teacher.requests) - NUM_SEEDS
    print(f"{counts}, {again} calls were made again")
    # Damage is retried; a reply with a correct checksum is what the server meant.
    assert counts.get("VerificationError", 0) > NUM_SEEDS / 4 if sealed else counts["right"] > NUM_SEEDS * 0.9
    assert again > NUM_SEEDS / 10, "the fuzzer does nothing"
    assert outcome(teacher, client, top_k=2) == "right"


def garbage(teacher, context, chunks):
    next(chunks)
    yield b"\xff\xff\xff"


def unreadable(teacher, context, chunks):
    code, text, trailing = status.to_status(errors.InvalidRequestError("not a request", field=codec.WHOLE_REQUEST))
    context.set_trailing_metadata(trailing)
    context.abort(code, text)
    yield


@pytest.mark.parametrize("damage", [garbage, unreadable])
def test_passing_damage_costs_a_retry_and_lasting_damage_is_an_error_soon(teacher, connect, damage):
    client = connect(teacher, deadline_s=20.0)
    teacher.faults.append(damage)
    assert outcome(teacher, client) == "right"
    assert len(teacher.requests) == 2
    teacher.always = damage
    assert outcome(teacher, client) in ("VerificationError", "TeacherError")
    assert len(teacher.requests) <= 2 + 3


def structure_of(rng, data):
    """Returns the chunk with wrong entries and a correct checksum, as a bug would send it."""
    (run,) = codec.decode_response(data, top_k=2, candidate_count=0).runs()
    info = FakeTeacher().info.model
    how = rng.integers(5)
    index, first, scores = run
    if how == 0:
        runs = [(index, first + 1, scores)]
    elif how == 1:
        runs = [(index + int(rng.integers(1, 20)), first, scores)]
    elif how == 2:
        runs = [(index, first, scores)] * 2
    elif how == 3:
        runs = []
    else:
        runs = [(int(rng.integers(2**32)), int(rng.integers(2**32)), scores)]
    yield codec.encode_response(runs, info=info, temperature=1.0)


def test_fuzzed_server_info_is_an_error_or_harmless(teacher, connect):
    whole = codec.encode_server_info(teacher.info)

    def one(seed):
        # The same damage in each reply: a client asks a process that it does not know more than once.
        damaged = change_bytes(np.random.default_rng(seed), whole)

        class Garbled(FakeTeacher):
            def _get_info(self, _, context):
                return damaged

        garbled = Garbled().start()
        try:
            return outcome(garbled, connect(garbled.endpoint, deadline_s=1.0))
        finally:
            garbled.stop()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        counts = collections.Counter(pool.map(one, range(NUM_SEEDS)))
    print(counts)
    assert len(counts) > 1


def test_fuzzed_error_details_are_errors_and_leave_no_call_waiting(teacher, connect):
    rng = np.random.default_rng(0)
    real = [
        status.to_status(errors.InvalidRequestError("no", field="token_ids", sequence=3)),
        status.to_status(errors.OverloadedError("full")),
        status.to_status(errors.FingerprintMismatchError("other")),
    ]
    odd = []
    for sequence in ("x", "-1", "99999999999999999999", "1.5", ""):
        info = error_details_pb2.ErrorInfo(reason="INVALID_REQUEST", domain="jdistill", metadata={"sequence": sequence})
        message = status_pb2.Status(code=3, message="no")
        message.details.add().Pack(info)
        odd.append((grpc.StatusCode.INVALID_ARGUMENT, "no", ((status.DETAILS_KEY, message.SerializeToString()),)))
    for seconds in (-(10**9), 10**11):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.seconds = seconds
        message = status_pb2.Status(code=8, message="full")
        message.details.add().Pack(retry)
        odd.append((grpc.StatusCode.RESOURCE_EXHAUSTED, "full", ((status.DETAILS_KEY, message.SerializeToString()),)))

    def fail_with(code, text, details):
        def fault(teacher, context, chunks):
            context.set_trailing_metadata(details)
            context.abort(code, text)
            yield

        return fault

    cases = list(odd)
    for _ in range(NUM_SEEDS):
        code, text, ((key, details),) = real[int(rng.integers(len(real)))]
        cases.append((code, text, ((key, change_bytes(rng, details)),)))
    counts = {}
    for case in cases:
        teacher.faults.append(fail_with(*case))
        found = outcome(teacher, connect(teacher, deadline_s=1.0))
        counts[found] = counts.get(found, 0) + 1
        teacher.faults.clear()
    print(counts)
    assert "TeacherError" not in counts or counts["TeacherError"] < len(cases) / 2


def test_received_scores_are_returned_although_the_stream_never_ends(teacher, connect):
    def never_ends(teacher, context, chunks):
        yield from chunks
        while context.is_active():
            time.sleep(0.01)

    teacher.faults.append(never_ends)
    client = connect(teacher, deadline_s=20.0, stall_s=15.0)
    assert outcome(teacher, client) == "right"
