"""`jdistill train` as a user runs it: real processes, real gRPC, real signals."""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

REPO = pathlib.Path(__file__).parents[2]
VLLM_PYTHON = os.environ.get("JDISTILL_VLLM_PYTHON")
NUM_STEPS = 7
SMALL = [
    f"num_steps={NUM_STEPS}",
    "rollout.num_prompts=4",
    "rollout.num_completions=4",
    "eval.every=3",
    "eval.num_prompts=16",
    "checkpoint.every=2",
]


def start(run_dir: pathlib.Path, *overrides: str) -> subprocess.Popen[str]:
    options = [word for word in overrides if word.startswith("--")]
    values = [word for word in overrides if not word.startswith("--")]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jdistill.cli",
            "train",
            *options,
            "configs/demo.yaml",
            *SMALL,
            f"run_dir={run_dir}",
            *values,
        ],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0, timeout_s: float = 280) -> str:
    output, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == code, output
    return output


def wait_for_step(process: subprocess.Popen[str], run_dir: pathlib.Path, step: int) -> None:
    give_up = time.monotonic() + 200
    while time.monotonic() < give_up:
        if num_lines(run_dir) > step:  # step 0 has a line too
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"step {step} was never reached")


def num_lines(run_dir: pathlib.Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def sidecar_pid(run_dir: pathlib.Path) -> int:
    """Returns the process that runs `jdistill teacher` with this run's file."""
    wanted = str(run_dir / "teacher.yaml").encode()
    for proc in pathlib.Path("/proc").iterdir():
        if proc.name.isdigit():
            try:
                if wanted in (proc / "cmdline").read_bytes().split(b"\0"):
                    return int(proc.name)
            except OSError:
                continue
    raise AssertionError("no sidecar runs")


def is_running(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pid: int, timeout_s: float = 60) -> None:
    give_up = time.monotonic() + timeout_s
    while is_running(pid):
        assert time.monotonic() < give_up, f"process {pid} still runs"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    finish(start(run_dir))
    return run_dir


def metrics(run_dir: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_reports_every_step(uninterrupted: pathlib.Path) -> None:
    lines = metrics(uninterrupted)
    assert [line["step"] for line in lines] == list(range(NUM_STEPS + 1))
    assert [line["step"] for line in lines if "eval/accuracy" in line] == [0, 3, 6, 7]
    assert all(line["reverse_kl"] > 0 for line in lines[1:])
    # Sampler and step are two programs, which must agree on the sampled tokens' probabilities.
    assert max(line["sampler_gap_max"] for line in lines[1:]) < 1e-3


def test_the_student_approaches_its_teacher(tmp_path: pathlib.Path) -> None:
    run_dir = tmp_path / "distillation"
    finish(start(run_dir, "num_steps=40", "rollout.num_prompts=16", "objective.rl_loss_weight=0", "eval.every=0"))
    reverse_kl = [line["reverse_kl"] for line in metrics(run_dir)]
    assert sum(reverse_kl[-8:]) < 0.8 * sum(reverse_kl[:8])


@pytest.mark.parametrize(
    ("engine", "python"),
    [
        ("transformers", sys.executable),
        pytest.param(
            "vllm",
            VLLM_PYTHON,
            marks=pytest.mark.skipif(VLLM_PYTHON is None, reason="JDISTILL_VLLM_PYTHON is not set (make test sets it)"),
        ),
    ],
)
def test_another_engine_gives_the_same_loss(
    uninterrupted: pathlib.Path, tmp_path: pathlib.Path, engine: str, python: str
) -> None:
    run_dir = tmp_path / engine
    finish(start(run_dir, f"teacher.spawn.engine={engine}", f"teacher.spawn.python={python}", "num_steps=1"))
    # The first batch is identical: only the teacher's rounding differs.
    for name in ("loss", "reverse_kl"):
        assert metrics(run_dir)[1][name] == pytest.approx(metrics(uninterrupted)[1][name], abs=1e-4)
    assert metrics(run_dir)[1]["sampled_tokens"] == metrics(uninterrupted)[1]["sampled_tokens"]


def test_a_killed_and_resumed_run_equals_an_uninterrupted_run(
    uninterrupted: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run_dir = tmp_path / "killed"
    seed = int(os.environ.get("JDISTILL_TEST_SEED", random.randrange(1 << 16)))
    chosen = random.Random(seed)
    step, delay_s = chosen.randint(0, NUM_STEPS - 1), chosen.random() / 2  # in the update, the rollout, a save ...
    print(f"JDISTILL_TEST_SEED={seed}: killed {delay_s:.3f} s after step {step}")  # shown if the test fails
    process = start(run_dir)
    wait_for_step(process, run_dir, step)
    pid = sidecar_pid(run_dir)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_until_gone(pid)  # the sidecar of a trainer that was killed outright
    finish(start(run_dir, "--resume"))
    assert (run_dir / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()


def test_a_teacher_that_dies_is_restarted_and_changes_no_number(
    uninterrupted: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run_dir = tmp_path / "teacher_dies"
    process = start(run_dir)
    wait_for_step(process, run_dir, 3)
    os.kill(sidecar_pid(run_dir), signal.SIGKILL)
    output = finish(process)
    assert "restart 1" in output
    assert (run_dir / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()


def test_a_teacher_that_sleeps_between_its_scoring_phases_changes_no_number(
    uninterrupted: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run_dir = tmp_path / "offload"
    finish(start(run_dir, "teacher.offload=true", "num_steps=3"))
    for got, expected in zip(metrics(run_dir)[1:], metrics(uninterrupted)[1:4], strict=True):
        for name in ("loss", "reverse_kl", "reward"):
            assert got[name] == pytest.approx(expected[name], abs=1e-5)
    log = (run_dir / "teacher.log").read_text()
    assert log.count("sleeping after") == 1 + 3, "once before the first rollout, and after each scoring phase"


def test_a_teacher_that_cannot_sleep_is_an_error_before_the_first_step(tmp_path: pathlib.Path) -> None:
    run_dir = tmp_path / "run"
    with_teacher = start_teacher(tmp_path)
    try:
        process = start(
            run_dir, "teacher.spawn=null", f"teacher.endpoints=['{with_teacher[1]}']", "teacher.offload=true"
        )
        output = finish(process, code=1)
    finally:
        with_teacher[0].terminate()
        with_teacher[0].wait()
    assert "offload" in output and with_teacher[1] in output
    assert num_lines(run_dir) == 0


def start_teacher(directory: pathlib.Path) -> tuple[subprocess.Popen[bytes], str]:
    """Starts a sidecar apart from any trainer; returns its process and address."""
    port_file = directory / "port"
    teacher = subprocess.Popen(
        [sys.executable, "-m", "jdistill.cli", "teacher", "--engine", "jax", "--model", "examples/addition/teacher"]
        + ["--dtype", "float32", "--port", "0", "--port-file", str(port_file)],
        cwd=REPO,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not port_file.exists():
        assert teacher.poll() is None
        time.sleep(0.1)
    return teacher, f"127.0.0.1:{port_file.read_text().strip()}"


def test_sigterm_saves_the_state_and_takes_the_sidecar_down(tmp_path: pathlib.Path) -> None:
    run_dir = tmp_path / "terminated"
    process = start(run_dir)
    wait_for_step(process, run_dir, 1)
    pid = sidecar_pid(run_dir)
    process.send_signal(signal.SIGTERM)
    output = finish(process, code=128 + signal.SIGTERM)
    assert "--resume" in output
    assert not is_running(pid)
    saved = max(int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit())
    assert saved == metrics(run_dir)[-1]["step"]


def test_a_teacher_that_stays_down_stops_the_run_with_its_state_saved(tmp_path: pathlib.Path) -> None:
    teacher, endpoint = start_teacher(tmp_path)
    try:
        run_dir = tmp_path / "abandoned"
        process = start(run_dir, "teacher.spawn=null", f"teacher.endpoints=['{endpoint}']", "teacher.deadline_s=10")
        wait_for_step(process, run_dir, 2)
    finally:
        teacher.kill()
        teacher.wait()
    output = finish(process, code=1)
    assert endpoint in output
    assert "--resume" in output
    assert any(path.name.isdigit() for path in (run_dir / "checkpoints").iterdir())


def test_nan_stops_the_run_before_it_reaches_the_weights(tmp_path: pathlib.Path) -> None:
    output = finish(start(tmp_path / "nan", "optimizer.learning_rate=1e38", "optimizer.warmup_steps=0"), code=1)
    assert "NaN" in output
    assert "optimizer.learning_rate" in output


def test_a_student_with_another_tokenizer_is_refused(tmp_path: pathlib.Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(REPO / "examples/addition/student", student)
    text = (student / "tokenizer.json").read_text()
    tokenizer = json.loads(text)
    vocab = tokenizer["model"]["vocab"]
    vocab["1"], vocab["2"] = vocab["2"], vocab["1"]
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    output = finish(start(tmp_path / "run", f"model.path={student}"), code=1)
    assert "tokenizer" in output


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["optimizer.learning_rat=1e-4"], "did you mean optimizer.learning_rate"),
        (["model.path=no/such/checkpoint"], "no/such/checkpoint"),
        (["rollout.max_new_tokens=4000"], "max_position_embeddings"),
        (["teacher.endpoints=['127.0.0.1:1']"], "exactly one of teacher.endpoints"),
        (["task.name=additoin"], "did you mean addition"),
        (["teacher.spawn.engine=vlm"], "did you mean vllm"),
    ],
)
def test_a_wrong_configuration_is_answered_with_the_remedy(
    tmp_path: pathlib.Path, overrides: list[str], says: str
) -> None:
    process = start(tmp_path / "run", *overrides)
    output, _ = process.communicate(timeout=280)
    assert process.returncode in (1, 2)
    assert says in output
    assert "Traceback" not in output
