"""`jdistill score`: the numbers, their order, and what happens to bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jdistill import cli
from jdistill.commands import score
from jdistill.sidecar.engines import fake
from jdistill.wire.types import TokenScores
from tests.commands.factories import VOCAB, random_lines, write
from tests.sidecar.certificates import Authority
from tests.waiting import wait_until


def expected(line, positions, temperature):
    tokens = np.array(line["token_ids"])
    full_PV = fake.logprobs_PV(tokens, np.array(positions), vocab_size=VOCAB, temperature=temperature)
    full_PV = full_PV.astype(np.float32)
    result = {"logprobs": full_PV[np.arange(len(positions)), tokens[positions]]}
    if "top_k" in line:
        result["top_ids"] = np.argsort(-full_PV, axis=1)[:, : line["top_k"]]
        result["top_logprobs"] = np.take_along_axis(full_PV, result["top_ids"], axis=1)
    if "candidate_ids" in line:
        result["candidate_logprobs"] = np.take_along_axis(full_PV, np.array(line["candidate_ids"]), axis=1)
    return result


@pytest.mark.parametrize("way", ["teacher", "engine"])
def test_output_is_the_models_numbers_to_the_last_bit_in_input_order(way, tmp_path, start_sidecar, monkeypatch):
    monkeypatch.setattr(score, "GROUP_TOKENS", 200)  # many groups, more than may be under way
    monkeypatch.setattr(score, "MAX_TOKENS_UNDER_WAY", 1000)
    lines = random_lines(200)
    source = write(tmp_path / "in.jsonl", [line for line, _ in lines])
    target = tmp_path / "out.jsonl"
    if way == "teacher":
        scorer = ["--teacher", start_sidecar("--engine-arg", "delay_s=0.001").address]
    else:
        scorer = ["--engine", "fake", "--model", str(tmp_path), "--engine-arg", "delay_s=0.001"]
    argv = ["score", *scorer, "--input", str(source), "--output", str(target), "--temperature", "0.5"]
    assert cli.main(argv) == 0
    records = [json.loads(text) for text in target.read_text().splitlines()]
    assert len(records) == 200
    for number, (record, (line, positions)) in enumerate(zip(records, lines, strict=True), start=1):
        assert record.pop("id") == line.get("id", number)
        want = expected(line, positions, 0.5)
        assert record.keys() == want.keys()
        for name, values in want.items():
            got = np.array(record[name], np.int64 if name == "top_ids" else np.float32)
            np.testing.assert_array_equal(got, values)
    assert sorted(path.name for path in tmp_path.glob("*.jsonl*")) == ["in.jsonl", "out.jsonl"]


def test_credentials_open_a_teacher_and_their_lack_is_told_at_once(tmp_path, start_sidecar, capsys):
    authority, tokens = Authority(tmp_path), tmp_path / "tokens"
    tokens.write_text("secret-of-mine\n")
    sidecar = start_sidecar(*authority.server_flags(), "--token-file", tokens)
    lines = random_lines(20)
    source, target = write(tmp_path / "in.jsonl", [line for line, _ in lines]), tmp_path / "out.jsonl"
    argv = ["score", "--teacher", sidecar.address, "--input", str(source), "--output", str(target)]
    assert cli.main([*argv, "--tls-ca", authority.ca, "--token-file", str(tokens)]) == 0
    records = [json.loads(text) for text in target.read_text().splitlines()]
    for record, (line, positions) in zip(records, lines, strict=True):
        np.testing.assert_array_equal(
            np.array(record["logprobs"], np.float32), expected(line, positions, 1.0)["logprobs"]
        )
    begin = time.monotonic()
    assert cli.main([*argv, "--tls-ca", authority.ca]) == 1
    assert "no token" in capsys.readouterr().err
    assert cli.main([*argv, "--token-file", str(tokens)]) == 1
    assert "speaks TLS" in capsys.readouterr().err
    assert time.monotonic() - begin < 120, "of the 600 s that a teacher may stay away"


@given(st.lists(st.floats(max_value=-0.0, width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_every_float32_reads_back_as_itself(values):
    logprobs = np.array(values, np.float32)
    text = score.format_line("x", TokenScores(logprobs, None, None, None, 0))
    np.testing.assert_array_equal(np.array(json.loads(text)["logprobs"], np.float32), logprobs)


GOOD = {"token_ids": [1, 2, 3]}


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not JSON"),
        ("[1, 2]", "expected an object, with token_ids, got list"),
        ({"token_id": [1, 2]}, "unknown key token_id; did you mean token_ids?"),
        ({"id": 3}, "missing key token_ids"),
        ({"token_ids": [1, 2.5]}, "token_ids.1"),
        ({"token_ids": [1, True]}, "token_ids.1"),
        ({"token_ids": [1, "2"]}, "token_ids.1"),
        ({"token_ids": [1, 64]}, "outside the vocabulary"),
        ({"token_ids": [1, -1]}, "outside the vocabulary"),
        ({"token_ids": [1, 2**40]}, "no token id"),
        ({"token_ids": [1]}, "at least 2"),
        ({"token_ids": []}, "at least 2"),
        ({"token_ids": [1] * 4097}, "--max-sequence-length"),
        ({"token_ids": [1, 2, 3], "spans": []}, "spans"),
        ({"token_ids": [1, 2, 3], "spans": [[1, 2, 3]]}, "spans"),
        ({"token_ids": [1, 2, 3], "spans": [[0, 2]]}, "inside \\[1, 3\\)"),
        ({"token_ids": [1, 2, 3], "spans": [[2, 3], [1, 2]]}, "ascending"),
        ({"token_ids": [1, 2, 3], "top_k": 65}, "top_k = 65"),
        ({"token_ids": [1, 2, 3], "top_k": -1}, "top_k = -1"),
        ({"token_ids": [1, 2, 3], "candidate_ids": [[1], [2, 3]]}, "different lengths"),
        ({"token_ids": [1, 2, 3], "candidate_ids": [[1]]}, "1 rows, its spans score 2"),
        ({"token_ids": [1, 2, 3], "candidate_ids": [[1], [99]]}, "candidate_ids.*outside the vocabulary"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_scored_and_nothing_is_written(line, message, tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [GOOD, "", GOOD, line])
    target = tmp_path / "out.jsonl"
    target.write_text("what was there before\n")
    argv = ["score", "--engine", "fake", "--model", str(tmp_path), "--input", str(source), "--output", str(target)]
    # The engine would fail, with another exit code, if it saw a token of the good lines.
    assert cli.main([*argv, "--engine-arg", "die_on_token=2"]) == 2
    error = capsys.readouterr().err
    assert f"{source} line 4" in error and "Traceback" not in error
    assert re.search(message, error), error
    assert target.read_text() == "what was there before\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("way", ["teacher", "engine"])
def test_a_failure_in_the_middle_names_the_line_and_leaves_no_half_file(way, tmp_path, start_sidecar, capsys):
    lines = [{"token_ids": [1, 2, n % 50]} for n in range(100)] + [{"token_ids": [1, 60]}]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    if way == "teacher":
        scorer = ["--teacher", start_sidecar("--engine-arg", "fail_on_token=60").address, "--deadline-s", "5"]
        message = "RuntimeError"
    else:
        scorer = ["--engine", "fake", "--model", str(tmp_path), "--engine-arg", "die_on_token=60"]
        message = "the fake engine died"
    assert cli.main(["score", *scorer, "--input", str(source), "--output", str(target)]) == 1
    error = capsys.readouterr().err
    assert f"{source} line " in error and message in error
    assert not target.exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_a_missing_or_empty_input_is_an_error(content, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    if content is not None:
        source.write_text(content)
    argv = ["score", "--engine", "fake", "--model", "m", "--input", str(source), "--output", str(tmp_path / "out")]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert str(source) in error and ("empty" if content is not None else "no such file") in error


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "give --teacher HOST:PORT"),
        (["--teacher", "localhost:1", "--engine", "fake"], "--teacher and --engine"),
        (["--teacher", "localhost:1", "--model", "m"], "--teacher and --model"),
        (["--engine", "fake"], "--model is missing"),
        (["--engine", "fake", "--model", "m", "--token-file", "t"], "--token-file is for --teacher"),
        (["--teacher", "localhost:1", "--tls-key", "t"], "tls_ca"),
        (["--engine", "fkae", "--model", "m"], "did you mean fake?"),
        (["--engine", "fake", "--model", "m", "--temperature", "0"], "temperature = 0"),
        (["--engine", "fake", "--model", "m", "--output", "/no/such/directory/out"], "no directory /no/such"),
        (["--engine", "fake", "--model", "m", "--output", "."], "it is a directory"),
        (["--engine", "fake", "--model", "m", "--output", "/dev/null"], "it is no regular file"),
    ],
)
def test_a_request_that_cannot_be_meant_is_2(argv, message, tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [GOOD])
    assert cli.main(["score", "--input", str(source), "--output", str(tmp_path / "out"), *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize("state", ["scoring", "waiting for a teacher"])
def test_ctrl_c_ends_it_with_130_and_leaves_nothing(state, tmp_path):
    source, target = write(tmp_path / "in.jsonl", [GOOD] * 1000), tmp_path / "out.jsonl"
    if state == "scoring":
        scorer = ["--engine", "fake", "--model", str(tmp_path), "--engine-arg", "delay_s=0.1"]
    else:
        scorer = ["--teacher", "127.0.0.1:1"]
    # A shell that started the tests in the background had SIGINT ignored, which children inherit.
    code = (
        "import signal, sys; from jdistill.cli import main; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(main())"
    )
    argv = [sys.executable, "-c", code, "score", *scorer, "--input", str(source), "--output", str(target)]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    try:
        if state == "scoring":
            wait_until(lambda: list(tmp_path.glob(".out*")), process=process)
        else:
            assert any(state in line for line in process.stderr)
        os.kill(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "interrupted" in error and "Traceback" not in error
    assert not target.exists() and not list(tmp_path.glob(".out*"))
