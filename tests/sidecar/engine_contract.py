"""One suite for every engine that serves a checkpoint: subclass EngineContract where the engine can run.

A subclass's module has a fixture `served`, scope "module": a `Served` with an engine over `write_checkpoint`'s model.
The expectation comes from the logits of bare transformers, in a process of its own: it shares nothing with the engine.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np
import pytest

from jdistill.checkpoint_files import tokenizer_fingerprint
from jdistill.config import TeacherServerConfig
from jdistill.fingerprint import model_fingerprint
from jdistill.sidecar.engines import engine_class
from jdistill.sidecar.engines.base import Engine
from jdistill.wire.codec import token_crc
from jdistill.wire.errors import InvalidRequestError, TeacherError, UnavailableError, UnsupportedError
from jdistill.wire.types import SequenceToScore, TokenScores
from jdistill.wire.validate import validate_request
from tests.sidecar.checkpoints import write_adapter, write_checkpoint
from tests.sidecar.reference import reference_logits

# float32 on both sides; measured differences are about 1e-5.
TOLERANCE = 1e-4


def expected_logprobs(logits_SV: np.ndarray, temperature: float) -> np.ndarray:
    """Returns the log-softmax [S, V] of logits / temperature in float64."""
    scaled_SV = logits_SV.astype(np.float64) / temperature
    scaled_SV -= scaled_SV.max(axis=-1, keepdims=True)
    return scaled_SV - np.log(np.exp(scaled_SV).sum(axis=-1, keepdims=True))


@dataclasses.dataclass
class Served:
    """An engine, its checkpoint, sequences with their reference logits, and the event loop that it lives in."""

    engine: Engine
    path: pathlib.Path
    runner: asyncio.Runner
    token_ids: list[np.ndarray]
    logits: list[np.ndarray]

    def score(self, sequences: list[SequenceToScore], **options: Any) -> list[TokenScores]:
        return self.runner.run(score_all(self.engine, sequences, **options))


async def score_all(engine: Engine, sequences: list[SequenceToScore], **options: Any) -> list[TokenScores]:
    scores: dict[int, TokenScores] = {}
    async for index, score in engine.score(sequences, **options):
        assert index not in scores
        scores[index] = score
    return [scores[index] for index in range(len(sequences))]


def serve(name: str, path: pathlib.Path, tmp_path: pathlib.Path, **config: Any):
    """Yields a Served for a fixture, with sequences from 2 tokens to the model's limit."""
    rng = np.random.default_rng(5)
    token_ids = [rng.integers(0, 512, size).astype(np.int32) for size in (2, 128, 37, 64, 9, 100)]
    logits = reference_logits(path, token_ids, tmp_path / "reference.npz")
    with asyncio.Runner() as runner:
        server_config = TeacherServerConfig(engine=name, model=str(path), **config)
        engine = runner.run(engine_class(name).create(server_config))
        try:
            yield Served(engine, path, runner, token_ids, logits)
        finally:
            runner.run(engine.close())
            runner.run(engine.close())  # twice is as good as once


@functools.cache
def random_spans(length: int, seed: int) -> tuple[tuple[int, int], ...]:
    """Returns ascending disjoint spans within [1, length), with holes where there is room."""
    rng = np.random.default_rng(seed)
    mask = rng.random(length) < 0.5
    mask[0] = False
    mask[rng.integers(1, length)] = True
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return tuple((int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True))


class EngineContract:
    """Tests for every engine; each gets its expectation from the reference logits."""

    def check(self, served: Served, index: int, spans, got: TokenScores, *, temperature=1.0, candidates=None):
        ids, logits = served.token_ids[index], served.logits[index]
        positions = SequenceToScore(ids, spans).scored_positions()
        logprobs_PV = expected_logprobs(logits, temperature)[positions - 1]
        rows = np.arange(len(positions))
        assert got.logprobs.dtype == np.float32
        np.testing.assert_allclose(got.logprobs, logprobs_PV[rows, ids[positions]], atol=TOLERANCE, rtol=0)
        assert (got.logprobs <= 0).all()
        assert got.token_crc == token_crc(ids)
        if got.top_ids is not None:
            assert got.top_ids.dtype == np.int32
            top_k = got.top_ids.shape[1]
            # Values, not ids: two tokens closer than the tolerance may swap.
            largest = -np.sort(-logprobs_PV, axis=-1)[:, :top_k]
            np.testing.assert_allclose(got.top_logprobs, largest, atol=TOLERANCE, rtol=0)
            np.testing.assert_allclose(
                got.top_logprobs, np.take_along_axis(logprobs_PV, got.top_ids, axis=-1), atol=TOLERANCE, rtol=0
            )
            assert (np.diff(got.top_logprobs, axis=-1) <= 0).all()
            assert all(len(set(row)) == top_k for row in got.top_ids.tolist())
        if candidates is not None:
            np.testing.assert_allclose(
                got.candidate_logprobs, np.take_along_axis(logprobs_PV, candidates, axis=-1), atol=TOLERANCE, rtol=0
            )

    def test_scores_equal_transformers_and_come_in_order_of_the_request(self, served):
        sequences = [SequenceToScore(ids) for ids in served.token_ids]
        for index, got in enumerate(served.score(sequences)):
            assert got.top_ids is None and got.top_logprobs is None and got.candidate_logprobs is None
            self.check(served, index, (), got)

    @pytest.mark.parametrize("seed", range(3))
    def test_random_spans_with_holes_score_the_tokens_at_those_positions(self, served, seed):
        spans = [random_spans(len(ids), seed) for ids in served.token_ids]
        sequences = [SequenceToScore(ids, s) for ids, s in zip(served.token_ids, spans, strict=True)]
        for index, got in enumerate(served.score(sequences, top_k=3)):
            self.check(served, index, spans[index], got)

    def test_a_sequence_of_exactly_the_longest_length_is_scored_to_its_last_token(self, served):
        ids = served.token_ids[1]
        assert len(ids) == served.engine.info.max_sequence_length
        (got,) = served.score([SequenceToScore(ids, ((127, 128),))])
        self.check(served, 1, ((127, 128),), got)

    @pytest.mark.parametrize("top_k", [1, 20])
    def test_top_k_is_sorted_and_holds_the_most_likely_tokens(self, served, top_k):
        (got,) = served.score([SequenceToScore(served.token_ids[3])], top_k=top_k)
        assert got.top_ids.shape == (63, top_k)
        self.check(served, 3, (), got)

    def test_candidates_are_scored_in_the_order_asked_with_duplicates_and_the_token_itself(self, served):
        if served.engine.info.max_candidate_count == 0:
            asked = SequenceToScore(served.token_ids[4], ((1, 2),), np.zeros((1, 3), np.int32))
            with pytest.raises(UnsupportedError, match="cannot score candidates"):
                validate_request([asked], info=served.engine.info)
            return
        rng = np.random.default_rng(7)
        sequences, all_candidates = [], []
        for index in (0, 2, 5):
            ids = served.token_ids[index]
            spans = random_spans(len(ids), 11)
            positions = SequenceToScore(ids, spans).scored_positions()
            candidates = rng.integers(0, 512, (len(positions), 5)).astype(np.int32)
            candidates[:, 1] = candidates[:, 4]
            candidates[:, 2] = ids[positions]
            sequences.append(SequenceToScore(ids, spans, candidates))
            all_candidates.append(candidates)
        for index, sequence, got in zip((0, 2, 5), sequences, served.score(sequences, top_k=2), strict=True):
            self.check(served, index, sequence.spans, got, candidates=sequence.candidate_ids)
            np.testing.assert_array_equal(got.candidate_logprobs[:, 2], got.logprobs)
            np.testing.assert_array_equal(got.candidate_logprobs[:, 1], got.candidate_logprobs[:, 4])

    @pytest.mark.parametrize("temperature", [0.25, 0.7, 3.0])
    def test_a_temperature_divides_the_logits_or_is_refused(self, served, temperature):
        sequence = SequenceToScore(served.token_ids[2], ((3, 9), (20, 37)), np.full((23, 2), 5, np.int32))
        if not served.engine.info.any_temperature:
            with pytest.raises(UnsupportedError, match="temperature 1 only"):
                validate_request([sequence], info=served.engine.info, top_k=4, temperature=temperature)
            return
        (got,) = served.score([sequence], top_k=4, temperature=temperature)
        self.check(served, 2, sequence.spans, got, temperature=temperature, candidates=sequence.candidate_ids)

    def test_batch_mates_change_nothing_beyond_rounding(self, served):
        alone = served.score([SequenceToScore(served.token_ids[2])])[0]
        mates = [SequenceToScore(ids) for ids in served.token_ids * 3]
        crowded = served.score(mates)
        for copy in (2, 8, 14):
            np.testing.assert_allclose(crowded[copy].logprobs, alone.logprobs, atol=2e-5, rtol=0)

    def test_concurrent_calls_with_different_options_do_not_mix(self, served):
        async def both():
            return await asyncio.gather(
                score_all(served.engine, [SequenceToScore(ids) for ids in served.token_ids], top_k=2),
                score_all(served.engine, [SequenceToScore(ids, ((1, 2),)) for ids in served.token_ids], top_k=4),
            )

        first, second = served.runner.run(both())
        for index in range(len(served.token_ids)):
            self.check(served, index, (), first[index])
            assert first[index].top_ids.shape[1] == 2
            self.check(served, index, ((1, 2),), second[index])
            assert second[index].top_ids.shape == (1, 4)

    def test_closing_early_cancels_the_rest_and_the_engine_continues(self, served):
        async def first_only():
            stream = served.engine.score([SequenceToScore(ids) for ids in served.token_ids * 20])
            async for _ in stream:
                break
            await stream.aclose()
            return len([t for t in asyncio.all_tasks() if "_score_one" in repr(t.get_coro())])

        assert served.runner.run(first_only()) == 0
        (got,) = served.score([SequenceToScore(served.token_ids[4])])
        self.check(served, 4, (), got)

    def test_bad_requests_are_refused_before_the_engine_which_continues(self, served):
        info = served.engine.info
        ids = served.token_ids[4]
        bad = [
            SequenceToScore(np.array([1, 512], np.int32)),
            SequenceToScore(np.array([1, -1], np.int32)),
            SequenceToScore(np.zeros(info.max_sequence_length + 1, np.int32)),
            SequenceToScore(ids, (), np.full((8, 1), 512, np.int32)),
        ]
        for sequence in bad:
            with pytest.raises((InvalidRequestError, UnsupportedError)):
                validate_request([sequence], info=info)
        with pytest.raises(TeacherError):
            validate_request([SequenceToScore(ids)], info=info, top_k=info.max_top_k + 1)
        (got,) = served.score([SequenceToScore(ids)])
        self.check(served, 4, (), got)

    def test_a_healthy_engine_passes_its_check(self, served):
        assert served.runner.run(served.engine.check()) is None

    def test_sleep_and_wake_bring_back_the_same_model_or_are_refused(self, served):
        engine, sequence = served.engine, SequenceToScore(served.token_ids[3])

        async def twice(change):
            await change()
            await change()  # twice is as good as once

        if not engine.can_sleep:
            for change in (engine.sleep, engine.wake):
                with pytest.raises(UnsupportedError, match=f"the {engine.name} engine"):
                    served.runner.run(change())
            return
        info, (before,) = engine.info, served.score([sequence], top_k=2)
        served.runner.run(twice(engine.sleep))
        with pytest.raises(UnavailableError, match="asleep"):
            served.score([sequence])
        served.runner.run(twice(engine.wake))
        (after,) = served.score([sequence], top_k=2)
        assert engine.info == info
        np.testing.assert_array_equal(after.logprobs, before.logprobs)
        np.testing.assert_array_equal(after.top_ids, before.top_ids)

    def test_info_describes_the_checkpoint(self, served):
        info = served.engine.info
        assert info.fingerprint == model_fingerprint(served.path, "float32")
        assert info.tokenizer_fingerprint == tokenizer_fingerprint(served.path) != ""
        assert (info.vocab_size, info.max_sequence_length, info.dtype) == (512, 128, "float32")
        assert info.model == served.path.name


def serve_adapters(name: str, directory: pathlib.Path, **config: Any):
    """Like serve(), with adapters "math" and "code" of different ranks; NAME-merged holds each merged checkpoint.

    "code" uses what an engine can apply wrongly: a scale by the root of the rank, other scales by pattern, a regular
    expression as target.
    """
    base = write_checkpoint(directory / "tiny")
    special = {"target_modules": r".*\.self_attn\.[qkvo]_proj", "use_rslora": True, "alpha_pattern": {"q_proj": 2}}
    adapters = {
        adapter: str(write_adapter(directory / adapter, base, rank=rank, seed=rank, **options))
        for adapter, rank, options in (("math", 4, {}), ("code", 9, {"lora_alpha": 5, **special}))
    }
    yield from serve(name, base, directory, adapters=adapters, **config)


class AdapterContract:
    """Tests for every engine with adapters; a subclass's fixture `with_adapters` uses serve_adapters()."""

    def test_each_adapter_scores_like_its_merged_checkpoint_and_the_base_like_itself(self, with_adapters, tmp_path):
        engine, ids = with_adapters.engine, with_adapters.token_ids[3]
        rng = np.random.default_rng(3)
        candidates = rng.integers(0, 512, (63, 3)).astype(np.int32)
        sequence = SequenceToScore(ids, (), candidates)
        names = ["", "math", "code", "math", ""]

        async def together():
            return await asyncio.gather(*(score_all(engine, [sequence], top_k=2, adapter=name) for name in names))

        scores = [score for (score,) in with_adapters.runner.run(together())]
        logits = {"": with_adapters.logits[3]}
        for name in ("math", "code"):
            merged = with_adapters.path.with_name(f"{name}-merged")
            (logits[name],) = reference_logits(merged, [ids], tmp_path / f"{name}.npz")
            assert np.abs(logits[name] - logits[""]).max() > 0.5
        for name, got in zip(names, scores, strict=True):
            served = dataclasses.replace(with_adapters, token_ids=[ids], logits=[logits[name]])
            EngineContract().check(served, 0, (), got, candidates=candidates)

    def test_adapters_are_described_as_separate_models(self, with_adapters):
        engine = with_adapters.engine
        assert list(engine.adapters) == ["math", "code"]
        fingerprints = {info.fingerprint for info in (engine.info, *engine.adapters.values())}
        assert len(fingerprints) == 3
        for name, info in engine.adapters.items():
            assert (info.model, info.base_model) == (name, engine.info.model)
            assert info.max_candidate_count == engine.info.max_candidate_count
