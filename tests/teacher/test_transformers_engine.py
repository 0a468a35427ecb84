"""The transformers engine: the contract, and what is its own."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from jdistill.config import TeacherServerConfig
from jdistill.wire.types import SequenceToScore
from tests.teacher.checkpoints import write_checkpoint
from tests.teacher.engine_contract import EngineContract, expected_logprobs, reference_logits, score_all, serve

pytest.importorskip("torch", reason="the transformers engine needs PyTorch: pip install 'jdistill[transformers]'")

from jdistill.teacher.engines.transformers import TransformersEngine


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("transformers")
    # A budget of 300 tokens makes several batches; chunks of 7 positions cut through sequences.
    yield from serve(
        "transformers",
        write_checkpoint(tmp_path / "tiny"),
        tmp_path,
        max_batch_tokens=300,
        engine_args={"chunk_tokens": 7, "device": "cpu"},
    )


class TestTransformersEngine(EngineContract):
    pass


def run(coroutine):
    with asyncio.Runner() as runner:
        return runner.run(coroutine)


def create(path, **config):
    return run(TransformersEngine.create(TeacherServerConfig(engine="transformers", model=str(path), **config)))


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_other_families_tied_and_grouped_give_transformers_numbers(tmp_path, model_type):
    path = write_checkpoint(tmp_path / "tiny", model_type=model_type, tie_word_embeddings=True, seed=3)
    ids = np.random.default_rng(1).integers(0, 512, 30).astype(np.int32)
    (logits,) = reference_logits(path, [ids], tmp_path / "reference.npz")

    async def score():
        engine = await TransformersEngine.create(TeacherServerConfig(engine="transformers", model=str(path)))
        scores = await score_all(engine, [SequenceToScore(ids)])
        await engine.close()
        return scores

    expected = expected_logprobs(logits, 1.0)[np.arange(29), ids[1:]]
    np.testing.assert_allclose(run(score())[0].logprobs, expected, atol=1e-4, rtol=0)


def test_bfloat16_is_served_when_asked_and_has_another_fingerprint(tmp_path):
    path = write_checkpoint(tmp_path / "tiny")

    async def score(dtype):
        engine = await TransformersEngine.create(
            TeacherServerConfig(engine="transformers", model=str(path), dtype=dtype)
        )
        scores = await score_all(engine, [SequenceToScore(np.arange(60, dtype=np.int32))])
        await engine.close()
        return engine.info, scores[0].logprobs

    (exact_info, exact), (info, rounded) = run(score("auto")), run(score("bfloat16"))
    assert (exact_info.dtype, info.dtype) == ("float32", "bfloat16")
    assert exact_info.fingerprint != info.fingerprint
    assert 1e-4 < np.abs(exact - rounded).max() < 1.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"engine_args": {"devise": "cpu"}}, "does not know 'devise'; did you mean 'device'"),
        ({"engine_args": {"device": "abacus"}}, "none that PyTorch knows"),
        ({"engine_args": {"chunk_tokens": 0}}, "positive integer, got 0"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: the transformers engine cannot do that"),
        ({"max_sequence_length": 129}, "expected 2 to 128"),
        ({"dtype": "float64"}, "auto or one of float32, bfloat16, float16, got 'float64'"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_remedy(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        create(write_checkpoint(tmp_path / "tiny"), **config)


def test_a_model_that_caps_its_logits_is_refused(tmp_path):
    import torch
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=32,
        final_logit_softcapping=0.5,
    )
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    model.save_pretrained(tmp_path / "gemma")
    with pytest.raises(ValueError, match="soft cap or a scale"):
        create(tmp_path / "gemma")
