"""Several replicas of one teacher: balance, limits, preflight."""

import threading

import numpy as np
import pytest

from jdistill.client import SequenceToScore
from jdistill.wire import errors
from tests.client.factories import check, sequences


def test_work_is_balanced_by_outstanding_tokens(start_teacher, connect):
    teachers = [start_teacher(), start_teacher(), start_teacher()]
    asked = [SequenceToScore(np.arange(50) % 97) for _ in range(60)]
    check(teachers[0], asked, connect(*teachers, hedge_after_s=None).score(asked))
    shares = [sum(len(call) for call in t.requests) for t in teachers]
    assert sum(shares) == 60 and max(shares) - min(shares) <= 6


def test_a_slow_replica_gets_less_of_the_work(start_teacher, connect):
    slow, fast = start_teacher(), start_teacher()
    enough = threading.Event()

    def slowly(teacher, context, chunks):
        assert enough.wait(60)
        yield from chunks

    def count(teacher, context, chunks):
        if sum(len(call) for call in fast.requests) > 75:
            enough.set()
        yield from chunks

    slow.always, fast.always = slowly, count
    asked = [SequenceToScore(np.arange(50) % 97) for _ in range(100)]
    check(fast, asked, connect(slow, fast, batch_tokens=100, max_in_flight=2, hedge_after_s=None).score(asked))
    num_slow, num_fast = (sum(len(call) for call in t.requests) for t in (slow, fast))
    assert num_slow + num_fast == 100 and num_slow < 25


def test_no_replica_has_more_calls_in_flight_than_allowed(start_teacher, connect):
    teacher = start_teacher()
    peak, lock, together = [], threading.Lock(), threading.Event()
    running = [0]

    def count(teacher, context, chunks):
        with lock:
            running[0] += 1
            peak.append(running[0])
        if running[0] == 3:
            together.set()
        assert together.wait(60)  # so that three do run at once
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
        client.submit(SequenceToScore(np.arange(3)), temperature=0.5).result(timeout=60)


@pytest.mark.parametrize(("teachers", "says"), [("t2", "'t2'"), ("", "no tokenizer files")])
def test_an_unexpected_tokenizer_is_an_error_with_a_remedy(start_teacher, connect, teachers, says):
    client = connect(start_teacher(tokenizer_fingerprint=teachers), expected_tokenizer_fingerprint="t1")
    with pytest.raises(errors.FingerprintMismatchError, match=f"{says}.*the student's 't1'.*Use a teacher of the same"):
        client.info()


def test_the_expected_tokenizer_passes(start_teacher, connect):
    teacher = start_teacher(tokenizer_fingerprint="t1")
    assert connect(teacher, expected_tokenizer_fingerprint="t1").info() == teacher.sent_info


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
