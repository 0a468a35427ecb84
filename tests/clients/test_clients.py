"""The clients in Node and C++ write what `jdistill score` writes, wait as long, and refuse the same wrong replies."""

import dataclasses
import json
import socket
import subprocess

import numpy as np
import pytest

from jdistill import cli
from jdistill.wire import errors
from tests.client.factories import FakeTeacher
from tests.commands.factories import random_lines, write
from tests.sidecar import processes
from tests.sidecar.certificates import Authority
from tests.sidecar.checkpoints import write_checkpoint

DEADLINE_S = 30
# One worker: two would build the same client in the same directory at once.
pytestmark = pytest.mark.xdist_group("clients")


def start(client, address, source, target, *flags):
    command = [*client, "--teacher", address, "--input", source, "--output", target, "--deadline-s", DEADLINE_S, *flags]
    return subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)


def finish(process):
    """(exit code, what it said)."""
    try:
        _, error = process.communicate(timeout=2 * DEADLINE_S)
    finally:
        process.kill()
    return process.returncode, error


def run(client, *arguments):
    return finish(start(client, *arguments))


def records(path):
    """The output with its numbers as float32."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {name: v if name in ("id", "top_ids") else np.array(v, np.float32).tolist() for name, v in line.items()}
        for line in lines
    ]


def python_records(address, source, target, *flags):
    assert cli.main(["score", "--teacher", address, "--input", str(source), "--output", str(target), *flags]) == 0
    return records(target)


@pytest.fixture
def teacher():
    teacher = FakeTeacher().start()
    yield teacher
    teacher.stop()


@pytest.fixture
def one_line(tmp_path):
    line = {"token_ids": [5, 6, 7, 8], "top_k": 2, "candidate_ids": [[1, 2, 3]] * 3}
    return write(tmp_path / "in.jsonl", [line]), tmp_path / "out.jsonl"


def test_every_kind_of_line_gets_the_same_float32_as_from_python(client, start_sidecar, tmp_path):
    lines = [line for line, _ in random_lines(100)]
    # 4,000 tokens with top-60 are 1.9 MB: two chunks, put together again. 30,000 tokens of one kind: two calls.
    lines.append({"id": "long", "token_ids": (np.arange(4000) % 64).tolist(), "top_k": 60})
    lines += [{"token_ids": (np.arange(3000) * (n + 1) % 64).tolist()} for n in range(10)]
    source = write(tmp_path / "in.jsonl", ["", *lines])
    address = start_sidecar("--engine-arg", "vocab_size=64").address
    code, error = run(client, address, source, tmp_path / "out.jsonl", "--temperature", "0.7")
    assert code == 0, error
    got = records(tmp_path / "out.jsonl")
    assert got == python_records(address, source, tmp_path / "py.jsonl", "--temperature", "0.7")
    assert [got[0]["id"], got[-1]["id"], len(got)] == [2, 112, 111]


@pytest.fixture(scope="module")
def real_teacher(tmp_path_factory):
    """Address of a sidecar with a real model; loading PyTorch takes seconds, so the clients share it."""
    directory = tmp_path_factory.mktemp("real")
    model = write_checkpoint(directory / "model")
    one = processes.launch(directory, "--engine", "transformers", "--model", model, wait=False)
    try:
        one.wait_for_port(timeout_s=120)
        yield one.address
    finally:
        one.process.kill()
        one.process.wait()


def test_a_real_model_gives_them_the_same_float32_as_python(client, real_teacher, tmp_path):
    rng = np.random.default_rng(0)
    lines = [{"token_ids": rng.integers(0, 512, 40).tolist(), "top_k": 5} for _ in range(8)]
    source = write(tmp_path / "in.jsonl", lines)
    code, error = run(client, real_teacher, source, tmp_path / "out.jsonl")
    assert code == 0, error
    assert records(tmp_path / "out.jsonl") == python_records(real_teacher, source, tmp_path / "py.jsonl")


def test_they_wait_for_a_teacher_that_is_not_there_yet(client, start_sidecar, one_line):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = start(client, f"127.0.0.1:{port}", *one_line)
    assert "UNAVAILABLE" in process.stderr.readline()
    start_sidecar("--port", port)
    code, error = finish(process)
    assert code == 0 and len(records(one_line[1])[0]["logprobs"]) == 3, error


def test_a_full_queue_makes_them_come_back_when_the_server_said(client, start_sidecar, tmp_path):
    # Kinds alternate, so each line is a call; four at once, of which the queue holds one.
    lines = [{"token_ids": list(range(20)), "top_k": n % 2} for n in range(12)]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    limits = ["--max-running-tokens", 20, "--max-queued-tokens", 20, "--engine-arg", "tokens_per_s=400"]
    code, error = run(client, start_sidecar(*limits).address, source, target)
    assert code == 0 and "RESOURCE_EXHAUSTED" in error, error
    assert [line["id"] for line in records(target)] == list(range(1, 13))


def test_tls_and_token_let_them_in_and_a_wrong_token_is_told_at_once(client, start_sidecar, one_line, tmp_path):
    authority, token = Authority(tmp_path), tmp_path / "token"
    token.write_text("correct-horse-battery-staple\n")
    token.chmod(0o600)
    address = start_sidecar(*authority.server_flags(), "--token-file", token).address
    flags = ["--tls-ca", authority.ca, "--token-file"]
    code, error = run(client, address, *one_line, *flags, token)
    assert code == 0, error
    one_line[1].unlink()
    wrong = tmp_path / "wrong"
    wrong.write_text("incorrect\n")
    code, error = run(client, address, *one_line, *flags, wrong)
    assert code == 1 and "UNAUTHENTICATED" in error and "again in" not in error and "incorrect" not in error
    assert not one_line[1].exists()


def changed(**change):
    """A fault: the chunk with other scores; its payload_crc is right."""

    def fault(teacher, context, chunks):
        (sequence,) = teacher.requests[-1]
        scores = teacher.expected_scores(sequence, top_k=2)
        yield teacher.encode([(0, 0, dataclasses.replace(scores, **{k: f(scores) for k, f in change.items()}))])

    return fault


def with_logprob(value):
    return changed(logprobs=lambda s: np.array([value, *s.logprobs[1:]], np.float32))


def truncated(teacher, context, chunks):
    (sequence,) = teacher.requests[-1]
    scores = teacher.expected_scores(sequence, top_k=2)
    fewer = {f: getattr(scores, f)[:2] for f in ("logprobs", "top_ids", "top_logprobs", "candidate_logprobs")}
    yield teacher.encode([(0, 0, dataclasses.replace(scores, **fewer))])


def twice(teacher, context, chunks):
    chunks = list(chunks)
    yield from chunks + chunks


def of_another_sequence(teacher, context, chunks):
    yield teacher.encode([(1, 0, teacher.expected_scores(teacher.requests[-1][0], top_k=2))])


def at_another_temperature(teacher, context, chunks):
    yield teacher.encode([(0, 0, teacher.expected_scores(teacher.requests[-1][0], top_k=2))], temperature=0.5)


def without_top_k(teacher, context, chunks):
    yield teacher.encode([(0, 0, teacher.expected_scores(teacher.requests[-1][0], top_k=0))])


def by_another_model(teacher, context, chunks):
    teacher.info = dataclasses.replace(
        teacher.info, models=(dataclasses.replace(teacher.info.model, fingerprint="another"),)
    )
    yield from chunks


@pytest.mark.parametrize(
    "fault, message",
    [
        (changed(token_crc=lambda s: s.token_crc ^ 1), "other token ids"),
        (with_logprob(0.1), "at most 0"),
        (with_logprob(np.nan), "at most 0"),
        (changed(top_ids=lambda s: s.top_ids + 97), "outside the vocabulary"),
        (changed(top_logprobs=lambda s: s.top_logprobs[:, ::-1]), "descending"),
        (truncated, "2 of 3"),
        (twice, "after 3 of 3"),
        (of_another_sequence, "sequence 1 of 1"),
        (at_another_temperature, "temperature 0.5"),
        (without_top_k, "top_ids, expected 6"),
        (by_another_model, "exchanged"),
    ],
)
def test_a_wrong_reply_is_refused_and_nothing_is_written(client, fault, message, teacher, one_line):
    teacher.faults.append(fault)
    code, error = run(client, teacher.endpoint, *one_line)
    assert code == 1 and message in error, error
    assert not one_line[1].exists()


def flipped(teacher, context, chunks):
    """One bit of the first log-probability: a number that nothing but payload_crc can tell from a right one."""
    (sequence,) = teacher.requests[-1]
    scores = teacher.expected_scores(sequence, top_k=2)
    (data,) = chunks
    place = data.index(scores.logprobs.tobytes())
    yield data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def broken_off(teacher, context, chunks):
    teacher.abort(context, errors.UnavailableError("shutting down"))
    yield b""


@pytest.mark.parametrize("fault", [flipped, broken_off])
def test_what_can_heal_is_asked_again_and_the_numbers_are_right(client, fault, teacher, one_line, tmp_path):
    teacher.faults.append(fault)
    code, error = run(client, teacher.endpoint, *one_line)
    assert code == 0 and "again in" in error, error
    assert len(teacher.requests) == 2
    assert records(one_line[1]) == python_records(teacher.endpoint, one_line[0], tmp_path / "py.jsonl")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1, 2]",
        {"token_ids": [1, 2], "tokens": 3},
        {"id": 3},
        {"token_ids": [1]},
        {"token_ids": [1, 2.5]},
        {"token_ids": [1, -1]},
        {"token_ids": [1, 2**32]},
        {"token_ids": [1, True]},
        {"token_ids": [1, 2, 3], "spans": []},
        {"token_ids": [1, 2, 3], "spans": [[1]]},
        {"token_ids": [1, 2, 3], "top_k": -1},
        {"token_ids": [1, 2, 3], "candidate_ids": [[1]]},
        {"token_ids": [1, 2, 3], "candidate_ids": [[1], [2, 3]]},
    ],
)
def test_a_bad_line_is_named_before_anybody_is_asked(client, line, tmp_path):
    source, target = write(tmp_path / "in.jsonl", [{"token_ids": [1, 2]}, "", line]), tmp_path / "out.jsonl"
    code, error = run(client, "127.0.0.1:1", source, target)
    assert code == 2 and f"{source}:3: " in error, error


def test_what_the_teacher_refuses_is_told_with_its_line_at_once(client, start_sidecar, tmp_path):
    lines = [{"token_ids": [1, 2]}, "", {"token_ids": [1, 64]}]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    code, error = run(client, start_sidecar("--engine-arg", "vocab_size=64").address, source, target)
    assert code == 1 and "line 3" in error and "outside the vocabulary" in error and "again in" not in error
    assert not target.exists()


def test_help_names_every_flag(client):
    done = subprocess.run([*client, "--help"], capture_output=True, text=True, timeout=120, check=True)
    for flag in ("teacher", "input", "output", "temperature", "model", "deadline-s", "tls-ca", "token-file"):
        assert f"--{flag} " in done.stdout


@pytest.mark.parametrize("argv", [[], ["--teacher"], ["--no-such-flag"], ["--deadline-s", "0"]])
def test_arguments_that_cannot_be_meant_are_2(client, argv):
    done = subprocess.run([*client, *argv], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "error: " in done.stderr
