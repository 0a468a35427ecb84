"""Weights of the loss terms over the run, and of the tokens in the distillation term.

Schedules map the step, which counts from 0 and may be traced, to a weight. Only `clip_per_token` has a gradient.

Dimension key: B sequences, T targets.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jdistill.losses.masked import fill, masked_mean

Step = int | Int[Array | np.ndarray, ""]

# ---- schedules ----


def linear(step: Step, *, begin: float, end: float, num_steps: int) -> Float[Array, ""]:
    """Interpolate linearly from `begin` at step 0 to `end` at step `num_steps`, constant afterwards.

    Raises:
        ValueError: num_steps is below 1.
    """
    progress = _progress(step, num_steps)
    return begin * (1 - progress) + end * progress


def cosine(step: Step, *, begin: float, end: float, num_steps: int) -> Float[Array, ""]:
    """Interpolate along half a cosine, flat at both ends, from `begin` at step 0 to `end` at `num_steps` and later.

    Raises:
        ValueError: num_steps is below 1.
    """
    progress = (1 - jnp.cos(jnp.pi * _progress(step, num_steps))) / 2
    return begin * (1 - progress) + end * progress


def kdrl_annealing(step: Step, *, begin: float, end: float, decrement: float) -> Float[Array, ""]:
    """Lower the weight from `begin` by `decrement` per step, never below `end` (KDRL's annealing of distillation).

    The run starts with strong imitation and leaves room for the reward later. Unlike `linear`, the schedule does not
    depend on the length of the run.

    Args:
        step: counts from 0.
        begin: weight at step 0.
        end: minimum weight.
        decrement: decrease per step.

    Raises:
        ValueError: end is above begin, or decrement is not positive.

    Reference:
        Xu et al. (KDRL), arXiv 2506.02208.
    """
    if end > begin or decrement <= 0:
        raise ValueError(
            f"the weight decreases from begin to end by decrement > 0, got begin = {begin}, end = {end}, "
            f"decrement = {decrement}"
        )
    return jnp.maximum(begin - decrement * jnp.asarray(step, float), end)


def _progress(step: Step, num_steps: int) -> Float[Array, ""]:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    return jnp.clip(jnp.asarray(step, float) / num_steps, 0, 1)


# ---- token weights ----


def reward_guided_mask(
    rewards: Float[Array | np.ndarray, "B"], loss_mask: Bool[Array | np.ndarray, "B T"], *, threshold: float = 0.5
) -> Float[Array, "B T"]:
    """Return weight 1 at the scored tokens of failed sequences (reward below `threshold`), 0 elsewhere.

    This is a weight and not a new mask: a reduction still divides by all scored tokens, so a batch with one wrong
    answer contributes less than a batch in which all are wrong.

    Args:
        rewards: one number per sequence.
        loss_mask: true where a target is scored.
        threshold: for rewards of 0 and 1, any number between them.

    Reference:
        Xu et al. (KDRL), arXiv 2506.02208, response-level reward-guided distillation.
    """
    wrong_B = jnp.asarray(rewards) < threshold
    return (wrong_B[:, None] & jnp.asarray(loss_mask)).astype(float)


def entropy_weights(
    entropy: Float[Array, "B T"], loss_mask: Bool[Array, "B T"], *, strength: float = 1.0
) -> Float[Array, "B T"]:
    """Weight tokens by uncertainty: (1 + strength * h) / (1 + strength), h = entropy / mean entropy.

    The mean over scored tokens is 1, so the term's size does not depend on strength. A token of zero entropy keeps
    1 / (1 + strength), because a student that is sure and wrong has much to learn, which entropy does not show. Both
    papers below select tokens, by a threshold or at random by entropy; this weight is the expectation of selecting
    tokens at random by this score.

    Args:
        entropy: of the student (Xu et al.) or of the teacher (Jin et al.) at each target, in nats; not negative.
        loss_mask: true where a target is scored; values elsewhere are not read.
        strength: 0 weights all tokens equally; a large strength weights them in proportion to their entropy.

    Returns:
        Weights without a gradient, 0 where the mask is false; all 1 if every entropy is 0.

    Raises:
        ValueError: strength is negative.

    Reference:
        Xu et al. (TIP), arXiv 2604.14084; Jin et al., arXiv 2603.07079.
    """
    if strength < 0:
        raise ValueError(f"strength must not be negative (weights could become negative), got {strength}")
    entropy_BT = jax.lax.stop_gradient(fill(entropy, loss_mask))
    mean = masked_mean(entropy_BT, loss_mask)
    relative_BT = jnp.where(mean > 0, entropy_BT / jnp.where(mean > 0, mean, 1), 1)
    return fill((1 + strength * relative_BT) / (1 + strength), loss_mask)


def clip_per_token(x: Float[Array, "B T"], *, limit: float) -> Float[Array, "B T"]:
    """Bound each token's distillation advantage or loss to [-limit, limit], and scale its gradient by the same factor.

    Computes x * min(1, limit / abs(x)) without a gradient through the factor. Beyond the limit a loss keeps that share
    of its gradient; clip() would leave none, and the tokens on which teacher and student disagree most would teach
    nothing. The price is bias: a token with abs(x) = 2 * limit has half its gradient.

    Args:
        x: one finite number per token, in nats.
        limit: bound in nats; above 0.

    Raises:
        ValueError: limit is not above 0.
    """
    if limit <= 0:
        raise ValueError(f"limit must be above 0, got {limit}")
    return x * jax.lax.stop_gradient(limit / jnp.maximum(jnp.abs(x), limit))
