"""Several teachers, adapters, privileged prefixes, sleeping teachers and rotated tokens, over real sockets."""

import concurrent.futures
import dataclasses
import logging
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill.client import SequenceToScore, Teacher, TeacherClient
from jdistill.client.teachers import choose_teacher
from jdistill.wire import codec, errors
from jdistill.wire.types import ServerState
from tests.client.factories import FakeTeacher
from tests.waiting import wait_until


def tokens(num, seed=0):
    return np.random.default_rng(seed).integers(0, 97, num)


# ---- which teacher ----


def test_each_sequence_is_scored_by_the_teacher_that_it_names(start_teacher, connect):
    math, code = start_teacher(fingerprint="m"), start_teacher(fingerprint="c")
    math.model_number, code.model_number = 1, 2
    client = connect({"math": [math.endpoint], "code": [code.endpoint]}, batch_tokens=60)
    names = ["math", "code", "code", "math", "code"] * 6
    asked = [SequenceToScore(tokens(5 + i, i), teacher=name) for i, name in enumerate(names)]
    for sequence, scores in zip(asked, client.score(asked), strict=True):
        math.assert_scores(scores, sequence, model={"math": 1, "code": 2}[sequence.teacher])
    assert sum(map(len, math.requests)) == 12 and sum(map(len, code.requests)) == 18
    assert client.info("math").model.fingerprint == "m" and client.info("code").model.fingerprint == "c"


def test_an_unknown_teacher_is_refused_with_the_known_names(start_teacher, connect):
    teacher = start_teacher()
    client = connect({"math": [teacher.endpoint], "code": [teacher.endpoint]})
    for name in ("maths", ""):
        with pytest.raises(errors.InvalidRequestError, match=f"'{name}' of sequence 1, expected one of 'math', 'code'"):
            client.score([SequenceToScore(tokens(4), teacher="math"), SequenceToScore(tokens(4), teacher=name)])
        with pytest.raises(errors.InvalidRequestError, match="expected one of 'math', 'code'"):
            client.info(name)
    with pytest.raises(errors.InvalidRequestError, match="one teacher without a name: leave it out"):
        connect(teacher).submit(SequenceToScore(tokens(4), teacher="math"))
    assert not teacher.requests
    assert choose_teacher("", ["math"]) == "math"  # the only one


def test_a_failed_sequence_of_one_teacher_fails_the_whole_score_of_both(start_teacher, connect):
    math, code = start_teacher(), start_teacher(max_sequence_length=5)
    client = connect({"math": [math.endpoint], "code": [code.endpoint]})
    asked = [SequenceToScore(tokens(8), teacher="math"), SequenceToScore(tokens(8), teacher="code")]
    with pytest.raises(errors.InvalidRequestError, match=r"sequence 1 has 8 tokens.*takes at most 5"):
        client.score(asked)


def test_the_teachers_need_not_agree_with_each_other_but_the_replicas_of_one_must(start_teacher, connect):
    a, b, c = start_teacher(), start_teacher(fingerprint="other"), start_teacher(fingerprint="third", vocab_size=50)
    client = connect({"x": [a.endpoint, b.endpoint], "y": [c.endpoint]})
    assert client.info("y").model.vocab_size == 50
    with pytest.raises(errors.FingerprintMismatchError, match="differ in fingerprint"):
        client.info("x")


def test_one_teacher_that_is_down_does_not_stop_the_others(start_teacher, connect):
    up, down = start_teacher(), start_teacher()
    down.stop()
    messages = []
    client = connect({"up": [up.endpoint], "down": [down.endpoint]}, on_wait=messages.append)
    waiting = client.submit(SequenceToScore(tokens(6), teacher="down"))
    wait_until(lambda: messages)
    up.assert_scores(client.score([SequenceToScore(tokens(6), teacher="up")])[0], SequenceToScore(tokens(6)))
    assert not waiting.done()
    down.start()
    down.assert_scores(waiting.result(timeout=60), SequenceToScore(tokens(6)))
    assert messages and messages[0].startswith("teacher 'down': waiting") and messages[-1] is None


@pytest.mark.parametrize("endpoints", [{}, {"a": []}, {"a": "host:1"}, {"a": ["host"]}])
def test_invalid_teachers_are_refused(endpoints):
    with pytest.raises(ValueError, match="expected"):
        TeacherClient(endpoints)


# ---- which model of it ----


def test_an_adapter_is_requested_by_name_and_pinned_by_its_fingerprint(start_teacher, connect):
    sidecar = start_teacher(adapters=("math", "code"))
    client = connect(
        {
            "base": Teacher([sidecar.endpoint]),
            "math": Teacher([sidecar.endpoint], model="math"),
            "code": Teacher([sidecar.endpoint], model="code"),
        }
    )
    asked = [SequenceToScore(tokens(9, i), teacher=name) for i, name in enumerate(["base", "math", "code"] * 3)]
    for sequence, scores in zip(asked, client.score(asked), strict=True):
        sidecar.assert_scores(scores, sequence, model=["base", "math", "code"].index(sequence.teacher))
    asked_of = {(options.model, options.expected_fingerprint) for options in sidecar.options}
    assert asked_of == {("", "ffffffff"), ("math", "math"), ("code", "code")}
    info = client.info("math")
    assert info.model.model == "math" and {model.model for model in info.models} == {"fake", "math", "code"}


def test_a_model_that_is_not_served_is_an_error_that_lists_the_served_ones(start_teacher, connect):
    sidecar = start_teacher(adapters=("math",))
    client = connect(Teacher([sidecar.endpoint], model="maths"))
    for call in (client.info, lambda: client.score([SequenceToScore(tokens(4))])):
        with pytest.raises(errors.ModelNotFoundError, match=f"{sidecar.endpoint}: .*'maths', only 'fake', 'math'"):
            call()
    assert not sidecar.requests


def test_a_replica_that_returns_without_the_adapter_is_not_used(start_teacher, connect, caplog):
    sidecars = [start_teacher(adapters=("math",)) for _ in range(2)]
    client = connect(Teacher([s.endpoint for s in sidecars], model="math"))
    client.info()
    sidecars[0].stop()
    sidecars[0].info = dataclasses.replace(sidecars[0].info, models=sidecars[0].info.models[:1])
    asked = [SequenceToScore(tokens(6, i)) for i in range(8)]
    with caplog.at_level(logging.ERROR):
        client.score(asked)
        sidecars[0].start()

        def left_out():
            for sequence, scores in zip(asked, client.score(asked), strict=True):
                sidecars[1].assert_scores(scores, sequence, model=1)
            return "teacher left out" in caplog.text

        wait_until(left_out)
    assert f"teacher left out: {sidecars[0].endpoint}: {sidecars[0].endpoint}: serves no model 'math'" in caplog.text


# ---- what the teacher sees instead of the prompt ----


def test_the_teacher_sees_the_prefix_and_scores_the_same_tokens(start_teacher, connect):
    teacher = start_teacher()
    asked = [
        SequenceToScore(tokens(9), ((4, 9),), teacher_prefix=np.array([90, 91, 92, 93, 94, 95]), num_replaced=3),
        SequenceToScore(tokens(9), ((5, 6), (7, 9)), tokens(3 * 2).reshape(3, 2), "", np.array([7]), 4),
        SequenceToScore(tokens(9), teacher_prefix=np.array([], int), num_replaced=0),
        SequenceToScore(tokens(9), teacher_prefix=np.array([5, 6])),
    ]
    got = [connect(teacher).submit(sequence).result(timeout=60) for sequence in asked]
    for sequence, scores in zip(asked, got, strict=True):
        teacher.assert_scores(scores, sequence)
    # For the first: 6 tokens replace 3, so the tokens at 4 to 8 were scored at 7 to 11.
    np.testing.assert_array_equal(got[0].logprobs, teacher.expected_logprobs(tokens(9)[4:], np.arange(7, 12)))
    assert got[0].token_crc == codec.token_crc(np.r_[[90, 91, 92, 93, 94, 95], tokens(9)[3:]])


def test_a_prefix_counts_in_batches_and_limits(start_teacher, connect):
    teacher = start_teacher(max_sequence_length=60)
    client = connect(teacher, batch_tokens=60, max_in_flight=1)
    asked = [SequenceToScore(tokens(10, i), teacher_prefix=tokens(40), num_replaced=5) for i in range(3)]
    client.score(asked)
    assert [len(call) for call in teacher.requests] == [1, 1, 1]  # 45 tokens each, as the teacher sees them
    with pytest.raises(errors.InvalidRequestError, match="with its teacher_prefix has 61 tokens"):
        client.score([SequenceToScore(tokens(10), teacher_prefix=tokens(56), num_replaced=5)])


def test_a_teacher_that_ignores_the_prefix_is_detected(start_teacher, connect):
    teacher = start_teacher()

    def plain(teacher, context, chunks):
        sequence = dataclasses.replace(teacher.requests[-1][0], teacher_prefix=None, num_replaced=0)
        yield teacher.encode([(0, 0, teacher.expected_scores(sequence, 0))])

    teacher.always = plain
    asked = SequenceToScore(tokens(9), ((4, 9),), teacher_prefix=np.array([90, 91]), num_replaced=3)
    with pytest.raises(errors.VerificationError, match="scored other token ids than were sent"):
        connect(teacher).score([asked])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_prefix": np.array([97])}, "teacher_prefix of sequence 0 has 97 at 0: outside the vocabulary"),
        ({"teacher_prefix": np.array([[1]])}, "teacher_prefix of sequence 0 is int32 of shape"),
        ({"teacher_prefix": np.array([0.5])}, "teacher_prefix of sequence 0 has dtype float64"),
        ({"teacher_prefix": np.array([1]), "num_replaced": 9}, "expected 0 to 8"),
        ({"teacher_prefix": np.array([1]), "num_replaced": 4}, "spans are ascending"),
        ({"num_replaced": 2}, "no teacher_prefix to put there"),
    ],
)
def test_an_invalid_prefix_reaches_no_teacher(start_teacher, connect, change, message):
    teacher = start_teacher()
    with pytest.raises(errors.InvalidRequestError, match=message):
        connect(teacher).score([SequenceToScore(tokens(9), ((3, 9),), **change)])
    assert not teacher.requests


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_batch_with_prefixes_and_teachers_stays_on_the_students_grid(several, data):
    teachers, client = several
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    num_rows, num_tokens = data.draw(st.integers(1, 5)), data.draw(st.integers(3, 12))
    tokens_BS = rng.integers(0, 97, (num_rows, num_tokens))
    replaced_B = rng.integers(0, num_tokens - 1, num_rows)
    names_B = [("a", "b")[i] for i in rng.integers(0, 2, num_rows)]
    prefixes_B = [rng.integers(0, 97, rng.integers(1, 6)) if rng.random() < 0.7 else None for _ in range(num_rows)]
    mask_BT = rng.random((num_rows, num_tokens - 1)) < 0.6
    mask_BT &= np.arange(1, num_tokens) >= replaced_B[:, None]
    got = client.score_batch(
        tokens_BS, mask_BT, teachers_B=names_B, teacher_prefixes_B=prefixes_B, num_replaced_B=replaced_B
    )
    np.testing.assert_array_equal(got.valid, mask_BT)
    for b, t in np.ndindex(*mask_BT.shape):
        moved = 0 if prefixes_B[b] is None else len(prefixes_B[b]) - replaced_B[b]
        expected = teachers[0].expected_logprobs(tokens_BS[b, t + 1], t + 1 + moved, 1 + "ab".index(names_B[b]))
        np.testing.assert_array_equal(got.logprobs[b, t], expected if mask_BT[b, t] else np.nan)


@pytest.fixture(scope="module")
def several():
    """Two teachers and a client for all examples of one test."""
    teachers = [FakeTeacher().start(), FakeTeacher().start()]
    for number, teacher in enumerate(teachers):
        teacher.model_number = number + 1
    with TeacherClient({"a": [teachers[0].endpoint], "b": [teachers[1].endpoint]}, deadline_s=20) as client:
        yield teachers, client
    for teacher in teachers:
        teacher.stop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teachers_B": ["a"]}, "teachers_B has 1 entries, expected one for each of 2 rows"),
        ({"teachers_B": "ab"}, "teachers_B has a string"),
        ({"teacher_prefixes_B": [None] * 3}, "teacher_prefixes_B has 3 entries"),
        ({"num_replaced_B": [1, 1]}, "num_replaced_B without teacher_prefixes_B"),
        ({"num_replaced_B": [1], "teacher_prefixes_B": [[1], [1]]}, "num_replaced_B is .* of shape"),
    ],
)
def test_batch_columns_of_the_wrong_length_are_refused(connect, change, message):
    with pytest.raises(errors.InvalidRequestError, match=message):
        connect(["127.0.0.1:1"]).score_batch(np.zeros((2, 4), int), np.ones((2, 3), bool), **change)


# ---- states ----


@pytest.mark.parametrize(
    ("state", "says"), [(ServerState.LOADING, "is loading"), (ServerState.DRAINING, "is draining")]
)
def test_the_client_waits_for_a_loading_or_draining_server(start_teacher, connect, state, says):
    teacher = start_teacher()
    teacher.set_state(state)
    messages = []
    client = connect(teacher, on_wait=messages.append)
    future = client.submit(SequenceToScore(tokens(5)))
    wait_until(lambda: messages)
    assert f"{teacher.endpoint}: {says}" in messages[0]
    assert not teacher.requests
    teacher.set_state(ServerState.SERVING)
    teacher.assert_scores(future.result(timeout=60), SequenceToScore(tokens(5)))


def test_a_loading_server_lists_no_models(start_teacher, connect):
    teacher = start_teacher()
    loaded, teacher.info = teacher.info, dataclasses.replace(teacher.info, models=(), state=ServerState.LOADING)
    messages = []
    with pytest.raises(errors.DeadlineError, match=f"no teacher answered within 1 s: {teacher.endpoint}"):
        connect(teacher, deadline_s=1.0, on_wait=messages.append).info()
    assert f"{teacher.endpoint}: is loading its model" in messages[0]
    teacher.info = loaded
    assert connect(teacher).info() == teacher.sent_info


def test_a_sleeping_teacher_is_up_only_if_a_score_wakes_it(start_teacher, connect):
    teacher = start_teacher(can_sleep=True, wake_on_score=True)
    teacher.set_state(ServerState.SLEEPING)
    teacher.assert_scores(connect(teacher).score([SequenceToScore(tokens(5))])[0], SequenceToScore(tokens(5)))
    refuses = start_teacher(can_sleep=True)
    refuses.set_state(ServerState.SLEEPING)
    messages = []
    with pytest.raises(errors.DeadlineError, match=f"no teacher answered within 1 s: {refuses.endpoint}"):
        connect(refuses, deadline_s=1.0, on_wait=messages.append).info()
    assert "is asleep and refuses scores; call TeacherClient.wake" in messages[0]


def test_sleep_and_wake_reach_every_replica_and_submissions_wait_meanwhile(start_teacher, connect, caplog):
    teachers = [start_teacher(can_sleep=True) for _ in range(3)]
    client = connect({"a": [t.endpoint for t in teachers[:2]], "b": [teachers[2].endpoint]})
    client.check_can_sleep()
    asked = [SequenceToScore(tokens(5, i), teacher="a") for i in range(4)]
    for _ in range(2):
        client.sleep()
        assert all(t.info.state is ServerState.SLEEPING for t in teachers)
        futures = [client.submit(sequence) for sequence in asked]
        client.wake()
        assert all(t.info.state is ServerState.SERVING for t in teachers)
        # Work starts at once: no replica waits for a probe.
        assert all(replica.ready for dispatcher in client._dispatchers.values() for replica in dispatcher.pool.replicas)
        for sequence, future in zip(asked, futures, strict=True):
            teachers[0].assert_scores(future.result(timeout=60), sequence)
    client.sleep("b")
    assert [t.info.state is ServerState.SLEEPING for t in teachers] == [False, False, True]
    assert "left out" not in caplog.text


def test_a_teacher_that_cannot_sleep_is_reported_at_the_preflight(start_teacher, connect):
    can, cannot = start_teacher(can_sleep=True), start_teacher(engine="tiny")
    client = connect(can, cannot)
    with pytest.raises(errors.UnsupportedError, match=rf"{cannot.endpoint}: .*engine tiny 0\) cannot sleep"):
        client.check_can_sleep()
    with pytest.raises(errors.UnsupportedError, match=f"{cannot.endpoint}: .*cannot sleep"):
        client.sleep()
    assert can.control == cannot.control == []  # half a teacher asleep helps nobody
    connect({"a": [can.endpoint], "b": [cannot.endpoint]}).check_can_sleep("a")


def test_a_replica_that_is_down_does_not_keep_the_others_from_sleep_and_wake(start_teacher, connect):
    up, down = start_teacher(can_sleep=True), start_teacher(can_sleep=True)
    client = connect(up, down)
    client.check_can_sleep()
    down.stop()
    client.sleep()
    client.wake()
    assert up.control == ["Sleep", "Wake"]
    up.assert_scores(client.score([SequenceToScore(tokens(5))])[0], SequenceToScore(tokens(5)))


def test_wake_waits_for_a_teacher_that_is_being_restarted(start_teacher, connect):
    teacher = start_teacher(can_sleep=True)
    messages = []
    client = connect(teacher, on_wait=messages.append)
    client.sleep()
    teacher.stop()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.wake)
        wait_until(lambda: messages)
        assert not future.done()
        teacher.start()
        future.result(timeout=60)
    teacher.assert_scores(client.score([SequenceToScore(tokens(5))])[0], SequenceToScore(tokens(5)))


def test_a_teacher_that_wakes_with_another_model_is_refused(start_teacher, connect):
    teacher = start_teacher(can_sleep=True)
    client = connect(teacher)
    client.sleep()
    changed = dataclasses.replace(teacher.info.model, fingerprint="new")
    teacher.info = dataclasses.replace(teacher.info, models=(changed,))
    with pytest.raises(errors.FingerprintMismatchError, match="fingerprint is now 'new'"):
        client.wake()


def test_a_server_that_fails_to_sleep_is_named(start_teacher, connect):
    teacher = start_teacher(can_sleep=True)
    client = connect(teacher)
    client.info()
    teacher.info = dataclasses.replace(teacher.info, can_sleep=False)  # the client does not know yet
    with pytest.raises(errors.UnsupportedError, match=f"{teacher.endpoint}: cannot sleep"):
        client.sleep()


# ---- tokens ----


def test_every_call_identifies_the_client(start_teacher, connect):
    teacher = start_teacher()
    for client in (connect(teacher), connect(teacher)):
        for _ in range(2):
            client.score([SequenceToScore(tokens(5))])
    names = [metadata["jdistill-client"] for metadata in teacher.metadata]
    assert names[0] == names[1] != names[2] == names[3]


def test_a_rotated_token_is_read_again_and_no_score_is_lost(start_teacher, connect):
    teacher = start_teacher()
    teacher.token = "first"
    asked_for = []

    def token():
        asked_for.append(teacher.token)
        return f"{teacher.token}\n"  # as a file has it

    client = connect(teacher, token=token, batch_tokens=30)
    asked = [SequenceToScore(tokens(10, i)) for i in range(20)]
    for rotated in ("first", "second"):
        teacher.token = rotated
        for sequence, scores in zip(asked, client.score(asked), strict=True):
            teacher.assert_scores(scores, sequence)
    teacher.token = "third"
    client.info()
    assert asked_for == ["first", "second", "third"]  # once each, however many calls were refused


@pytest.mark.parametrize("token", ["old", lambda: "old"])
def test_an_expired_token_fails_fast_with_the_remedy(start_teacher, connect, token):
    teacher = start_teacher()
    teacher.token = "old"
    client = connect(teacher, token=token, deadline_s=120)
    client.info()
    teacher.token = "new"
    start = time.monotonic()
    for call in (client.info, lambda: client.score([SequenceToScore(tokens(5))])):
        with pytest.raises(
            errors.UnauthenticatedError, match=f"{teacher.endpoint}: .*is the token right, and not expired"
        ):
            call()
    assert time.monotonic() - start < 60  # half of the deadline


def test_a_token_that_expires_while_the_teacher_is_down_does_not_wait_for_the_deadline(start_teacher, connect):
    teacher = start_teacher()
    client = connect(teacher, token="old", deadline_s=240)
    client.info()
    teacher.stop()
    future = client.submit(SequenceToScore(tokens(5)))
    teacher.token = "new"
    teacher.start()
    with pytest.raises(errors.UnauthenticatedError, match="is the token right"):
        future.result(timeout=60)


def test_the_error_of_a_token_function_is_raised(start_teacher, connect):
    client = connect(start_teacher(), token=lambda: open("/nowhere/at/all").read())
    with pytest.raises(errors.UnauthenticatedError, match="the token function failed with FileNotFoundError"):
        client.score([SequenceToScore(tokens(5))])
