"""A real vLLM behind a real sidecar: bad requests do not reach it, work of lost clients ends, its death is reported."""

import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: run these with the Python of its environment", allow_module_level=True)
from jdistill.client import SequenceToScore
from jdistill.wire.v1 import teacher_pb2_grpc
from tests.faults.bad_requests import BAD, MAX_LENGTH, VOCAB, assert_refused
from tests.faults.harness import WATCHED, metrics
from tests.sidecar import processes
from tests.sidecar.checkpoints import write_checkpoint
from tests.waiting import wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """One vLLM for the module: the last test kills it, the others leave it intact."""
    directory = tmp_path_factory.mktemp("vllm")
    path = write_checkpoint(directory / "tiny")
    # The largest context, so that a lost client's work would last.
    args = ("--engine", "vllm", "--model", path, "--max-sequence-length", MAX_LENGTH)
    one = processes.launch(directory, *WATCHED, *args, wait=False)
    try:
        one.wait_for_port(180)
        yield one
    finally:
        one.process.terminate()
        try:
            one.process.wait(30)
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()


def random_sequences(num, length, seed=0):
    rng = np.random.default_rng(seed)
    return [SequenceToScore(rng.integers(0, VOCAB, length).astype(np.int32)) for _ in range(num)]


def family(pid):
    """Returns the processes below `pid`, itself included."""
    parents = {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int(entry.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has just ended
    found, new = set(), {pid}
    while new:
        found |= new
        new = {child for child, parent in parents.items() if parent in new} - found
    return found


def cpu_s(pids):
    total = 0.0
    for pid in pids:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def test_invalid_sequences_never_reach_vllm_and_the_rest_is_scored(teacher, connect):
    client = connect(teacher)
    asked = random_sequences(8, 60)
    before = client.score(asked, top_k=2)
    stop, rounds = threading.Event(), []

    def meanwhile():
        while not stop.is_set():
            rounds.append(client.score(asked, top_k=2))

    thread = threading.Thread(target=meanwhile)
    thread.start()
    try:
        with grpc.insecure_channel(teacher.address) as channel:
            for name, (message, *_) in BAD.items():
                with pytest.raises(grpc.RpcError) as caught:
                    list(teacher_pb2_grpc.TeacherServiceStub(channel).ScoreSequences(message, timeout=30))
                assert_refused(caught.value, name)
        seen = len(rounds)
        wait_until(lambda: len(rounds) > seen, 30)
    finally:
        stop.set()
        thread.join(60)
    for scores in rounds:
        for got, expected in zip(scores, before, strict=True):
            # Different batch mates change the float32 rounding.
            np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-4)
            assert (got.logprobs <= 0).all() and np.ptp(got.logprobs) > 1
    assert teacher.process.poll() is None and processes.health(teacher.address) == processes.SERVING


CLIENT = """
import sys, numpy as np
from jdistill.client import SequenceToScore, TeacherClient
rng = np.random.default_rng(0)
with TeacherClient([sys.argv[1]], deadline_s=300, max_in_flight=8) as client:
    client.score([SequenceToScore(rng.integers(0, 512, 128).astype(np.int32)) for _ in range(20_000)], top_k=20)
"""


def engine_core(teacher):
    """Returns the process id of vLLM's scheduler."""
    for pid in family(teacher.process.pid):
        if "EngineCore" in "".join(pathlib.Path(f"/proc/{pid}/{name}").read_text() for name in ("comm", "cmdline")):
            return pid
    raise AssertionError("no process is called EngineCore")


def busy(pids, during_s):
    """Measures the number of cores that these processes use."""
    before_s, begin = cpu_s(pids), time.monotonic()
    time.sleep(during_s)
    return (cpu_s(pids) - before_s) / (time.monotonic() - begin)


def test_the_work_of_a_vanished_client_leaves_vllm_undone(teacher, connect):
    """Compares processor time, which another process's load hardly changes, instead of the time until the end."""
    everyone, scheduler = family(teacher.process.pid), engine_core(teacher)
    process = subprocess.Popen([sys.executable, "-c", CLIENT, teacher.address])
    try:
        wait_until(lambda: metrics(teacher)["jdistill_running_tokens"] > 100_000)
        wait_until(lambda: busy([scheduler], 0.5) > 0.1, what="the scheduler's work")
        begin_s, begin = cpu_s(everyone), metrics(teacher)["jdistill_scored_tokens_total"]
        wait_until(lambda: metrics(teacher)["jdistill_scored_tokens_total"] > begin + 20_000)
        num_scored = metrics(teacher)["jdistill_scored_tokens_total"] - begin
        s_per_token = (cpu_s(everyone) - begin_s) / num_scored
        work_s = metrics(teacher)["jdistill_running_tokens"] * s_per_token
        process.kill()
        killed_s = cpu_s(everyone)
        process.wait()
        wait_until(lambda: not metrics(teacher)["jdistill_open_calls"], what="the end of its calls")
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: busy([scheduler], 0.4) < 0.1, what="the end of the scheduler's work")
    spent_s = cpu_s(everyone) - killed_s
    assert spent_s < 0.5 * work_s, f"{spent_s:.1f} s of processor time after its end, of {work_s:.1f} s that were left"
    # A worker of vLLM waits for the next step in a busy loop, for a second.
    wait_until(lambda: busy(everyone, 0.5) < 0.3, what="the end of vLLM's work")
    (scores,) = connect(teacher).score(random_sequences(1, 30))
    assert len(scores.logprobs) == 29


def test_the_death_of_vllms_engine_process_is_reported_at_once_and_ends_the_sidecar_with_1(teacher, connect):
    """Must be the last test of the module: it kills vLLM."""
    everyone = family(teacher.process.pid)
    statuses, first = [], threading.Event()

    def watch():
        with grpc.insecure_channel(teacher.address) as channel:
            try:
                for reply in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
                    statuses.append(reply.status)
                    first.set()
            except grpc.RpcError:
                pass  # it has ended

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert first.wait(10)
    os.kill(engine_core(teacher), signal.SIGKILL)
    killed_at = time.monotonic()
    wait_until(lambda: len(statuses) > 1, 5.0, what="NOT_SERVING")
    assert teacher.process.wait(30) == 1
    print(f"ended {time.monotonic() - killed_at:.1f} s after its engine")
    watcher.join(10)
    assert statuses == [processes.SERVING, processes.NOT_SERVING]
    assert "died" in teacher.log or "dead" in teacher.log
    wait_until(lambda: not any(pathlib.Path(f"/proc/{pid}").exists() for pid in everyone), 15, what="the end of vLLM")
