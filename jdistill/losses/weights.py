"""How much each term counts at a step, and how much each token counts in the distillation's.

Schedules take the step, which counts from 0 and may be traced, and return a weight. Nothing here has a gradient, but
for the argument of `clip_per_token`.

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


def constant(step: Step, *, value: float) -> Float[Array, ""]:
    """The same weight at every step."""
    return jnp.full(jnp.shape(step), value, dtype=float)


def linear(step: Step, *, begin: float, end: float, num_steps: int) -> Float[Array, ""]:
    """From `begin` at step 0 in equal steps to `end` at step `num_steps`, and `end` from there on.

    Raises:
        ValueError: num_steps below 1.
    """
    progress = _progress(step, num_steps)
    return begin * (1 - progress) + end * progress


def cosine(step: Step, *, begin: float, end: float, num_steps: int) -> Float[Array, ""]:
    """From `begin` at step 0 along half a cosine, flat at both ends, to `end` at step `num_steps`; `end` from there on.

    Raises:
        ValueError: num_steps below 1.
    """
    progress = (1 - jnp.cos(jnp.pi * _progress(step, num_steps))) / 2
    return begin * (1 - progress) + end * progress


def kdrl_annealing(step: Step, *, begin: float, end: float, decrement: float) -> Float[Array, ""]:
    """KDRL's annealing of the distillation weight: `begin`, less `decrement` each step, never below `end`.

    Strong imitation first, then room for the reward. Unlike `linear` it does not depend on how long the run is.

    Args:
        step: counts from 0.
        begin: at step 0.
        end: the least.
        decrement: by how much less at each step.

    Raises:
        ValueError: end above begin, or a decrement that is not positive.

    Reference:
        Xu et al. (KDRL), arXiv 2506.02208.
    """
    if end > begin or decrement <= 0:
        raise ValueError(
            f"the weight goes down from begin to end by decrement > 0, got begin = {begin}, end = {end}, "
            f"decrement = {decrement}"
        )
    return jnp.maximum(begin - decrement * jnp.asarray(step, float), end)


SCHEDULES = {"constant": constant, "linear": linear, "cosine": cosine, "kdrl": kdrl_annealing}


def _progress(step: Step, num_steps: int) -> Float[Array, ""]:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    return jnp.clip(jnp.asarray(step, float) / num_steps, 0, 1)


# ---- weights of tokens ----


def reward_guided_mask(
    rewards: Float[Array | np.ndarray, "B"], loss_mask: Bool[Array | np.ndarray, "B T"], *, threshold: float = 0.5
) -> Float[Array, "B T"]:
    """1 at the scored tokens of the sequences whose reward is below `threshold`, 0 elsewhere: distil only what failed.

    A weight and not a new mask: a reduction still divides by all scored tokens, so a batch with one wrong answer does
    not count that one as much as a batch in which all are wrong.

    Args:
        rewards: of each sequence.
        loss_mask: true where a target is scored.
        threshold: with rewards of 0 and 1, anything between them.

    Reference:
        Xu et al. (KDRL), arXiv 2506.02208, reward-guided distillation by response.
    """
    wrong_B = jnp.asarray(rewards) < threshold
    return (wrong_B[:, None] & jnp.asarray(loss_mask)).astype(float)


def entropy_weights(
    entropy: Float[Array, "B T"], loss_mask: Bool[Array, "B T"], *, strength: float = 1.0
) -> Float[Array, "B T"]:
    """More weight where the next token is uncertain: (1 + strength * h) / (1 + strength), h = entropy / its mean.

    The mean over scored tokens is 1, so the term's size does not change with strength. A certain token keeps
    1 / (1 + strength) of its weight: where a student is sure and wrong there is much to learn, and entropy does not see
    it. Both papers below choose tokens by a threshold, or at random by entropy; this is the weight that gives a
    token, for sure, what choosing at random by this score gives it on average.

    Args:
        entropy: of the student (Xu et al.) or of the teacher (Jin et al.) at each target, in nats; never negative.
        loss_mask: true where a target is scored; what stands elsewhere is not read.
        strength: 0 is the same weight for all; large is in proportion to the entropy.

    Returns:
        Weights without a gradient, 0 where the mask is false; all 1 if there is no entropy anywhere.

    Raises:
        ValueError: a negative strength.

    Reference:
        Xu et al. (TIP), arXiv 2604.14084; Jin et al., arXiv 2603.07079.
    """
    if strength < 0:
        raise ValueError(f"strength must not be negative (weights could be), got {strength}")
    entropy_BT = jax.lax.stop_gradient(fill(entropy, loss_mask))
    mean = masked_mean(entropy_BT, loss_mask)
    relative_BT = jnp.where(mean > 0, entropy_BT / jnp.where(mean > 0, mean, 1), 1)
    return fill((1 + strength * relative_BT) / (1 + strength), loss_mask)


def clip_per_token(x: Float[Array, "B T"], *, limit: float) -> Float[Array, "B T"]:
    """Holds each token's distillation, an advantage or a loss, between -limit and limit, and its gradient with it.

    x * min(1, limit / abs(x)), the factor held fixed: beyond the limit a loss keeps that share of its gradient. With
    clip() it would have none, and the tokens that teacher and student disagree on most would teach nothing. The
    bias is that share: a token of abs(x) = 2 * limit counts half.

    Args:
        x: per token; finite.
        limit: in nats; above 0.

    Raises:
        ValueError: limit not above 0.
    """
    if limit <= 0:
        raise ValueError(f"limit must be above 0, got {limit}")
    return x * jax.lax.stop_gradient(limit / jnp.maximum(jnp.abs(x), limit))
