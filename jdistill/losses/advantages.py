"""Rewards -> advantages.

Of whole completions, compared with each other: `ADVANTAGES`. Of tokens, from a value head: `gae`. By enumeration
(tests/losses/test_policy_enumeration.py), with every token of a completion getting its advantage and the loss summed
over tokens, the expected gradient, relative to that of the expected reward J, is

    rloo                  that of J
    dr_grpo               (1 - 1/G) that of J: the group's mean holds the completion's own reward
    grpo                  another: each prompt's is divided by about its own standard deviation. With rewards of 0 and
                          1 a prompt that is solved with probability p pulls 1 / sqrt(p (1 - p)) times as much, for
                          large G: what goes up is the mean over prompts of 2 arcsin(sqrt(p)), not that of p
    reinforce_plus_plus   nearly parallel: one standard deviation for the batch, which depends on the samples, but less
                          on each the more there are

Dimension key: P prompts, G completions of each prompt; B = P * G sequences, T targets.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from jdistill.losses.masked import decayed_suffix_sum, fill, masked_mean

# ---- of completions ----


def grpo(
    rewards: Float[Array | np.ndarray, "P G"], *, normalize_std: bool = True, epsilon: float = 1e-6
) -> Float[Array, "P G"]:
    """Each completion's reward relative to the other completions of its prompt.

    Args:
        rewards: one number for each completion.
        normalize_std: divide by the group's sample standard deviation (G - 1 in its denominator, which is what TRL,
            verl and Tunix compute); False leaves the scale alone, as Dr. GRPO does. What that does to the gradient is
            above; for G = 2 and rewards of 0 and 1 it is the same factor, sqrt(2) of dr_grpo's, for every prompt.
        epsilon: added to the standard deviation.

    Returns:
        Advantages; exactly 0 in a group whose rewards are all the same.

    Raises:
        ValueError: fewer than two completions a prompt.

    Reference:
        Shao et al., "DeepSeekMath", arXiv 2402.03300, section 4.1; Liu et al. (Dr. GRPO), arXiv 2503.20783.
    """
    rewards = _of_groups(rewards, "GRPO")
    centered_PG = _centered(rewards)
    if normalize_std:
        centered_PG = centered_PG / (jnp.std(rewards, axis=1, ddof=1, keepdims=True) + epsilon)
    return centered_PG


def rloo(rewards: Float[Array | np.ndarray, "P G"]) -> Float[Array, "P G"]:
    """Each completion's reward less the mean of the others of its prompt: an unbiased baseline.

    Args:
        rewards: one number for each completion.

    Returns:
        Advantages: G / (G - 1) times those of Dr. GRPO; exactly 0 in a group whose rewards are all the same.

    Raises:
        ValueError: fewer than two completions a prompt.

    Reference:
        Kool et al., "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019; Ahmadian et al., arXiv 2402.14740.
    """
    rewards = _of_groups(rewards, "RLOO")
    num_completions = rewards.shape[1]
    return _centered(rewards) * (num_completions / (num_completions - 1))


def reinforce_plus_plus(rewards: Float[Array | np.ndarray, "P G"], *, epsilon: float = 1e-6) -> Float[Array, "P G"]:
    """Rewards normalised by the whole batch: one scale for all prompts, so none counts more for varying less.

    With one completion a prompt this is REINFORCE++: the batch's mean is the baseline. With several it is
    REINFORCE++-Baseline: each group's mean is, and the batch's standard deviation the scale.

    Args:
        rewards: one number for each completion. The paper also charges a KL to a reference in them, token by token;
            here that is a term of the loss, or an advantage to be added.
        epsilon: added to the standard deviation, whose denominator is P * G.

    Returns:
        Advantages; exactly 0 in a group (with G = 1: a batch) whose rewards are all the same.

    Raises:
        ValueError: a single completion, which there is nothing to compare with.

    Reference:
        Hu et al., arXiv 2501.03262.
    """
    rewards = jnp.asarray(rewards)
    if rewards.size < 2:
        raise ValueError("REINFORCE++ compares the completions of a batch: there must be at least 2")
    centered_PG = _centered(rewards) if rewards.shape[1] > 1 else _centered(rewards.T).T
    return centered_PG / (jnp.std(centered_PG) + epsilon)


def _of_groups(rewards: Float[Array | np.ndarray, "P G"], name: str) -> Float[Array, "P G"]:
    if rewards.shape[1] < 2:
        raise ValueError(
            f"{name} compares the completions of one prompt, got {rewards.shape[1]} of each: "
            "rollout.num_completions must be at least 2"
        )
    return jnp.asarray(rewards)


def _centered(rewards_PG: Float[Array, "P G"]) -> Float[Array, "P G"]:
    # Eight rewards of 0.1 have a float32 mean of 0.1 + 7e-9: with epsilon = 1e-6 an advantage of 0.007.
    same_P1 = ~has_signal(rewards_PG)[:, None]
    return jnp.where(same_P1, 0.0, rewards_PG - jnp.mean(rewards_PG, axis=1, keepdims=True))


# name -> f(rewards [P, G]) -> advantages [P, G]. Adding one is its function and a line here.
ADVANTAGES = {
    "grpo": grpo,
    "dr_grpo": functools.partial(grpo, normalize_std=False),
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
}


# ---- which completions, which rewards (DAPO) ----


def has_signal(rewards: Float[Array | np.ndarray, "P G"]) -> Bool[Array, "P"]:
    """True for the groups whose rewards are not all the same; the others' advantages are 0, and DAPO samples anew.

    Reference:
        Yu et al. (DAPO), arXiv 2503.14476, section 3.2.
    """
    rewards = jnp.asarray(rewards)
    return jnp.any(rewards != rewards[:, :1], axis=1)


def overlong_penalty(
    lengths: Shaped[Array | np.ndarray, "*shape"], *, max_length: int, buffer: int
) -> Float[Array, "*shape"]:
    """What a completion's length adds to its reward: 0, falling to -1 over the last `buffer` tokens before max_length.

    Args:
        lengths: tokens of each completion.
        max_length: where the sampler cuts off, in tokens.
        buffer: the tokens before it that cost; a completion of max_length - buffer costs nothing.

    Raises:
        ValueError: a buffer that is not between 1 and max_length.

    Reference:
        Yu et al. (DAPO), arXiv 2503.14476, eq. 13.
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"buffer must be between 1 and max_length = {max_length} tokens, got {buffer}")
    over = jnp.asarray(lengths) - (max_length - buffer)
    return -jnp.clip(over / buffer, 0, 1)


# ---- of tokens ----


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    *,
    discount: float,
    gae_lambda: float,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimates of the scored tokens, and the returns that a value head is to foresee.

    delta_t = r_t + discount * V_next - V_t; A_t = delta_t + discount * gae_lambda * A_next; returns = A + V. `next` is
    the sequence's next scored token: a hole in the mask (a tool's output, a user's turn) neither earns nor discounts.
    After the last one both are 0: a completion that was cut off counts as ended.

    Args:
        rewards: earned by each token; often 0 but for the last.
        values: of the head, before each target's token is chosen.
        loss_mask: true where a target is scored; what stands elsewhere is not read.
        discount: of a later reward, per scored token.
        gae_lambda: 0 trusts the values (one step: biased as they are), 1 the rewards (the whole return-to-go less the
            value, unbiased whatever the values are, and noisy).

    Returns:
        Advantages and returns without a gradient, 0 where the mask is false.

    Reference:
        Schulman et al., arXiv 1506.02438, eq. 16.
    """
    rewards_BT, values_BT = fill(rewards, loss_mask), fill(values, loss_mask)
    # The value of the first scored target at or after t; then that after t.
    at_or_after_BT = decayed_suffix_sum(values_BT, jnp.where(loss_mask, 0, 1).astype(values_BT.dtype))
    next_BT = jnp.pad(at_or_after_BT[:, 1:], ((0, 0), (0, 1)))
    delta_BT = fill(rewards_BT + discount * next_BT - values_BT, loss_mask)
    decay_BT = jnp.where(loss_mask, jnp.asarray(discount * gae_lambda, delta_BT.dtype), 1)
    advantages_BT = fill(decayed_suffix_sum(delta_BT, decay_BT), loss_mask)
    return jax.lax.stop_gradient((advantages_BT, advantages_BT + values_BT))


def whiten(
    advantages: Float[Array, "B T"], loss_mask: Bool[Array, "B T"], *, epsilon: float = 1e-6
) -> Float[Array, "B T"]:
    """Advantages of mean 0 and standard deviation 1 over all scored targets of the batch; 0 elsewhere.

    Args:
        advantages: of each token.
        loss_mask: true where a target is scored; what stands elsewhere is not read.
        epsilon: added to the standard deviation, whose denominator is the number of scored targets.

    Returns:
        Without a gradient; exactly 0 if all are the same.
    """
    advantages_BT = jax.lax.stop_gradient(fill(advantages, loss_mask))
    centered_BT = advantages_BT - masked_mean(advantages_BT, loss_mask)
    std = jnp.sqrt(masked_mean(jnp.square(centered_BT), loss_mask))
    largest = jnp.max(jnp.where(loss_mask, advantages_BT, -jnp.inf), initial=-jnp.inf)
    varies = jnp.any(loss_mask & (advantages_BT != largest))
    return jnp.where(varies, fill(centered_BT / (std + epsilon), loss_mask), 0)
