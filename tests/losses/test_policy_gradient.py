"""Policy losses branch by branch, and invariances of all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill.losses import masked, policy_gradient


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [  # clip_low 0.2, clip_high 0.3, dual_clip 3; d loss / d log-prob = -advantage * ratio, or 0 where it is clipped
        (1.0, 2.0, -2.0, -2.0),
        (1.25, 2.0, -2.5, -2.5),  # above 1.2, below 1.3: not clipped, clip_high is a separate bound
        (1.4, 2.0, -2.6, 0.0),
        (0.5, 2.0, -1.0, -1.0),  # moving back is never clipped
        (0.7, -2.0, 1.6, 0.0),
        (2.0, -2.0, 4.0, 4.0),
        (5.0, -2.0, 6.0, 0.0),  # dual clip: 3 * 2
    ],
)
def test_each_branch_of_the_clip_by_hand(ratio, advantage, loss, gradient):
    def per_token(logprobs):
        return policy_gradient.ppo_clip(
            logprobs, jnp.zeros((1, 1)), jnp.full((1, 1), advantage), clip_low=0.2, clip_high=0.3, dual_clip=3.0
        ).sum()

    value, grad = jax.value_and_grad(per_token)(jnp.log(jnp.full((1, 1), ratio)))
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    np.testing.assert_allclose(grad[0, 0], gradient, rtol=1e-5, atol=1e-6)
    active = policy_gradient.clip_is_active(
        jnp.log(jnp.full((1, 1), ratio)), jnp.zeros((1, 1)), jnp.full((1, 1), advantage), clip_low=0.2, clip_high=0.3
    )
    assert bool(active[0, 0]) == (gradient == 0 and ratio < 5)


def test_a_dual_clip_that_stops_on_policy_tokens_is_refused():
    with pytest.raises(ValueError, match="dual_clip must be above 1"):
        policy_gradient.ppo_clip(jnp.zeros((1, 1)), jnp.zeros((1, 1)), jnp.ones((1, 1)), dual_clip=0.5)


def one(x):
    return jnp.full((1, 1), x)


ONE = jnp.ones((1, 1), bool)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient", "bounded"),
    [  # weights between 0.5 and 1.5; d loss / d log-prob = -advantage * weight, everywhere
        (1.2, 2.0, -2.4, False),
        (4.0, 2.0, -3.0, True),
        (4.0, -2.0, 3.0, True),
        (0.1, -2.0, 1.0, True),
        (0.1, 2.0, -1.0, True),
        (4.0, 0.0, 0.0, False),
    ],
)
def test_cispo_bounds_the_weight_and_never_stops_the_gradient(ratio, advantage, gradient, bounded):
    options = {"clip_low": 0.5, "clip_high": 0.5}
    args = (jnp.log(one(ratio)) - 3, one(-3.0), one(advantage))
    grad = jax.grad(lambda x: policy_gradient.cispo(x, *args[1:], **options).sum())(args[0])
    np.testing.assert_allclose(grad[0, 0], gradient, rtol=1e-5)
    np.testing.assert_allclose(policy_gradient.cispo(*args, **options)[0, 0], gradient * (np.log(ratio) - 3), rtol=1e-5)
    assert bool(policy_gradient.POLICIES["cispo"].clip_is_active(*args, ONE, **options)[0, 0]) == bounded


def test_cispos_default_has_no_lower_bound_and_a_weight_of_at_most_5():
    for ratio, weight in ((1e-6, 1e-6), (4.9, 4.9), (100.0, 5.0)):
        grad = jax.grad(lambda x: policy_gradient.cispo(x, one(0.0), one(1.0)).sum())(jnp.log(one(ratio)))
        np.testing.assert_allclose(grad[0, 0], -weight, rtol=1e-4)


@pytest.mark.parametrize("ratio", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_sapos_gate_by_hand(ratio, advantage):
    tau = {True: 1.5, False: 3.0}[advantage > 0]
    gate = 1 / (1 + np.exp(-tau * (ratio - 1)))
    value, grad = jax.value_and_grad(
        lambda x: policy_gradient.sapo(x, one(-1.0), one(advantage), tau_positive=1.5, tau_negative=3.0).sum()
    )(jnp.log(one(ratio)) - 1)
    np.testing.assert_allclose(value, -advantage * 4 / tau * gate, rtol=1e-5)
    np.testing.assert_allclose(grad[0, 0], -advantage * ratio * 4 * gate * (1 - gate), rtol=1e-5)


def test_a_tau_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match=r"tau must be above 0, got 1\.0 and 0\.0"):
        policy_gradient.sapo(one(0.0), one(0.0), one(1.0), tau_negative=0.0)


def test_gspo_by_hand():
    # Log ratios 0.3 and -0.1 over two scored targets: a sequence's ratio of exp(0.1) for both; the hole is not read.
    logprobs, proximal = jnp.array([[-1.0, -9.0, -2.0]]), jnp.array([[-1.3, jnp.nan, -1.9]])
    mask, advantage = jnp.array([[True, False, True]]), jnp.array([[2.0, 5.0, -3.0]])

    def loss(x, **clip):
        return policy_gradient.gspo(x, proximal, advantage, mask, **clip)

    ratio = np.exp(0.1)
    np.testing.assert_allclose(loss(logprobs, clip_low=0.2), [[-2 * ratio, 0, 3 * ratio]], rtol=1e-5)
    grad = jax.grad(lambda x: loss(x, clip_low=0.2).sum())(logprobs)
    np.testing.assert_allclose(grad, [[-2 * ratio, 0, 3 * ratio]], rtol=1e-5)
    # 1.105 > 1.05: the token with a positive advantage is clipped, because the clip compares the sequence's ratio.
    grad = jax.grad(lambda x: loss(x, clip_low=0.2, clip_high=0.05).sum())(logprobs)
    np.testing.assert_allclose(grad, [[0, 0, 3 * ratio]], rtol=1e-5)
    active = policy_gradient.POLICIES["gspo"].clip_is_active(
        logprobs, proximal, advantage, mask, clip_low=0.2, clip_high=0.05
    )
    np.testing.assert_array_equal(active, [[True, False, False]])


def test_gspos_token_form_is_its_sequence_form_where_the_advantage_is_the_sequences():
    rng = np.random.default_rng(1)
    logprobs, proximal = jnp.asarray(rng.normal(-1, 0.2, (2, 4, 5)), jnp.float32)
    mask = jnp.asarray(rng.random((4, 5)) < 0.7).at[:, 0].set(True)
    advantage = jnp.broadcast_to(jnp.asarray(rng.normal(size=(4, 1)), jnp.float32), (4, 5))

    def sequence_form(x):
        """The paper's loss, differentiated through the mean."""
        ratio_B = jnp.exp(jnp.where(mask, x - proximal, 0).sum(1) / mask.sum(1))
        reached_B = jnp.minimum(ratio_B * advantage[:, 0], jnp.clip(ratio_B, 0.9, 1.1) * advantage[:, 0])
        return -reached_B.mean()

    def token_form(x):
        return masked.masked_sequence_mean(policy_gradient.gspo(x, proximal, advantage, mask, clip_low=0.1), mask)

    expected, found = (jax.value_and_grad(f)(logprobs) for f in (sequence_form, token_form))
    assert 0 < policy_gradient.gspo_clip_is_active(logprobs, proximal, advantage, mask, clip_low=0.1).sum() < mask.sum()
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-7)


# ---- all of them ----

NAMES = sorted(policy_gradient.POLICIES)
B, T = 3, 5
SEEDS = st.integers(0, 2**32 - 1)
OPTIONS = {"ppo_clip": {"dual_clip": 3.0}, "gspo": {"clip_low": 0.2}}


def per_token(name, *args):
    return policy_gradient.POLICIES[name].function(*args, **OPTIONS.get(name, {}))


@functools.cache
def reduced(name):
    """(value, gradients in log-probs and proximal log-probs) of the mean over scored targets."""

    def loss(logprobs, proximal, advantages, mask):
        return masked.masked_mean(per_token(name, logprobs, proximal, advantages, mask), mask)

    return jax.jit(jax.value_and_grad(loss))


def random_inputs(rng, spread=0.3):
    logprobs = rng.normal(-1.5, 1, (B, T)).astype(np.float32)
    proximal = (logprobs + spread * rng.normal(size=(B, T))).astype(np.float32)
    return logprobs, proximal, rng.normal(size=(B, T)).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_unscored_targets_padding_and_order_touch_neither_value_nor_gradient(name, seed):
    rng = np.random.default_rng(seed)
    inputs = random_inputs(rng)
    mask = rng.random((B, T)) < 0.6
    value, grad = reduced(name)(*inputs, mask)
    assert np.all(np.asarray(grad)[~mask] == 0)
    order = rng.permutation(B)

    def spoil(x):
        x = np.where(mask, x, rng.choice(np.array([np.nan, np.inf, -np.inf, 1e30], np.float32), x.shape))
        return np.pad(x, ((0, 0), (0, 2)), constant_values=np.nan)[order]

    padded_mask = np.pad(mask, ((0, 0), (0, 2)))[order]
    other_value, other_grad = reduced(name)(*map(spoil, inputs), padded_mask)
    np.testing.assert_allclose(other_value, value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.asarray(other_grad)[np.argsort(order), :T], grad, rtol=1e-5, atol=1e-7)
    assert np.all(np.asarray(other_grad)[~padded_mask] == 0)


@pytest.mark.parametrize("name", NAMES)
@given(seed=SEEDS, spread=st.sampled_from([1.0, 30.0, 1e4, 1e30]))
@settings(max_examples=20, deadline=None)
def test_values_and_gradients_are_finite_for_extreme_ratios(name, seed, spread):
    rng = np.random.default_rng(seed)
    value, grad = reduced(name)(*random_inputs(rng, spread), np.ones((B, T), bool))
    assert np.isfinite(value) and np.isfinite(grad).all()


@functools.cache
def clipped_and_not(name):
    """(gradient with a clip, gradient without, where the clip is active)."""
    clip, wide = {"clip_low": 0.15, "clip_high": 0.25}, {"clip_low": 1e6, "clip_high": 1e6}

    def total(logprobs, proximal, advantages, mask, options):
        return jnp.sum(policy_gradient.POLICIES[name].function(logprobs, proximal, advantages, mask, **options))

    def both(*inputs):
        grads = (jax.grad(total)(*inputs, options) for options in (clip, wide))
        return (*grads, policy_gradient.POLICIES[name].clip_is_active(*inputs, **clip))

    return jax.jit(both)


@pytest.mark.parametrize("name", [name for name in NAMES if policy_gradient.POLICIES[name].clip_is_active is not None])
@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_a_clip_is_active_exactly_where_it_changes_the_gradient(name, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((B, T)) < 0.7
    clipped, unclipped, active = map(np.asarray, clipped_and_not(name)(*random_inputs(rng, 0.5), mask))
    np.testing.assert_array_equal(active, ~np.isclose(clipped, unclipped, rtol=1e-6, atol=0))
    if name != "cispo":
        assert np.all(clipped[active] == 0)
