"""One call over real sockets: messages, queueing, cancellation, slow readers, memory, log records."""

import asyncio
import gc
import logging
import re
import types

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill.sidecar import call as call_module
from jdistill.wire.types import SequenceToScore
from jdistill.wire.v1 import teacher_pb2, teacher_pb2_grpc
from tests.sidecar.services import Gated, Req, assemble, failure, request, run, score, serving, until


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
        async with serving(hang_on_token=63) as (service, _, channel):
            message = Req(sequence_lengths=[5, 5, 5], token_ids=[63] * 5 + [1] * 5 + [2] * 5)
            call = teacher_pb2_grpc.TeacherServiceStub(channel).ScoreSequences(message)
            finished = set()
            while len(finished) < 2:
                finished.update((await call.read()).sequence_indexes)
            assert finished == {1, 2} and len(service.open_calls) == 1
            call.cancel()

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
            # The next request is answered as usual.
            assert await score(channel, Req(sequence_lengths=[4], token_ids=[1, 77_777, 34, 2]))

    run(main)
    assert "step 7" in caplog.text and "failed as it was told to" in caplog.text and "Traceback" in caplog.text
    assert "77777" not in "".join(record.getMessage().partition("Traceback")[0] for record in caplog.records)


@pytest.mark.parametrize("how", ["cancelled", "deadline", "client gone"])
def test_an_abandoned_call_closes_the_engines_iterator_at_once(how):
    async def main():
        async with serving(delay_s=0.05) as (service, engine, channel):
            stub = teacher_pb2_grpc.TeacherServiceStub(channel)
            call = stub.ScoreSequences(request(*[5] * 200), timeout=1 if how == "deadline" else None)  # 10 s of work
            if how == "cancelled":
                await call.read()
                call.cancel()
            elif how == "client gone":
                await call.read()
                await channel.close()
            else:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    while await call.read() is not grpc.aio.EOF:
                        pass
                assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            await asyncio.wait_for(service.open_calls.wait_until_none(), 5)
            assert engine.num_cancelled == 1

    run(main)


@given(st.lists(st.integers(2, 90), min_size=1, max_size=30), st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_a_call_is_cut_into_the_same_pieces_every_time_and_pieces_do_not_change_scores(lengths, seed):
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


def test_a_scored_sequence_makes_room_before_its_call_ends():
    async def main():
        async with serving(hang_on_token=63, config={"max_running_tokens": 30}) as (service, _, channel):
            # The last one first; the other never ends.
            message = Req(sequence_lengths=[20, 10], token_ids=[63] * 20 + [1] * 10)
            hanging = teacher_pb2_grpc.TeacherServiceStub(channel).ScoreSequences(message)
            await hanging.read()
            assert service.queue.running_tokens == 20
            assert await score(channel, Req(sequence_lengths=[10], token_ids=[2] * 10))
            hanging.cancel()

    run(main)


def test_clients_share_the_queue_by_name_or_else_by_address():
    async def main():
        async with serving(Gated, config={"max_running_tokens": 30}) as (service, engine, channel):
            calls = []

            async def begin(length, *metadata):
                calls.append(asyncio.create_task(score(channel, request(length), metadata=metadata)))
                await until(lambda: len(service.open_calls) == len(calls))

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
                await score(channel, request(20), timeout=0.5)
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: len(service.open_calls) == 1)
            assert service.queue.queued_tokens == 0
            value = service.metrics.registry.get_sample_value
            labels = {"method": "ScoreSequences", "code": "DEADLINE_EXCEEDED"}
            assert value("jdistill_calls_total", labels) == 1 and value("jdistill_cancelled_calls_total") == 0
            engine.gate.set()
            await running
            assert engine.calls == [[30]]

    run(main)


@pytest.mark.parametrize("how", ["cancelled", "client gone"])
def test_a_vanished_client_leaves_queue_and_engine_at_once(how):
    async def main():
        async with serving(Gated, config={"max_running_tokens": 30}) as (service, engine, channel):
            async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as doomed:
                calls = [asyncio.create_task(score(doomed, request(10, 20, 20, 10))) for _ in range(3)]
                await until(lambda: len(service.open_calls) == 3)
                assert (service.queue.running_tokens, service.queue.queued_tokens) == (30, 150)
                begin = asyncio.get_running_loop().time()
                if how == "cancelled":
                    for call in calls:
                        call.cancel()
                else:
                    await doomed.close()
                await service.open_calls.wait_until_none()
                assert asyncio.get_running_loop().time() - begin < 5, "measured: 5 ms"
                await asyncio.gather(*calls, return_exceptions=True)
            assert service.queue.running_tokens == service.queue.queued_tokens == 0
            assert engine.num_cancelled == len(engine.calls)
            value = service.metrics.registry.get_sample_value
            assert value("jdistill_cancelled_calls_total") == 3
            engine.gate.set()
            assert await score(channel, request(5))

    run(main)


def test_a_client_that_leaves_with_all_its_scores_does_not_count_as_cancelled(monkeypatch):
    send = call_module._send

    async def send_and_dawdle(*args):
        await send(*args)
        await asyncio.sleep(60)  # as with a busy loop or a distant client: the stream's end has not arrived

    monkeypatch.setattr(call_module, "_send", send_and_dawdle)

    async def main():
        async with serving() as (service, _, channel):
            call = teacher_pb2_grpc.TeacherServiceStub(channel).ScoreSequences(request(5))
            assert len((await call.read()).logprobs) == 4
            call.cancel()
            await until(lambda: len(service.open_calls) == 0)
            value = service.metrics.registry.get_sample_value
            assert value("jdistill_calls_total", {"method": "ScoreSequences", "code": "OK"}) == 1
            assert value("jdistill_cancelled_calls_total") == 0

    run(main)


def test_a_slow_reader_gets_no_further_pieces_and_does_not_delay_other_clients(monkeypatch):
    monkeypatch.setattr(call_module, "MAX_UNSENT_BYTES", 1 << 20)

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
def test_the_memory_of_a_failed_call_is_freed_without_the_garbage_collector(ends_with):
    def requests_in_memory():
        objects = gc.get_objects()
        # type() rather than isinstance(), which asks every object for __class__: some of other libraries warn then.
        big = sum(type(o) is call_module.Call and len(o.request) > 1000 for o in objects)
        frames = [o for o in objects if type(o) is types.FrameType and "jdistill/sidecar/" in o.f_code.co_filename]
        big += sum(len(frame.f_locals.get("request") or b"") > 1000 for frame in frames if "self" in frame.f_locals)
        return big + sum(type(o) is SequenceToScore and len(o.token_ids) == 3000 for o in objects)

    async def main():
        config = {"max_running_tokens": 20, "max_queued_tokens": 20}
        async with serving(hang_on_token=63, fail_on_token=62, config=config) as (service, _, channel):
            hang = Req(sequence_lengths=[20], token_ids=[63] * 20)
            busy = 2 if ends_with == "overload" else 0
            running = [asyncio.create_task(score(channel, hang)) for _ in range(busy)]
            await until(lambda: len(service.open_calls) == busy)
            token = {"engine error": 62, "cancelled": 63}.get(ends_with, 1)
            message = Req(sequence_lengths=[3000], token_ids=[token] * 3000, top_k=65 if ends_with == "invalid" else 0)
            gc.collect()
            gc.disable()
            try:
                for _ in range(10):
                    with pytest.raises((grpc.aio.AioRpcError, TimeoutError)):
                        await asyncio.wait_for(score(channel, message), 0.05 if ends_with == "cancelled" else 5)
                await until(lambda: len(service.open_calls) == busy)
                await until(lambda: requests_in_memory() <= 1)  # gRPC releases the last one slightly later
            finally:
                gc.enable()
            for call in running:
                call.cancel()
            await service.open_calls.wait_until_none()

    run(main)


def test_each_call_writes_one_log_record_with_its_fields_and_no_secrets(caplog):
    caplog.set_level(logging.DEBUG, "jdistill.sidecar.call")

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
