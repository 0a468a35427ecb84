"""Advantages against plain loops and hand-computed values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill.losses import advantages, distillation
from tests.close import assert_close

SEEDS = st.integers(0, 2**32 - 1)
GROUPS = ["grpo", "dr_grpo", "rloo"]


def test_grpo_standardises_each_group_by_its_sample_deviation():
    rewards_PG = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    expected = (rewards_PG - rewards_PG.mean(1, keepdims=True)) / (rewards_PG.std(1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(advantages.grpo(rewards_PG), expected, atol=1e-5)
    centered = rewards_PG - rewards_PG.mean(1, keepdims=True)
    assert_close(advantages.ADVANTAGES["dr_grpo"](rewards_PG), centered, factor=32)


def test_rloo_compares_each_completion_with_the_others():
    rewards_PG = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    expected = np.array([[row[g] - np.delete(row, g).mean() for g in range(5)] for row in rewards_PG])
    assert_close(advantages.rloo(rewards_PG), expected, factor=32)


def test_reinforce_plus_plus_normalises_by_the_batch():
    rewards_PG = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    centered = rewards_PG - rewards_PG.mean(1, keepdims=True)
    np.testing.assert_allclose(
        advantages.reinforce_plus_plus(rewards_PG), centered / (centered.std() + 1e-6), atol=1e-5
    )
    alone = rewards_PG.reshape(15, 1)  # one completion per prompt: the batch's mean is the baseline
    expected = (alone - alone.mean()) / (alone.std() + 1e-6)
    np.testing.assert_allclose(advantages.reinforce_plus_plus(alone), expected, atol=1e-5)


@pytest.mark.parametrize("name", sorted(advantages.ADVANTAGES))
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1.0])
def test_a_group_of_equal_rewards_has_advantage_exactly_zero(name, reward):
    function = advantages.ADVANTAGES[name]
    assert np.all(np.asarray(function(np.full((2, 8), reward, np.float32))) == 0)
    rewards_PG = np.array([[reward] * 4, [0.0, 1.0, 0.0, 0.0]], np.float32)
    found = np.asarray(function(rewards_PG))
    assert np.all(found[0] == 0) and found[1, 1] > 0 > found[1, 0]
    np.testing.assert_array_equal(advantages.has_signal(rewards_PG), [False, True])


@pytest.mark.parametrize("name", sorted(advantages.ADVANTAGES))
@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_advantages_sum_to_zero_and_follow_their_completions_and_prompts(name, seed):
    rng = np.random.default_rng(seed)
    rewards_PG = rng.choice([0.0, 0.1, 1.0], (3, 4)).astype(np.float32)
    found = np.asarray(advantages.ADVANTAGES[name](rewards_PG))
    np.testing.assert_allclose(found.sum(1), 0, atol=1e-5)
    prompts, completions = rng.permutation(3), rng.permutation(4)
    moved = np.asarray(advantages.ADVANTAGES[name](rewards_PG[prompts][:, completions]))
    assert_close(moved, found[prompts][:, completions], factor=64)


@pytest.mark.parametrize("name", GROUPS)
def test_a_single_completion_per_prompt_is_refused_by_advantages_that_compare_completions(name):
    with pytest.raises(ValueError, match=r"(GRPO|RLOO) compares .*num_completions must be at least 2"):
        advantages.ADVANTAGES[name](np.zeros((4, 1), np.float32))
    advantages.reinforce_plus_plus(np.zeros((4, 1), np.float32))
    with pytest.raises(ValueError, match="completions of a batch and needs at least 2"):
        advantages.reinforce_plus_plus(np.zeros((1, 1), np.float32))


def test_the_overlong_penalty_falls_over_the_last_tokens():
    lengths = np.array([[0, 80, 85], [90, 100, 130]])
    found = advantages.overlong_penalty(lengths, max_length=100, buffer=20)
    np.testing.assert_allclose(found, [[0, 0, -0.25], [-0.5, -1, -1]], rtol=1e-6)
    for buffer in (0, 101):
        with pytest.raises(ValueError, match="between 1 and max_length = 100"):
            advantages.overlong_penalty(lengths, max_length=100, buffer=buffer)


# ---- advantages of tokens ----


def plain_gae(rewards_BT, values_BT, mask_BT, discount, gae_lambda):
    """GAE as the double sum over later scored tokens, in float64."""
    found = np.zeros(rewards_BT.shape)
    for b in range(len(rewards_BT)):
        scored = np.flatnonzero(mask_BT[b])
        rewards, values = rewards_BT[b, scored].astype(float), [*values_BT[b, scored].astype(float), 0.0]
        for i, t in enumerate(scored):
            found[b, t] = sum(
                (discount * gae_lambda) ** (j - i) * (rewards[j] + discount * values[j + 1] - values[j])
                for j in range(i, len(scored))
            )
    return found


@functools.cache
def compiled_gae(discount, gae_lambda):
    return jax.jit(functools.partial(advantages.gae, discount=discount, gae_lambda=gae_lambda))


@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (0.9, 0.0), (1.0, 1.0), (0.7, 1.0)])
@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_gae_equals_the_double_sum_over_scored_tokens(discount, gae_lambda, seed):
    rng = np.random.default_rng(seed)
    rewards_BT, values_BT = rng.normal(size=(2, 3, 7)).astype(np.float32)
    mask_BT = rng.random((3, 7)) < 0.6
    expected = plain_gae(rewards_BT, values_BT, mask_BT, discount, gae_lambda)
    # Values at unscored targets are not read.
    bad = rng.choice(np.array([np.nan, np.inf, -np.inf], np.float32), (3, 7))
    found, returns = compiled_gae(discount, gae_lambda)(
        jnp.asarray(np.where(mask_BT, rewards_BT, bad)), jnp.asarray(np.where(mask_BT, values_BT, bad)), mask_BT
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(mask_BT, expected + values_BT, 0), atol=1e-5)


def test_without_values_the_returns_are_the_return_to_go_that_distillation_computes():
    rng = np.random.default_rng(0)
    teacher, student = jnp.asarray(rng.normal(size=(2, 3, 6)), jnp.float32)
    mask = jnp.asarray(rng.random((3, 6)) < 0.7)
    expected = distillation.sampled_reverse_kl_advantage(student, teacher, mask, discount=0.8)
    found, returns = advantages.gae(teacher - student, jnp.zeros((3, 6)), mask, discount=0.8, gae_lambda=1.0)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(returns, expected, atol=1e-5)


def test_no_gradient_flows_to_the_values_through_advantages_and_returns():
    def total(values):
        found = advantages.gae(jnp.ones((1, 3)), values, jnp.ones((1, 3), bool), discount=0.9, gae_lambda=0.9)
        return sum(x.sum() for x in found) + advantages.whiten(values, jnp.ones((1, 3), bool))[0, 0]

    np.testing.assert_array_equal(jax.grad(total)(jnp.arange(3.0)[None]), 0)


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_whitened_advantages_have_mean_zero_and_deviation_one_over_scored_tokens(seed):
    rng = np.random.default_rng(seed)
    x_BT, mask_BT = (10 + rng.normal(size=(3, 5))).astype(np.float32), rng.random((3, 5)) < 0.6
    spoiled = np.where(mask_BT, x_BT, np.nan).astype(np.float32)
    found = np.asarray(advantages.whiten(jnp.asarray(spoiled), jnp.asarray(mask_BT)))
    assert np.all(found[~mask_BT] == 0)
    scored = x_BT[mask_BT].astype(np.float64)
    if len(scored) < 2:
        assert np.all(found == 0)
        return
    np.testing.assert_allclose(found[mask_BT], (scored - scored.mean()) / (scored.std() + 1e-6), atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3])
@pytest.mark.parametrize("num_targets", [3, 50, 1000])
def test_whitening_equal_advantages_gives_exactly_zero(value, num_targets):
    # The float32 mean of many equal numbers may differ from them, and that error over a tiny deviation is not tiny.
    mask = jnp.ones((2, num_targets), bool).at[0, -1].set(False)
    np.testing.assert_array_equal(advantages.whiten(jnp.full((2, num_targets), value), mask), 0)
