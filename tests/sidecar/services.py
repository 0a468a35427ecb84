"""Factories for tests: a service in this process over the fake engine, requests, and readers of its replies."""

import asyncio
import contextlib

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from jdistill.config import TeacherServerConfig
from jdistill.sidecar.engines import fake
from jdistill.sidecar.metrics import Metrics
from jdistill.sidecar.service import TeacherService
from jdistill.wire.v1 import teacher_pb2, teacher_pb2_grpc

VOCAB = 64


@contextlib.asynccontextmanager
async def serving(engine=fake.FakeEngine, *, config=None, states=None, **engine_args):
    """Yields (service, engine, channel) of a service in this process on a loopback port.

    `engine` is an engine or its class; `config` has further fields of TeacherServerConfig; every state is added to
    `states`.
    """
    config = TeacherServerConfig(
        engine="fake", model="some/tiny", engine_args=engine_args, max_sequence_length=4096, **(config or {})
    )
    if isinstance(engine, type):
        engine = engine(config)
    states = [] if states is None else states

    async def on_state(state):
        states.append(state)

    service = TeacherService("tiny", config, metrics=Metrics(), on_state=on_state)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(service.handlers())
    port = service.port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await service.lifecycle.serve(engine)
    options = [("grpc.max_receive_message_length", -1)]
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            yield service, engine, channel
    finally:
        await server.stop(None)
        await service.lifecycle.close()


class Gated(fake.FakeEngine):
    """Scores nothing until `gate` is set; `calls` are the lengths of the sequences of each call of `score`."""

    def __init__(self, config):
        super().__init__(config)
        self.gate, self.calls = asyncio.Event(), []

    async def score(self, sequences, **options):
        self.calls.append([len(sequence.token_ids) for sequence in sequences])
        async with contextlib.aclosing(super().score(sequences, **options)) as results:
            async for result in results:
                yield result

    async def _wait(self, sequence, ready_at):
        await self.gate.wait()
        return await super()._wait(sequence, ready_at)


async def until(condition):
    """Waits until `condition()` is true."""
    async with asyncio.timeout(100):
        while not condition():
            await asyncio.sleep(0.001)


def run(main):
    """Runs `main` like asyncio.run, for at most 120 s."""

    async def bounded():
        async with asyncio.timeout(120):
            return await main()

    return asyncio.run(bounded())


def request(*lengths, seed=0, **fields):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, sum(lengths)).tolist()
    return teacher_pb2.ScoreSequencesRequest(sequence_lengths=lengths, token_ids=ids, **fields)


async def score(channel, message, **call):
    return [chunk async for chunk in teacher_pb2_grpc.TeacherServiceStub(channel).ScoreSequences(message, **call)]


async def failure(channel, message, **call):
    """Returns (status code, message, ErrorInfo, BadRequest or None) of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await score(channel, message, **call)
    return explain(caught.value)


def explain(error):
    details = dict(error.trailing_metadata())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(details)
    assert status.code == error.code().value[0]
    info, bad = error_details_pb2.ErrorInfo(), None
    for detail in status.details:
        if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            detail.Unpack(bad)
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
    assert info.domain == "jdistill"
    return error.code(), error.details(), info, bad


def assemble(message, chunks):
    """Decodes {sequence: (logprobs, top_ids, top_logprobs, candidate_logprobs)} as the proto's comments describe."""
    found = {}
    for chunk in chunks:
        assert len(chunk.sequence_indexes) == len(chunk.first_targets) == len(chunk.target_counts)
        n = 0
        for b, first, count in zip(chunk.sequence_indexes, chunk.first_targets, chunk.target_counts, strict=True):
            columns = found.setdefault(b, ([], [], [], []))
            assert first == len(columns[0]), "pieces of a sequence come in order"
            k, c = message.top_k, message.candidate_count
            columns[0].extend(chunk.logprobs[n : n + count])
            columns[1].extend(chunk.top_ids[n * k : (n + count) * k])
            columns[2].extend(chunk.top_logprobs[n * k : (n + count) * k])
            columns[3].extend(chunk.candidate_logprobs[n * c : (n + count) * c])
            n += count
        assert n == len(chunk.logprobs)
    return found


def retry_delay_s(error):
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    for detail in status.details:
        retry = error_details_pb2.RetryInfo()
        if detail.Is(retry.DESCRIPTOR) and detail.Unpack(retry):
            return retry.retry_delay.ToMilliseconds() / 1000
    raise AssertionError("no RetryInfo")


Req = teacher_pb2.ScoreSequencesRequest


OFFLOAD = {"offload": True}


REFUSE = {"offload": True, "on_sleep": "refuse"}


def control_of(channel):
    stub = teacher_pb2_grpc.TeacherControlServiceStub(channel)

    async def sleep(**call):
        return (await stub.Sleep(teacher_pb2.SleepRequest(), **call)).state

    async def wake(**call):
        return (await stub.Wake(teacher_pb2.WakeRequest(), **call)).state

    return sleep, wake


async def control_failure(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return explain(caught.value)
