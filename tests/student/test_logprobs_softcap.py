"""target_logprobs of a model with a final softcap, against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.student.logprobs import target_logprobs

B, T, D, V, K = 2, 5, 6, 23, 3
CAP = 1.5


def plain(hidden_BTD, head_DV, ids_BTK, temperature):
    logits_BTV = CAP * jnp.tanh(hidden_BTD @ head_DV / CAP) / temperature
    logprobs_BTV = jax.nn.log_softmax(logits_BTV)
    return jnp.take_along_axis(logprobs_BTV, ids_BTK, -1), -jnp.sum(jnp.exp(logprobs_BTV) * logprobs_BTV, -1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_softcap_is_in_the_scores_and_in_both_gradients(temperature):
    rng = np.random.default_rng(0)
    # Logits of a few times the cap: tanh is far from linear, and its slope from 1.
    hidden_BTD, head_DV = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((B, T, D), (D, V)))
    ids_BTK = jnp.asarray(rng.integers(0, V, (B, T, 1 + K)))
    mask_BT = jnp.asarray(rng.random((B, T)) < 0.7)
    weight_BTK = jnp.where(mask_BT[..., None], rng.standard_normal((B, T, 1 + K)), 0)

    def ours(hidden_BTD, head_DV):
        out = target_logprobs(
            hidden_BTD,
            head_DV,
            ids_BTK[..., 0],
            mask_BT,
            ids_BTK[..., 1:],
            temperature=temperature,
            chunk_tokens=3,
            softcap=CAP,
        )
        logprobs_BTK = jnp.concatenate([out.logprobs[..., None], out.candidate_logprobs], -1)
        return jnp.sum(weight_BTK * logprobs_BTK), (logprobs_BTK, out.entropy)

    def expected(hidden_BTD, head_DV):
        logprobs_BTK, entropy_BT = plain(hidden_BTD, head_DV, ids_BTK, temperature)
        return jnp.sum(weight_BTK * logprobs_BTK), (logprobs_BTK, entropy_BT)

    got, want = (jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(hidden_BTD, head_DV) for f in (ours, expected))
    for ours_x, plain_x in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(np.asarray(ours_x)[mask_BT], np.asarray(plain_x)[mask_BT], rtol=0, atol=2e-6)
    for ours_x, plain_x in zip(got[0], want[0], strict=True):
        assert np.abs(plain_x).max() > 0.1
        np.testing.assert_allclose(ours_x, plain_x, rtol=0, atol=5e-6)
