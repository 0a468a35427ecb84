"""Policy losses and advantages against exact gradients, by enumerating every sequence, in float64.

Three symbols, of which 0 ends a sequence, and at most three targets: 15 sequences of 1 to 3 tokens. Targets after the
end are NaN, so that reading one fails the test.

Dimension key: N = 15 sequences, T = 3 targets, V = 3 vocabulary, H = 7 prefixes, G completions of a prompt, M batches.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.losses import advantages, off_policy, policy_gradient

V, T = 3, 3
PREFIXES = [p for n in range(T) for p in itertools.product((1, 2), repeat=n)]
SEQUENCES = [(*p, v) for p in PREFIXES for v in range(V) if v == 0 or len(p) == T - 1]
N, H = len(SEQUENCES), len(PREFIXES)
MASK_NT = np.array([[t < len(s) for t in range(T)] for s in SEQUENCES])
PREFIX_NT = np.array([[PREFIXES.index(s[:t]) if t < len(s) else 0 for t in range(T)] for s in SEQUENCES])
TOKEN_NT = np.array([[s[t] if t < len(s) else 0 for t in range(T)] for s in SEQUENCES])
UNCLIPPED = {"clip_low": 1e6, "clip_high": 1e6}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def table(seed):
    """Logits [H, V]."""
    return np.random.default_rng(seed).normal(size=(H, V))


def token_logprobs(logits_HV, padding=np.nan):
    return jnp.where(MASK_NT, jax.nn.log_softmax(logits_HV)[PREFIX_NT, TOKEN_NT], padding)


def probabilities(logits_HV):
    return jnp.exp(token_logprobs(logits_HV, padding=0).sum(1))


def spread(x_N):
    return jnp.where(MASK_NT, jnp.asarray(x_N)[:, None], jnp.nan)


def expected_reward_gradient(logits_HV, reward_N):
    return jax.grad(lambda x: jnp.sum(probabilities(x) * reward_N))(logits_HV)


def expected_gradient(loss, logits_HV, weight_N):
    """Expected gradient of a loss [N, T], summed over scored targets; the sampler does not depend on the parameters."""
    weight_N = jax.lax.stop_gradient(weight_N)
    return jax.grad(lambda x: jnp.sum(weight_N[:, None] * jnp.where(MASK_NT, loss(x), 0)))(logits_HV)


def on_policy(policy, advantages_NT):
    def loss(logits_HV):
        logprobs_NT = token_logprobs(logits_HV)
        proximal_NT = jax.lax.stop_gradient(logprobs_NT)
        return policy_gradient.POLICIES[policy].function(logprobs_NT, proximal_NT, advantages_NT, jnp.asarray(MASK_NT))

    return loss


REWARD_N = np.random.default_rng(5).normal(size=N)
RIGHT_N = (np.arange(N) % 3 == 0).astype(float)  # rewards of 0 and 1


def test_the_enumeration_is_complete():
    assert (N, H) == (15, 7) and len(set(SEQUENCES)) == N
    np.testing.assert_allclose(probabilities(table(0)).sum(), 1, rtol=1e-14)


# ---- policies ----


@pytest.mark.parametrize("policy", policy_gradient.POLICIES)
def test_on_policy_each_loss_has_the_gradient_of_the_expected_reward(policy):
    logits_HV = table(0)
    exact = expected_reward_gradient(logits_HV, REWARD_N)
    found = expected_gradient(on_policy(policy, spread(REWARD_N)), logits_HV, probabilities(logits_HV))
    assert np.abs(exact).max() > 0.05
    np.testing.assert_allclose(found, -exact, atol=1e-13)


def continuation_values(logits_HV, reward_N):
    """Expected reward [H] given each prefix, and [H, V] given each next token, by grouping the sequences."""
    weight_N = np.asarray(probabilities(logits_HV))
    value_H, value_HV, reach_H = np.zeros(H), np.zeros((H, V)), np.zeros(H)
    for h in range(H):
        through_N = ((PREFIX_NT == h) & MASK_NT).any(1)
        reach_H[h] = weight_N[through_N].sum()
        value_H[h] = (weight_N * reward_N)[through_N].sum() / reach_H[h]
        for v in range(V):
            with_v_N = ((PREFIX_NT == h) & (TOKEN_NT == v) & MASK_NT).any(1)
            value_HV[h, v] = (weight_N * reward_N)[with_v_N].sum() / weight_N[with_v_N].sum()
    return value_H, value_HV, reach_H


def one_step_gradient(logits_HV, sampler_HV, reward_N):
    """Gradient of the expected reward if the policy draws one token at the sampler's prefixes, the sampler the rest."""
    _, value_HV, reach_H = continuation_values(sampler_HV, reward_N)
    return jax.grad(lambda x: jnp.sum(reach_H[:, None] * jax.nn.softmax(x) * value_HV))(logits_HV)


@pytest.mark.parametrize("policy", ["ppo_clip", "cispo"])
@pytest.mark.parametrize("proximal", ["current", "another"])
def test_off_policy_the_tokens_weight_gives_the_exact_gradient_at_the_samplers_prefixes(policy, proximal):
    logits_HV, sampler_HV = table(0), table(1)
    sampler_NT = token_logprobs(sampler_HV)
    proximal_NT = token_logprobs(logits_HV if proximal == "current" else table(2))
    weight_NT, kept_NT = off_policy.behavior_weight(proximal_NT, sampler_NT, jnp.asarray(MASK_NT))
    np.testing.assert_array_equal(kept_NT, MASK_NT)

    def loss(x, weight_NT=weight_NT):
        return weight_NT * policy_gradient.POLICIES[policy].function(
            token_logprobs(x), proximal_NT, spread(REWARD_N), jnp.asarray(MASK_NT), **UNCLIPPED
        )

    exact = one_step_gradient(logits_HV, sampler_HV, REWARD_N)
    found = expected_gradient(loss, logits_HV, probabilities(sampler_HV))
    np.testing.assert_allclose(found, -exact, atol=1e-13)
    # Without the weight the gradient differs.
    without = expected_gradient(lambda x: loss(x, weight_NT=1.0), logits_HV, probabilities(sampler_HV))
    assert np.abs(without + exact).max() > 0.02
    # It is not the gradient of the expected reward of the policy's own answers either.
    assert np.abs(exact - expected_reward_gradient(logits_HV, REWARD_N)).max() > 0.02


def weighted_by_sequence(level, sampler_HV, logits_HV, **bounds):
    logprobs_NT = token_logprobs(logits_HV)
    weight_NT, _ = off_policy.behavior_weight(
        logprobs_NT, token_logprobs(sampler_HV), jnp.asarray(MASK_NT), level=level, **bounds
    )
    loss = on_policy("ppo_clip", spread(REWARD_N))
    return expected_gradient(lambda x: weight_NT * loss(x), logits_HV, probabilities(sampler_HV))


def test_off_policy_the_geometric_mean_and_an_active_bound_are_biased_and_less_so_near_the_policy():
    logits_HV = table(0)
    exact = expected_reward_gradient(logits_HV, REWARD_N)
    for level, bounds in (("sequence", {}), ("sequence", {"upper": 1.1})):
        bias = []
        for distance in (1.0, 0.1):
            sampler_HV = logits_HV + distance * (table(1) - logits_HV)
            bias.append(np.abs(weighted_by_sequence(level, sampler_HV, logits_HV, **bounds) + exact).max())
        assert bias[0] > 0.02 and bias[1] < 0.3 * bias[0]


# ---- advantages of groups ----


def mean_advantage(name, logits_HV, reward_N, num_completions):
    """E[A_1 | y_1 = n] for each sequence n, over all groups that contain it."""
    groups_MG = np.array(list(itertools.product(range(N), repeat=num_completions)))
    advantages_MG = np.asarray(advantages.ADVANTAGES[name](reward_N[groups_MG]))
    others_M = np.asarray(probabilities(logits_HV))[groups_MG[:, 1:]].prod(1)
    mean_N = np.zeros(N)
    np.add.at(mean_N, groups_MG[:, 0], others_M * advantages_MG[:, 0])
    return mean_N


def group_gradient(name, logits_HV, reward_N, num_completions):
    mean_N = mean_advantage(name, logits_HV, reward_N, num_completions)
    return expected_gradient(on_policy("ppo_clip", spread(mean_N)), logits_HV, probabilities(logits_HV))


@pytest.mark.parametrize("num_completions", [2, 3])
def test_rloo_is_unbiased_and_dr_grpo_is_so_up_to_its_factor(num_completions):
    logits_HV = table(0)
    exact = expected_reward_gradient(logits_HV, REWARD_N)
    np.testing.assert_allclose(group_gradient("rloo", logits_HV, REWARD_N, num_completions), -exact, atol=1e-12)
    shrunk = (1 - 1 / num_completions) * exact
    np.testing.assert_allclose(group_gradient("dr_grpo", logits_HV, REWARD_N, num_completions), -shrunk, atol=1e-12)


def grpo_pull(p, num_completions):
    """Expected advantage of right minus wrong answers, for a prompt solved with probability p (binomial sums)."""

    def advantage(own, num_right):
        mean = num_right / num_completions
        variance = num_right * (num_completions - num_right) / num_completions / (num_completions - 1)
        return (own - mean) / math.sqrt(variance) if variance else 0.0

    n = num_completions - 1
    return sum(
        math.comb(n, k) * p**k * (1 - p) ** (n - k) * (advantage(1, k + 1) - advantage(0, k)) for k in range(n + 1)
    )


@pytest.mark.parametrize("num_completions", [2, 3])
def test_grpos_standard_deviation_rescales_each_prompt_by_its_difficulty(num_completions):
    for seed in (0, 3):
        logits_HV = table(seed)
        p = float(jnp.sum(probabilities(logits_HV) * RIGHT_N))
        exact = expected_reward_gradient(logits_HV, RIGHT_N)
        pull = grpo_pull(p, num_completions)
        # 1e-5: epsilon is added to the standard deviation.
        np.testing.assert_allclose(
            group_gradient("grpo", logits_HV, RIGHT_N, num_completions), -pull * exact, rtol=1e-5, atol=1e-12
        )


def test_grpos_pull_by_number_of_completions_and_difficulty():
    # Two completions: the same for every prompt, sqrt(2) times dr_grpo's 1 - 1/2.
    np.testing.assert_allclose([grpo_pull(p, 2) for p in (0.01, 0.3, 0.5)], math.sqrt(0.5), rtol=1e-12)
    # Many completions: 1 / sqrt(p (1 - p)).
    for p in (0.1, 0.3, 0.5):
        np.testing.assert_allclose(grpo_pull(p, 512), 1 / math.sqrt(p * (1 - p)), rtol=0.02)
    # Eight completions: a prompt solved one time in ten pulls 1.25 times as much as one solved every other time.
    np.testing.assert_allclose([grpo_pull(0.1, 8), grpo_pull(0.5, 8)], [2.1774, 1.7358], rtol=1e-4)


def test_reinforce_plus_plus_rescales_each_prompt_by_the_variance_of_the_others():
    # Two prompts, two completions of each: the batch's deviation is sqrt(mixed groups / 8). Where the first group is
    # mixed, the second is with probability q = 2 p (1 - p): a factor of sqrt(2) (1 - q) + q for the first prompt.
    tables = [table(0), table(3)]
    weights = [np.asarray(probabilities(x)) for x in tables]
    chances = [float(w @ RIGHT_N) for w in weights]
    batches_M22 = np.array(list(itertools.product(range(N), repeat=4))).reshape(-1, 2, 2)
    found_M22 = np.asarray(jax.jit(jax.vmap(advantages.reinforce_plus_plus))(RIGHT_N[batches_M22]))
    factors = []
    for own, other in ((0, 1), (1, 0)):
        others_M = weights[own][batches_M22[:, own, 1]] * weights[other][batches_M22[:, other, :]].prod(1)
        mean_N = np.zeros(N)
        np.add.at(mean_N, batches_M22[:, own, 0], others_M * found_M22[:, own, 0])
        found = expected_gradient(on_policy("ppo_clip", spread(mean_N)), tables[own], weights[own])
        q = 2 * chances[other] * (1 - chances[other])
        factors.append(math.sqrt(2) * (1 - q) + q)
        exact = expected_reward_gradient(tables[own], RIGHT_N)
        np.testing.assert_allclose(found, -factors[-1] * exact, rtol=1e-5, atol=1e-12)
    assert (
        abs(factors[0] / factors[1] - 1) > 1e-3
    )  # so the sum over both prompts is not quite parallel to the exact gradient


# ---- advantages of tokens ----


@pytest.mark.parametrize("gae_lambda", [0.0, 0.6, 1.0])
def test_gae_with_exact_values_has_the_exact_gradient_whatever_lambda_is(gae_lambda):
    logits_HV = table(0)
    value_H, _, _ = continuation_values(logits_HV, REWARD_N)
    found = gae_gradient(logits_HV, value_H, gae_lambda)
    np.testing.assert_allclose(found, -expected_reward_gradient(logits_HV, REWARD_N), atol=1e-13)


def test_gae_with_wrong_values_is_unbiased_at_lambda_1_only():
    logits_HV = table(0)
    value_H = np.random.default_rng(4).normal(size=H)
    exact = expected_reward_gradient(logits_HV, REWARD_N)
    np.testing.assert_allclose(gae_gradient(logits_HV, value_H, 1.0), -exact, atol=1e-13)
    assert np.abs(gae_gradient(logits_HV, value_H, 0.5) + exact).max() > 0.02


def gae_gradient(logits_HV, value_H, gae_lambda):
    last_NT = MASK_NT & (np.cumsum(MASK_NT, 1) == MASK_NT.sum(1, keepdims=True))
    rewards_NT = jnp.where(MASK_NT, last_NT * REWARD_N[:, None], jnp.nan)
    values_NT = jnp.where(MASK_NT, value_H[PREFIX_NT], jnp.nan)
    advantages_NT, _ = advantages.gae(rewards_NT, values_NT, jnp.asarray(MASK_NT), discount=1.0, gae_lambda=gae_lambda)
    return expected_gradient(on_policy("ppo_clip", advantages_NT), logits_HV, probabilities(logits_HV))
