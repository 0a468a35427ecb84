"""Calls that no gRPC library would make: the sidecar keeps serving other clients, with the same engine."""

import concurrent.futures
import threading

import grpc
import pytest

from jdistill.client import TeacherClient
from tests.faults.harness import assert_scores, batch, good_calls, metrics
from tests.sidecar import processes
from tests.waiting import wait_until


def call_without_utf8(address):
    """Calls a method whose name is not UTF-8, which stops grpc.aio's server."""
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary(b"/jdi\xf3till.wire.v1.TeacherService/GetServerInfo")(b"", timeout=60, wait_for_ready=True)


def test_a_method_name_that_is_not_utf8_costs_only_a_retry(start_sidecar, connect):
    sidecar = start_sidecar("--engine-arg", "delay_s=0.01")
    client = connect(sidecar, batch_tokens=200, deadline_s=120.0)
    asked = batch(60)
    over = threading.Event()

    def keep_scoring():  # until the hostile calls are over, however slow the machine is: they always meet work
        while True:
            last = over.is_set()
            assert_scores(client.score(asked), asked)
            if last:
                return

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(keep_scoring)
        try:
            for num_before in (1, 8):
                wait_until(lambda num_before=num_before: good_calls(sidecar) >= num_before, 60)
                call_without_utf8(sidecar.address)
        finally:
            over.set()
        future.result(timeout=120)
    assert processes.health(sidecar.address) == processes.SERVING
    assert sidecar.log.count("listening again") == 2 and sidecar.log.count("loaded in") == 1
    # The work of the closed connections has left queue and engine.
    wait_until(lambda: not metrics(sidecar)["jdistill_open_calls"])
    assert metrics(sidecar)["jdistill_running_tokens"] == 0
    assert sidecar.stop() == 0


def test_many_hostile_calls_leave_no_resources_behind(start_sidecar):
    sidecar = start_sidecar()
    asked = batch(5)
    for _ in range(20):
        call_without_utf8(sidecar.address)
        with TeacherClient([sidecar.address], deadline_s=60.0) as client:
            assert_scores(client.score(asked), asked)
    assert sidecar.log.count("listening again") == 20
    assert sidecar.stop() == 0
