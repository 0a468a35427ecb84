"""target_logprobs of a model with a final softcap, against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdistill import models
from jdistill.rollout.sampler import Sampler
from jdistill.sidecar.engines import jax as jax_engine
from jdistill.student.logprobs import loss_of_targets, target_logprobs

B, T, D, V, K = 2, 5, 6, 23, 3
CAP = 1.5


def plain(hidden_BTD, head_DV, ids_BTK, temperature):
    logits_BTV = CAP * jnp.tanh(hidden_BTD @ head_DV / CAP) / temperature
    logprobs_BTV = jax.nn.log_softmax(logits_BTV)
    return jnp.take_along_axis(logprobs_BTV, ids_BTK, -1), -jnp.sum(jnp.exp(logprobs_BTV) * logprobs_BTV, -1)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_softcap_enters_the_log_probs_and_both_gradients(temperature, fused):
    rng = np.random.default_rng(0)
    # Logits are a few times the cap, where tanh is far from linear.
    hidden_BTD, head_DV = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((B, T, D), (D, V)))
    ids_BTK = jnp.asarray(rng.integers(0, V, (B, T, 1 + K)))
    mask_BT = jnp.asarray(rng.random((B, T)) < 0.7)
    weight_BTK = jnp.where(mask_BT[..., None], rng.standard_normal((B, T, 1 + K)), 0)

    def joined(out):
        return jnp.concatenate([out.logprobs[..., None], out.candidate_logprobs], -1)

    def ours(hidden_BTD, head_DV):
        arguments = (hidden_BTD, head_DV, ids_BTK[..., 0], mask_BT, ids_BTK[..., 1:])
        options = {"temperature": temperature, "chunk_tokens": 3, "softcap": CAP}
        if fused:
            loss, out = loss_of_targets(
                lambda out, weight: jnp.sum(weight * joined(out)), weight_BTK, *arguments, **options
            )
        else:
            out = target_logprobs(*arguments, **options)
            loss = jnp.sum(weight_BTK * joined(out))
        return loss, (joined(out), out.entropy)

    def expected(hidden_BTD, head_DV):
        logprobs_BTK, entropy_BT = plain(hidden_BTD, head_DV, ids_BTK, temperature)
        return jnp.sum(weight_BTK * logprobs_BTK), (logprobs_BTK, entropy_BT)

    got, want = (jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(hidden_BTD, head_DV) for f in (ours, expected))
    for ours_x, plain_x in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(np.asarray(ours_x)[mask_BT], np.asarray(plain_x)[mask_BT], rtol=0, atol=2e-6)
    for ours_x, plain_x in zip(got[0], want[0], strict=True):
        assert np.abs(plain_x).max() > 0.1
        np.testing.assert_allclose(ours_x, plain_x, rtol=0, atol=5e-6)


def test_sampler_engine_and_step_score_a_softcapped_model_alike():
    config = models.DecoderConfig(
        family="gemma2",
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        hidden_act="gelu_pytorch_tanh",
        sliding_window=4,
        sliding_layers=(True, False),
        attention_softcap=1.0,
        final_softcap=CAP,
        norm_plus_one=True,
        post_norms=True,
        scale_embedding=True,
        tie_word_embeddings=True,
    )
    rng = np.random.default_rng(0)
    decoder = nnx.eval_shape(lambda: models.Decoder(config, rngs=nnx.Rngs(0)))
    shapes = nnx.state(decoder, nnx.Param)
    nnx.update(decoder, jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), shapes))
    graphdef, params = nnx.split(decoder, nnx.Param)
    sampler = Sampler(graphdef, max_prompt_tokens=5, max_new_tokens=12, stop_token_ids=())
    (sampled,) = sampler.sample(sampler.prepare(params), [np.arange(5)], seeds=[3], temperature=0.7)
    tokens_BS = sampled.token_ids[None]
    targets_T = sampled.token_ids[5:]

    @jax.jit
    def scores(params):
        decoder = nnx.merge(graphdef, params)
        hidden_BTD, _ = decoder(tokens_BS[:, :-1], np.arange(16)[None])
        mask_BT = jnp.ones((1, 16), bool)
        step = target_logprobs(
            hidden_BTD,
            decoder.head_DV(),
            jnp.asarray(tokens_BS[:, 1:]),
            mask_BT,
            temperature=0.7,
            chunk_tokens=8,
            softcap=decoder.config.final_softcap,
        )
        none_nC = jnp.zeros((12, 0), jnp.int32)
        engine = jax_engine._project(graphdef, params, hidden_BTD[0, 4:], targets_T, none_nC, 0.7, top_k=1)
        return step.logprobs[0, 4:], engine[0]

    step_T, engine_T = scores(params)
    assert np.ptp(step_T) > 0.5
    np.testing.assert_allclose(step_T, sampled.sampler_logprobs, rtol=0, atol=1e-5)
    np.testing.assert_allclose(step_T, engine_T, rtol=0, atol=1e-5)
