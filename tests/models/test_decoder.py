"""The decoder's cache, rematerialisation, flags, packing and scan over layers."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdistill import models
from jdistill.models import Decoder, DecoderConfig, Rope
from jdistill.models.packing import pack_rows

CONFIG = DecoderConfig(
    family="qwen3",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    qk_norm=True,
    initializer_range=0.2,
)
# Every flag at once, which no family has: what holds here holds for each.
ALL_FLAGS = dataclasses.replace(
    CONFIG,
    sliding_window=6,
    sliding_layers=(True, False, True),
    local_rope=Rope(theta=100.0),
    query_pre_attn_scalar=5.0,
    attention_softcap=1.5,
    final_softcap=2.0,
    norm_plus_one=True,
    post_norms=True,
    scale_embedding=True,
    num_experts=5,
    num_experts_per_tok=2,
)


@functools.cache  # compiling the random numbers is most of the time of these tests
def random_decoder(config=CONFIG):
    if config == CONFIG:
        return models.random_init(config, 7)
    rng = np.random.default_rng(7)
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    state = nnx.state(decoder, nnx.Param)
    nnx.update(decoder, jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape, np.float32)), state))
    return decoder


@nnx.jit
def jitted(decoder, tokens_BS, positions_BS, packing=None, cache=None):
    hidden_BSD, cache = decoder(tokens_BS, positions_BS, packing=packing, cache=cache)
    return decoder.logits(hidden_BSD), cache


def forward(decoder, tokens_BS, positions_BS=None, **kwargs):
    if positions_BS is None:
        positions_BS = np.broadcast_to(np.arange(tokens_BS.shape[1]), tokens_BS.shape)
    logits_BSV, cache = jitted(decoder, jnp.asarray(tokens_BS), jnp.asarray(positions_BS), **kwargs)
    return np.asarray(logits_BSV), cache


@pytest.mark.parametrize("config", [CONFIG, ALL_FLAGS], ids=["no flags", "all flags"])
def test_cached_decode_of_right_padded_prompts_equals_the_full_forward(config):
    decoder = random_decoder(config)
    rng = np.random.default_rng(0)
    B, S, prompt_S = 4, 24, 10
    tokens_BS = rng.integers(0, 61, (B, S))
    lengths_B = np.array([10, 7, 1, 4])
    full_BSV, _ = forward(decoder, tokens_BS)
    prompt_BS = np.where(np.arange(prompt_S) < lengths_B[:, None], tokens_BS[:, :prompt_S], 5)
    cache = models.init_cache(config, B, S, "float32")
    logits_BSV, cache = forward(decoder, prompt_BS, cache=cache)
    for b, length in enumerate(lengths_B):
        np.testing.assert_allclose(logits_BSV[b, :length], full_BSV[b, :length], rtol=0, atol=5e-5)
    rows_B = np.arange(B)
    for step in range(S - prompt_S):
        at_B = lengths_B + step  # every row at its own position
        logits_BSV, cache = forward(decoder, tokens_BS[rows_B, at_B][:, None], at_B[:, None], cache=cache)
        np.testing.assert_allclose(logits_BSV[:, 0], full_BSV[rows_B, at_B], rtol=0, atol=5e-5)


def test_a_position_outside_the_cache_writes_nothing():
    decoder = random_decoder()
    cache = models.init_cache(CONFIG, 2, 6, "float32")
    tokens_BS = np.array([[3, 4], [5, 6]])
    _, cache = forward(decoder, tokens_BS, np.array([[0, 1], [6, 7]]), cache=cache)
    k_LBKHM, v_LBKMH = (jnp.abs(jnp.stack(part)) for part in cache)
    for written_LBM in (k_LBKHM.sum((2, 3)) > 0, v_LBKMH.sum((2, 4)) > 0):
        assert written_LBM[:, 0].tolist() == [[True, True, False, False, False, False]] * 3
        assert not written_LBM[:, 1].any()


def test_decoding_copies_no_cache():
    decoder = random_decoder()
    graphdef, state = nnx.split(decoder)

    def step(state, layers, tokens_BS, positions_BS, cache):
        return nnx.merge(graphdef, state)(tokens_BS, positions_BS, cache=cache, layers=layers)

    cache = models.init_cache(CONFIG, 2, 64, "float32")
    one_BS = jnp.zeros((2, 1), jnp.int32)
    compiled = jax.jit(step, donate_argnums=4).lower(state, decoder.unstacked(), one_BS, one_BS, cache).compile()
    text = compiled.as_text()
    for part, *_ in cache:
        shape = re.escape(f"f32[{','.join(map(str, part.shape))}]")
        assert re.search(rf"= {shape}\S* (scatter|dynamic-update-slice)\(", text), "the update is not where it was"
        assert not re.findall(rf"= {shape}\S* (?:copy|transpose|concatenate)\(.*", text)
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * sum(k.nbytes for k in cache.k)


def test_remat_changes_no_gradient_and_a_tied_embedding_gets_both_gradients():
    tokens_BS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 12)))
    positions_BS = jnp.broadcast_to(jnp.arange(12), (2, 12))

    @nnx.jit
    @nnx.grad
    def gradient(decoder):
        hidden, _ = decoder(tokens_BS, positions_BS)
        return -jnp.take_along_axis(jax.nn.log_softmax(decoder.logits(hidden)), tokens_BS[..., None], -1).mean()

    untied = nnx.clone(random_decoder())
    untied.head[...] = untied.embed[...].T  # so that the tied model is the same function
    expected = gradient(untied)
    for tied in (False, True):
        config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
        decoder = nnx.eval_shape(lambda config=config: Decoder(config, rngs=nnx.Rngs(0), remat="layer"))
        state = nnx.state(untied)
        if tied:
            del state["head"]
        nnx.update(decoder, state)
        ours = gradient(decoder)
        embed = expected["embed"][...] + (expected["head"][...].T if tied else 0)
        np.testing.assert_allclose(ours["embed"][...], embed, rtol=0, atol=1e-6)
        for a, b in zip(jax.tree.leaves(ours["layers"]), jax.tree.leaves(expected["layers"]), strict=True):
            assert np.abs(b).max() > 0
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_every_flag_changes_the_logits():
    # Parity with transformers would not notice a flag that has no effect.
    state = nnx.state(random_decoder(ALL_FLAGS))
    tokens_BS = np.random.default_rng(0).integers(0, 61, (1, 12))
    positions_BS = np.arange(12)[None]

    def logits(config):
        decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        nnx.update(decoder, state)
        return decoder.logits(decoder(tokens_BS, positions_BS)[0])

    expected = logits(ALL_FLAGS)
    for flag, value in (
        ("sliding_window", 5),
        ("query_pre_attn_scalar", 12.0),
        ("attention_softcap", 1.0),
        ("local_rope", Rope(theta=50.0)),
    ):
        changed = logits(dataclasses.replace(ALL_FLAGS, **{flag: value}))
        assert np.abs(changed - expected).max() > 1e-2, flag


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("config", [CONFIG, ALL_FLAGS], ids=["no flags", "all flags"])
def test_packed_rows_equal_separate_rows(config, num_groups):
    decoder = random_decoder(config)
    lengths_B = [9, 1, 13, 5]
    tokens_BS = np.random.default_rng(2).integers(0, 61, (4, 13))
    packing = pack_rows(lengths_B, 13, num_groups=num_groups)
    assert packing.token_of.shape == (num_groups, 33 if num_groups == 1 else 20)  # 28 of 52 tokens; 18 of 26
    positions_BS = np.broadcast_to(np.arange(13), tokens_BS.shape)
    packed_GPV, _ = forward(decoder, packing.pack(tokens_BS), packing.pack(positions_BS), packing=packing)
    ours_BSV = packing.unpack(packed_GPV)
    for row, length in enumerate(lengths_B):
        expected, _ = forward(decoder, tokens_BS[row : row + 1, :length])
        np.testing.assert_allclose(ours_BSV[row, :length], expected[0], rtol=0, atol=5e-5)
        assert np.all(ours_BSV[row, length:] == 0)


@pytest.mark.parametrize("config", [CONFIG, ALL_FLAGS], ids=["no flags", "all flags"])
def test_compiled_size_does_not_grow_with_depth(config):
    def size(num_layers):
        layers = (True, False) * (num_layers // 2) if config.sliding_layers else ()
        deeper = dataclasses.replace(config, num_layers=num_layers, sliding_layers=layers)
        graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(deeper, rngs=nnx.Rngs(0))))
        tokens_BS = jnp.zeros((1, 8), jnp.int32)
        return len(jax.jit(lambda s: nnx.merge(graphdef, s)(tokens_BS, tokens_BS)[0]).lower(state).as_text())

    assert size(24) < 1.05 * size(2)


def test_random_init_has_the_statistics_of_the_config():
    decoder = random_decoder()
    assert np.std(decoder.layers.gate[...]) == pytest.approx(0.2, rel=0.05)
    assert np.std(decoder.embed[...]) == pytest.approx(0.2, rel=0.05)
    assert np.all(decoder.layers.mlp_norm[...] == 1)
    weights = [np.ravel(leaf) for leaf in jax.tree.leaves(nnx.state(decoder)) if leaf.ndim > 2]
    assert len({float(w[0]) for w in weights}) == len(weights), "every parameter has its own numbers"


def test_errors_name_the_wrong_argument():
    with pytest.raises(ValueError, match="remat = 'all'"):
        Decoder(CONFIG, rngs=nnx.Rngs(0), remat="all")
    decoder = random_decoder()
    tokens_BS = np.zeros((1, 2), np.int32)
    with pytest.raises(ValueError, match="packing with a cache"):
        forward(decoder, tokens_BS, packing=pack_rows([2], 2), cache=models.init_cache(CONFIG, 1, 4, "float32"))
