"""Processes that are killed, stopped, replaced or crash while they work; real processes, real signals."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jdistill.client import SequenceToScore
from jdistill.wire.v1 import teacher_pb2, teacher_pb2_grpc
from tests.faults.harness import FULL, WATCHED, assert_scores, batch, calls, good_calls, metrics
from tests.sidecar import processes
from tests.waiting import wait_until


@pytest.fixture
def in_background():
    """in_background(function, ...) -> Future."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        yield pool.submit


def kill(sidecar):
    sidecar.process.kill()
    sidecar.process.wait()


@pytest.mark.parametrize("calls_before", [0, 3, 9])
def test_sigkill_of_one_of_three_sidecars_within_a_batch_loses_and_repeats_nothing(
    start_sidecar, connect, in_background, calls_before
):
    fleet = [start_sidecar("--engine-arg", "delay_s=0.04") for _ in range(3)]
    client = connect(*fleet, batch_tokens=100)
    client.info()
    asked = batch(480, seed=calls_before, candidates=2)
    future = in_background(client.score, asked, top_k=3)
    victim = fleet[1]
    wait_until(lambda: metrics(victim)["jdistill_open_calls"] and good_calls(victim) >= calls_before)
    scored_there = metrics(victim)["jdistill_scored_sequences_total"]
    kill(victim)
    assert not future.done(), "the batch was over before the kill"
    assert_scores(future.result(timeout=60), asked, top_k=3)
    # Complete results of the dead sidecar are kept: the others repeat at most its calls in flight.
    survivors = (fleet[0], fleet[2])
    repeated = sum(metrics(one)["jdistill_scored_sequences_total"] for one in survivors) + scored_there - len(asked)
    under_way = 4 * max(call["sequences"] for one in survivors for call in calls(one))
    assert repeated <= under_way, f"{repeated} sequences were scored twice, at most {under_way} were under way"


def test_all_sidecars_down_for_a_while_delay_a_batch_and_lose_nothing(start_sidecar, connect, in_background):
    down_s = 20.0 if FULL else 4.0
    fleet = [start_sidecar("--engine-arg", "delay_s=0.01") for _ in range(2)]
    said = []
    client = connect(*fleet, deadline_s=120.0, batch_tokens=300, on_wait=said.append)
    asked = batch(200)
    future = in_background(client.score, asked)
    wait_until(lambda: all(good_calls(one) for one in fleet))
    for one in fleet:
        kill(one)
    time.sleep(down_s)
    assert not future.done()
    for one in fleet:
        start_sidecar("--port", one.port)
    assert_scores(future.result(timeout=60), asked)
    assert "waiting for a teacher" in said[0] and said[-1] is None


def test_sigterm_under_load_finishes_running_calls_and_sends_new_work_elsewhere(start_sidecar, connect, in_background):
    fleet = [start_sidecar("--engine-arg", "delay_s=0.02") for _ in range(2)]
    clients = [connect(*fleet, batch_tokens=200) for _ in range(2)]
    batches = [batch(300, seed=seed) for seed in range(4)]
    futures = [in_background(client.score, asked) for client, asked in zip(clients * 2, batches, strict=True)]
    wait_until(lambda: good_calls(fleet[0]) >= 2)
    before = good_calls(fleet[1])
    fleet[0].process.send_signal(signal.SIGTERM)
    assert not any(future.done() for future in futures), "the load was over before the signal"
    assert fleet[0].process.wait(60) == 0
    for future, asked in zip(futures, batches, strict=True):
        assert_scores(future.result(timeout=60), asked)
    assert good_calls(fleet[1]) > before
    assert "calls may finish" in fleet[0].log and "did not finish" not in fleet[0].log
    # The refused calls had not started.
    assert {call.get("sequences", 0) for call in calls(fleet[0]) if call["code"] != "OK"} <= {0}


def test_a_replica_restarted_with_another_checkpoint_is_refused_until_it_has_the_right_one(
    start_sidecar, connect, caplog
):
    fleet = [start_sidecar() for _ in range(3)]
    client = connect(*fleet, batch_tokens=200)
    asked = batch(60)
    assert_scores(client.score(asked), asked)
    kill(fleet[1])
    other = start_sidecar("--port", fleet[1].port, "--engine-arg", "vocab_size=80")  # other numbers for the same ids

    def refused():
        assert_scores(client.score(asked), asked)
        return [r.message for r in caplog.records if "teacher left out" in r.message]

    assert fleet[1].address in wait_until(refused)[0]
    for seed in range(5):
        again = batch(60, seed=seed)
        assert_scores(client.score(again), again)
    assert not good_calls(other), "it was used"
    kill(other)
    right = start_sidecar("--port", fleet[1].port)

    def taken_back():
        assert_scores(client.score(asked), asked)
        return good_calls(right)

    wait_until(taken_back)


CLIENT = """
import sys, numpy as np
from jdistill.client import SequenceToScore, TeacherClient
with TeacherClient([sys.argv[1]], batch_tokens=4096) as client:
    client.score([SequenceToScore(np.arange(100) % 64) for _ in range(2000)])
"""


def test_the_work_of_a_vanished_client_is_cancelled_in_the_engine(start_sidecar, connect):
    # 4 calls of 40 sequences at 2 s each: without a cancellation they would go on for almost 80 s.
    sidecar = start_sidecar("--engine-arg", "delay_s=2")
    process = subprocess.Popen([sys.executable, "-c", CLIENT, sidecar.address])
    try:
        wait_until(lambda: metrics(sidecar)["jdistill_scored_sequences_total"] >= 4)
        before = metrics(sidecar)
        assert before["jdistill_open_calls"] >= 4 and before["jdistill_running_tokens"] > 0
        process.kill()
        process.wait()
        wait_until(lambda: not metrics(sidecar)["jdistill_open_calls"], timeout_s=30.0, what="the end of its calls")
    finally:
        process.kill()
        process.wait()
    after = metrics(sidecar)
    assert after["jdistill_running_tokens"] == after["jdistill_queued_tokens"] == 0
    assert after["jdistill_cancelled_calls_total"] >= 4
    time.sleep(4.1)  # two sequences of each of its calls, if they still ran
    assert metrics(sidecar)["jdistill_scored_sequences_total"] == after["jdistill_scored_sequences_total"]
    asked = batch(10)
    assert_scores(connect(sidecar).score(asked), asked)


class Supervisor:
    """Restarts a sidecar that ends with a nonzero code, as systemd's Restart=on-failure does."""

    def __init__(self, directory, *args):
        self.exit_codes = []
        self._directory, self._args = directory, args
        self.sidecar = processes.launch(directory, *args)
        self.first = self.sidecar
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while (code := self.sidecar.process.wait()) != 0 and not self._stopping.is_set():
            self.exit_codes.append(code)
            self.sidecar = processes.launch(self._directory, "--port", self.first.port, *self._args, wait=False)

    def stop(self):
        self._stopping.set()
        while self._thread.is_alive():
            self.sidecar.process.kill()
            self._thread.join(0.05)


def test_after_an_engine_crash_the_restarted_sidecar_is_used_again(start_sidecar, connect, in_background, tmp_path):
    (tmp_path / "supervised").mkdir()
    supervisor = Supervisor(
        tmp_path / "supervised", *WATCHED, "--engine-arg", "die_on_token=63", "--engine-arg", "delay_s=0.02"
    )
    try:
        other = start_sidecar("--engine-arg", "delay_s=0.02")
        client = connect(supervisor.first, other, batch_tokens=200)
        asked = [SequenceToScore(np.minimum(s.token_ids, 62), s.spans) for s in batch(800)]
        future = in_background(client.score, asked)
        wait_until(lambda: good_calls(supervisor.first))
        statuses, watching = [], threading.Event()

        def watch():
            with grpc.insecure_channel(supervisor.first.address) as channel:
                watcher = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
                try:
                    for reply in watcher:
                        statuses.append(reply.status)
                        watching.set()
                except grpc.RpcError:
                    pass  # it has ended

        watched = in_background(watch)
        assert watching.wait(60)
        with grpc.insecure_channel(supervisor.first.address) as channel, pytest.raises(grpc.RpcError) as caught:
            deadly = teacher_pb2.ScoreSequencesRequest(sequence_lengths=[2], token_ids=[1, 63])
            list(teacher_pb2_grpc.TeacherServiceStub(channel).ScoreSequences(deadly, timeout=60))
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE and "died" in caught.value.details()
        assert not future.done(), "the batch was over before the crash"
        assert_scores(future.result(timeout=60), asked)
        watched.result(timeout=60)
        assert statuses == [processes.SERVING, processes.NOT_SERVING]
        wait_until(lambda: supervisor.exit_codes == [1])

        def used_again():
            assert_scores(client.score(asked[:40]), asked[:40])
            return supervisor.sidecar is not supervisor.first and good_calls(supervisor.sidecar)

        wait_until(used_again)
    finally:
        supervisor.stop()


def test_a_stopped_sidecar_is_hedged_and_nothing_is_scored_twice_in_the_result(start_sidecar, connect, in_background):
    fleet = [start_sidecar("--engine-arg", "delay_s=0.02") for _ in range(3)]
    client = connect(*fleet, batch_tokens=200, hedge_after_s=0.5)
    asked = batch(600)
    future = in_background(client.score, asked)
    wait_until(lambda: good_calls(fleet[1]))
    fleet[1].process.send_signal(signal.SIGSTOP)
    try:
        assert not future.done(), "the batch was over before the stop"
        assert_scores(future.result(timeout=60), asked)  # the stopped one does not go on before that
    finally:
        os.kill(fleet[1].process.pid, signal.SIGCONT)
    # The stopped sidecar now answers calls that are over, which must not affect the client.
    for seed in range(3):
        again = batch(100, seed=seed)
        assert_scores(client.score(again), again)
