"""vLLM with adapters, and over several workers: separate real engines on the CPU."""

from __future__ import annotations

import asyncio
import importlib.util

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: run these with the Python of its environment", allow_module_level=True)
from jdistill.config import ConfigError, TeacherServerConfig
from jdistill.sidecar.engines import create_engine
from tests.sidecar.checkpoints import write_checkpoint
from tests.sidecar.engine_contract import AdapterContract, EngineContract, serve, serve_adapters

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]


@pytest.mark.full  # two processes load vLLM, three times
@pytest.mark.parametrize("size", ["tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"])
def test_two_workers_score_like_one(tmp_path, size):
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
    yield from serve_adapters("vllm", tmp_path_factory.mktemp("adapters"))


class TestAdapters(AdapterContract):
    def test_they_are_scored_by_the_extension(self, with_adapters):
        assert with_adapters.engine.way == "extension"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"offload": True}, r"offload: vLLM .* has no sleep mode on this platform \(cpu\); leave offload out"),
        ({"offload": True, "engine_args": {"sleep_level": 3}}, "sleep_level: expected 1 or 2, got 3"),
        ({"engine_args": {"sleep_level": 2}}, "sleep_level is for offload"),
        (
            {"offload": True, "engine_args": {"sleep_level": 2}, "adapters": {"math": "somewhere"}},
            "sleep_level 2 forgets the adapters",
        ),
        ({"engine_args": {"max_loras": 4}}, "set adapters instead"),
        ({"adapters": {"math": "no/such/adapter"}}, "is not a LoRA adapter"),
        ({"engine_args": {"pipeline_parallel_size": 2}}, "set pipeline_parallel_size instead"),
        ({"engine_args": {"gpu_memory_utilization": 0.5}}, "set memory_fraction instead"),
        ({"urls": ["http://127.0.0.1:1"]}, "two ways of naming an engine"),
    ],
)
def test_what_cannot_be_is_refused_at_start_with_the_remedy(tmp_path, change, words):
    fields = {"engine": "vllm", "model": str(write_checkpoint(tmp_path / "tiny")), **change}
    with pytest.raises((ConfigError, ValueError), match=words):
        asyncio.run(create_engine(TeacherServerConfig(**fields)))
