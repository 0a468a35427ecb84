"""The gRPC methods over real sockets, with the public stubs: clients in any language see exactly this."""

import asyncio
import dataclasses

import grpc
import numpy as np
import pytest

from jdistill.config import TeacherServerConfig
from jdistill.sidecar.engines import fake
from jdistill.sidecar.metrics import Metrics
from jdistill.sidecar.service import TeacherService
from jdistill.wire import codec
from jdistill.wire.errors import UnavailableError
from jdistill.wire.types import ServerState
from jdistill.wire.v1 import teacher_pb2, teacher_pb2_grpc
from tests.sidecar.services import VOCAB, assemble, explain, failure, request, run, score, serving


@pytest.mark.parametrize("max_chunk_bytes", [0, 700])
def test_scores_equal_the_models_for_spans_with_holes_top_k_candidates_and_temperature(max_chunk_bytes):
    message = request(
        5, 300, 2, top_k=3, candidate_count=2, temperature=0.7, max_chunk_bytes=max_chunk_bytes,
        span_counts=[2, 1, 1], span_starts=[2, 4, 1, 1], span_ends=[3, 5, 300, 2],
    )  # fmt: skip
    num_scored = [2, 299, 1]
    message.candidate_ids.extend(np.random.default_rng(1).integers(0, VOCAB, 2 * sum(num_scored)).tolist())

    async def main():
        async with serving() as (_, engine, channel):
            return engine, await score(channel, message)

    engine, chunks = run(main)
    assert len(chunks) == 1 if max_chunk_bytes == 0 else len(chunks) > 10
    assert all(chunk.ByteSize() < 1000 for chunk in chunks) or max_chunk_bytes == 0
    found = assemble(message, chunks)
    ids = np.array(message.token_ids)
    starts = np.array([0, 5, 305])
    positions = [np.array([2, 4]), np.arange(1, 300), np.array([1])]
    candidates = np.split(np.array(message.candidate_ids).reshape(-1, 2), np.cumsum(num_scored)[:-1])
    for b in range(3):
        tokens = ids[starts[b] : starts[b] + message.sequence_lengths[b]]
        temperature = float(np.float32(0.7))
        full_PV = fake.logprobs_PV(tokens, positions[b], vocab_size=VOCAB, temperature=temperature)
        assert np.allclose(np.exp(full_PV).sum(1), 1)
        logprobs, top_ids, top_logprobs, candidate_logprobs = map(np.array, found[b])
        rows = np.arange(len(positions[b]))
        np.testing.assert_allclose(logprobs, full_PV[rows, tokens[positions[b]]], rtol=1e-6)
        expected_ids = np.argsort(-full_PV, axis=1)[:, :3]
        np.testing.assert_array_equal(top_ids.reshape(-1, 3), expected_ids)
        np.testing.assert_allclose(top_logprobs.reshape(-1, 3), -np.sort(-full_PV, axis=1)[:, :3], rtol=1e-6)
        expected = np.take_along_axis(full_PV, candidates[b], axis=1)
        np.testing.assert_allclose(candidate_logprobs.reshape(-1, 2), expected, rtol=1e-6)
    for chunk in chunks:
        assert (chunk.model, chunk.fingerprint) == ("tiny", engine.info.fingerprint)
        assert chunk.temperature == np.float32(0.7)
        crcs = [
            codec.token_crc(ids[starts[b] : starts[b] + message.sequence_lengths[b]]) for b in chunk.sequence_indexes
        ]
        assert list(chunk.token_crcs) == crcs


def test_the_engines_checksum_is_passed_on_and_not_computed_from_the_request():
    class OtherTokens(fake.FakeEngine):
        def _score(self, sequence, top_k, temperature, adapter):
            return dataclasses.replace(super()._score(sequence, top_k, temperature, adapter), token_crc=12345)

    async def main():
        async with serving(OtherTokens) as (_, _, channel):
            return await score(channel, request(5))

    (chunk,) = run(main)
    assert list(chunk.token_crcs) == [12345]


def test_unparsable_bytes_are_an_invalid_argument_without_python_text():
    async def main():
        async with serving() as (_, _, channel):
            for method in (codec.SCORE_METHOD, codec.INFO_METHOD):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    if method == codec.SCORE_METHOD:
                        await channel.unary_stream(method)(b"\xff\xff\xff garbage").read()
                    else:
                        await channel.unary_unary(method)(b"\xff\xff\xff garbage")
                code, text, info, _ = explain(caught.value)
                assert code == grpc.StatusCode.INVALID_ARGUMENT and info.reason == "INVALID_REQUEST"
                assert "not a jdistill.wire.v1" in text and "Traceback" not in text and "Exception" not in text

    run(main)


def test_server_info_is_complete():
    async def main():
        async with serving() as (_, engine, channel):
            stub = teacher_pb2_grpc.TeacherServiceStub(channel)
            return engine, await stub.GetServerInfo(teacher_pb2.GetServerInfoRequest())

    engine, info = run(main)
    assert (info.engine, info.engine_version) == ("fake", engine.version)
    assert info.instance_id and info.server_version and info.max_request_bytes > 4 << 20
    model = info.models[0]
    assert (model.model, model.fingerprint) == ("tiny", engine.info.fingerprint)
    assert (model.vocab_size, model.max_sequence_length, model.max_top_k, model.max_candidate_count) == (
        64,
        4096,
        64,
        64,
    )
    assert model.any_temperature and model.dtype == "float32"


def test_concurrent_calls_each_get_their_own_scores():
    async def main():
        async with serving(delay_s=0.001) as (_, _, channel):
            messages = [request(7, 9, 11, seed=seed) for seed in range(20)]
            replies = await asyncio.gather(*(score(channel, message) for message in messages))
            for message, chunks in zip(messages, replies, strict=True):
                tokens = np.array(message.token_ids)[7:16]
                full_PV = fake.logprobs_PV(tokens, np.arange(1, 9), vocab_size=VOCAB)
                found = assemble(message, chunks)[1][0]
                np.testing.assert_allclose(found, full_PV[np.arange(8), tokens[1:]], rtol=1e-6)

    run(main)


def test_each_adapter_is_scored_by_itself_and_named_in_info_reply_and_error():
    async def main():
        async with serving(config={"adapters": {"french": "a", "german": "b"}}) as (_, _, channel):
            info = await teacher_pb2_grpc.TeacherServiceStub(channel).GetServerInfo(teacher_pb2.GetServerInfoRequest())
            assert [model.model for model in info.models] == ["tiny", "french", "german"]
            assert [model.base_model for model in info.models] == ["", "tiny", "tiny"]
            fingerprints = {model.model: model.fingerprint for model in info.models}
            assert len(set(fingerprints.values())) == 3
            tokens = np.array(request(9).token_ids)
            for name, adapter in (("", ""), ("tiny", ""), ("french", "french"), ("german", "german")):
                served = name or "tiny"
                expected = fingerprints[served]
                (chunk,) = await score(channel, request(9, model=name, expected_fingerprint=expected))
                assert (chunk.model, chunk.fingerprint) == (served, expected)
                full_PV = fake.logprobs_PV(tokens, np.arange(1, 9), vocab_size=VOCAB, adapter=adapter)
                np.testing.assert_allclose(chunk.logprobs, full_PV[np.arange(8), tokens[1:]], rtol=1e-5)
            code, text, info, _ = await failure(channel, request(9, model="dutch"))
            assert (code, info.metadata["field"]) == (grpc.StatusCode.NOT_FOUND, "model")
            assert all(repr(name) in text for name in ("dutch", "tiny", "french", "german"))
            code, _, info, _ = await failure(
                channel, request(9, model="french", expected_fingerprint=fingerprints["tiny"])
            )
            assert info.reason == "FINGERPRINT_MISMATCH"

    run(main)


def test_info_is_answered_in_every_state():
    async def main():
        config = TeacherServerConfig(engine="fake", model="some/tiny", offload=True, max_queued_tokens=777)
        service = TeacherService("tiny", config, metrics=Metrics(), on_state=lambda _: asyncio.sleep(0))
        server = grpc.aio.server()
        server.add_generic_rpc_handlers(service.handlers())
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = teacher_pb2_grpc.TeacherServiceStub(channel)
            control = teacher_pb2_grpc.TeacherControlServiceStub(channel)

            async def info():
                return await stub.GetServerInfo(teacher_pb2.GetServerInfoRequest())

            loading = await info()
            assert loading.state == ServerState.LOADING and not loading.models and not loading.can_sleep
            assert (loading.engine, loading.max_queued_tokens, loading.wake_on_score) == ("fake", 777, True)
            code, text, _, _ = await failure(channel, request(5))
            assert code == grpc.StatusCode.UNAVAILABLE and "loading" in text
            with pytest.raises(grpc.aio.AioRpcError, match="loading"):
                await control.Sleep(teacher_pb2.SleepRequest())
            await service.lifecycle.serve(fake.FakeEngine(config))
            for change, state in (
                (lambda: asyncio.sleep(0), ServerState.SERVING),
                (lambda: control.Sleep(teacher_pb2.SleepRequest()), ServerState.SLEEPING),
                (lambda: control.Wake(teacher_pb2.WakeRequest()), ServerState.SERVING),
                (lambda: service.lifecycle.refuse(UnavailableError("shutting down")), ServerState.DRAINING),
            ):
                await change()
                now = await info()
                assert now.state == state == service.lifecycle.state and now.can_sleep and now.models[0].model == "tiny"
                assert now.instance_id == loading.instance_id
                assert codec.decode_server_info(now.SerializeToString()).state is state
        await server.stop(None)
        await service.lifecycle.close()

    run(main)
