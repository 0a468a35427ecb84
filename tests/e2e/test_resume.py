"""Runs that continue elsewhere, and starts that fail: `jdistill train` and `demo` as real processes."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jdistill.student import metrics

REPO = pathlib.Path(__file__).parents[2]
SMALL = ["rollout.num_prompts=4", "rollout.num_completions=4", "rollout.max_new_tokens=8", "optimizer.warmup_steps=0"]


def begin(num_devices: int, *words: str, command: str = "train") -> subprocess.Popen[str]:
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}", "JAX_PLATFORMS": "cpu"}
    config = ["configs/demo.yaml"] if command == "train" else []
    return subprocess.Popen(
        [sys.executable, "-m", "jdistill.cli", command, *config, *words],
        cwd=REPO,
        env=os.environ | flags,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train(num_devices: int, *words: str, code: int = 0, command: str = "train") -> str:
    process = begin(num_devices, *words, command=command)
    output, _ = process.communicate(timeout=800)
    assert process.returncode == code, output
    return output


def mesh(num_devices: int) -> str:
    return f"mesh={{data: 1, fsdp: {num_devices}, tensor: 1}}"


@pytest.mark.timeout(2400)
def test_a_run_continues_on_fewer_devices_and_for_more_steps(tmp_path: pathlib.Path) -> None:
    keys = [*SMALL, "eval.every=0", "optimizer.schedule=constant"]
    train(4, *keys, mesh(4), "num_steps=4", f"run_dir={tmp_path / 'whole'}")
    whole = metrics.read(tmp_path / "whole" / "metrics.jsonl")
    assert all(line["grad_norm"] > 0 for line in whole), "without a gradient any two runs are equal"

    train(4, *keys, mesh(4), "num_steps=2", f"run_dir={tmp_path / 'first'}")
    shutil.copytree(tmp_path / "first", tmp_path / "moved")
    output = train(4, *keys, mesh(4), "num_steps=4", f"run_dir={tmp_path / 'first'}", "--resume")
    assert "resumed at step 2 with changes: num_steps: 2 -> 4" in output
    assert metrics.read(tmp_path / "first" / "metrics.jsonl") == whole  # bit for bit

    output = train(2, *keys, mesh(2), "num_steps=4", f"run_dir={tmp_path / 'moved'}", "--resume")
    assert "mesh.fsdp: 4 -> 2" in output and "devices: 4 -> 2" in output
    for a, b in zip(metrics.read(tmp_path / "moved" / "metrics.jsonl"), whole, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-3, atol=1e-4, err_msg=name)
    (line,) = map(json.loads, (tmp_path / "moved" / "changes.jsonl").read_text().splitlines())
    assert line["step"] == 2 and line["place"]["devices"] == [4, 2]

    refused = train(2, *keys, mesh(2), "num_steps=4", "seed=5", f"run_dir={tmp_path / 'moved'}", "--resume", code=2)
    assert "seed: was 0, is 5" in refused


@pytest.mark.timeout(2400)
def test_a_start_that_fails_leaves_no_run_and_deletes_none(tmp_path: pathlib.Path) -> None:
    run_dir = tmp_path / "run"
    words = [*SMALL, "num_steps=1", "eval.every=0", f"run_dir={run_dir}"]
    nobody = ["teacher.spawn=null", "teacher.endpoints=['127.0.0.1:9']", "teacher.deadline_s=1"]
    assert "127.0.0.1:9" in train(1, *words, *nobody, code=1)
    assert not run_dir.exists()
    assert "vllm" in train(1, *words, "teacher.spawn.engine=vlm", code=1)
    assert {path.name for path in run_dir.iterdir()} <= {"teacher.log", "teacher.yaml", "teacher.port"}

    process = begin(1, *words)  # killed between taking the directory and the first step
    give_up = time.monotonic() + 300
    while not (run_dir / "config.json").exists():
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").read_bytes():
        assert "an earlier start in" in train(1, *words)
    line = metrics.read(run_dir / "metrics.jsonl")
    assert [one["step"] for one in line] == [1]

    assert "holds a run already" in train(1, *words, code=2)
    train(1, *words, *nobody, "--overwrite", code=1)
    assert metrics.read(run_dir / "metrics.jsonl") == line, "a start that failed has deleted the earlier run"


def test_demo_overwrites_nothing_unless_it_is_told_to(tmp_path: pathlib.Path) -> None:
    run_dir = tmp_path / "rl_only-seed0"
    run_dir.mkdir()
    (run_dir / "config.json").write_text("{}")
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    output = train(1, "--to", str(tmp_path), command="demo", code=2)
    assert f"{run_dir} holds a run already: --overwrite deletes it" in output
    assert (run_dir / "metrics.jsonl").read_text() == '{"step": 1}\n'
