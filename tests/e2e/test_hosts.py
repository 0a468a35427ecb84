"""Two real processes with 4 devices each train the same as one with 8, through `jdistill train`."""

from __future__ import annotations

import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from jdistill.student import metrics
from tests import devices

REPO = pathlib.Path(__file__).parents[2]
KEYS = [
    *("num_steps=3", "rollout.num_prompts=4", "rollout.num_completions=4", "rollout.max_new_tokens=12"),
    *("objective.reference={path: examples/addition/student, weight: 0.1}", "objective.advantage=reinforce_plus_plus"),
    *("optimizer.accumulate=2", "optimizer.packing=true", "optimizer.warmup_steps=0"),
    *("eval.every=3", "eval.num_prompts=5", "eval.greedy=false", "mesh={data: 1, fsdp: 4, tensor: 2}"),
]

# A run takes about a minute on two calm cores, and several on busy ones: only a hang takes longer than this.
HANGS_S = 800
pytestmark = pytest.mark.timeout(3 * HANGS_S)


def start(
    run_dir: pathlib.Path, num_devices: int, *argv: str, found: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "jdistill.cli", "train", "configs/demo.yaml", *KEYS, f"run_dir={run_dir}", *argv],
        cwd=REPO,
        env=devices.environment(num_devices) | (found or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_two(
    run_dir: pathlib.Path, *argv: str, second: tuple[str, ...] = (), slurm: bool = False
) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if slurm:  # what srun tells each of its processes, one on each of two nodes
        step = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "2"}
        step |= {"SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "JAX_COORDINATOR_PORT": str(port)}
        return [start(run_dir, 4, "--distributed", *argv, found=step | {"SLURM_PROCID": str(i)}) for i in range(2)]
    common = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", *argv]
    return [start(run_dir, 4, *common, "--process-id", str(i), *argv) for i, argv in enumerate([(), second])]


def finish(processes: list[subprocess.Popen[str]], code: int = 0) -> list[str]:
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=HANGS_S)[0])
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), "\n".join(outputs)[-5000:]
    return outputs


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    finish([start(run_dir, 8)])
    return metrics.read(run_dir / "metrics.jsonl")


def test_two_processes_stop_together_resume_and_match_one_process(
    alone: list[dict[str, float]], tmp_path: pathlib.Path
) -> None:
    run_dir = tmp_path / "run"
    processes = start_two(run_dir)
    lines = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + HANGS_S
    while not (lines.exists() and len(metrics.read(lines)) >= 2):  # steps 0 and 1
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)  # one of them, and both stop after the same step
    stopped = finish(processes, 128 + signal.SIGTERM)
    assert all("--resume continues from there" in output for output in stopped)
    assert len(metrics.read(lines)) < 4
    first, second = finish(start_two(run_dir, "--resume", slurm=True))
    assert "3/3" in first and "3/3" not in second  # the first one speaks
    together = metrics.read(lines)
    assert [line["step"] for line in together] == [line["step"] for line in alone] == [0, 1, 2, 3]
    for a, b in zip(together, alone, strict=True):
        assert set(a) == set(b)
        for name in set(a) - {"padding_share"}:  # rows are dealt out within a host
            assert a[name] == pytest.approx(b[name], rel=5e-3, abs=1e-4), (a["step"], name)


def test_an_error_that_one_process_detects_ends_all(tmp_path: pathlib.Path) -> None:
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    for output in finish(start_two(tmp_path / "run"), 2):
        assert "holds a run already: --resume continues it" in output
    for output in finish(start_two(tmp_path / "other", "rollout.num_prompts=3", "optimizer.accumulate=1"), 2):
        assert "rollout.num_prompts = 3 does not split over 2 processes" in output


def test_a_process_with_an_error_of_its_own_exits_without_waiting_for_the_others(tmp_path: pathlib.Path) -> None:
    first, second = start_two(tmp_path / "run", second=("rollout.max_prompt_tokens=100000",))
    try:
        output = second.communicate(timeout=HANGS_S)[0]
    finally:
        first.kill()
        first.communicate()
    assert second.returncode == 2
    assert "has max_position_embeddings" in output and "process 1 of 2 ends here" in output
