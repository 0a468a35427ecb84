"""The service over real sockets, with the public stubs: any client in any language sees just this."""

import asyncio
import contextlib
import dataclasses
import logging

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from jdistill.config import TeacherServerConfig
from jdistill.teacher.engines import fake
from jdistill.teacher.metrics import Metrics
from jdistill.teacher.service import TeacherService
from jdistill.wire import codec
from jdistill.wire.errors import UnavailableError
from jdistill.wire.v1 import teacher_pb2, teacher_pb2_grpc

VOCAB = 64


async def no_health(state):
    pass


@contextlib.asynccontextmanager
async def serving(engine=None, **engine_args):
    """(service, engine, channel) of a service in this process on a loopback port."""
    config = TeacherServerConfig(engine="fake", model="some/tiny", engine_args=engine_args, max_sequence_length=4096)
    engine = engine or fake.FakeEngine(config)
    service = TeacherService("tiny", config, metrics=Metrics(), on_state=no_health)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(service.handlers())
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await service.serve(engine)
    options = [("grpc.max_receive_message_length", -1)]
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            yield service, engine, channel
    finally:
        await server.stop(None)


def request(*lengths, seed=0, **fields):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, sum(lengths)).tolist()
    return teacher_pb2.ScoreSequencesRequest(sequence_lengths=lengths, token_ids=ids, **fields)


async def score(channel, message, **call):
    return [chunk async for chunk in teacher_pb2_grpc.TeacherServiceStub(channel).ScoreSequences(message, **call)]


async def failure(channel, message, **call):
    """(status code, message, ErrorInfo, BadRequest or None) of a call that must fail."""
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
    """{sequence: (logprobs, top_ids, top_logprobs, candidate_logprobs)} by the proto's own words, loop by loop."""
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


@pytest.mark.parametrize("max_chunk_bytes", [0, 700])
def test_scores_are_the_models_own_for_spans_with_holes_top_k_candidates_and_temperature(max_chunk_bytes):
    message = request(
        5, 300, 2, top_k=3, candidate_count=2, temperature=0.7, max_chunk_bytes=max_chunk_bytes,
        span_counts=[2, 1, 1], span_starts=[2, 4, 1, 1], span_ends=[3, 5, 300, 2],
    )  # fmt: skip
    num_scored = [2, 299, 1]
    message.candidate_ids.extend(np.random.default_rng(1).integers(0, VOCAB, 2 * sum(num_scored)).tolist())

    async def main():
        async with serving() as (_, engine, channel):
            return engine, await score(channel, message)

    engine, chunks = asyncio.run(main())
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


def test_chunks_hold_about_a_megabyte_and_many_small_sequences_share_one():
    async def main():
        async with serving() as (_, _, channel):
            small = await score(channel, request(*[20] * 500))
            big = await score(channel, request(*[1000] * 10, top_k=64))
            return small, big

    small, big = asyncio.run(main())
    assert sum(len(chunk.sequence_indexes) for chunk in small) == 500
    assert len(small) <= 5, "500 sequences that finish at once need no message each"
    sizes = [chunk.ByteSize() for chunk in big]
    assert sum(len(chunk.logprobs) for chunk in big) == 9990
    assert max(sizes) < (1 << 20) + 2000 and len(big) == 5  # a sequence is 515,480 bytes


def test_a_finished_sequence_does_not_wait_for_a_slow_one():
    async def main():
        async with serving(delay_s=0.2) as (_, _, channel):
            begin, times = asyncio.get_running_loop().time(), []
            async for _ in teacher_pb2_grpc.TeacherServiceStub(channel).ScoreSequences(request(5, 5, 5)):
                times.append(asyncio.get_running_loop().time() - begin)
            return times

    times = asyncio.run(main())
    assert len(times) == 3
    assert times[0] < 0.35 and times[2] >= 0.6


def test_the_engines_checksum_is_passed_on_and_not_computed_from_the_request():
    class OtherTokens(fake.FakeEngine):
        def _score(self, sequence, top_k, temperature, adapter):
            return dataclasses.replace(super()._score(sequence, top_k, temperature, adapter), token_crc=12345)

    async def main():
        engine = OtherTokens(TeacherServerConfig(engine="fake", model="m"))
        async with serving(engine) as (_, _, channel):
            return await score(channel, request(5))

    (chunk,) = asyncio.run(main())
    assert list(chunk.token_crcs) == [12345]


Req = teacher_pb2.ScoreSequencesRequest
BAD = {
    "an id outside the vocabulary": (Req(sequence_lengths=[3], token_ids=[1, 64, 2]), "token_ids", 0),
    "an id above int32": (Req(sequence_lengths=[3], token_ids=[1, 2**32 - 1, 2]), "token_ids", 0),
    "one token": (Req(sequence_lengths=[3, 1], token_ids=[1, 2, 3, 4]), "sequence_lengths", 1),
    "too long": (request(5, 4097), "token_ids", 1),
    "lengths that do not add up": (Req(sequence_lengths=[3], token_ids=[1, 2]), "token_ids", None),
    "top_k over the vocabulary": (request(5, top_k=65), "top_k", None),
    "temperature 0": (request(5, temperature=0.0), "temperature", None),
    "temperature NaN": (request(5, temperature=float("nan")), "temperature", None),
    "span from 0": (request(5, span_counts=[1], span_starts=[0], span_ends=[3]), "spans", 0),
    "span beyond the end": (request(5, span_counts=[1], span_starts=[1], span_ends=[6]), "spans", 0),
    "too few candidates": (request(5, candidate_count=2, candidate_ids=[1, 2, 3]), "candidate_ids", None),
    "a candidate outside": (request(2, candidate_count=2, candidate_ids=[1, 64]), "candidate_ids", 0),
}


def test_bad_requests_are_refused_with_field_and_sequence_before_the_engine_sees_them():
    async def main():
        async with serving() as (service, engine, channel):
            engine.score = None  # calling it would be a TypeError, an INTERNAL error
            for name, (message, field, sequence) in BAD.items():
                code, text, info, bad = await failure(channel, message)
                assert code == grpc.StatusCode.INVALID_ARGUMENT, name
                assert info.reason == "INVALID_REQUEST", name
                assert info.metadata["field"] == field, name
                assert info.metadata.get("sequence") == (None if sequence is None else str(sequence)), name
                assert bad.field_violations[0].field.endswith(field) and text, name
            assert not service.dead.is_set()

    asyncio.run(main())


def test_what_is_no_request_at_all_is_an_invalid_argument_without_pythons_words():
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

    asyncio.run(main())


def test_another_fingerprint_or_model_is_refused_by_name_and_the_right_ones_pass():
    async def main():
        async with serving() as (_, engine, channel):
            code, text, info, _ = await failure(channel, request(5, expected_fingerprint="00" * 32))
            assert (code, info.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "FINGERPRINT_MISMATCH")
            assert engine.info.fingerprint[:16] in text
            code, text, info, _ = await failure(channel, request(5, model="huge"))
            assert (code, info.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
            assert "'huge'" in text and "'tiny'" in text
            assert await score(channel, request(5, model="tiny", expected_fingerprint=engine.info.fingerprint))

    asyncio.run(main())


def test_what_the_engine_cannot_do_is_unimplemented_with_the_remedy():
    async def main():
        async with serving(any_temperature=False, max_top_k=0, max_candidate_count=0) as (_, _, channel):
            for message, remedy in (
                (request(5, temperature=0.5), "temperature 1"),
                (request(5, top_k=2), "top_k = 0"),
                (request(2, candidate_count=1, candidate_ids=[1]), "another engine"),
            ):
                code, text, info, _ = await failure(channel, message)
                assert (code, info.reason) == (grpc.StatusCode.UNIMPLEMENTED, "UNSUPPORTED")
                assert remedy in text

    asyncio.run(main())


@pytest.mark.parametrize(
    "field, spoil",
    [
        ("logprobs", lambda x: np.where(np.arange(len(x)) == 2, np.nan, x)),
        ("logprobs", lambda x: np.where(np.arange(len(x)) == 2, -np.inf, x)),
        ("logprobs", lambda x: np.where(np.arange(len(x)) == 2, np.float32(1e-6), x)),
        ("logprobs", lambda x: x[:-1]),
        ("top_ids", lambda x: x + VOCAB),
        ("top_ids", lambda x: None),
        ("top_logprobs", lambda x: x[:, :1]),
        ("candidate_logprobs", lambda x: x * np.float32("nan")),
    ],
)
def test_what_an_engine_returns_is_checked_before_it_leaves(field, spoil):
    class Spoiled(fake.FakeEngine):
        def _score(self, sequence, top_k, temperature, adapter):
            scores = super()._score(sequence, top_k, temperature, adapter)
            return dataclasses.replace(scores, **{field: spoil(getattr(scores, field))})

    async def main():
        async with serving(Spoiled(TeacherServerConfig(engine="fake", model="m"))) as (_, _, channel):
            message = request(6, top_k=2, candidate_count=1, candidate_ids=[1, 2, 3, 4, 5])
            code, text, info, _ = await failure(channel, message)
            assert (code, info.reason) == (grpc.StatusCode.INTERNAL, "ENGINE_RESULT")
            assert field in text and "sequence 0" in text

    asyncio.run(main())


@pytest.mark.parametrize("order", [[0, 1, 1], [0, 1], [0, 1, 2, 3]])
def test_an_engine_that_scores_twice_too_little_or_too_much_is_found_out(order):
    class Miscounting(fake.FakeEngine):
        async def score(self, sequences, *, top_k=0, temperature=1.0, adapter=""):
            for index in order:
                yield index, self._score(sequences[min(index, 2)], top_k, temperature, adapter)

    async def main():
        async with serving(Miscounting(TeacherServerConfig(engine="fake", model="m"))) as (_, _, channel):
            code, _, info, _ = await failure(channel, request(5, 5, 5))
            assert (code, info.reason) == (grpc.StatusCode.INTERNAL, "ENGINE_RESULT")

    asyncio.run(main())


def test_an_unexpected_exception_is_internal_and_the_log_has_its_traceback_but_no_tokens(caplog):
    caplog.set_level(logging.DEBUG, "jdistill")

    async def main():
        async with serving(fail_on_token=33) as (_, _, channel):
            message = Req(sequence_lengths=[4], token_ids=[1, 51, 33, 2], request_id="step 7")
            code, text, info, _ = await failure(channel, message)
            assert (code, info.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
            assert "RuntimeError" in text and "log" in text
            await failure(channel, Req(sequence_lengths=[4], token_ids=[1, 51, 99, 2]))
            # The next request is answered as if nothing had been.
            assert await score(channel, Req(sequence_lengths=[4], token_ids=[1, 51, 34, 2]))

    asyncio.run(main())
    assert "step 7" in caplog.text and "failed as it was told to" in caplog.text and "Traceback" in caplog.text
    assert "51" not in "".join(record.getMessage().partition("Traceback")[0] for record in caplog.records)


def test_a_dead_engine_is_unavailable_for_good():
    async def main():
        async with serving(die_on_token=13) as (service, _, channel):
            code, _, info, _ = await failure(channel, Req(sequence_lengths=[2], token_ids=[1, 13]))
            assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")
            assert service.dead.is_set()
            code, _, info, _ = await failure(channel, request(5))
            assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")

    asyncio.run(main())


@pytest.mark.parametrize("how", ["cancelled", "deadline", "client gone"])
def test_a_call_that_nobody_waits_for_closes_the_engines_iterator_at_once(how):
    async def main():
        async with serving(delay_s=0.05) as (service, engine, channel):
            stub = teacher_pb2_grpc.TeacherServiceStub(channel)
            call = stub.ScoreSequences(request(*[5] * 200), timeout=0.2 if how == "deadline" else None)
            await call.read()
            if how == "cancelled":
                call.cancel()
            elif how == "client gone":
                await channel.close()
            else:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    while await call.read() is not grpc.aio.EOF:
                        pass
                assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            await asyncio.wait_for(service.wait_until_idle(), 1)
            assert engine.num_cancelled == 1

    asyncio.run(main())


def test_before_the_engine_is_there_and_while_it_drains_calls_are_unavailable_with_a_delay_to_retry():
    async def main():
        async with serving(delay_s=0.05) as (service, engine, channel):
            await service.refuse(UnavailableError("teacher 'tiny' is shutting down"))
            code, text, info, _ = await failure(channel, request(5))
            assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
            assert "shutting down" in text
            stub = teacher_pb2_grpc.TeacherServiceStub(channel)
            info = await stub.GetServerInfo(teacher_pb2.GetServerInfoRequest())
            assert info.state == teacher_pb2.SERVER_STATE_DRAINING and info.models[0].model == "tiny"
            await service.serve(engine)
            running = asyncio.create_task(score(channel, request(*[5] * 10)))
            await asyncio.sleep(0.2)
            service.fail_running(UnavailableError("teacher 'tiny' has shut down before it finished"))
            with pytest.raises(grpc.aio.AioRpcError, match="before it finished"):
                await running
            assert engine.num_cancelled == 1

    asyncio.run(main())


def test_server_info_is_complete():
    async def main():
        async with serving() as (_, engine, channel):
            stub = teacher_pb2_grpc.TeacherServiceStub(channel)
            return engine, await stub.GetServerInfo(teacher_pb2.GetServerInfoRequest())

    engine, info = asyncio.run(main())
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

    asyncio.run(main())
