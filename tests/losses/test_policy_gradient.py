"""PPO's clipped surrogate and GRPO's advantages against other implementations."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill.losses import advantages, masked, policy_gradient

FIXTURE = pathlib.Path(__file__).parents[3] / "shared" / "fixtures" / "areal_losses.json"


@pytest.mark.parametrize("name", ["ppo_token/0", "ppo_clip_higher/0", "ppo_dual_clip/0"])
def test_ppo_clip_equals_areal(name):
    if not FIXTURE.exists():
        pytest.skip(f"AReaL's values are not beside this checkout: {FIXTURE}")
    (case,) = (c for c in json.loads(FIXTURE.read_text())["cases"] if c["name"] == name)
    inputs = {key: jnp.asarray(value, jnp.float32) for key, value in case["inputs"].items()}
    mask = inputs["mask"] > 0

    def loss(logprobs):
        per_token = policy_gradient.ppo_clip(
            logprobs, inputs["proximal_logprobs"], inputs["advantages"], **case["params"]
        )
        return masked.masked_mean(per_token, mask)

    value, grad = jax.value_and_grad(loss)(inputs["logprobs"])
    np.testing.assert_allclose(value, case["loss"], atol=1e-5)
    np.testing.assert_allclose(grad, case["grad_logprobs"], atol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [  # clip_low 0.2, clip_high 0.3, dual_clip 3; d loss / d log-prob = -advantage * ratio, or 0 where it is clipped
        (1.0, 2.0, -2.0, -2.0),
        (1.25, 2.0, -2.5, -2.5),  # above 1.2, below 1.3: not clipped, clip_high is its own bound
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


@given(
    logprob=st.floats(-1e4, 0, width=32), proximal=st.floats(-1e4, 0, width=32), advantage=st.floats(-50, 50, width=32)
)
@settings(max_examples=60, deadline=None)
def test_loss_and_gradient_are_finite_for_extreme_ratios(logprob, proximal, advantage):
    def loss(x):
        return policy_gradient.ppo_clip(x, jnp.full((1, 1), proximal), jnp.full((1, 1), advantage)).sum()

    value, grad = jax.value_and_grad(loss)(jnp.full((1, 1), logprob))
    assert np.isfinite(value) and np.isfinite(grad[0, 0])


def test_a_dual_clip_that_stops_on_policy_tokens_is_refused():
    with pytest.raises(ValueError, match="dual_clip must be above 1"):
        policy_gradient.ppo_clip(jnp.zeros((1, 1)), jnp.zeros((1, 1)), jnp.ones((1, 1)), dual_clip=0.5)


def test_grpo_standardises_each_group_by_its_sample_deviation():
    rewards_PG = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    expected = (rewards_PG - rewards_PG.mean(1, keepdims=True)) / (rewards_PG.std(1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(advantages.grpo(rewards_PG), expected, atol=1e-5)
    centered = rewards_PG - rewards_PG.mean(1, keepdims=True)
    np.testing.assert_allclose(advantages.grpo(rewards_PG, normalize_std=False), centered, atol=1e-6)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1.0])
def test_a_group_of_equal_rewards_teaches_exactly_nothing(reward):
    assert np.all(np.asarray(advantages.grpo(np.full((2, 8), reward, np.float32))) == 0)


def test_grpo_of_one_completion_is_refused():
    with pytest.raises(ValueError, match=r"num_completions must be at least 2"):
        advantages.grpo(np.zeros((4, 1), np.float32))
