"""vLLM with adapters, and over several workers: each an engine of its own, real, on the CPU."""

from __future__ import annotations

import asyncio
import importlib.util

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: run these with the Python of its environment", allow_module_level=True)
from jdistill.config import ConfigError, TeacherServerConfig
from jdistill.teacher.engines import create_engine
from jdistill.wire.types import SequenceToScore
from tests.teacher.checkpoints import write_adapter, write_checkpoint
from tests.teacher.engine_contract import EngineContract, reference_logits, score_all, serve

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("size", ["tensor_parallel_size", "data_parallel_size"])
def test_two_workers_give_the_numbers_of_one(tmp_path, size):
    served_by_two = serve("vllm", write_checkpoint(tmp_path / "tiny"), tmp_path, **{size: 2})
    served = next(served_by_two)
    try:
        contract = EngineContract()
        contract.test_random_spans_with_holes_score_the_tokens_at_those_positions(served, 1)
        contract.test_candidates_are_scored_in_the_order_asked_with_duplicates_and_the_token_itself(served)
        contract.test_a_temperature_divides_the_logits_or_is_refused(served, 0.7)
        served.runner.run(served.engine.check())
    finally:
        served_by_two.close()


@pytest.fixture(scope="module")
def with_adapters(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters")
    base = write_checkpoint(directory / "tiny")
    adapters = {
        name: str(write_adapter(directory / name, base, rank=rank, seed=rank))
        for name, rank in (("math", 4), ("code", 9))
    }
    yield from serve("vllm", base, directory, adapters=adapters)


def test_each_adapter_gives_the_numbers_of_the_checkpoint_it_is_merged_into_and_the_base_its_own(
    with_adapters, tmp_path
):
    engine = with_adapters.engine
    assert engine.way == "extension"
    rng = np.random.default_rng(3)
    candidates = rng.integers(0, 512, (63, 3)).astype(np.int32)
    sequence = SequenceToScore(with_adapters.token_ids[3], (), candidates)

    async def together():
        names = ["", "math", "code", "math"]
        return await asyncio.gather(*(score_all(engine, [sequence], top_k=2, adapter=name) for name in names))

    (base,), (math,), (code,), (again,) = with_adapters.runner.run(together())
    contract = EngineContract()
    contract.check(with_adapters, 3, (), base, candidates=candidates)
    np.testing.assert_array_equal(math.logprobs, again.logprobs)
    for name, got in (("math", math), ("code", code)):
        merged = with_adapters.path.with_name(f"{name}-merged")
        with_adapters.logits[3] = reference_logits(merged, [with_adapters.token_ids[3]], tmp_path / f"{name}.npz")[0]
        contract.check(with_adapters, 3, (), got, candidates=candidates)
        assert np.abs(got.logprobs - base.logprobs).max() > 0.1


def test_adapters_are_models_of_their_own(with_adapters):
    engine = with_adapters.engine
    assert list(engine.adapters) == ["math", "code"]
    fingerprints = {info.fingerprint for info in (engine.info, *engine.adapters.values())}
    assert len(fingerprints) == 3
    for name, info in engine.adapters.items():
        assert (info.model, info.base_model) == (name, engine.info.model)
        assert info.max_candidate_count == engine.info.max_candidate_count


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"offload": True}, "(?i)sleep mode"),
        ({"adapters": {"math": "no/such/adapter"}}, "is no LoRA adapter"),
        ({"engine_args": {"pipeline_parallel_size": 2}}, "set pipeline_parallel_size instead"),
        ({"engine_args": {"gpu_memory_utilization": 0.5}}, "set memory_fraction instead"),
        ({"urls": ["http://127.0.0.1:1"]}, "two ways of naming an engine"),
    ],
)
def test_what_cannot_be_is_refused_at_start_with_the_remedy(tmp_path, change, words):
    fields = {"engine": "vllm", "model": str(write_checkpoint(tmp_path / "tiny")), **change}
    with pytest.raises((ConfigError, ValueError), match=words):
        asyncio.run(create_engine(TeacherServerConfig(**fields)))
