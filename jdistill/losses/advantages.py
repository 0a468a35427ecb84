"""Rewards -> advantages.

`ADVANTAGES` compares the completions of a prompt or batch; `gae` estimates each token's advantage from a value head. If
every token of a completion gets the completion's advantage and the loss is summed over tokens, the expected gradient
compares with the gradient of the expected reward J as follows (tests/losses/test_policy_enumeration.py enumerates it):

    rloo                  equal
    dr_grpo               (1 - 1/G) times it, because the group's mean includes the completion's own reward
    grpo                  different: each prompt's gradient is divided by about the prompt's standard deviation. With
                          rewards of 0 and 1 and large G, a prompt solved with probability p gets the weight
                          1 / sqrt(p (1 - p)), which maximizes the mean of 2 arcsin(sqrt(p)) over prompts, not of p
    reinforce_plus_plus   nearly parallel: divided by one standard deviation for the whole batch, which depends on each
                          sample less the larger the batch is

Dimension key: P prompts, G completions of each prompt; B = P * G sequences, T targets.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from jdistill.losses.masked import decayed_suffix_sum, fill, masked_mean

# ---- advantages of completions ----


def grpo(
    rewards: Float[Array | np.ndarray, "P G"], *, normalize_std: bool = True, epsilon: float = 1e-6
) -> Float[Array, "P G"]:
    """Return each completion's reward relative to its group, the completions of the same prompt.

    Args:
        rewards: one number per completion.
        normalize_std: divide by the group's sample standard deviation (G - 1 in its denominator, as in TRL, verl and
            Tunix); False keeps the scale, as in Dr. GRPO. The module's docstring gives the effect on the gradient; for
            G = 2 and rewards of 0 and 1, every prompt has the same factor, sqrt(2) times that of dr_grpo.
        epsilon: added to the standard deviation.

    Returns:
        Advantages; exactly 0 in a group of equal rewards.

    Raises:
        ValueError: fewer than two completions per prompt.

    Reference:
        Shao et al., "DeepSeekMath", arXiv 2402.03300, section 4.1; Liu et al. (Dr. GRPO), arXiv 2503.20783.
    """
    rewards = _of_groups(rewards, "GRPO")
    centered_PG = _centered(rewards)
    if normalize_std:
        centered_PG = centered_PG / (jnp.std(rewards, axis=1, ddof=1, keepdims=True) + epsilon)
    return centered_PG


def rloo(rewards: Float[Array | np.ndarray, "P G"]) -> Float[Array, "P G"]:
    """Return each completion's reward minus the mean of the others in its group, an unbiased baseline.

    Args:
        rewards: one number per completion.

    Returns:
        Advantages: G / (G - 1) times those of Dr. GRPO; exactly 0 in a group of equal rewards.

    Raises:
        ValueError: fewer than two completions per prompt.

    Reference:
        Kool et al., "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019; Ahmadian et al., arXiv 2402.14740.
    """
    rewards = _of_groups(rewards, "RLOO")
    num_completions = rewards.shape[1]
    return _centered(rewards) * (num_completions / (num_completions - 1))


def reinforce_plus_plus(rewards: Float[Array | np.ndarray, "P G"], *, epsilon: float = 1e-6) -> Float[Array, "P G"]:
    """Normalise rewards by the standard deviation of the whole batch, so that low-variance prompts gain no weight.

    The baseline is the batch's mean with one completion per prompt (REINFORCE++), and each group's mean with several
    (REINFORCE++-Baseline).

    Args:
        rewards: one number per completion. The paper subtracts a per-token KL to a reference from them; here the KL is
            a separate term of the loss, or an advantage to be added.
        epsilon: added to the standard deviation, whose denominator is P * G.

    Returns:
        Advantages; exactly 0 in a group (with G = 1: a batch) of equal rewards.

    Raises:
        ValueError: a batch of a single completion.

    Reference:
        Hu et al., arXiv 2501.03262.
    """
    rewards = jnp.asarray(rewards)
    if rewards.size < 2:
        raise ValueError("REINFORCE++ compares the completions of a batch and needs at least 2")
    centered_PG = _centered(rewards) if rewards.shape[1] > 1 else _centered(rewards.T).T
    return centered_PG / (jnp.std(centered_PG) + epsilon)


def _of_groups(rewards: Float[Array | np.ndarray, "P G"], name: str) -> Float[Array, "P G"]:
    if rewards.shape[1] < 2:
        raise ValueError(
            f"{name} compares the completions of one prompt, got {rewards.shape[1]} per prompt: "
            "rollout.num_completions must be at least 2"
        )
    return jnp.asarray(rewards)


def _centered(rewards_PG: Float[Array, "P G"]) -> Float[Array, "P G"]:
    # Eight rewards of 0.1 have a float32 mean of 0.1 + 7e-9: with epsilon = 1e-6 the advantage is 0.007.
    same_P1 = ~has_signal(rewards_PG)[:, None]
    return jnp.where(same_P1, 0.0, rewards_PG - jnp.mean(rewards_PG, axis=1, keepdims=True))


# name -> f(rewards [P, G]) -> advantages [P, G]. To add one, write its function and add a line here.
ADVANTAGES = {
    "grpo": grpo,
    "dr_grpo": functools.partial(grpo, normalize_std=False),
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
}


# ---- group filter and length penalty (DAPO) ----


def has_signal(rewards: Float[Array | np.ndarray, "P G"]) -> Bool[Array, "P"]:
    """Return which groups have unequal rewards; the others' advantages are 0, and DAPO replaces them by new samples.

    Reference:
        Yu et al. (DAPO), arXiv 2503.14476, section 3.2.
    """
    rewards = jnp.asarray(rewards)
    return jnp.any(rewards != rewards[:, :1], axis=1)


def overlong_penalty(
    lengths: Shaped[Array | np.ndarray, "*shape"], *, max_length: int, buffer: int
) -> Float[Array, "*shape"]:
    """Return a term to add to each reward: 0, falling linearly to -1 over the last `buffer` tokens before max_length.

    Args:
        lengths: number of tokens of each completion.
        max_length: length at which the sampler truncates, in tokens.
        buffer: width of the penalized range in tokens; up to max_length - buffer there is no penalty.

    Raises:
        ValueError: buffer is not between 1 and max_length.

    Reference:
        Yu et al. (DAPO), arXiv 2503.14476, eq. 13.
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"buffer must be between 1 and max_length = {max_length} tokens, got {buffer}")
    over = jnp.asarray(lengths) - (max_length - buffer)
    return -jnp.clip(over / buffer, 0, 1)


# ---- advantages of tokens ----


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    *,
    discount: float,
    gae_lambda: float,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Compute generalised advantage estimates of the scored tokens, and the returns that a value head should predict.

    delta_t = r_t + discount * V_next - V_t; A_t = delta_t + discount * gae_lambda * A_next; returns = A + V. `next` is
    the sequence's next scored token: a hole in the mask (a tool's output, a user's turn) neither earns nor discounts.
    V_next and A_next are 0 after the last scored token, so a truncated completion counts as ended.

    Args:
        rewards: reward of each token; usually 0 except at the last.
        values: value head's prediction before each target's token is chosen.
        loss_mask: true where a target is scored; values elsewhere are not read.
        discount: factor per scored token on later rewards.
        gae_lambda: 0 relies on the values (one step, with their bias), 1 on the rewards (the full return-to-go minus
            the value: unbiased for any values, but noisy).

    Returns:
        Advantages and returns without a gradient, 0 where the mask is false.

    Reference:
        Schulman et al., arXiv 1506.02438, eq. 16.
    """
    rewards_BT, values_BT = fill(rewards, loss_mask), fill(values, loss_mask)
    # Value of the first scored target at or after t, then of the first one after t.
    at_or_after_BT = decayed_suffix_sum(values_BT, jnp.where(loss_mask, 0, 1).astype(values_BT.dtype))
    next_BT = jnp.pad(at_or_after_BT[:, 1:], ((0, 0), (0, 1)))
    delta_BT = fill(rewards_BT + discount * next_BT - values_BT, loss_mask)
    decay_BT = jnp.where(loss_mask, jnp.asarray(discount * gae_lambda, delta_BT.dtype), 1)
    advantages_BT = fill(decayed_suffix_sum(delta_BT, decay_BT), loss_mask)
    return jax.lax.stop_gradient((advantages_BT, advantages_BT + values_BT))


def whiten(
    advantages: Float[Array, "B T"], loss_mask: Bool[Array, "B T"], *, epsilon: float = 1e-6
) -> Float[Array, "B T"]:
    """Normalise advantages to mean 0 and standard deviation 1 over all scored targets of the batch.

    Args:
        advantages: one number per token.
        loss_mask: true where a target is scored; values elsewhere are not read.
        epsilon: added to the standard deviation, whose denominator is the number of scored targets.

    Returns:
        Advantages without a gradient, 0 where the mask is false; exactly 0 everywhere if all are equal.
    """
    advantages_BT = jax.lax.stop_gradient(fill(advantages, loss_mask))
    centered_BT = advantages_BT - masked_mean(advantages_BT, loss_mask)
    std = jnp.sqrt(masked_mean(jnp.square(centered_BT), loss_mask))
    largest = jnp.max(jnp.where(loss_mask, advantages_BT, -jnp.inf), initial=-jnp.inf)
    varies = jnp.any(loss_mask & (advantages_BT != largest))
    return jnp.where(varies, fill(centered_BT / (std + epsilon), loss_mask), 0)
