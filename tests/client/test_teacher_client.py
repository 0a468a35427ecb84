"""TeacherClient against real gRPC servers on loopback, with real faults."""

import concurrent.futures
import dataclasses
import logging
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from jdistill.client import SequenceToScore, TeacherClient
from jdistill.wire import codec, errors
from tests.client.factories import check, hang, sequences
from tests.waiting import wait_until

# ---- the good case ----


@pytest.mark.parametrize(("top_k", "candidates", "chunk_bytes"), [(0, 0, 1 << 20), (3, 0, 40), (0, 2, 1), (5, 4, 100)])
def test_scores_are_in_input_order_for_any_order_and_size_of_chunks(
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


def test_a_sequence_longer_than_a_batch_is_sent_alone(start_teacher, connect):
    teacher = start_teacher()
    asked = [SequenceToScore(np.arange(n) % 97) for n in (10, 500, 10, 10)]
    check(teacher, asked, connect(teacher, batch_tokens=30, max_in_flight=1).score(asked))
    assert [len(s.token_ids) for call in teacher.requests for s in call] == [10, 500, 10, 10]
    assert [len(call) for call in teacher.requests] == [1, 1, 2]


def test_requests_stay_below_the_servers_limit(start_teacher, connect):
    teacher = start_teacher(max_request_bytes=codec.request_bytes(SequenceToScore(np.zeros(300, int))) + 4096)
    client = connect(teacher)
    asked = [SequenceToScore(np.arange(200) % 97) for _ in range(3)]
    check(teacher, asked, client.score(asked))
    assert [len(call) for call in teacher.requests] == [1, 1, 1]
    with pytest.raises(errors.InvalidRequestError, match=r"sequence 1 makes a request of .* bytes, the teacher acc"):
        client.score([asked[0], SequenceToScore(np.arange(400) % 97)])


def _submit_together(client, asked, **options):
    """Submits while the client's thread is held, so that all arrive within one step of its loop, however slow it is."""
    held = threading.Event()
    client._loop.call_soon_threadsafe(held.wait)
    try:
        return [client.submit(sequence, **options) for sequence in asked]
    finally:
        held.set()


def test_submitted_sequences_share_calls_in_order(start_teacher, connect):
    teacher = start_teacher()
    client = connect(teacher)
    client.info()
    asked = sequences(30)
    futures = _submit_together(client, asked, temperature=0.5)
    check(teacher, asked, [f.result(timeout=60) for f in futures])
    assert len(teacher.requests) == 1
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
        teacher.assert_scores(future.result(timeout=60), sequence, top_k)
    assert len(teacher.requests) >= 4


def test_submitted_tokens_are_scored_even_if_the_buffer_changes(start_teacher, connect):
    teacher = start_teacher()
    client = connect(teacher)
    buffer = np.arange(10, dtype=np.int32)
    future = client.submit(SequenceToScore(buffer))
    buffer[:] = 50
    teacher.assert_scores(future.result(timeout=60), SequenceToScore(np.arange(10)))


def test_a_batch_is_aligned_with_its_mask_and_nan_elsewhere(start_teacher, connect):
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


def test_every_call_carries_the_token(start_teacher, connect):
    teacher = start_teacher()
    connect(teacher, token="secret").score(sequences(2))
    assert teacher.metadata[0]["authorization"] == "Bearer secret"


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
    end = time.monotonic() + 60
    while len(teachers[0].requests) == num_requests and time.monotonic() < end:
        check(teachers[1], asked, client.score(asked))
    assert len(teachers[0].requests) > num_requests


def test_a_model_that_changed_everywhere_is_an_error_at_once(start_teacher, connect):
    teacher = start_teacher()
    client = connect(teacher, deadline_s=120)
    client.info()
    teacher.info = dataclasses.replace(
        teacher.info, models=(dataclasses.replace(teacher.info.model, fingerprint="new"),)
    )
    start = time.monotonic()
    with pytest.raises(errors.FingerprintMismatchError, match="expected ffffffff"):
        client.score(sequences(3))
    with pytest.raises(errors.FingerprintMismatchError, match="fingerprint is now 'new', was 'ffffffff'"):
        client.info()
    assert time.monotonic() - start < 60  # half of the deadline


def test_a_model_change_within_a_stream_is_detected(start_teacher, connect):
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
    teacher.faults.append(hang)
    client = connect(teacher)
    client.info()
    futures = _submit_together(client, sequences(3))
    assert teacher.served.wait(60)
    assert all(f.cancel() for f in futures)
    wait_until(lambda: teacher.num_cancelled == 1)
    check(teacher, asked := sequences(2), client.score(asked))


def test_close_fails_pending_work_and_refuses_more(start_teacher, connect):
    teacher = start_teacher()
    teacher.always = hang
    client = connect(teacher, batch_tokens=20, max_in_flight=1)
    client.info()
    futures = [client.submit(s) for s in sequences(6)]
    assert teacher.served.wait(60)
    client.close()
    client.close()
    for future in futures:
        with pytest.raises(errors.UnavailableError, match="closed"):
            future.result(timeout=1)
    with pytest.raises(RuntimeError, match="closed"):
        client.score(sequences(1))


def test_a_callback_that_would_wait_for_itself_gets_an_error(start_teacher, connect):
    client = connect(start_teacher())
    caught = concurrent.futures.Future()

    def callback(_):
        try:
            client.score(sequences(1))
        except RuntimeError as e:
            caught.set_result(str(e))

    client.submit(sequences(1)[0]).add_done_callback(callback)
    assert "callback must not" in caught.result(timeout=60)


def test_an_on_wait_that_fails_does_not_stop_the_scoring(start_teacher, connect):
    teacher = start_teacher()
    teacher.stop()

    called = threading.Event()

    def broken(message):
        called.set()
        raise KeyError(message)

    client = connect(teacher, on_wait=broken)
    future = client.submit(sequences(1)[0])
    assert called.wait(60)
    teacher.start()
    teacher.assert_scores(future.result(timeout=60), sequences(1)[0])


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
def test_invalid_addresses_are_refused(endpoints, message):
    with pytest.raises(ValueError, match=message):
        TeacherClient(endpoints)


@pytest.mark.parametrize("name", ["deadline_s", "max_in_flight", "batch_tokens"])
def test_invalid_sizes_are_refused(name):
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
def test_a_bug_in_the_client_is_an_error_instead_of_a_hang(start_teacher, connect, monkeypatch, where):
    def broken(*_, **__):
        raise ZeroDivisionError("our bug")

    client = connect(start_teacher())
    monkeypatch.setattr(f"jdistill.client.{where}", broken)
    for _ in range(2):
        with pytest.raises(errors.TeacherError, match="the client failed with ZeroDivisionError: our bug"):
            client.submit(sequences(1)[0]).result(timeout=60)
