"""The value loss by hand, and explained variance against the textbook formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill.losses import masked, value


@pytest.mark.parametrize(
    ("now", "old", "target", "loss", "gradient"),
    [  # clip 0.2
        (1.0, 1.0, 2.0, 0.5, -1.0),
        (1.1, 1.0, 2.0, 0.405, -0.9),  # within the clip
        (1.5, 1.0, 2.0, 0.32, 0.0),  # moved too far towards the return: clipped to 1.2
        (0.5, 1.0, 2.0, 1.125, -1.5),  # moved away: its own error is larger
        (3.0, 1.0, 2.0, 0.5, 1.0),  # beyond the return: its own error, 1, is larger than that of 1.2
        (2.5, 1.0, 2.0, 0.32, 0.0),  # beyond the return, but closer to it than 1.2
    ],
)
def test_the_clipped_loss_by_hand(now, old, target, loss, gradient):
    args = jnp.full((1, 1), old), jnp.full((1, 1), target)
    found = jax.value_and_grad(lambda v: value.value_loss(v, *args, clip=0.2).sum())(jnp.full((1, 1), now))
    np.testing.assert_allclose(found[0], loss, rtol=1e-5)
    np.testing.assert_allclose(found[1][0, 0], gradient, rtol=1e-5, atol=1e-6)
    plain = jax.value_and_grad(lambda v: value.value_loss(v, *args).sum())(jnp.full((1, 1), now))
    np.testing.assert_allclose(plain[0], (now - target) ** 2 / 2, rtol=1e-5)
    np.testing.assert_allclose(plain[1][0, 0], now - target, rtol=1e-5)


def test_no_gradient_flows_to_old_values_and_returns():
    old, target = jnp.array([[1.0, 2.0]]), jnp.array([[2.0, 0.0]])
    for clip in (None, 0.2):
        grads = jax.grad(lambda o, r, c=clip: value.value_loss(jnp.array([[1.5, 1.9]]), o, r, clip=c).sum(), (0, 1))(
            old, target
        )
        for grad in grads:
            np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize("clip", [0.0, -1.0])
def test_a_clip_that_is_not_positive_is_refused(clip):
    with pytest.raises(ValueError, match="clip must be above 0"):
        value.value_loss(jnp.zeros((1, 1)), jnp.zeros((1, 1)), jnp.zeros((1, 1)), clip=clip)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_unscored_targets_touch_neither_value_nor_gradient(seed):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(3, 3, 5)).astype(np.float32)
    mask = jnp.asarray(rng.random((3, 5)) < 0.6)
    bad = rng.choice(np.array([np.nan, np.inf, -np.inf], np.float32), (3, 3, 5))

    def loss(values, old, returns):
        filled = (masked.fill(x, mask) for x in (values, old, returns))
        return masked.masked_mean(value.value_loss(*filled, clip=0.5), mask)

    clean, spoiled = (
        jax.value_and_grad(loss)(*(jnp.asarray(x) for x in xs)) for xs in (inputs, np.where(mask, inputs, bad))
    )
    for got, want in zip(spoiled, clean, strict=True):
        np.testing.assert_array_equal(got, want)
    assert np.all(np.asarray(clean[1])[~np.asarray(mask)] == 0)


@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=20, deadline=None)
def test_explained_variance_equals_the_textbook_formula_over_scored_targets(seed, share):
    rng = np.random.default_rng(seed)
    returns = rng.normal(5, 1, (3, 5)).astype(np.float32)
    values = (share * returns + (1 - share) * rng.normal(size=(3, 5))).astype(np.float32)
    mask = rng.random((3, 5)) < 0.6
    found = value.explained_variance(
        jnp.asarray(np.where(mask, values, np.nan)), jnp.asarray(np.where(mask, returns, -np.inf)), jnp.asarray(mask)
    )
    if mask.sum() < 2:
        assert found == 0
        return
    expected = 1 - (returns - values)[mask].astype(float).var() / returns[mask].astype(float).var()
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("constant", [0.0, 0.1])
def test_explained_variance_is_zero_for_constant_returns_or_values(constant):
    values = jnp.array([[0.3, 0.5, -0.2]])
    for num_targets in (3, 50, 1000):
        many = jnp.arange(num_targets, dtype=jnp.float32)[None]
        assert value.explained_variance(many, jnp.full(many.shape, constant), jnp.ones(many.shape, bool)) == 0
    assert value.explained_variance(values, values, jnp.zeros((1, 3), bool)) == 0
    # Constant values explain none of the variance of the returns.
    np.testing.assert_allclose(
        value.explained_variance(jnp.full((1, 3), 7.0), values, jnp.ones((1, 3), bool)), 0, atol=1e-5
    )
