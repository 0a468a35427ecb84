"""Adapters change nothing at the start, equal the merged weights once trained, and load in PEFT."""

import dataclasses

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx

from jdistill import models
from jdistill.models.config import LORA_TARGETS
from tests.models.factories import CONFIGS, LLAMA, random_decoder

BY_FAMILY = {config.family: config for config in CONFIGS}
MOE = BY_FAMILY["qwen3_moe"]
LORA = models.Lora(rank=3, alpha=12.0, targets=LORA_TARGETS)
MODELS = {
    "llama with biases": (LLAMA, LORA),
    "qwen3": (BY_FAMILY["qwen3"], dataclasses.replace(LORA, targets=("down", "key", "output"))),
    "gemma2": (BY_FAMILY["gemma2"], LORA),
    "qwen3_moe": (MOE, models.Lora(rank=2, alpha=4.0, targets=("query", "output"))),
}


@pytest.fixture(params=MODELS)
def start(request, tmp_path):
    """A checkpoint and the configuration of its adapters."""
    config, lora = MODELS[request.param]
    models.save(random_decoder(config, 1), tmp_path / "base")
    return tmp_path / "base", lora


def trained(path, lora):
    """The checkpoint with adapters in which both factors are not 0, as after training."""
    decoder = models.load(path, lora=lora)
    rng = np.random.default_rng(0)
    state = nnx.state(decoder, nnx.LoRAParam)
    nnx.update(decoder, jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(0, 0.2, x.shape), "float32"), state))
    return decoder


def hidden(decoder):
    tokens = np.random.default_rng(5).integers(0, decoder.config.vocab_size, (2, 9))
    return np.asarray(decoder(tokens, np.broadcast_to(np.arange(9), tokens.shape))[0])


def test_a_new_adapter_changes_nothing_and_merging_keeps_the_logits(start):
    path, lora = start
    plain = hidden(models.load(path))
    np.testing.assert_array_equal(hidden(models.load(path, lora=lora)), plain)
    decoder = trained(path, lora)
    merged = models.merge_lora(decoder)
    assert merged.config == models.config_from_hf(path) and not nnx.state(merged, nnx.LoRAParam)
    assert np.abs(hidden(decoder) - plain).max() > 0.1
    np.testing.assert_allclose(hidden(merged), hidden(decoder), atol=5e-5)


def test_cached_decoding_applies_the_adapters(start):
    decoder = trained(*start)
    tokens = np.random.default_rng(5).integers(0, decoder.config.vocab_size, (2, 9))
    cache = models.init_cache(decoder.config, 2, 9, "float32")
    one_by_one = []
    for i in range(9):
        states, cache = decoder(tokens[:, i : i + 1], np.full((2, 1), i), cache=cache)
        one_by_one.append(states)
    np.testing.assert_allclose(np.concatenate(one_by_one, axis=1), hidden(decoder), atol=5e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers for it
def test_peft_loads_a_saved_adapter_and_gives_the_same_logits(start, tmp_path):
    path, lora = start
    decoder = trained(path, lora)
    models.save_adapter(decoder, tmp_path / "adapter", base=path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    tokens = np.random.default_rng(5).integers(0, decoder.config.vocab_size, (2, 9))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    got = decoder.logits(jax.numpy.asarray(hidden(decoder)))
    np.testing.assert_allclose(got, expected, atol=1e-4)
    with pytest.raises(ValueError, match="is not an empty directory"):
        models.save_adapter(decoder, tmp_path / "adapter", base=path)


def test_adapters_are_a_function_of_the_seed(start):
    path, lora = start
    one, same, other = (nnx.state(models.load(path, lora=lora, seed=s), nnx.LoRAParam) for s in (3, 3, 4))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_unsupported_targets_and_saves_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"q_proj.*expected one or more of query, key"):
        models.Lora(rank=2, alpha=1.0, targets=("q_proj",))
    with pytest.raises(ValueError, match="on down, gate, up of 5 experts is not supported"):
        dataclasses.replace(MOE, lora=LORA)
    models.save(random_decoder(LLAMA, 1), tmp_path / "base")
    with pytest.raises(ValueError, match="merge_lora"):
        models.save(models.load(tmp_path / "base", lora=LORA), tmp_path / "out")
    with pytest.raises(ValueError, match="trained without model"):
        models.save_adapter(models.load(tmp_path / "base"), tmp_path / "out", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()
