"""Refused requests over real sockets: status, reason and field, before the engine sees anything."""

import asyncio

import grpc
import pytest

from tests.sidecar.services import Gated, Req, explain, failure, request, retry_delay_s, run, score, serving, until

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
            assert not service.lifecycle.dead.is_set()

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


def test_a_request_without_sequences_gets_an_empty_reply():
    async def main():
        async with serving() as (_, _, channel):
            assert await score(channel, request()) == []
            assert len(await score(channel, request(5))) == 1

    run(main)


def test_a_call_over_the_limit_is_refused_with_a_retry_delay_and_waiting_calls_are_served():
    async def main():
        config = {"max_running_tokens": 100, "max_queued_tokens": 150}
        async with serving(Gated, config=config) as (service, engine, channel):
            calls = [asyncio.create_task(score(channel, request(100))) for _ in range(2)]
            await until(lambda: len(service.open_calls) == 2)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await score(channel, request(60))
            code, text, info, _ = explain(caught.value)
            assert (code, info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
            assert "150" in text and "60" in text
            assert retry_delay_s(caught.value) > 0
            calls.append(asyncio.create_task(score(channel, request(50))))  # this much fits
            await until(lambda: len(service.open_calls) == 3)
            assert engine.calls == [[100]]
            engine.gate.set()
            await asyncio.gather(*calls)
            assert engine.calls == [[100], [100], [50]]
            value = service.metrics.registry.get_sample_value
            labels = {"method": "ScoreSequences", "code": "RESOURCE_EXHAUSTED"}
            assert value("jdistill_calls_total", labels) == 1
            assert value("jdistill_scored_tokens_total") == 250 and value("jdistill_scored_positions_total") == 247
            assert value("jdistill_queue_duration_seconds_count") == 3
            assert value("jdistill_queued_tokens") == value("jdistill_running_tokens") == 0

    run(main)
