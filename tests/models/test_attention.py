"""Attention against jax.nn.dot_product_attention with an explicit mask, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.models.attention import cached_attention, causal_attention
from jdistill.models.masked_attention import masked_attention


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
def test_cached_attention_sees_slots_up_to_the_querys_position(dtype, atol):
    q, k, v, _ = inputs(3, 20, dtype=dtype)
    positions = jnp.array([[3, 4], [0, 1], [18, 19]])
    rows = jnp.arange(3)[:, None]
    # The content of later slots must not matter.
    slots = jnp.arange(20)
    junk = jnp.where((slots > positions[:, -1:])[:, :, None, None], 1e4, 0).astype(dtype)
    found = cached_attention(
        q[rows, positions], (k + junk).transpose(0, 2, 3, 1), (v + junk).transpose(0, 2, 1, 3), positions
    )
    assert found.dtype == jnp.dtype(dtype)
    expected = plain(*(x.astype(jnp.float32) for x in (q, k, v)))[rows, positions]
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=atol)


def all_scores(q, k, v, slots, window, scale, softcap):
    """Computes attention head by head, with all scores of a row at once."""
    scores = jnp.einsum("bsnh,bmnh->bnsm", q, jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    distance = slots[:, :, None] - jnp.arange(k.shape[1])
    seen = (distance >= 0) & (distance < (k.shape[1] if window is None else window))
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnsm,bmnh->bsnh", weights, jnp.repeat(v, q.shape[2] // v.shape[2], axis=2))


@pytest.mark.parametrize(("window", "softcap"), [(None, 2.0), (20, None), (130, 0.5)])
@pytest.mark.parametrize(("S", "M"), [(5, 5), (128, 128), (300, 300), (200, 320)])
def test_masked_attention_and_its_gradients(S, M, window, softcap):
    q, _, _, weights = inputs(2, S)
    _, k, v, _ = inputs(2, M)
    slots = M - S + jnp.arange(S)[None] - jnp.array([[0], [M - S]])  # the later keys of one row, the first of the other

    def total(f):
        return lambda q, k, v: jnp.sum(f(q, k, v) * weights)

    def masked(q, k, v):
        return masked_attention(q, k, v, slots, window=window, scale=0.7, softcap=softcap)

    def expected(q, k, v):
        return all_scores(q, k, v, slots, window, 0.7, softcap)

    np.testing.assert_allclose(jax.jit(masked)(q, k, v), expected(q, k, v), atol=5e-6)
    found, wanted = (jax.jit(jax.grad(total(f), argnums=(0, 1, 2)))(q, k, v) for f in (masked, expected))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


def test_the_scores_of_all_queries_never_exist_at_once():
    q, k, v, _ = inputs(1, 2048)
    slots = jnp.arange(2048)[None]

    def temporaries(f):
        grad = jax.grad(lambda q, k, v: jnp.sum(f(q, k, v)), argnums=(0, 1, 2))
        return jax.jit(grad).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    scores = 4 * 2048 * 2048 * 4
    kinds = {"window": 100, "scale": 1.0, "softcap": 5.0}
    assert temporaries(lambda q, k, v: all_scores(q, k, v, slots, **kinds)) > scores
    assert temporaries(lambda q, k, v: masked_attention(q, k, v, slots, **kinds)) < scores / 2
