"""Schedules against their closed forms, weights against plain loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill.losses import masked, weights


@pytest.mark.parametrize("compiled", [False, True])
def test_schedules_by_hand(compiled):
    cases = [  # schedule, its arguments, step -> weight
        (
            weights.linear,
            {"begin": 1.0, "end": 0.2, "num_steps": 4},
            {0: 1.0, 1: 0.8, 2: 0.6, 4: 0.2, 5: 0.2, 900: 0.2},
        ),
        (weights.linear, {"begin": 0.0, "end": 2.0, "num_steps": 1}, {0: 0.0, 1: 2.0}),
        (
            weights.cosine,
            {"begin": 1.0, "end": 0.0, "num_steps": 4},
            {0: 1.0, 1: (1 + math.sqrt(0.5)) / 2, 2: 0.5, 4: 0.0},
        ),
        (weights.cosine, {"begin": 0.5, "end": 1.5, "num_steps": 10}, {0: 0.5, 5: 1.0, 10: 1.5, 99: 1.5}),
        (
            weights.kdrl_annealing,
            {"begin": 5e-3, "end": 1e-3, "decrement": 1e-3},
            {0: 5e-3, 1: 4e-3, 3: 2e-3, 4: 1e-3, 5: 1e-3, 10**6: 1e-3},
        ),
    ]
    for schedule, arguments, expected in cases:

        def at(step, schedule=schedule, arguments=arguments):
            return schedule(step, **arguments)

        for step, weight in expected.items():
            found = jax.jit(at)(jnp.int32(step)) if compiled else at(step)
            np.testing.assert_allclose(found, weight, rtol=1e-6, atol=1e-7)
            assert found.shape == ()


def test_schedules_begin_and_end_exactly():
    # A weight of 0 turns the term off; 1e-9 would not.
    for schedule in (weights.linear, weights.cosine):
        for begin, end in ((0.1, 0.0), (0.3, 0.1)):
            found = [float(schedule(step, begin=begin, end=end, num_steps=30)) for step in (0, 30, 31)]
            assert found == [float(np.float32(x)) for x in (begin, end, end)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weights.linear(0, begin=1.0, end=0.0, num_steps=0), "num_steps must be at least 1"),
        (lambda: weights.cosine(0, begin=1.0, end=0.0, num_steps=0), "num_steps must be at least 1"),
        (lambda: weights.kdrl_annealing(0, begin=0.1, end=0.2, decrement=0.1), "decreases from begin to end"),
        (lambda: weights.kdrl_annealing(0, begin=0.2, end=0.1, decrement=0.0), "decrement > 0"),
        (lambda: weights.entropy_weights(jnp.ones((1, 2)), jnp.ones((1, 2), bool), strength=-0.1), "negative"),
        (lambda: weights.clip_per_token(jnp.ones((1, 2)), limit=0.0), "limit must be above 0"),
    ],
)
def test_invalid_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_reward_guided_mask_keeps_the_scored_tokens_of_wrong_answers():
    mask_BT = jnp.array([[False, True, True], [True, True, False], [True, False, False]])
    found = weights.reward_guided_mask(jnp.array([0.0, 1.0, 0.5]), mask_BT, threshold=0.5)
    np.testing.assert_array_equal(found, [[0, 1, 1], [0, 0, 0], [0, 0, 0]])
    # The reduction divides by all scored tokens: two of five, not two of two.
    np.testing.assert_allclose(masked.masked_mean(found, mask_BT), 0.4, rtol=1e-6)


@given(seed=st.integers(0, 2**32 - 1), strength=st.sampled_from([0.0, 0.5, 1.0, 100.0]))
@settings(max_examples=25, deadline=None)
def test_entropy_weights_are_positive_of_mean_one_and_ordered_by_entropy(seed, strength):
    rng = np.random.default_rng(seed)
    entropy_BT, mask_BT = rng.gamma(0.3, size=(3, 5)).astype(np.float32), rng.random((3, 5)) < 0.6
    spoiled = jnp.asarray(np.where(mask_BT, entropy_BT, np.nan).astype(np.float32))
    found = np.asarray(weights.entropy_weights(spoiled, jnp.asarray(mask_BT), strength=strength))
    assert np.all(found[~mask_BT] == 0)
    if not mask_BT.any():
        return
    scored, entropy = found[mask_BT], entropy_BT[mask_BT].astype(np.float64)
    np.testing.assert_allclose(scored.mean(), 1, rtol=1e-5)
    np.testing.assert_allclose(scored, (1 + strength * entropy / entropy.mean()) / (1 + strength), rtol=1e-4)
    assert np.all(scored >= 0.999 / (1 + strength))
    assert np.all(np.diff(scored[np.argsort(entropy)]) >= -1e-6)


def test_entropy_weights_have_no_gradient_and_are_one_if_every_entropy_is_zero():
    mask_BT = jnp.array([[True, True, False]])
    grad = jax.grad(lambda x: (weights.entropy_weights(x, mask_BT) * jnp.arange(3.0)).sum())(
        jnp.array([[1.0, 2.0, 3.0]])
    )
    np.testing.assert_array_equal(grad, 0)
    np.testing.assert_array_equal(weights.entropy_weights(jnp.zeros((1, 3)), mask_BT), [[1, 1, 0]])


def test_a_clipped_token_keeps_its_share_of_the_gradient():
    x = jnp.array([[0.5, -1.0, 4.0, -1e30, 0.0]])
    value, pullback = jax.vjp(lambda x: weights.clip_per_token(x, limit=2.0), x)
    np.testing.assert_allclose(value, [[0.5, -1.0, 2.0, -2.0, 0.0]], rtol=1e-6)
    (grad,) = pullback(jnp.ones_like(x))
    np.testing.assert_allclose(grad, [[1.0, 1.0, 0.5, 2e-30, 1.0]], rtol=1e-6)
