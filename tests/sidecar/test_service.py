"""The service over real sockets, with the public stubs: any client in any language sees just this."""

import asyncio
import contextlib
import dataclasses
import gc
import logging
import re
import types

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill.config import TeacherServerConfig
from jdistill.sidecar import service as service_module
from jdistill.sidecar.engines import fake
from jdistill.sidecar.metrics import Metrics
from jdistill.sidecar.service import TeacherService
from jdistill.wire import codec
from jdistill.wire.errors import EngineDeadError, UnavailableError
from jdistill.wire.types import SequenceToScore, ServerState
from jdistill.wire.v1 import teacher_pb2, teacher_pb2_grpc

VOCAB = 64


@contextlib.asynccontextmanager
async def serving(engine=fake.FakeEngine, *, config=None, states=None, **engine_args):
    """(service, engine, channel) of a service in this process on a loopback port.

    `engine` is one, or a class of them; `config` are further fields of TeacherServerConfig; `states` gets every state.
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
    await service.serve(engine)
    options = [("grpc.max_receive_message_length", -1)]
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            yield service, engine, channel
    finally:
        await server.stop(None)
        await service.close()


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
    """Returns when `condition()` is true; for what the service does by itself."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def run(main):
    """asyncio.run, bounded."""

    async def bounded():
        async with asyncio.timeout(30):
            return await main()

    return asyncio.run(bounded())


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


def test_chunks_hold_about_a_megabyte_and_many_small_sequences_share_one():
    async def main():
        async with serving() as (_, _, channel):
            small = await score(channel, request(*[20] * 500))
            big = await score(channel, request(*[1000] * 10, top_k=64))
            return small, big

    small, big = run(main)
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

    times = run(main)
    assert len(times) == 3
    assert times[0] < 0.35 and times[2] >= 0.6


def test_the_engines_checksum_is_passed_on_and_not_computed_from_the_request():
    class OtherTokens(fake.FakeEngine):
        def _score(self, sequence, top_k, temperature, adapter):
            return dataclasses.replace(super()._score(sequence, top_k, temperature, adapter), token_crc=12345)

    async def main():
        async with serving(OtherTokens) as (_, _, channel):
            return await score(channel, request(5))

    (chunk,) = run(main)
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

    run(main)


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

    run(main)


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

    run(main)


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

    run(main)


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
        async with serving(Spoiled) as (_, _, channel):
            message = request(6, top_k=2, candidate_count=1, candidate_ids=[1, 2, 3, 4, 5])
            code, text, info, _ = await failure(channel, message)
            assert (code, info.reason) == (grpc.StatusCode.INTERNAL, "ENGINE_RESULT")
            assert field in text and "sequence 0" in text

    run(main)


@pytest.mark.parametrize("order", [[0, 1, 1], [0, 1], [0, 1, 2, 3]])
def test_an_engine_that_scores_twice_too_little_or_too_much_is_found_out(order):
    class Miscounting(fake.FakeEngine):
        async def score(self, sequences, *, top_k=0, temperature=1.0, adapter=""):
            for index in order:
                yield index, self._score(sequences[min(index, 2)], top_k, temperature, adapter)

    async def main():
        async with serving(Miscounting) as (_, _, channel):
            code, _, info, _ = await failure(channel, request(5, 5, 5))
            assert (code, info.reason) == (grpc.StatusCode.INTERNAL, "ENGINE_RESULT")

    run(main)


def test_an_unexpected_exception_is_internal_and_the_log_has_its_traceback_but_no_tokens(caplog):
    caplog.set_level(logging.DEBUG, "jdistill")

    async def main():
        async with serving(fail_on_token=33, vocab_size=90_000) as (_, _, channel):
            message = Req(sequence_lengths=[4], token_ids=[1, 77_777, 33, 2], request_id="step 7")
            code, text, info, _ = await failure(channel, message)
            assert (code, info.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
            assert "RuntimeError" in text and "log" in text
            await failure(channel, Req(sequence_lengths=[4], token_ids=[1, 77_777, 90_000, 2]))
            # The next request is answered as if nothing had been.
            assert await score(channel, Req(sequence_lengths=[4], token_ids=[1, 77_777, 34, 2]))

    run(main)
    assert "step 7" in caplog.text and "failed as it was told to" in caplog.text and "Traceback" in caplog.text
    assert "77777" not in "".join(record.getMessage().partition("Traceback")[0] for record in caplog.records)


def test_a_dead_engine_is_unavailable_for_good():
    async def main():
        async with serving(die_on_token=13) as (service, _, channel):
            code, _, info, _ = await failure(channel, Req(sequence_lengths=[2], token_ids=[1, 13]))
            assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")
            assert service.dead.is_set()
            code, _, info, _ = await failure(channel, request(5))
            assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")

    run(main)


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

    run(main)


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


# ---- models ----


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
            await service.serve(fake.FakeEngine(config))
            for change, state in (
                (lambda: asyncio.sleep(0), ServerState.SERVING),
                (lambda: control.Sleep(teacher_pb2.SleepRequest()), ServerState.SLEEPING),
                (lambda: control.Wake(teacher_pb2.WakeRequest()), ServerState.SERVING),
                (lambda: service.refuse(UnavailableError("shutting down")), ServerState.DRAINING),
            ):
                await change()
                now = await info()
                assert now.state == state == service.state and now.can_sleep and now.models[0].model == "tiny"
                assert now.instance_id == loading.instance_id
                assert codec.decode_server_info(now.SerializeToString()).state is state
        await server.stop(None)
        await service.close()

    run(main)


# ---- admission ----


@given(st.lists(st.integers(2, 90), min_size=1, max_size=30), st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_a_call_reaches_the_engine_as_one_or_as_the_same_pieces_each_time_with_the_same_scores(lengths, seed):
    async def main():
        message = request(*lengths, seed=seed, top_k=2)
        answers, works = [], []
        for max_running_tokens in (100, 100, 10_000):
            config = {"max_running_tokens": max_running_tokens}
            async with serving(Gated, config=config) as (_, engine, channel):
                engine.gate.set()
                answers.append(assemble(message, await score(channel, message)))
                works.append(engine.calls)
        assert works[0] == works[1] and works[2] == [lengths]
        assert [n for work in works[0] for n in work] == lengths
        if sum(lengths) <= 100:
            assert works[0] == [lengths]
        assert answers[0] == answers[1] == answers[2]

    run(main)


def test_a_request_without_sequences_is_answered_and_stands_in_nobodys_way():
    async def main():
        async with serving() as (_, _, channel):
            assert await score(channel, request()) == []
            assert len(await score(channel, request(5))) == 1

    run(main)


def test_over_the_limit_a_call_is_turned_away_at_once_with_a_delay_and_what_waits_is_served():
    async def main():
        config = {"max_running_tokens": 100, "max_queued_tokens": 150}
        async with serving(Gated, config=config) as (service, engine, channel):
            calls = [asyncio.create_task(score(channel, request(100))) for _ in range(2)]
            await until(lambda: service.num_calls == 2)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await score(channel, request(60))
            code, text, info, _ = explain(caught.value)
            assert (code, info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
            assert "150" in text and "60" in text
            assert retry_delay_s(caught.value) > 0
            calls.append(asyncio.create_task(score(channel, request(50))))  # this much fits
            await until(lambda: service.num_calls == 3)
            assert engine.calls == [[100]]
            engine.gate.set()
            await asyncio.gather(*calls)
            assert engine.calls == [[100], [100], [50]]
            value = service._metrics.registry.get_sample_value
            labels = {"method": "ScoreSequences", "code": "RESOURCE_EXHAUSTED"}
            assert value("jdistill_calls_total", labels) == 1
            assert value("jdistill_scored_tokens_total") == 250 and value("jdistill_scored_positions_total") == 247
            assert value("jdistill_queue_duration_seconds_count") == 3
            assert value("jdistill_queued_tokens") == value("jdistill_running_tokens") == 0

    run(main)


def retry_delay_s(error):
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    for detail in status.details:
        retry = error_details_pb2.RetryInfo()
        if detail.Is(retry.DESCRIPTOR) and detail.Unpack(retry):
            return retry.retry_delay.ToMilliseconds() / 1000
    raise AssertionError("no RetryInfo")


def test_a_sequence_that_is_scored_makes_room_before_its_call_is_over():
    async def main():
        async with serving(hang_on_token=63, config={"max_running_tokens": 30}) as (service, _, channel):
            # The last one first; the other never ends.
            message = Req(sequence_lengths=[20, 10], token_ids=[63] * 20 + [1] * 10)
            hanging = teacher_pb2_grpc.TeacherServiceStub(channel).ScoreSequences(message)
            await hanging.read()
            assert service._admission.running_tokens == 20
            assert await score(channel, Req(sequence_lengths=[10], token_ids=[2] * 10))
            hanging.cancel()

    run(main)


def test_clients_share_by_the_name_they_give_and_without_one_by_address():
    async def main():
        async with serving(Gated, config={"max_running_tokens": 30}) as (service, engine, channel):
            calls = []

            async def begin(length, *metadata):
                calls.append(asyncio.create_task(score(channel, request(length), metadata=metadata)))
                await until(lambda: service.num_calls == len(calls))

            await begin(30)
            for length in (21, 22, 23):
                await begin(length)
            await begin(24, ("jdistill-client", "another"))
            await begin(25, ("jdistill-client", "another"))
            await begin(26, ("jdistill-client", "another"))
            engine.gate.set()
            await asyncio.gather(*calls)
            # Who has had less goes next: the address has had 30; another 24, then 49; the address 51; another 75.
            assert [length for (length,) in engine.calls] == [30, 24, 25, 21, 26, 22, 23]

    run(main)


def test_a_call_whose_deadline_passes_in_the_queue_never_reaches_the_engine():
    async def main():
        async with serving(Gated, config={"max_running_tokens": 30}) as (service, engine, channel):
            running = asyncio.create_task(score(channel, request(30)))
            await until(lambda: engine.calls == [[30]])
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await score(channel, request(20), timeout=0.1)
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: service.num_calls == 1)
            assert service._admission.queued_tokens == 0
            value = service._metrics.registry.get_sample_value
            labels = {"method": "ScoreSequences", "code": "DEADLINE_EXCEEDED"}
            assert value("jdistill_calls_total", labels) == 1 and value("jdistill_cancelled_calls_total") == 0
            engine.gate.set()
            await running
            assert engine.calls == [[30]]

    run(main)


@pytest.mark.parametrize("how", ["cancelled", "client gone"])
def test_a_vanished_client_leaves_queue_and_engine_within_milliseconds(how):
    async def main():
        async with serving(Gated, config={"max_running_tokens": 30}) as (service, engine, channel):
            async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as doomed:
                calls = [asyncio.create_task(score(doomed, request(10, 20, 20, 10))) for _ in range(3)]
                await until(lambda: service.num_calls == 3)
                assert (service._admission.running_tokens, service._admission.queued_tokens) == (30, 150)
                begin = asyncio.get_running_loop().time()
                if how == "cancelled":
                    for call in calls:
                        call.cancel()
                else:
                    await doomed.close()
                await service.wait_until_idle()
                assert asyncio.get_running_loop().time() - begin < 0.5, "measured: 5 ms"
                await asyncio.gather(*calls, return_exceptions=True)
            assert service._admission.running_tokens == service._admission.queued_tokens == 0
            assert engine.num_cancelled == len(engine.calls)
            value = service._metrics.registry.get_sample_value
            assert value("jdistill_cancelled_calls_total") == 3
            engine.gate.set()
            assert await score(channel, request(5))

    run(main)


def test_a_client_that_leaves_with_all_of_its_scores_has_cancelled_nothing(monkeypatch):
    send = service_module.TeacherService._send

    async def send_and_dawdle(*args):
        await send(*args)
        await asyncio.sleep(60)  # the loop is busy, or the client far away: the end of the stream is not there yet

    monkeypatch.setattr(service_module.TeacherService, "_send", send_and_dawdle)

    async def main():
        async with serving() as (service, _, channel):
            call = teacher_pb2_grpc.TeacherServiceStub(channel).ScoreSequences(request(5))
            assert len((await call.read()).logprobs) == 4
            call.cancel()
            await until(lambda: service.num_calls == 0)
            value = service._metrics.registry.get_sample_value
            assert value("jdistill_calls_total", {"method": "ScoreSequences", "code": "OK"}) == 1
            assert value("jdistill_cancelled_calls_total") == 0

    run(main)


def test_a_client_that_does_not_read_gets_no_further_pieces_and_keeps_nobody_else_waiting(monkeypatch):
    monkeypatch.setattr(service_module, "MAX_UNSENT_BYTES", 1 << 20)

    async def main():
        async with serving(Gated, config={"max_running_tokens": 4000}) as (_, engine, channel):
            engine.gate.set()
            stub = teacher_pb2_grpc.TeacherServiceStub(channel)
            message = request(*[1000] * 100, top_k=64)  # 100 x 0.5 MB; gRPC itself buffers some of that
            call = stub.ScoreSequences(message, metadata=[("jdistill-client", "slow")])
            await call.read()
            handed = -1
            while handed != (handed := len(engine.calls)):
                await asyncio.sleep(0.3)
            assert len(engine.calls) < 40, "of 50 pieces"
            assert await score(channel, request(7)), "another client is served meanwhile"
            scored = 0
            while (chunk := await call.read()) is not grpc.aio.EOF:
                scored += len(chunk.logprobs)
            assert scored > 95 * 999 and sum(len(c) for c in engine.calls) == 101

    run(main)


@pytest.mark.parametrize("ends_with", ["overload", "invalid", "engine error", "cancelled"])
def test_the_memory_of_a_call_that_fails_is_free_without_the_garbage_collector(ends_with):
    def requests_in_memory():
        objects = gc.get_objects()
        # type() rather than isinstance(), which asks every object for __class__: some of other libraries warn then.
        big = sum(type(o) is service_module._Call and len(o.request) > 1000 for o in objects)
        frames = [o for o in objects if type(o) is types.FrameType and "service" in o.f_code.co_filename]
        big += sum(len(frame.f_locals.get("request") or b"") > 1000 for frame in frames if "self" in frame.f_locals)
        return big + sum(type(o) is SequenceToScore and len(o.token_ids) == 3000 for o in objects)

    async def main():
        config = {"max_running_tokens": 20, "max_queued_tokens": 20}
        async with serving(hang_on_token=63, fail_on_token=62, config=config) as (service, _, channel):
            hang = Req(sequence_lengths=[20], token_ids=[63] * 20)
            busy = 2 if ends_with == "overload" else 0
            running = [asyncio.create_task(score(channel, hang)) for _ in range(busy)]
            await until(lambda: service.num_calls == busy)
            token = {"engine error": 62, "cancelled": 63}.get(ends_with, 1)
            message = Req(sequence_lengths=[3000], token_ids=[token] * 3000, top_k=65 if ends_with == "invalid" else 0)
            gc.collect()
            gc.disable()
            try:
                for _ in range(10):
                    with pytest.raises((grpc.aio.AioRpcError, TimeoutError)):
                        await asyncio.wait_for(score(channel, message), 0.05 if ends_with == "cancelled" else 5)
                await until(lambda: service.num_calls == busy)
                await asyncio.sleep(0.01)  # gRPC lets go of the last one
                assert requests_in_memory() <= 1
            finally:
                gc.enable()
            for call in running:
                call.cancel()
            await service.wait_until_idle()

    run(main)


# ---- sleep and wake ----

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


def test_sleep_and_wake_change_the_state_once_however_often_they_are_called():
    states = []

    async def main():
        async with serving(config=OFFLOAD, states=states) as (service, engine, channel):
            sleep, wake = control_of(channel)
            assert await wake() == ServerState.SERVING and engine.num_wakes == 0
            assert [await sleep(), await sleep()] == [ServerState.SLEEPING] * 2
            assert engine.asleep and engine.num_sleeps == 1 and service.state is ServerState.SLEEPING
            assert [await wake(), await wake()] == [ServerState.SERVING] * 2
            assert not engine.asleep and engine.num_wakes == 1
            assert await score(channel, request(5))

    run(main)
    assert states == [ServerState.SERVING, ServerState.SLEEPING, ServerState.SERVING]


def test_what_cannot_sleep_says_so_and_what_is_no_request_is_an_invalid_argument():
    async def main():
        async with serving() as (service, _, channel):
            for call in control_of(channel):
                code, text, info, _ = await control_failure(call())
                assert (code, info.reason) == (grpc.StatusCode.UNIMPLEMENTED, "UNSUPPORTED") and "--offload" in text
            for method in ("Sleep", "Wake"):
                call = channel.unary_unary(f"/{codec.CONTROL_SERVICE}/{method}")(b"\xff\xff\xff garbage")
                code, text, _, _ = await control_failure(call)
                assert code == grpc.StatusCode.INVALID_ARGUMENT and f"not a jdistill.wire.v1.{method}Request" in text
            assert service.state is ServerState.SERVING and await score(channel, request(5))

    run(main)


def test_many_scores_that_arrive_in_sleep_wake_the_engine_once_and_are_answered():
    async def main():
        async with serving(config=OFFLOAD) as (service, engine, channel):
            sleep, _ = control_of(channel)
            await sleep()
            answers = await asyncio.gather(*(score(channel, request(5, seed=seed)) for seed in range(20)))
            assert all(len(chunks) == 1 for chunks in answers)
            assert (engine.num_wakes, service.state) == (1, ServerState.SERVING)

    run(main)


@pytest.mark.parametrize("config", [OFFLOAD, REFUSE], ids=["wake", "refuse"])
def test_sleep_waits_for_all_pieces_of_what_runs_and_what_waits_wakes_it_or_is_refused(config):
    async def main():
        async with serving(Gated, config={**config, "max_running_tokens": 30}) as (service, engine, channel):
            sleep, wake = control_of(channel)
            running = asyncio.create_task(score(channel, request(10, 10, 10, 10)))
            await until(lambda: engine.calls)
            waiting = asyncio.create_task(score(channel, request(20)))
            await until(lambda: service.num_calls == 2)
            asleep = asyncio.create_task(sleep())
            await until(lambda: service._falling_asleep)
            late = asyncio.create_task(score(channel, request(21)))
            if config is REFUSE:
                for call in (waiting, late):  # at once, not when the engine sleeps at last
                    with pytest.raises(grpc.aio.AioRpcError, match="asleep") as caught:
                        await call
                    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
                    assert retry_delay_s(caught.value) == service_module.ASLEEP_RETRY_S
            else:
                await until(lambda: service.num_calls == 3)
            assert not asleep.done() and not engine.asleep
            engine.gate.set()
            assert sum(len(chunk.logprobs) for chunk in await running) == 36
            assert await asleep == ServerState.SLEEPING and engine.num_sleeps == 1
            if config is REFUSE:
                assert service.state is ServerState.SLEEPING
                with pytest.raises(grpc.aio.AioRpcError, match="asleep"):
                    await score(channel, request(5))
                assert engine.num_wakes == 0
                await wake()
                assert await score(channel, request(5))
            else:
                assert await waiting and await late
            assert (engine.num_sleeps, engine.num_wakes) == (1, 1)

    run(main)


def test_sleep_does_not_wait_for_a_client_that_reads_slowly():
    async def main():
        async with serving(config=OFFLOAD) as (service, engine, channel):
            message = request(*[1000] * 40, top_k=64)  # 20 MB, more than gRPC buffers
            call = teacher_pb2_grpc.TeacherServiceStub(channel).ScoreSequences(message)
            await call.read()
            await control_of(channel)[0]()
            assert engine.asleep and service.num_calls == 1
            scored = 0
            while (chunk := await call.read()) is not grpc.aio.EOF:
                scored += len(chunk.logprobs)
            assert scored > 35 * 999

    run(main)


def test_a_client_that_gives_up_on_sleep_or_wake_leaves_no_engine_half_way():
    class Slow(fake.FakeEngine):
        def __init__(self, config):
            super().__init__(config)
            self.under_way, self.go_on = asyncio.Event(), asyncio.Event()

        async def sleep(self):
            self.asleep = True  # from now on nothing may be scored
            self.under_way.set()
            await self.go_on.wait()
            self.asleep = False
            await super().sleep()

        async def wake(self):
            await self.go_on.wait()
            await super().wake()

    async def main():
        async with serving(Slow, config=OFFLOAD) as (service, engine, channel):
            sleep, wake = control_of(channel)
            call = asyncio.create_task(sleep())
            await engine.under_way.wait()
            call.cancel()
            scoring = asyncio.create_task(score(channel, request(5)))
            await until(lambda: service._admission.queued_tokens)
            engine.go_on.set()
            assert await scoring
            await sleep()
            engine.go_on.clear()
            call = asyncio.create_task(wake())
            await until(service._transition.locked)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            engine.go_on.set()
            assert await score(channel, request(5))
            assert (engine.num_sleeps, engine.num_wakes) == (2, 2)

    run(main)


def test_sleep_wake_and_scores_may_race_and_no_score_meets_a_sleeping_engine():
    async def main():
        config = {**OFFLOAD, "max_running_tokens": 200}
        async with serving(config=config, delay_s=0.0005) as (service, engine, channel):
            sleep, wake = control_of(channel)
            rng = np.random.default_rng(0)
            scored = asyncio.Event()

            async def control():
                while not scored.is_set():
                    await (sleep() if rng.random() < 0.6 else wake())
                    await asyncio.sleep(0.005 * rng.random())

            async def scores():
                for _ in range(20):
                    lengths = [20] * int(rng.integers(1, 15))
                    chunks = await score(channel, request(*lengths))  # FakeEngine fails if it is asleep
                    assert sum(len(chunk.logprobs) for chunk in chunks) == 19 * len(lengths)

            controls = [asyncio.create_task(control()) for _ in range(2)]
            await asyncio.gather(*(scores() for _ in range(5)))
            scored.set()
            await asyncio.gather(*controls)
            assert engine.num_sleeps > 5 and 0 <= engine.num_sleeps - engine.num_wakes <= 1
            assert service._admission.queued_tokens == service._admission.running_tokens == 0

    run(main)


@pytest.mark.parametrize("at", ["waiting for what runs", "falling asleep", "waking"])
def test_draining_is_for_good_whatever_was_under_way(at):
    states = []

    class Slow(Gated):
        async def sleep(self):
            await super().sleep()
            if at == "falling asleep":
                self.under_way.set()
                await self.go_on.wait()

        async def wake(self):
            self.under_way.set()
            await self.go_on.wait()
            await super().wake()

        under_way, go_on = None, None

    async def main():
        Slow.under_way, Slow.go_on = asyncio.Event(), asyncio.Event()
        async with serving(Slow, config={**OFFLOAD, "max_running_tokens": 10}, states=states) as (
            service,
            engine,
            channel,
        ):
            sleep, wake = control_of(channel)
            scoring = []
            if at == "waiting for what runs":
                scoring = [asyncio.create_task(score(channel, request(10))) for _ in range(2)]
                await until(lambda: service.num_calls == 2)
            if at == "waking":
                await sleep()
            call = asyncio.create_task(wake() if at == "waking" else sleep())
            await (until(lambda: service._falling_asleep) if scoring else engine.under_way.wait())
            await service.refuse(UnavailableError("shutting down"))
            engine.go_on.set()
            engine.gate.set()
            if at == "waking":
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await call
            else:
                code, text, _, _ = await control_failure(call)
                assert code == grpc.StatusCode.UNAVAILABLE and "shutting down" in text
            for one in scoring:
                assert await one, "what was taken on is finished"
            assert engine.asleep == (at == "falling asleep")
            for one in (sleep(), wake()):
                code, text, _, _ = await control_failure(one)
                assert code == grpc.StatusCode.UNAVAILABLE and "shutting down" in text
            code, _, _, _ = await failure(channel, request(5))
            assert code == grpc.StatusCode.UNAVAILABLE
            assert service.state is ServerState.DRAINING

    run(main)
    assert states[-1] is ServerState.DRAINING and states.count(ServerState.DRAINING) == 1


def test_scores_that_wait_for_a_wake_are_sent_elsewhere_when_the_server_drains():
    class NeverWakes(fake.FakeEngine):
        async def wake(self):
            await asyncio.Event().wait()

    async def main():
        async with serving(NeverWakes, config=OFFLOAD) as (service, _, channel):
            await control_of(channel)[0]()
            scoring = asyncio.create_task(score(channel, request(5)))
            await until(lambda: service._admission.queued_tokens)
            await service.refuse(UnavailableError("shutting down"))
            with pytest.raises(grpc.aio.AioRpcError, match="shutting down"):
                await scoring

    run(main)


@pytest.mark.parametrize("by", ["wake", "score"])
def test_an_engine_that_wakes_with_other_weights_is_never_asked_again(by):
    async def main():
        async with serving(config=OFFLOAD, wakes_as="other") as (service, _, channel):
            sleep, wake = control_of(channel)
            await sleep()
            if by == "wake":
                code, text, info, _ = await control_failure(wake())
                assert (code, info.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "FINGERPRINT_MISMATCH")
                assert "'tiny'" in text
            else:
                code, text, info, _ = await failure(channel, request(5))
                assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD") and "other weights" in text
            assert service.dead.is_set() and service.state is ServerState.DRAINING
            code, _, info, _ = await failure(channel, request(5))
            assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")

    run(main)


@pytest.mark.parametrize("step", ["sleep", "wake"])
@pytest.mark.parametrize("error", [EngineDeadError("the GPU fell off"), RuntimeError("secret path")])
def test_an_engine_that_fails_to_sleep_or_to_wake_is_dead(step, error):
    class Failing(fake.FakeEngine):
        pass

    async def fail(self):
        raise error

    setattr(Failing, step, fail)

    async def main():
        async with serving(Failing, config=OFFLOAD) as (service, _, channel):
            sleep, wake = control_of(channel)
            if step == "wake":
                await sleep()
            code, text, info, _ = await control_failure(sleep() if step == "sleep" else wake())
            assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")
            assert "secret" not in text and ("GPU" in text or f"could not {step if step == 'wake' else 'fall'}" in text)
            assert service.dead.is_set()

    run(main)


# ---- the engine's life ----


@pytest.mark.parametrize("while_", ["nobody scores", "a call hangs", "it sleeps", "it drains"])
def test_an_engine_that_dies_is_noticed_and_ends_what_runs_and_what_waits(monkeypatch, while_):
    monkeypatch.setattr(service_module, "CHECK_EVERY_S", 0.01)

    async def main():
        config = {**OFFLOAD, "max_running_tokens": 10}
        async with serving(Gated, config=config) as (service, engine, channel):
            calls = []
            if while_ in ("a call hangs", "it drains"):
                calls = [asyncio.create_task(score(channel, request(10))) for _ in range(2)]
                await until(lambda: service.num_calls == 2)
            if while_ == "it sleeps":
                await control_of(channel)[0]()
            if while_ == "it drains":
                await service.refuse(UnavailableError("shutting down"))
            engine._dead = True
            async with asyncio.timeout(5):
                await service.dead.wait()
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                code, _, info, _ = explain(caught.value)
                assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")
            assert service.state is ServerState.DRAINING
            value = service._metrics.registry.get_sample_value
            assert value("jdistill_engine_errors_total", {"reason": "ENGINE_DEAD"}) == 1

    run(main)


def test_a_check_that_fails_otherwise_kills_nothing_and_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(service_module, "CHECK_EVERY_S", 0.005)

    class Flaky(fake.FakeEngine):
        num_checks = 0

        async def check(self):
            self.num_checks += 1
            raise TimeoutError("no answer")

    async def main():
        async with serving(Flaky) as (service, engine, channel):
            await until(lambda: engine.num_checks > 5)
            assert not service.dead.is_set() and await score(channel, request(5))

    run(main)
    assert caplog.text.count("the check of the engine failed") == 1


# ---- logs ----


def test_each_call_leaves_one_record_with_its_fields_and_no_secret(caplog):
    caplog.set_level(logging.DEBUG, "jdistill.sidecar.service")

    async def main():
        async with serving(vocab_size=90_000, config={"adapters": {"french": "a"}}) as (_, _, channel):
            metadata = [("jdistill-client", "trainer 3"), ("authorization", "Bearer hunter2")]
            message = Req(sequence_lengths=[4, 3], token_ids=[77_777] * 7, request_id="step 7", model="french")
            await score(channel, message, metadata=metadata)
            await failure(channel, Req(sequence_lengths=[4], token_ids=[77_777] * 4, top_k=90_001), metadata=metadata)
            stub = teacher_pb2_grpc.TeacherServiceStub(channel)
            await stub.GetServerInfo(teacher_pb2.GetServerInfoRequest(), metadata=metadata)
            await until(lambda: len([r for r in caplog.records if hasattr(r, "code")]) == 3)

    run(main)
    scored, failed, info = [record for record in caplog.records if hasattr(record, "code")]
    assert (scored.code, scored.method, scored.client) == ("OK", "ScoreSequences", "trainer 3")
    assert (scored.request_id, scored.model) == ("step 7", "french")
    assert (scored.sequences, scored.tokens, scored.scored) == (2, 7, 5)
    assert 0 <= scored.queue_s <= scored.total_s < 10 and scored.levelname == "INFO"
    assert (failed.code, failed.reason, failed.levelname) == ("INVALID_ARGUMENT", "INVALID_REQUEST", "WARNING")
    assert (info.code, info.method, info.levelname) == ("OK", "GetServerInfo", "DEBUG")
    everything = "".join(record.getMessage() + repr(vars(record)) for record in caplog.records)
    assert "hunter2" not in everything and not re.search(r"77.?777", everything)
    assert len(caplog.records) == 3, [record.getMessage() for record in caplog.records]
