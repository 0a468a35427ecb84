"""Connections that break, and servers that refuse, hang, die and restart."""

import concurrent.futures
import logging
import time

import grpc
import numpy as np
import pytest

from jdistill.client import SequenceToScore, TeacherClient
from jdistill.wire import errors, status
from tests.client.factories import check, hang, hang_after, sequences, wait_until_ready
from tests.waiting import wait_until


def unavailable(teacher, context, chunks):
    """A fault: the server dies after the first chunk."""
    yield next(chunks)
    context.abort(grpc.StatusCode.UNAVAILABLE, "cut")


def test_after_a_broken_stream_only_missing_sequences_are_requested_again(start_teacher, connect):
    teacher = start_teacher()
    teacher.faults.append(unavailable)
    asked = [SequenceToScore(np.arange(n)) for n in (5, 6, 7, 8)]
    check(teacher, asked, connect(teacher).score(asked))
    # The fake answers from the last sequence to the first: of 4, only the one with 8 tokens has arrived.
    assert [[len(s.token_ids) for s in call] for call in teacher.requests] == [[5, 6, 7, 8], [5, 6, 7]]


def test_a_partly_received_sequence_is_discarded(start_teacher, connect):
    teacher = start_teacher()
    teacher.chunk_bytes = 16 + 4 * 3
    teacher.faults.append(unavailable)
    asked = [SequenceToScore(np.arange(8))]
    check(teacher, asked, connect(teacher).score(asked))
    assert len(teacher.requests) == 2


@pytest.mark.parametrize("code", ["UNAVAILABLE", "CANCELLED", "ABORTED", "RESOURCE_EXHAUSTED"])
def test_a_transient_status_is_retried(start_teacher, connect, code):
    teacher = start_teacher()

    def fail(teacher, context, chunks):
        context.abort(getattr(grpc.StatusCode, code), "not now")
        yield

    teacher.faults += [fail, fail]
    asked = sequences(5)
    check(teacher, asked, connect(teacher).score(asked))
    assert len(teacher.requests) == 3


def test_an_overloaded_server_gets_no_calls_for_the_delay_that_it_asks_for(start_teacher, connect):
    teacher = start_teacher()

    full = errors.OverloadedError("full")
    full.retry_after_s = 0.7

    def overloaded(teacher, context, chunks):
        code, text, trailing = status.to_status(full)
        context.set_trailing_metadata(trailing)
        context.abort(code, text)
        yield

    teacher.faults.append(overloaded)
    client = connect(teacher, deadline_s=120)
    client.info()
    start = time.monotonic()
    check(teacher, asked := sequences(3), client.score(asked))
    assert 0.7 <= time.monotonic() - start < 60


def test_a_server_that_is_stopped_in_mid_batch_and_started_again_loses_nothing(start_teacher, connect):
    teacher = start_teacher()
    teacher.faults += [None, None, None, hang]  # so that the batch is under way when the server stops
    messages = []
    client = connect(teacher, batch_tokens=100, on_wait=messages.append)
    asked = sequences(40)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.score, asked)
        wait_until(lambda: len(teacher.requests) >= 4)
        teacher.stop()
        wait_until(lambda: messages)
        assert not future.done()
        teacher.start()
        check(teacher, asked, future.result(timeout=60))
    assert "waiting for a teacher" in messages[0] and teacher.endpoint in messages[0]
    assert messages[-1] is None


def test_the_other_replicas_take_over_from_one_that_is_stopped(start_teacher, connect):
    teachers = [start_teacher() for _ in range(3)]
    teachers[1].always = hang_after(1)  # so that the batch is under way when it stops
    client = connect(*teachers, batch_tokens=100, hedge_after_s=None)
    wait_until_ready(client)
    asked = sequences(60)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.score, asked)
        assert teachers[1].served.wait(60)
        assert not future.done()
        teachers[1].stop()
        check(teachers[0], asked, future.result(timeout=60))
    # It restarts on the same port and gets work again.
    num_before = len(teachers[1].requests)
    teachers[1].always = None
    teachers[1].start()

    def used_again():
        check(teachers[0], asked[:10], client.score(asked[:10]))
        return len(teachers[1].requests) > num_before

    wait_until(used_again)


def test_a_replica_that_is_down_at_the_start_joins_later(start_teacher, connect):
    up, late = start_teacher(), start_teacher()
    late.stop()
    client = connect(up, late)
    assert client.info().model.fingerprint == "ffffffff"
    check(up, asked := sequences(10), client.score(asked))
    late.start()

    def joined():
        check(up, asked, client.score(asked))
        return late.requests

    wait_until(joined)


def test_a_client_may_be_started_before_its_teacher(start_teacher, connect):
    teacher = start_teacher()
    teacher.stop()
    messages = []
    client = connect(teacher, on_wait=messages.append)
    asked = sequences(8)
    futures = [client.submit(s) for s in asked]
    wait_until(lambda: messages)
    teacher.start()
    check(teacher, asked, [f.result(timeout=60) for f in futures])
    assert [s.token_ids.tolist() for call in teacher.requests for s in call] == [s.token_ids.tolist() for s in asked]


def test_without_a_teacher_until_the_deadline_the_error_lists_every_endpoint(caplog):
    with TeacherClient(["127.0.0.1:1", "127.0.0.1:2"], deadline_s=1.5) as client, caplog.at_level(logging.WARNING):
        for call in (client.info, lambda: client.score(sequences(1))):
            start = time.monotonic()
            with pytest.raises(errors.DeadlineError, match=r"within 1\.5 s.*127.0.0.1:1: UNAV.*127.0.0.1:2: UNAV"):
                call()
            assert 1.4 < time.monotonic() - start < 60
    assert "waiting for a teacher" in caplog.text


def test_a_teacher_that_stays_dead_is_a_deadline_error_with_the_attempts(start_teacher, connect):
    teacher = start_teacher()
    client = connect(teacher, deadline_s=3.0)
    client.info()
    teacher.stop()
    with pytest.raises(errors.DeadlineError, match=f"sequence 0 .* within 3 s, after .* attempt.*{teacher.endpoint}"):
        client.score(sequences(1))


def test_a_teacher_that_hangs_ends_at_the_deadline(start_teacher, connect):
    teacher = start_teacher()
    teacher.always = hang
    client = connect(teacher, deadline_s=2.0)
    client.info()
    start = time.monotonic()
    with pytest.raises(errors.DeadlineError, match=r"1 attempt: .*DEADLINE_EXCEEDED"):
        client.score(sequences(1))
    assert time.monotonic() - start < 60


def test_an_unexpected_error_is_retried_three_times_and_raised(start_teacher, connect):
    teacher = start_teacher()

    def bug(teacher, context, chunks):
        context.abort(grpc.StatusCode.UNKNOWN, "Exception iterating responses: oops")
        yield

    teacher.always = bug
    with pytest.raises(errors.TeacherError, match="UNKNOWN: Exception iterating responses: oops"):
        connect(teacher).score(sequences(2))
    assert len(teacher.requests) == 3


@pytest.mark.parametrize("error", [errors.UnsupportedError("not this"), errors.InvalidRequestError("bad span")])
def test_a_permanent_error_is_raised_at_once(start_teacher, connect, error):
    teacher = start_teacher()

    def fail(teacher, context, chunks):
        code, text, trailing = status.to_status(error)
        context.set_trailing_metadata(trailing)
        context.abort(code, text)
        yield

    teacher.faults.append(fail)
    with pytest.raises(type(error), match=f"{teacher.endpoint}: {error}"):
        connect(teacher).score(sequences(2))


def test_wrong_credentials_do_not_wait_for_the_deadline(start_teacher, connect):
    teacher = start_teacher()

    def fail(teacher, context, chunks):
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you")
        yield

    teacher.always = fail
    start = time.monotonic()
    with pytest.raises(errors.TeacherError, match="UNAUTHENTICATED: who are you"):
        connect(teacher, deadline_s=120).score(sequences(2))
    assert time.monotonic() - start < 60  # half of the deadline


def test_a_server_that_is_not_a_teacher_fails_before_the_deadline():
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with TeacherClient([f"127.0.0.1:{port}"], deadline_s=120) as client:
            start = time.monotonic()
            with pytest.raises(errors.UnsupportedError, match="is this a jdistill teacher"):
                client.info()
            assert time.monotonic() - start < 60  # half of the deadline
    finally:
        server.stop(None).wait()
