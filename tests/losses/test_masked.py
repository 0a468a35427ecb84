"""Reductions depend only on scored targets, whatever the others hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill.losses import masked

BAD = np.array([np.nan, np.inf, -np.inf, 1e30], np.float32)


@st.composite
def tokens_and_masks(draw):
    num_rows, num_targets = draw(st.sampled_from([(1, 1), (3, 5), (5, 7)]))  # each shape is compiled once
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x_BT = rng.normal(size=(num_rows, num_targets)).astype(np.float32)
    mask_BT = rng.random((num_rows, num_targets)) < draw(st.sampled_from([0.2, 0.6, 1.0]))
    return x_BT, mask_BT, rng


@given(tokens_and_masks())
@settings(max_examples=25, deadline=None)
def test_reductions_equal_the_plain_loops(case):
    x_BT, mask_BT, _ = case
    scored = [row[m].astype(np.float64) for row, m in zip(x_BT, mask_BT, strict=True)]
    means = [row.mean() for row in scored if row.size]
    np.testing.assert_allclose(
        masked.masked_mean(jnp.asarray(x_BT), jnp.asarray(mask_BT)),
        np.concatenate(scored).mean() if means else 0.0,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        masked.masked_sequence_mean(jnp.asarray(x_BT), jnp.asarray(mask_BT)),
        np.mean(means) if means else 0.0,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        masked.masked_constant_mean(jnp.asarray(x_BT), jnp.asarray(mask_BT), length=9),
        np.mean([row.sum() / 9 for row in scored if row.size]) if means else 0.0,
        atol=1e-6,
    )


@pytest.mark.parametrize("length", [None, 0])
def test_the_constant_reduction_needs_its_constant(length):
    with pytest.raises(ValueError, match=r"needs a length of at least 1, e.g. max_new_tokens; got (None|0)"):
        masked.masked_constant_mean(jnp.ones((1, 2)), jnp.ones((1, 2), bool), length=length)


def test_a_long_sequence_counts_per_token_or_per_sequence_as_the_reduction_says():
    # A short sequence with one token of value 6, a long one with three tokens of value 2.
    x_BT = jnp.array([[6.0, 0.0, 0.0], [2.0, 2.0, 2.0]])
    mask_BT = jnp.array([[True, False, False], [True, True, True]])
    found = {name: float(reduce(x_BT, mask_BT, length=4)) for name, reduce in masked.REDUCTIONS.items()}
    assert found == {"token_mean": 3.0, "sequence_mean": 4.0, "constant": 1.5}


@functools.cache
def with_gradient(reduction):
    return jax.jit(jax.value_and_grad(functools.partial(masked.REDUCTIONS[reduction], length=5)))


@pytest.mark.parametrize("reduction", sorted(masked.REDUCTIONS))
@given(case=tokens_and_masks())
@settings(max_examples=25, deadline=None)
def test_masked_tokens_and_padding_and_order_touch_neither_value_nor_gradient(reduction, case):
    x_BT, mask_BT, rng = case
    reduce = with_gradient(reduction)
    value, grad_BT = reduce(jnp.asarray(np.where(mask_BT, x_BT, 0)), jnp.asarray(mask_BT))

    spoiled = np.where(mask_BT, x_BT, rng.choice(BAD, x_BT.shape))
    pad = 3 * int(rng.integers(0, 2))
    order = rng.permutation(len(x_BT))
    spoiled = np.pad(spoiled, ((0, 0), (0, pad)), constant_values=np.nan)[order]
    padded_mask = np.pad(mask_BT, ((0, 0), (0, pad)))[order]
    other_value, other_grad = reduce(jnp.asarray(spoiled), jnp.asarray(padded_mask))

    np.testing.assert_allclose(other_value, value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(other_grad[np.argsort(order), : x_BT.shape[1]], grad_BT, rtol=1e-6, atol=0)
    assert np.all(np.asarray(other_grad)[~padded_mask] == 0)


def test_fill_masks_leading_axes_and_keeps_the_candidates():
    x_BTK = jnp.arange(12, dtype=jnp.float32).reshape(2, 3, 2)
    mask_BT = jnp.array([[True, False, True], [False, False, True]])
    filled = masked.fill(x_BTK, mask_BT, value=-1.0)
    np.testing.assert_array_equal(filled, [[[0, 1], [-1, -1], [4, 5]], [[-1, -1], [-1, -1], [10, 11]]])
