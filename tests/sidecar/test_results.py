"""Impossible results of an engine become errors, never numbers."""

import dataclasses

import grpc
import numpy as np
import pytest

from jdistill.sidecar.engines import fake
from tests.sidecar.services import VOCAB, failure, request, run, serving


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
def test_impossible_scores_are_an_engine_error(field, spoil):
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
def test_a_sequence_scored_twice_never_or_unrequested_is_an_engine_error(order):
    class Miscounting(fake.FakeEngine):
        async def score(self, sequences, *, top_k=0, temperature=1.0, adapter=""):
            for index in order:
                yield index, self._score(sequences[min(index, 2)], top_k, temperature, adapter)

    async def main():
        async with serving(Miscounting) as (_, _, channel):
            code, _, info, _ = await failure(channel, request(5, 5, 5))
            assert (code, info.reason) == (grpc.StatusCode.INTERNAL, "ENGINE_RESULT")

    run(main)
