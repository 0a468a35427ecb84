"""The jax engine: the contract of all engines, static shapes, independence of batch mates."""

from __future__ import annotations

import asyncio
import gc
import weakref

import numpy as np
import pytest

from jdistill.config import TeacherServerConfig
from jdistill.wire.types import SequenceToScore
from tests.sidecar.checkpoints import write_checkpoint
from tests.sidecar.engine_contract import EngineContract, score_all, serve

pytest.importorskip("jax", reason="the jax engine needs JAX: pip install 'jdistill[student]'")
pytest.importorskip("torch", reason="the reference is transformers with PyTorch")

import jax

from jdistill.sidecar.engines.jax import JaxEngine
from tests.devices import run_on_devices


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("jax")
    # Passes of 256 tokens and chunks of 7 positions cut batches and sequences apart.
    yield from serve(
        "jax",
        write_checkpoint(tmp_path / "tiny"),
        tmp_path,
        max_batch_tokens=300,
        offload=True,
        engine_args={"pass_tokens": 256, "chunk_tokens": 7},
    )


class TestJaxEngine(EngineContract):
    def test_batch_mates_do_not_change_a_single_bit(self, served):
        alone = [served.score([SequenceToScore(ids)], top_k=3)[0] for ids in served.token_ids]
        order = np.random.default_rng(0).permutation(np.repeat(np.arange(6), 4))
        crowded = served.score([SequenceToScore(served.token_ids[i]) for i in order], top_k=3)
        for i, got in zip(order, crowded, strict=True):
            np.testing.assert_array_equal(got.logprobs, alone[i].logprobs)
            np.testing.assert_array_equal(got.top_ids, alone[i].top_ids)
            np.testing.assert_array_equal(got.top_logprobs, alone[i].top_logprobs)

    def test_sleep_frees_the_weights_and_wakes_without_compiling(self, served):
        served.score([SequenceToScore(np.arange(40, dtype=np.int32))])
        compiled = served.engine._hidden._cache_size()
        weights = [weakref.ref(array) for array in jax.tree.leaves(served.engine._params)]
        assert len(weights) > 5
        served.runner.run(served.engine.sleep())
        gc.collect()
        assert not [array for array in weights if array() is not None]
        served.runner.run(served.engine.wake())
        served.score([SequenceToScore(np.arange(40, dtype=np.int32))])
        assert served.engine._hidden._cache_size() == compiled

    def test_lengths_of_one_bucket_compile_once(self, served):
        served.score([SequenceToScore(np.arange(40, dtype=np.int32))])
        before = served.engine._hidden._cache_size()
        served.score([SequenceToScore(np.arange(n, dtype=np.int32)) for n in (33, 39, 41, 48)])
        assert served.engine._hidden._cache_size() == before
        assert before <= 8  # 16, 24, 32, 48, 64, 96, 128


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"engine_args": {"chunk_token": 4}}, "does not know 'chunk_token'; did you mean 'chunk_tokens'"),
        ({"engine_args": {"pass_tokens": 0}}, "pass_tokens must be a positive integer, got 0"),
        ({"engine_args": {"chunk_tokens": True}}, "chunk_tokens must be a positive integer, got True"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size: the jax engine cannot do that .*vllm or sglang"),
        ({"data_parallel_size": 2}, "data_parallel_size: the jax engine cannot do that .*start several sidecars"),
        ({"quantization": "fp8"}, r"quantization: the jax engine cannot do that \(got 'fp8'\)"),
        ({"memory_fraction": 0.5}, "memory_fraction: the jax engine cannot do that"),
        (
            {"adapters": {"math": "somewhere"}},
            "adapters: the jax engine cannot do that .*use the vllm engine, or merge",
        ),
        ({"tensor_parallel_size": 4096}, r"tensor_parallel_size = 4096, but JAX sees \d+ \w+ device"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_remedy(tmp_path, config, message):
    path = write_checkpoint(tmp_path / "tiny")
    with pytest.raises(ValueError, match=message):
        asyncio.run(JaxEngine.create(TeacherServerConfig(engine="jax", model=str(path), **config)))


def test_an_unknown_architecture_is_refused_with_the_engines_that_support_it(tmp_path):
    path = write_checkpoint(tmp_path / "tiny")
    text = (path / "config.json").read_text().replace('"qwen3"', '"falcon_h1"')
    (path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"'falcon_h1' is not supported.*vllm or transformers engine"):
        asyncio.run(JaxEngine.create(TeacherServerConfig(engine="jax", model=str(path))))


TENSOR_PARALLEL = """
import asyncio, sys
import numpy as np
from jdistill.config import TeacherServerConfig
from jdistill.sidecar.engines.jax import JaxEngine
from jdistill.wire.types import SequenceToScore

async def main(path, size, out):
    engine = await JaxEngine.create(
        TeacherServerConfig(engine="jax", model=path, tensor_parallel_size=size, engine_args={"pass_tokens": 64})
    )
    assert len(engine._params["layers"]["query"][...].sharding.device_set) == size
    ids = np.random.default_rng(0).integers(0, 512, 40).astype(np.int32)
    async for _, scores in engine.score([SequenceToScore(ids)], top_k=2):
        np.savez(out, logprobs=scores.logprobs, top=scores.top_logprobs)
    await engine.close()

asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
"""


def test_two_devices_give_the_scores_of_one(tmp_path, served):
    out = tmp_path / "two.npz"
    run_on_devices(2, TENSOR_PARALLEL, served.path, 2, out)
    ids = np.random.default_rng(0).integers(0, 512, 40).astype(np.int32)
    (one,) = served.runner.run(score_all(served.engine, [SequenceToScore(ids)], top_k=2))
    with np.load(out) as two:
        np.testing.assert_allclose(two["logprobs"], one.logprobs, atol=2e-5, rtol=0)
        np.testing.assert_allclose(two["top"], one.top_logprobs, atol=2e-5, rtol=0)
