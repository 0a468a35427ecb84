"""TeacherClient against real gRPC servers on loopback, with real faults."""

import concurrent.futures
import dataclasses
import logging
import pathlib
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest

from jdistill.client import SequenceToScore, TeacherClient
from jdistill.wire import codec, errors, status


def sequences(num, *, seed=0, max_tokens=40, candidates=0):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(num):
        length = int(rng.integers(3, max_tokens))
        start = int(rng.integers(1, length - 1))
        spans = ((start, start + 1), (start + 1, length)) if rng.random() < 0.5 else ((start, length),)
        sequence = SequenceToScore(rng.integers(0, 97, length), spans)
        if candidates:
            ids = rng.integers(0, 97, (sequence.num_scored, candidates))
            sequence = dataclasses.replace(sequence, candidate_ids=ids)
        made.append(sequence)
    return made


def check(teacher, asked, got, top_k=0):
    for sequence, scores in zip(asked, got, strict=True):
        teacher.assert_scores(scores, sequence, top_k)


# ---- the good case ----


@pytest.mark.parametrize(("top_k", "candidates", "chunk_bytes"), [(0, 0, 1 << 20), (3, 0, 40), (0, 2, 1), (5, 4, 100)])
def test_scores_come_back_in_input_order_whatever_the_order_and_size_of_chunks(
    start_teacher, connect, top_k, candidates, chunk_bytes
):
    teacher = start_teacher()
    teacher.chunk_bytes = chunk_bytes
    asked = sequences(40, candidates=candidates)
    check(teacher, asked, connect(teacher, batch_tokens=100, max_in_flight=1).score(asked, top_k=top_k), top_k)
    assert [s.token_ids.tolist() for call in teacher.requests for s in call] == [s.token_ids.tolist() for s in asked]
    assert all(sum(len(s.token_ids) for s in call) <= 100 for call in teacher.requests)


def test_nothing_to_score_needs_no_teacher(connect):
    with TeacherClient(["127.0.0.1:1"], deadline_s=0.1) as client:
        assert client.score([]) == []
        got = client.score_batch(np.zeros((2, 3), int), np.zeros((2, 2), bool), top_k=2)
    assert np.isnan(got.logprobs).all() and got.top_ids.shape == (2, 2, 2)


def test_a_sequence_longer_than_a_batch_goes_alone(start_teacher, connect):
    teacher = start_teacher()
    asked = [SequenceToScore(np.arange(n) % 97) for n in (10, 500, 10, 10)]
    check(teacher, asked, connect(teacher, batch_tokens=30, max_in_flight=1).score(asked))
    assert [len(s.token_ids) for call in teacher.requests for s in call] == [10, 500, 10, 10]
    assert [len(call) for call in teacher.requests] == [1, 1, 2]


def test_requests_stay_below_what_the_server_accepts(start_teacher, connect):
    teacher = start_teacher(max_request_bytes=codec.request_bytes(SequenceToScore(np.zeros(300, int))) + 4096)
    client = connect(teacher)
    asked = [SequenceToScore(np.arange(200) % 97) for _ in range(3)]
    check(teacher, asked, client.score(asked))
    assert [len(call) for call in teacher.requests] == [1, 1, 1]
    with pytest.raises(errors.InvalidRequestError, match=r"sequence 1 makes a request of .* bytes, the teacher acc"):
        client.score([asked[0], SequenceToScore(np.arange(400) % 97)])


def test_submitted_sequences_share_calls_in_order(start_teacher, connect):
    teacher = start_teacher()
    client = connect(teacher)
    client.info()
    asked = sequences(30)
    futures = [client.submit(s, temperature=0.5) for s in asked]
    check(teacher, asked, [f.result(timeout=10) for f in futures])
    assert len(teacher.requests) <= 10  # one, unless this machine was very slow just then
    assert [s.token_ids.tolist() for call in teacher.requests for s in call] == [s.token_ids.tolist() for s in asked]
    assert {options.temperature for options in teacher.options} == {0.5}
    assert {options.expected_fingerprint for options in teacher.options} == {teacher.info.model.fingerprint}


def test_different_options_never_share_a_call(start_teacher, connect):
    teacher = start_teacher()
    client = connect(teacher)
    asked = sequences(12)
    kinds = [(top_k, temperature) for top_k in (0, 2) for temperature in (1.0, 0.7)] * 3
    futures = [client.submit(s, top_k=k, temperature=t) for s, (k, t) in zip(asked, kinds, strict=True)]
    for sequence, (top_k, _), future in zip(asked, kinds, futures, strict=True):
        teacher.assert_scores(future.result(timeout=10), sequence, top_k)
    assert len(teacher.requests) >= 4


def test_what_is_scored_is_what_was_submitted_even_if_the_buffer_changes(start_teacher, connect):
    teacher = start_teacher()
    client = connect(teacher)
    buffer = np.arange(10, dtype=np.int32)
    future = client.submit(SequenceToScore(buffer))
    buffer[:] = 50
    teacher.assert_scores(future.result(timeout=10), SequenceToScore(np.arange(10)))


def test_a_batch_is_aligned_with_its_mask_and_holds_nan_elsewhere(start_teacher, connect):
    teacher = start_teacher()
    rng = np.random.default_rng(1)
    tokens_BS = rng.integers(0, 97, (6, 20))
    lengths_B = np.array([20, 3, 11, 2, 7, 0])
    mask_BT = (rng.random((6, 19)) < 0.5) & (np.arange(1, 20) < lengths_B[:, None])
    mask_BT[4] = False
    mask_BT[1, 1] = mask_BT[3, 0] = True
    tokens_BS[np.arange(20) >= lengths_B[:, None]] = -100  # a common padding that no teacher may see
    candidates_BTC = np.where(mask_BT[..., None], rng.integers(0, 97, (6, 19, 3)), -1)
    got = connect(teacher).score_batch(
        tokens_BS, mask_BT, lengths_B=lengths_B, candidate_ids_BTC=candidates_BTC, top_k=2
    )
    np.testing.assert_array_equal(got.valid, mask_BT)
    position_BT = np.broadcast_to(np.arange(1, 20), mask_BT.shape)
    np.testing.assert_array_equal(
        got.logprobs, np.where(mask_BT, teacher.expected_logprobs(tokens_BS[:, 1:], position_BT), np.nan)
    )
    np.testing.assert_array_equal(
        got.candidate_logprobs,
        np.where(mask_BT[..., None], teacher.expected_logprobs(candidates_BTC, position_BT[..., None]), np.nan),
    )
    np.testing.assert_array_equal(got.top_ids[..., 0], np.where(mask_BT, position_BT * 7 % 97, -1))
    assert {len(call) for call in teacher.requests} == {4}  # two rows have nothing to score


def test_many_threads_share_a_client(start_teacher, connect):
    teachers = [start_teacher(), start_teacher()]
    client = connect(*teachers, batch_tokens=200)

    def work(seed):
        asked = sequences(20, seed=seed)
        check(teachers[0], asked, client.score(asked, top_k=seed % 3), seed % 3)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))


def test_a_unix_socket_and_a_host_name_are_addresses_too(start_teacher, tmp_path):
    teacher = start_teacher()
    teacher.stop()
    teacher.unix_path = tmp_path / "socket"
    teacher.start()
    for endpoint in (f"unix:{tmp_path}/socket", f"localhost:{teacher.port}"):
        with TeacherClient([endpoint], deadline_s=10) as client:
            asked = sequences(3)
            check(teacher, asked, client.score(asked))


def test_the_token_goes_with_every_call(start_teacher, connect):
    teacher = start_teacher()
    connect(teacher, token="secret").score(sequences(2))
    assert teacher.metadata[0]["authorization"] == "Bearer secret"


# ---- replicas ----


def test_work_is_balanced_by_outstanding_tokens(start_teacher, connect):
    teachers = [start_teacher(), start_teacher(), start_teacher()]
    asked = [SequenceToScore(np.arange(50) % 97) for _ in range(60)]
    check(teachers[0], asked, connect(*teachers).score(asked))
    shares = [sum(len(call) for call in t.requests) for t in teachers]
    assert sum(shares) == 60 and max(shares) - min(shares) <= 6


def test_a_slow_replica_gets_less_of_the_work(start_teacher, connect):
    slow, fast = start_teacher(), start_teacher()
    slow.delay_s = 0.5
    asked = [SequenceToScore(np.arange(50) % 97) for _ in range(100)]
    check(fast, asked, connect(slow, fast, batch_tokens=100, max_in_flight=2, hedge_after_s=None).score(asked))
    num_slow, num_fast = (sum(len(call) for call in t.requests) for t in (slow, fast))
    assert num_slow + num_fast == 100 and num_slow < 25


def test_no_replica_has_more_calls_in_flight_than_allowed(start_teacher, connect):
    teacher = start_teacher()
    teacher.delay_s = 0.01
    peak, lock = [], threading.Lock()
    running = [0]

    def count(teacher, context, chunks):
        with lock:
            running[0] += 1
            peak.append(running[0])
        yield from chunks
        with lock:
            running[0] -= 1

    teacher.always = count
    connect(teacher, batch_tokens=50, max_in_flight=3).score([SequenceToScore(np.arange(50)) for _ in range(20)])
    assert max(peak) == 3


def test_the_preflight_lists_which_replicas_differ(start_teacher, connect):
    a, b, c = start_teacher(), start_teacher(fingerprint="other"), start_teacher()
    client = connect(a, b, c)
    with pytest.raises(errors.FingerprintMismatchError, match="differ in fingerprint") as caught:
        client.info()
    assert f"{a.endpoint}, {c.endpoint}: 'ffffffff'; {b.endpoint}: 'other'" in str(caught.value)
    with pytest.raises(errors.FingerprintMismatchError, match="differ in fingerprint"):
        client.score(sequences(2))
    assert not (a.requests or b.requests or c.requests)
    b.info = a.info
    check(a, asked := sequences(9), client.score(asked))  # put right, without a new client


@pytest.mark.parametrize("field", [{"tokenizer_fingerprint": "other"}, {"vocab_size": 98}])
def test_the_preflight_compares_tokenizer_and_vocabulary(start_teacher, connect, field):
    client = connect(start_teacher(), start_teacher(**field))
    with pytest.raises(errors.FingerprintMismatchError, match=f"differ in {next(iter(field))}"):
        client.info()


def test_the_limits_are_the_tightest_of_all_replicas(start_teacher, connect):
    client = connect(start_teacher(max_top_k=3), start_teacher(max_sequence_length=30, any_temperature=False))
    model = client.info().model
    assert (model.max_top_k, model.max_sequence_length, model.any_temperature) == (3, 30, False)
    with pytest.raises(errors.InvalidRequestError, match="takes at most 30"):
        client.score([SequenceToScore(np.arange(31))])
    with pytest.raises(errors.UnsupportedError, match="temperature 1 only"):
        client.submit(SequenceToScore(np.arange(3)), temperature=0.5).result(timeout=10)


@pytest.mark.parametrize(("teachers", "says"), [("t2", "'t2'"), ("", "no tokenizer files")])
def test_another_tokenizer_than_expected_is_an_error_with_a_remedy(start_teacher, connect, teachers, says):
    client = connect(start_teacher(tokenizer_fingerprint=teachers), expected_tokenizer_fingerprint="t1")
    with pytest.raises(errors.FingerprintMismatchError, match=f"{says}.*the student's 't1'.*Use a teacher of the same"):
        client.info()


def test_the_expected_tokenizer_passes(start_teacher, connect):
    teacher = start_teacher(tokenizer_fingerprint="t1")
    assert connect(teacher, expected_tokenizer_fingerprint="t1").info() == teacher.info


def test_bad_requests_name_sequence_and_field_and_reach_no_teacher(start_teacher, connect):
    teacher = start_teacher()
    client = connect(teacher)
    good = SequenceToScore(np.arange(5))
    with pytest.raises(errors.InvalidRequestError, match="sequence 1 has 97 at 2") as caught:
        client.score([good, SequenceToScore(np.array([1, 2, 97]))])
    assert (caught.value.field, caught.value.sequence) == ("token_ids", 1)
    with pytest.raises(errors.InvalidRequestError, match="sequence 3 has 97 at 1") as caught:  # the row, not the call's
        client.score_batch(np.array([[1, 2], [1, 2], [1, 2], [1, 97]]), np.array([[1], [0], [1], [1]], bool))
    assert caught.value.sequence == 3
    with pytest.raises(errors.InvalidRequestError, match="float64"):
        client.submit(SequenceToScore(np.array([0.5, 1])))
    with pytest.raises(errors.InvalidRequestError, match="does not fit int32"):
        client.score([SequenceToScore(np.array([1, 2**32 + 1]))])
    assert not teacher.requests


# ---- faults: the connection and the process ----


def unavailable(teacher, context, chunks):
    """Dies after the first chunk."""
    yield next(chunks)
    context.abort(grpc.StatusCode.UNAVAILABLE, "cut")


def test_a_broken_stream_repeats_only_what_had_not_come(start_teacher, connect):
    teacher = start_teacher()
    teacher.faults.append(unavailable)
    asked = [SequenceToScore(np.arange(n)) for n in (5, 6, 7, 8)]
    check(teacher, asked, connect(teacher).score(asked))
    # The fake answers from the last sequence to the first: of 4, only the one with 8 tokens had come.
    assert [[len(s.token_ids) for s in call] for call in teacher.requests] == [[5, 6, 7, 8], [5, 6, 7]]


def test_half_a_sequence_is_not_kept(start_teacher, connect):
    teacher = start_teacher()
    teacher.chunk_bytes = 16 + 4 * 3
    teacher.faults.append(unavailable)
    asked = [SequenceToScore(np.arange(8))]
    check(teacher, asked, connect(teacher).score(asked))
    assert len(teacher.requests) == 2


@pytest.mark.parametrize("code", ["UNAVAILABLE", "CANCELLED", "ABORTED", "RESOURCE_EXHAUSTED"])
def test_a_status_worth_a_retry_is_retried(start_teacher, connect, code):
    teacher = start_teacher()

    def fail(teacher, context, chunks):
        context.abort(getattr(grpc.StatusCode, code), "not now")
        yield

    teacher.faults += [fail, fail]
    asked = sequences(5)
    check(teacher, asked, connect(teacher).score(asked))
    assert len(teacher.requests) == 3


def test_an_overloaded_server_is_left_alone_for_as_long_as_it_asks(start_teacher, connect):
    teacher = start_teacher()

    full = errors.OverloadedError("full")
    full.retry_after_s = 0.7

    def overloaded(teacher, context, chunks):
        code, text, trailing = status.to_status(full)
        context.set_trailing_metadata(trailing)
        context.abort(code, text)
        yield

    teacher.faults.append(overloaded)
    client = connect(teacher)
    client.info()
    start = time.monotonic()
    check(teacher, asked := sequences(3), client.score(asked))
    assert 0.7 <= time.monotonic() - start < 5


def test_a_server_that_is_stopped_in_mid_batch_and_started_again_loses_nothing(start_teacher, connect):
    teacher = start_teacher()
    teacher.delay_s = 0.02
    messages = []
    client = connect(teacher, batch_tokens=100, on_wait=messages.append)
    asked = sequences(40)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.score, asked)
        assert teacher.served.wait(10)
        time.sleep(0.1)
        teacher.stop()
        time.sleep(0.5)
        assert not future.done()
        teacher.start()
        check(teacher, asked, future.result(timeout=20))
    assert "waiting for a teacher" in messages[0] and teacher.endpoint in messages[0]
    assert messages[-1] is None


def test_the_other_replicas_take_over_from_one_that_is_stopped(start_teacher, connect):
    teachers = [start_teacher() for _ in range(3)]
    for teacher in teachers:
        teacher.delay_s = 0.02
    client = connect(*teachers, batch_tokens=100)
    asked = sequences(60)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.score, asked)
        assert teachers[1].served.wait(10)
        teachers[1].stop()
        check(teachers[0], asked, future.result(timeout=20))
    # It comes back on the same port, and is given work again.
    num_before = len(teachers[1].requests)
    teachers[1].start()
    end = time.monotonic() + 15
    while len(teachers[1].requests) == num_before and time.monotonic() < end:
        check(teachers[0], asked[:10], client.score(asked[:10]))
    assert len(teachers[1].requests) > num_before


def test_a_replica_that_is_down_at_first_joins_later(start_teacher, connect):
    up, late = start_teacher(), start_teacher()
    late.stop()
    client = connect(up, late)
    assert client.info().model.fingerprint == "ffffffff"
    check(up, asked := sequences(10), client.score(asked))
    late.start()
    end = time.monotonic() + 15
    while not late.requests and time.monotonic() < end:
        check(up, asked, client.score(asked))
    assert late.requests


def test_a_client_may_be_started_before_its_teacher(start_teacher, connect):
    teacher = start_teacher()
    teacher.stop()
    client = connect(teacher)
    asked = sequences(8)
    futures = [client.submit(s) for s in asked]
    time.sleep(0.5)
    teacher.start()
    check(teacher, asked, [f.result(timeout=15) for f in futures])
    assert [s.token_ids.tolist() for call in teacher.requests for s in call] == [s.token_ids.tolist() for s in asked]


def test_no_teacher_until_the_deadline_is_an_error_that_lists_every_endpoint(caplog):
    with TeacherClient(["127.0.0.1:1", "127.0.0.1:2"], deadline_s=0.6) as client, caplog.at_level(logging.WARNING):
        for call in (client.info, lambda: client.score(sequences(1))):
            start = time.monotonic()
            with pytest.raises(errors.DeadlineError, match=r"within 0\.6 s.*127.0.0.1:1: UNAV.*127.0.0.1:2: UNAV"):
                call()
            assert 0.5 < time.monotonic() - start < 5
    assert "waiting for a teacher" in caplog.text


def test_a_teacher_that_dies_for_good_is_a_deadline_error_with_the_attempts(start_teacher, connect):
    teacher = start_teacher()
    client = connect(teacher, deadline_s=1.0)
    client.info()
    teacher.stop()
    with pytest.raises(errors.DeadlineError, match=f"sequence 0 .* within 1 s, after .* attempt.*{teacher.endpoint}"):
        client.score(sequences(1))


def test_a_teacher_that_hangs_ends_at_the_deadline(start_teacher, connect):
    teacher = start_teacher()
    teacher.delay_s = 3.0
    client = connect(teacher, deadline_s=0.5)
    client.info()
    start = time.monotonic()
    with pytest.raises(errors.DeadlineError, match=r"1 attempt: .*DEADLINE_EXCEEDED"):
        client.score(sequences(1))
    assert time.monotonic() - start < 2


def test_an_unforeseen_error_is_tried_three_times_and_told(start_teacher, connect):
    teacher = start_teacher()

    def bug(teacher, context, chunks):
        context.abort(grpc.StatusCode.UNKNOWN, "Exception iterating responses: oops")
        yield

    teacher.always = bug
    with pytest.raises(errors.TeacherError, match="UNKNOWN: Exception iterating responses: oops"):
        connect(teacher).score(sequences(2))
    assert len(teacher.requests) == 3


@pytest.mark.parametrize("error", [errors.UnsupportedError("not this"), errors.InvalidRequestError("bad span")])
def test_an_error_that_no_retry_can_help_is_raised_at_once(start_teacher, connect, error):
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
        connect(teacher).score(sequences(2))
    assert time.monotonic() - start < 5


def test_something_else_than_a_teacher_does_not_wait_for_the_deadline():
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with TeacherClient([f"127.0.0.1:{port}"], deadline_s=60) as client:
            start = time.monotonic()
            with pytest.raises(errors.UnsupportedError, match="is this a jdistill teacher"):
                client.info()
            assert time.monotonic() - start < 10
    finally:
        server.stop(None).wait()


# ---- faults: the reply ----


def rewrite(change, which=0):
    """A fault that changes the scores of the `which`-th chunk: change(scores) -> scores, or a list of runs."""

    def fault(teacher, context, chunks):
        for i, data in enumerate(chunks):
            if i != which:
                yield data
                continue
            top_k, count = teacher.options[-1].top_k, 0
            (run,) = codec.decode_response(data, top_k=top_k, candidate_count=count).runs()
            changed = change(run.scores)
            runs = changed if isinstance(changed, list) else [run._replace(scores=changed)]
            yield teacher.encode([codec.ScoredRun(run.sequence_index, *r) if len(r) == 2 else r for r in runs])

    return fault


def put(name, value, place=-1):
    def change(scores):
        values = getattr(scores, name).copy()
        values[place] = value
        return dataclasses.replace(scores, **{name: values})

    return change


def truncate(scores):
    return dataclasses.replace(
        scores, logprobs=scores.logprobs[:-1], top_ids=scores.top_ids[:-1], top_logprobs=scores.top_logprobs[:-1]
    )


def other_crc(scores):
    return dataclasses.replace(scores, token_crc=scores.token_crc ^ 1)


def drop(teacher, context, chunks):
    next(chunks)
    yield from chunks


def twice(teacher, context, chunks):
    for data in chunks:
        yield data
        yield data


def of_no_one(teacher, context, chunks):
    (run,) = codec.decode_response(next(chunks), top_k=2, candidate_count=0).runs()
    yield teacher.encode([run._replace(sequence_index=2)])


def hot(teacher, context, chunks):
    (run,) = codec.decode_response(next(chunks), top_k=2, candidate_count=0).runs()
    yield teacher.encode([run], temperature=2.0)


def garbage(teacher, context, chunks):
    next(chunks)
    yield b"\xff\xff\xff\xff"


def without_top_k(teacher, context, chunks):
    (run,) = codec.decode_response(next(chunks), top_k=2, candidate_count=0).runs()
    yield teacher.encode([run._replace(scores=dataclasses.replace(run.scores, top_ids=None, top_logprobs=None))])


BAD_REPLIES = {
    "other ids": (rewrite(other_crc), "sequence 1: the teacher scored other token ids than were sent"),
    "one score too few": (rewrite(truncate), "sequence 1: the stream ended after 3 of 4 scores: truncated"),
    "a sequence missing": (drop, "sequence 1: the stream ended after 0 of 4 scores"),
    "a sequence twice": (twice, r"sequence 1: scores \[0, 4\) came after 4 of 4"),
    "NaN": (rewrite(put("logprobs", np.nan)), "sequence 1: logprobs has nan at scored position 3"),
    "positive": (rewrite(put("logprobs", 1e-6, 1)), "sequence 1: logprobs has .* at scored position 1"),
    "NaN in top-k": (
        rewrite(put("top_logprobs", np.nan, (2, 1))),
        "sequence 1: top_logprobs has nan at scored position 2",
    ),
    "top id outside": (rewrite(put("top_ids", 97, (0, 0))), r"sequence 1: top_ids has 97 .* outside \[0, 97\)"),
    "top id negative": (rewrite(put("top_ids", -1, (0, 1))), r"sequence 1: top_ids has -1"),
    "top-k not sorted": (rewrite(put("top_logprobs", -1e6, (1, 0))), "sequence 1: top_logprobs at scored position 1"),
    "no top-k": (without_top_k, "0 top_ids, expected 8"),
    "an index outside": (of_no_one, "scores of sequence 2 of a request that has 2"),
    "another temperature": (hot, "scored at temperature 2, asked for 1"),
    "no message": (garbage, "not a jdistill"),
}


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_a_bad_reply_is_an_error_that_says_what_differed(start_teacher, connect, name):
    fault, message = BAD_REPLIES[name]
    teacher = start_teacher()
    teacher.always = fault
    asked = [SequenceToScore(np.arange(5)), SequenceToScore(np.arange(5) + 20)]
    with pytest.raises(errors.VerificationError, match=f"{teacher.endpoint}: .*{message}"):
        connect(teacher).score(asked, top_k=2)


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_a_bad_reply_of_one_replica_is_replaced_by_another_replicas(start_teacher, connect, name):
    fault, _ = BAD_REPLIES[name]
    bad, good = start_teacher(), start_teacher()
    bad.always = fault
    asked = [SequenceToScore(np.arange(5) + i) for i in range(4)]
    check(good, asked, connect(bad, good).score(asked, top_k=2), top_k=2)
    assert bad.requests  # it was asked, and not believed


def test_pieces_of_a_sequence_out_of_order_are_refused(start_teacher, connect):
    teacher = start_teacher()
    teacher.chunk_bytes = 16 + 4 * 2

    def swapped(teacher, context, chunks):
        first, second = next(chunks), next(chunks)
        yield second
        yield first

    teacher.always = swapped
    with pytest.raises(errors.VerificationError, match=r"sequence 0: scores \[2, 4\) came after 0 of 4"):
        connect(teacher).score([SequenceToScore(np.arange(5))])


def test_a_service_that_finds_its_own_engine_wrong_is_treated_as_a_bad_reply(start_teacher, connect):
    bad, good = start_teacher(), start_teacher()

    def found(teacher, context, chunks):
        code, text, trailing = status.to_status(errors.VerificationError("engine gave NaN"))
        context.set_trailing_metadata(trailing)
        context.abort(code, text)
        yield

    bad.always = found
    asked = sequences(6)
    check(good, asked, connect(bad, good).score(asked))


# ---- another model in the middle of the run ----


def test_a_replica_that_changed_its_model_is_left_out_and_reported(start_teacher, connect, caplog):
    teachers = [start_teacher(), start_teacher()]
    client = connect(*teachers)
    client.info()
    changed = dataclasses.replace(
        teachers[0].info, models=(dataclasses.replace(teachers[0].info.model, fingerprint="new"),)
    )
    same, teachers[0].info = teachers[0].info, changed
    with caplog.at_level(logging.ERROR):
        check(teachers[1], asked := sequences(10), client.score(asked))
        num_requests = len(teachers[0].requests)
        for _ in range(3):
            check(teachers[1], asked, client.score(asked))
    assert f"teacher left out: {teachers[0].endpoint}" in caplog.text
    assert len(teachers[0].requests) == num_requests
    with pytest.raises(errors.FingerprintMismatchError, match="differ in fingerprint"):
        client.info()
    teachers[0].info = same  # restarted with the right weights: it may join again
    end = time.monotonic() + 15
    while len(teachers[0].requests) == num_requests and time.monotonic() < end:
        check(teachers[1], asked, client.score(asked))
    assert len(teachers[0].requests) > num_requests


def test_a_model_that_changed_everywhere_is_an_error_at_once(start_teacher, connect):
    teacher = start_teacher()
    client = connect(teacher)
    client.info()
    teacher.info = dataclasses.replace(
        teacher.info, models=(dataclasses.replace(teacher.info.model, fingerprint="new"),)
    )
    start = time.monotonic()
    with pytest.raises(errors.FingerprintMismatchError, match="expected ffffffff"):
        client.score(sequences(3))
    with pytest.raises(errors.FingerprintMismatchError, match="fingerprint is now 'new', was 'ffffffff'"):
        client.info()
    assert time.monotonic() - start < 10


def test_a_model_that_changes_in_mid_stream_is_found_out(start_teacher, connect):
    teacher = start_teacher()

    def exchange(teacher, context, chunks):
        yield next(chunks)
        model = dataclasses.replace(teacher.info.model, fingerprint="new")
        teacher.info = dataclasses.replace(teacher.info, models=(model,))
        yield from chunks

    teacher.faults.append(exchange)
    with pytest.raises(errors.FingerprintMismatchError, match=r"'new'.*exchanged in the middle"):
        connect(teacher).score(sequences(3))


# ---- ending ----


def test_cancelling_every_future_of_a_call_cancels_it_at_the_server(start_teacher, connect):
    teacher = start_teacher()
    teacher.delay_s = 0.5
    client = connect(teacher)
    client.info()
    futures = [client.submit(s) for s in sequences(3)]
    assert teacher.served.wait(10)
    assert all(f.cancel() for f in futures)
    end = time.monotonic() + 5
    while not teacher.num_cancelled and time.monotonic() < end:
        time.sleep(0.02)
    assert teacher.num_cancelled == 1
    teacher.delay_s = 0
    check(teacher, asked := sequences(2), client.score(asked))


def test_closing_fails_what_is_under_way_and_refuses_more(start_teacher, connect):
    teacher = start_teacher()
    teacher.delay_s = 0.3
    client = connect(teacher, batch_tokens=20, max_in_flight=1)
    client.info()
    futures = [client.submit(s) for s in sequences(6)]
    assert teacher.served.wait(10)
    client.close()
    client.close()
    for future in futures:
        with pytest.raises(errors.UnavailableError, match="closed"):
            future.result(timeout=1)
    with pytest.raises(RuntimeError, match="closed"):
        client.score(sequences(1))


def test_a_callback_that_would_wait_for_itself_is_told_so(start_teacher, connect):
    client = connect(start_teacher())
    caught = concurrent.futures.Future()

    def callback(_):
        try:
            client.score(sequences(1))
        except RuntimeError as e:
            caught.set_result(str(e))

    client.submit(sequences(1)[0]).add_done_callback(callback)
    assert "callback must not" in caught.result(timeout=10)


def test_an_on_wait_that_fails_does_not_stop_the_scoring(start_teacher, connect):
    teacher = start_teacher()
    teacher.stop()

    def broken(message):
        raise KeyError(message)

    client = connect(teacher, on_wait=broken)
    future = client.submit(sequences(1)[0])
    time.sleep(0.3)
    teacher.start()
    teacher.assert_scores(future.result(timeout=15), sequences(1)[0])


@pytest.mark.parametrize(
    ("endpoints", "message"),
    [
        ("127.0.0.1:1", "expected a list"),
        ([], "expected a list"),
        (["http://127.0.0.1:1"], "without a scheme"),
        (["localhost"], "host:port"),
        (["localhost:0"], "host:port"),
        (["a:1", "b:1", "a:1"], "listed twice"),
    ],
)
def test_addresses_that_cannot_be_are_refused(endpoints, message):
    with pytest.raises(ValueError, match=message):
        TeacherClient(endpoints)


@pytest.mark.parametrize("name", ["deadline_s", "max_in_flight", "batch_tokens"])
def test_sizes_that_cannot_be_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} = 0"):
        TeacherClient(["127.0.0.1:1"], **{name: 0})


def test_the_client_imports_neither_jax_nor_torch_and_ends_quietly_without_close(start_teacher):
    teacher = start_teacher()
    code = f"""
import sys, numpy as np
from jdistill.client import SequenceToScore, TeacherClient
client = TeacherClient(["{teacher.endpoint}"], deadline_s=10)
client.submit(SequenceToScore(np.arange(5))).result()
client.submit(SequenceToScore(np.arange(5)))
heavy = [name for name in ("jax", "flax", "torch", "vllm", "transformers", "pydantic") if name in sys.modules]
assert not heavy, heavy
"""
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, cwd=root
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Error" not in done.stderr.replace("UNIMPLEMENTED", ""), done.stderr


@pytest.mark.parametrize("where", ["admission.validate_sequence", "dispatch.Reply", "jobs.JobQueue.take"])
def test_a_bug_in_the_client_is_an_error_and_not_a_wait_without_end(start_teacher, connect, monkeypatch, where):
    def broken(*_, **__):
        raise ZeroDivisionError("our bug")

    client = connect(start_teacher())
    monkeypatch.setattr(f"jdistill.client.{where}", broken)
    for _ in range(2):
        with pytest.raises(errors.TeacherError, match="the client failed with ZeroDivisionError: our bug"):
            client.submit(sequences(1)[0]).result(timeout=10)
