"""Attention against jax.nn.dot_product_attention with an explicit mask, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.models.attention import cached_attention, causal_attention


def inputs(B, S, N=4, K=2, H=8, dtype="float32"):
    keys = jax.random.split(jax.random.key(S), 4)
    shapes = [(B, S, N, H), (B, S, K, H), (B, S, K, H), (B, S, N, H)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def plain(q, k, v):
    S = q.shape[1]
    mask = jnp.tril(jnp.ones((S, S), bool))[None, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


@pytest.mark.parametrize("S", [5, 64, 150])  # less than, exactly and more than a block of queries
def test_causal_attention_and_its_gradients(S):
    q, k, v, weights = inputs(6, S)

    def total(f):
        return lambda q, k, v: jnp.sum(f(q, k, v) * weights)

    np.testing.assert_allclose(jax.jit(causal_attention)(q, k, v), plain(q, k, v), atol=2e-6)
    found, expected = (jax.jit(jax.grad(total(f), argnums=(0, 1, 2)))(q, k, v) for f in (causal_attention, plain))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_the_scores_of_all_rows_never_exist_at_once():
    q, k, v, _ = inputs(64, 256)

    def temporaries(f):
        grad = jax.jit(jax.grad(lambda q, k, v: jnp.sum(f(q, k, v)), argnums=(0, 1, 2)))
        return grad.lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    scores = 64 * 4 * 256 * 256 * 4
    assert temporaries(plain) > scores
    assert temporaries(causal_attention) < scores / 4


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 2e-6), ("bfloat16", 3e-2)])
def test_cached_attention_sees_the_slots_up_to_its_own(dtype, atol):
    q, k, v, _ = inputs(3, 20, dtype=dtype)
    positions = jnp.array([[3, 4], [0, 1], [18, 19]])
    rows = jnp.arange(3)[:, None]
    # What stands in later slots must not matter, whatever it is.
    slots = jnp.arange(20)
    junk = jnp.where((slots > positions[:, -1:])[:, :, None, None], 1e4, 0).astype(dtype)
    found = cached_attention(
        q[rows, positions], (k + junk).transpose(0, 2, 3, 1), (v + junk).transpose(0, 2, 1, 3), positions
    )
    assert found.dtype == jnp.dtype(dtype)
    expected = plain(*(x.astype(jnp.float32) for x in (q, k, v)))[rows, positions]
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=atol)
