"""Sidecars as real processes: start, health, signals, ports, parents. Only the model is simulated."""

import datetime
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from jdistill.config import ConfigError, TeacherServerConfig
from jdistill.sidecar import server
from jdistill.sidecar.engines import ENGINES, fake
from jdistill.wire.v1 import teacher_pb2, teacher_pb2_grpc
from tests.sidecar.certificates import Authority
from tests.sidecar.processes import NOT_SERVING, SERVICE, SERVING
from tests.sidecar.processes import health as health_of
from tests.waiting import wait_until

CONTROL_SERVICE = "jdistill.wire.v1.TeacherControlService"


def request(num_sequences=1, length=8):
    ids = np.arange(num_sequences * length) % 64
    return teacher_pb2.ScoreSequencesRequest(sequence_lengths=[length] * num_sequences, token_ids=ids.tolist())


class BackgroundCall:
    """A ScoreSequences call whose outcome is collected in a thread."""

    def __init__(self, address, message):
        self.scored, self.error = set(), None
        self.first = threading.Event()
        self._channel = grpc.insecure_channel(address)
        self._message = message
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        try:
            for chunk in teacher_pb2_grpc.TeacherServiceStub(self._channel).ScoreSequences(self._message, timeout=30):
                self.scored.update(chunk.sequence_indexes)
                self.first.set()
        except grpc.RpcError as e:
            self.error = e
        finally:
            self._channel.close()


def alive(pid):
    try:
        return "\nState:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_health_says_not_serving_while_it_loads_and_serving_once_it_answers(start_sidecar):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sidecar = start_sidecar("--port", port, "--engine-arg", "load_s=2", wait=False)
    address = f"127.0.0.1:{port}"
    wait_until(lambda: "listening on" in sidecar.log)  # otherwise the first call's backoff outlasts the loading
    assert health_of(address) == NOT_SERVING
    assert health_of(address, "") == NOT_SERVING
    assert not sidecar.port_file.exists(), "the port file promises a server that answers"
    with grpc.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            list(teacher_pb2_grpc.TeacherServiceStub(channel).ScoreSequences(request()))
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE and "is loading" in caught.value.details()
    sidecar.wait_for_port()
    assert sidecar.port == port
    assert health_of(address) == health_of(address, "") == SERVING
    with grpc.insecure_channel(address) as channel:
        (chunk,) = teacher_pb2_grpc.TeacherServiceStub(channel).ScoreSequences(request())
    full_PV = fake.logprobs_PV(np.arange(8), np.arange(1, 8), vocab_size=64)
    np.testing.assert_allclose(chunk.logprobs, full_PV[np.arange(7), np.arange(1, 8)], rtol=1e-6)
    assert sidecar.stop() == 0
    assert not sidecar.port_file.exists()


def test_reflection_tells_the_schema_to_any_client(start_sidecar):
    sidecar = start_sidecar()
    with grpc.insecure_channel(sidecar.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
        ]
        services, file = stub.ServerReflectionInfo(iter(asked), timeout=60)
    names = {service.name for service in services.list_services_response.service}
    assert {SERVICE, CONTROL_SERVICE, "grpc.health.v1.Health"} <= names
    schema = descriptor_pb2.FileDescriptorProto.FromString(file.file_descriptor_response.file_descriptor_proto[0])
    methods = {method.name: method.server_streaming for method in schema.service[0].method}
    assert methods == {"ScoreSequences": True, "GetServerInfo": False}


def test_health_of_a_sleeping_teacher_says_whether_a_score_would_be_served(start_sidecar):
    for on_sleep, expected in (("wake", SERVING), ("refuse", NOT_SERVING)):
        sidecar = start_sidecar("--offload", "--on-sleep", on_sleep)
        with grpc.insecure_channel(sidecar.address) as channel:
            control = teacher_pb2_grpc.TeacherControlServiceStub(channel)
            control.Sleep(teacher_pb2.SleepRequest(), timeout=60)
            for service in ("", SERVICE, CONTROL_SERVICE):
                assert health_of(sidecar.address, service) == expected
            control.Wake(teacher_pb2.WakeRequest(), timeout=60)
            assert health_of(sidecar.address) == health_of(sidecar.address, CONTROL_SERVICE) == SERVING


def test_metrics_are_served_while_the_model_loads_and_count_calls(start_sidecar, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("secret\n")
    sidecar = start_sidecar("--metrics-port", 0, "--engine-arg", "load_s=2", "--token-file", tokens, wait=False)
    wait_until(lambda: "metrics at http://" in sidecar.log)
    url = re.search(r"metrics at (http://127\.0\.0\.1:\d+/metrics)", sidecar.log)[1]

    def values():
        with urllib.request.urlopen(url, timeout=60) as reply:
            lines = [line for line in reply.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    assert values()['jdistill_state{jdistill_state="loading"}'] == 1
    sidecar.wait_for_port()
    metrics_file = sidecar.port_file.with_name(sidecar.port_file.name + ".metrics")
    assert url == f"http://127.0.0.1:{int(metrics_file.read_text())}/metrics"
    with grpc.insecure_channel(sidecar.address) as channel:
        stub = teacher_pb2_grpc.TeacherServiceStub(channel)
        list(stub.ScoreSequences(request(3, 8), metadata=(("authorization", "Bearer secret"),)))
        for call in (lambda: list(stub.ScoreSequences(request())), lambda: channel.unary_unary("/a.B/strange")(b"")):
            with pytest.raises(grpc.RpcError):
                call()
    got = values()
    assert got['jdistill_calls_total{code="OK",method="ScoreSequences"}'] == 1
    assert got['jdistill_calls_total{code="UNAUTHENTICATED",method="ScoreSequences"}'] == 1
    assert got['jdistill_calls_total{code="UNAUTHENTICATED",method="other"}'] == 1
    assert got["jdistill_scored_sequences_total"] == 3 and got["jdistill_scored_positions_total"] == 21
    assert got['jdistill_state{jdistill_state="serving"}'] == 1
    assert not any("strange" in name for name in got), "unknown method names must not become time series"
    assert sidecar.stop() == 0
    assert not metrics_file.exists()


def test_metrics_are_served_beyond_loopback_only_with_insecure(start_sidecar, tmp_path):
    authority = Authority(tmp_path)
    everywhere = ("--host", "0.0.0.0", "--metrics-port", 0, *authority.server_flags())
    assert "metrics at http://127.0.0.1:" in start_sidecar(*everywhere).log
    assert "metrics at http://0.0.0.0:" in start_sidecar(*everywhere, "--insecure").log


def test_a_metrics_port_in_use_is_named_with_the_remedy_before_anything_is_loaded(start_sidecar):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        sidecar = start_sidecar("--metrics-port", port, "--engine-arg", "load_s=60", wait=False)
        assert sidecar.process.wait(60) == 2
    last = sidecar.log.strip().splitlines()[-1]
    assert f"metrics on 127.0.0.1:{port}: the port is in use" in last and "--metrics-port" in last


def test_a_json_log_has_one_object_per_line_even_for_errors(start_sidecar, tmp_path):
    authority = Authority(tmp_path)
    flags = ("--log-format", "json", "--engine-arg", "fail_on_token=63", *authority.server_flags())
    sidecar = start_sidecar(*flags)
    with grpc.insecure_channel(sidecar.address) as channel, pytest.raises(grpc.RpcError):
        teacher_pb2_grpc.TeacherServiceStub(channel).GetServerInfo(teacher_pb2.GetServerInfoRequest(), timeout=60)
    trusted = grpc.ssl_channel_credentials(pathlib.Path(authority.ca).read_bytes())
    with grpc.secure_channel(sidecar.address, trusted) as channel:
        stub = teacher_pb2_grpc.TeacherServiceStub(channel)
        good, bad = request(2), teacher_pb2.ScoreSequencesRequest(sequence_lengths=[2], token_ids=[1, 63])
        good.request_id = bad.request_id = 'run 7, step 3\n"'
        list(stub.ScoreSequences(good))
        with pytest.raises(grpc.RpcError):
            list(stub.ScoreSequences(bad))
    assert sidecar.stop() == 0
    lines = [json.loads(line) for line in sidecar.log.splitlines()]
    for line in lines:
        assert {"time", "level", "logger", "message"} <= line.keys()
        assert datetime.datetime.fromisoformat(line["time"]).utcoffset() == datetime.timedelta(0)
    (scored,) = (line for line in lines if line.get("code") == "OK" and line.get("method") == "ScoreSequences")
    assert scored["request_id"] == good.request_id and scored["level"] == "INFO"
    assert (scored["sequences"], scored["tokens"], scored["scored"]) == (2, 16, 14)
    assert any(line["level"] == "ERROR" and line.get("request_id") == bad.request_id for line in lines)
    assert lines[-1]["message"] == "ended"


def test_sigterm_under_load_finishes_running_calls_refuses_new_ones_and_exits_with_0(start_sidecar):
    sidecar = start_sidecar("--engine-arg", "delay_s=0.05")
    running = [BackgroundCall(sidecar.address, request(20)) for _ in range(4)]
    waiting = threading.Event()
    statuses = []

    def watch():
        with grpc.insecure_channel(sidecar.address) as channel:
            watcher = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            try:
                for reply in watcher:
                    statuses.append(reply.status)
                    waiting.set()
            except grpc.RpcError:
                pass  # the server has ended

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert waiting.wait(60)
    for call in running:
        assert call.first.wait(60)
    with grpc.insecure_channel(sidecar.address) as channel:
        stub = teacher_pb2_grpc.TeacherServiceStub(channel)
        stub.GetServerInfo(teacher_pb2.GetServerInfoRequest())
        sidecar.process.send_signal(signal.SIGTERM)
        wait_until(lambda: NOT_SERVING in statuses)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.ScoreSequences(request(), timeout=60))
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE and "shutting down" in caught.value.details()
    for call in running:
        call.thread.join(60)
        assert call.error is None and call.scored == set(range(20)), "a running call was cut off"
    assert sidecar.process.wait(60) == 0
    watcher.join(60)
    assert statuses == [SERVING, NOT_SERVING]


@pytest.mark.parametrize("ended_by", ["drain timeout", "second signal"])
def test_calls_that_take_too_long_to_drain_end_as_unavailable(start_sidecar, ended_by):
    timeout_s = 0.5 if ended_by == "drain timeout" else 60
    sidecar = start_sidecar("--engine-arg", "delay_s=0.2", "--drain-timeout-s", timeout_s)
    call = BackgroundCall(sidecar.address, request(500))
    assert call.first.wait(60)
    begin = time.monotonic()
    sidecar.process.send_signal(signal.SIGINT)
    if ended_by == "second signal":
        wait_until(lambda: "calls may finish within 60 s" in sidecar.log)
        assert sidecar.process.poll() is None
        sidecar.process.send_signal(signal.SIGINT)
    assert sidecar.process.wait(50) == 0  # the calls would take 100 s
    assert ended_by == "second signal" or time.monotonic() - begin >= timeout_s
    call.thread.join(60)
    assert call.error.code() == grpc.StatusCode.UNAVAILABLE and "before it finished" in call.error.details()
    assert len(call.scored) < 500


def test_a_signal_during_loading_ends_it_at_once(start_sidecar):
    sidecar = start_sidecar("--engine-arg", "load_s=100", wait=False)
    wait_until(lambda: "listening on" in sidecar.log)
    begin = time.monotonic()
    assert sidecar.stop() == 0
    assert time.monotonic() - begin < 50  # loading takes 100 s
    assert not sidecar.port_file.exists()


HANGING = """
import asyncio, multiprocessing, pathlib, sys, time
from jdistill.config import TeacherServerConfig
from jdistill.sidecar import server
from jdistill.sidecar.engines import fake

class Hanging(fake.FakeEngine):
    @classmethod
    async def create(cls, config):
        child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(100,))
        child.start()
        pathlib.Path(sys.argv[1]).write_text(str(child.pid))
        await asyncio.to_thread(time.sleep, 100)

if __name__ == "__main__":
    fake.FakeEngine = Hanging
    sys.exit(server.serve(TeacherServerConfig(engine="fake", model="m", port=0)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_engine_that_hangs_while_it_loads_is_left_behind_and_its_processes_are_killed(tmp_path):
    script, pid_file = tmp_path / "hanging.py", tmp_path / "pid"
    script.write_text(HANGING)
    process = subprocess.Popen([sys.executable, script, pid_file], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: pid_file.exists() and pid_file.read_text())
        child_pid = int(pid_file.read_text())
        assert alive(child_pid)
        process.terminate()
        assert process.wait(60) == 0  # it waits 5 s for the engine, which would take 100 s
        wait_until(lambda: not alive(child_pid), what="the child's end")
    finally:
        process.kill()
        process.wait()


def test_a_dead_engine_ends_the_sidecar_with_1_and_fails_running_calls(start_sidecar):
    sidecar = start_sidecar("--engine-arg", "die_on_token=63", "--engine-arg", "delay_s=0.02")
    running = BackgroundCall(sidecar.address, request(500, length=4))
    assert running.first.wait(60)
    deadly = teacher_pb2.ScoreSequencesRequest(sequence_lengths=[2], token_ids=[1, 63])
    with grpc.insecure_channel(sidecar.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(teacher_pb2_grpc.TeacherServiceStub(channel).ScoreSequences(deadly))
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert sidecar.process.wait(60) == 1
    running.thread.join(60)
    assert running.error.code() == grpc.StatusCode.UNAVAILABLE and "died" in running.error.details()
    assert "the engine has died" in sidecar.log


def test_a_port_in_use_is_named_with_the_remedy_before_anything_is_loaded(start_sidecar):
    first = start_sidecar()
    second = start_sidecar("--port", first.port, "--engine-arg", "load_s=600", wait=False)
    assert second.process.wait(120) == 2  # loading takes 600 s
    last = second.log.strip().splitlines()[-1]
    assert f"cannot listen on 127.0.0.1:{first.port}" in last and "in use" in last and "--port" in last
    assert "Traceback" not in second.log
    assert health_of(first.address) == SERVING, "the first one is not disturbed"


def test_a_port_is_free_again_as_soon_as_its_sidecar_has_ended(start_sidecar):
    first = start_sidecar()
    with grpc.insecure_channel(first.address) as channel:  # a connection, so that the port has been used
        teacher_pb2_grpc.TeacherServiceStub(channel).GetServerInfo(teacher_pb2.GetServerInfoRequest())
        first.process.kill()
        first.process.wait()
        second = start_sidecar("--port", first.port)
    assert health_of(second.address) == SERVING


PARENT = """
import subprocess, sys, time
child = subprocess.Popen(sys.argv[1:])
print(child.pid, flush=True)
time.sleep(100)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("when", ["serving", "loading"])
def test_a_sidecar_ends_when_its_parent_is_killed(tmp_path, when):
    port_file = tmp_path / "port"
    command = [sys.executable, "-m", "jdistill.cli", "teacher", "--engine", "fake", "--model", str(tmp_path)]
    command += ["--port", "0", "--port-file", str(port_file), "--exit-with-parent"]
    if when == "loading":
        command += ["--engine-arg", "load_s=100"]
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, *command], stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    child_pid = int(parent.stdout.readline())
    try:
        wait_until(lambda: port_file.exists() if when == "serving" else "listening" in log.read_text())
        assert alive(child_pid)
        parent.kill()
        parent.wait()
        parent.stdout.close()
        wait_until(lambda: not alive(child_pid), what="the child's end")
        assert not port_file.exists(), "it did not shut down in order"
    finally:
        if alive(child_pid):
            os.kill(child_pid, signal.SIGKILL)


def test_a_sidecar_whose_parent_died_before_it_started_ends_too(start_sidecar):
    sidecar = start_sidecar("--exit-with-parent", os.getpid())
    assert sidecar.stop() == 0
    orphan = start_sidecar("--exit-with-parent", 2**22 + 1, wait=False)  # above Linux's largest process id
    assert orphan.process.wait(60) == -signal.SIGTERM
    assert not orphan.port_file.exists()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"engine": "transformer"}, "no engine 'transformer'; did you mean transformers?"),
        ({"host": "0.0.0.0"}, "host 0.0.0.0: beyond loopback .* --insecure"),
        ({"host": "::"}, "host ::: beyond loopback"),
        ({"host": "teacher.example.org"}, "beyond loopback"),
        ({"host": "no.such.host.invalid", "insecure": True}, "'no.such.host.invalid' is not known"),
        ({"host": "192.0.2.1", "insecure": True}, "192.0.2.1:0: this machine has no such address; .* --host"),
        ({"port_file": "/no/such/directory/port"}, "there is no directory /no/such/directory"),
        (
            {"engine_args": {"vocabsize": 3}},
            "engine_args of the fake engine: unknown key vocabsize; did you mean vocab_size",
        ),
        ({"engine_args": {"vocab_size": "3"}}, "vocab_size: .*integer"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_with_its_remedy(fields, message):
    config = TeacherServerConfig(**({"engine": "fake", "model": "m", "port": 0} | fields))
    with pytest.raises(ConfigError, match=message):
        server.serve(config)


def test_insecure_allows_every_interface(start_sidecar):
    sidecar = start_sidecar("--host", "0.0.0.0", "--insecure")
    assert health_of(sidecar.address) == SERVING


def test_the_table_of_engines_imports_nothing_heavy():
    code = (
        "import sys, jdistill.sidecar.server, jdistill.commands.teacher;"
        "print([m for m in ('jax', 'flax', 'torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
    assert set(ENGINES) >= {"vllm", "transformers", "jax", "fake"}
