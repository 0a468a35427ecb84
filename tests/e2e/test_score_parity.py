"""One checkpoint and one file through every engine, in process and behind gRPC: the same numbers."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.sidecar.checkpoints import write_checkpoint

REPO = pathlib.Path(__file__).parents[2]
VLLM_PYTHON = os.environ.get("JDISTILL_VLLM_PYTHON")
LIMIT = 96  # tokens; the longest sequence has exactly as many
TEMPERATURES = (1.0, 0.7, 1.6)
PYTHON_OF = {"jax": sys.executable, "transformers": sys.executable, "vllm": VLLM_PYTHON}
NEEDS_VLLM = pytest.mark.skipif(
    VLLM_PYTHON is None, reason="JDISTILL_VLLM_PYTHON names no interpreter (make test does)"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=128)


@pytest.fixture(scope="module")
def lines() -> list[dict]:
    """Random sequences from 2 tokens to the limit, with random spans, top-k and candidates."""
    rng = np.random.default_rng(0)
    result = []
    for length in [2, 2, LIMIT, LIMIT, *rng.integers(3, LIMIT, 20)]:
        line: dict = {"token_ids": rng.integers(0, 512, length).tolist()}
        cuts = np.sort(rng.choice(np.arange(1, length + 1), size=min(length, 4) // 2 * 2, replace=False)).tolist()
        if rng.random() < 0.6:
            line["spans"] = [cuts[i : i + 2] for i in range(0, len(cuts), 2)]
        spans = line.get("spans") or [[1, length]]
        if rng.random() < 0.5:
            line["top_k"] = int(rng.integers(1, 9))
        if rng.random() < 0.5:
            num = sum(stop - start for start, stop in spans)
            line["candidate_ids"] = rng.integers(0, 512, (num, 3)).tolist()
        result.append(line)
    return result


@pytest.fixture(scope="module")
def input_file(lines: list[dict], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("input") / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def score(python: str, input_file: pathlib.Path, temperature: float, *source: str) -> list[dict]:
    output = input_file.with_suffix(f".{time.monotonic_ns()}.out")
    command = [python, "-m", "jdistill.cli", "score", "--input", str(input_file), "--output", str(output)]
    done = subprocess.run(
        [*command, "--temperature", str(temperature), *source], cwd=REPO, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in output.read_text().splitlines()]


def engine_arguments(engine: str, checkpoint: pathlib.Path) -> list[str]:
    return ["--engine", engine, "--model", str(checkpoint), "--dtype", "float32", "--max-sequence-length", str(LIMIT)]


@pytest.fixture(scope="module")
def expected(checkpoint: pathlib.Path, lines: list[dict]) -> dict[float, list[dict]]:
    """Reference: transformers' full log-softmax, one sequence at a time."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    by_temperature: dict[float, list[dict]] = {}
    for temperature in TEMPERATURES:
        answers = []
        for line in lines:
            ids = torch.tensor(line["token_ids"])
            with torch.no_grad():
                logprobs_TV = torch.log_softmax(model(ids[None]).logits[0, :-1] / temperature, -1)
            positions = [t for start, stop in line.get("spans") or [[1, len(ids)]] for t in range(start, stop)]
            answer = {"logprobs": [logprobs_TV[t - 1, ids[t]].item() for t in positions]}
            rows_PV = logprobs_TV[[t - 1 for t in positions]]
            if "top_k" in line:
                answer["top_logprobs"] = rows_PV.topk(line["top_k"]).values.tolist()
            if "candidate_ids" in line:
                answer["candidate_logprobs"] = rows_PV.gather(1, torch.tensor(line["candidate_ids"])).tolist()
            answers.append(answer)
        by_temperature[temperature] = answers
    return by_temperature


def check(answers: list[dict], expected: list[dict]) -> None:
    for answer, right in zip(answers, expected, strict=True):
        for name, values in right.items():
            np.testing.assert_allclose(answer[name], values, atol=1e-4, rtol=0, err_msg=name)
        if "top_logprobs" in right:
            assert np.shape(answer["top_ids"]) == np.shape(right["top_logprobs"])


# In its own environment vLLM is compared in process by the engines' contract, so its second start here can wait.
@pytest.mark.parametrize("engine", ["jax", "transformers", pytest.param("vllm", marks=[NEEDS_VLLM, pytest.mark.full])])
def test_score_in_process_equals_transformers_log_softmax(
    engine: str, checkpoint: pathlib.Path, input_file: pathlib.Path, expected: dict[float, list[dict]]
) -> None:
    temperature = TEMPERATURES[1]
    answers = score(PYTHON_OF[engine], input_file, temperature, *engine_arguments(engine, checkpoint))
    check(answers, expected[temperature])


@pytest.mark.parametrize("engine", ["jax", "transformers", pytest.param("vllm", marks=NEEDS_VLLM)])
def test_score_through_grpc_equals_transformers_log_softmax(
    engine: str,
    checkpoint: pathlib.Path,
    input_file: pathlib.Path,
    expected: dict[float, list[dict]],
    tmp_path: pathlib.Path,
) -> None:
    port_file = tmp_path / "port"
    with (tmp_path / "log").open("wb") as log:
        teacher = subprocess.Popen(
            [PYTHON_OF[engine], "-m", "jdistill.cli", "teacher", *engine_arguments(engine, checkpoint)]
            + ["--port", "0", "--port-file", str(port_file)],
            cwd=REPO,
            stdout=log,
            stderr=log,
        )
    try:
        while not port_file.exists():
            assert teacher.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        endpoint = f"127.0.0.1:{port_file.read_text().strip()}"
        for temperature in TEMPERATURES:
            check(score(sys.executable, input_file, temperature, "--teacher", endpoint), expected[temperature])
    finally:
        teacher.terminate()
        assert teacher.wait(60) == 0
