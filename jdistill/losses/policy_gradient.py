"""Policy losses: log-probs and advantages -> loss per token.

The ratio compares the policy being trained with the proximal policy, the parameters at the start of the step. On-policy
(ratio 1), every loss has REINFORCE's gradient, -advantage * grad log p, so RLOO and REINFORCE++ are advantages
(`advantages`) that work with any of these losses. The losses differ in how they limit a token that has moved away:

    ppo_clip    no gradient once the token's ratio leaves a range
    gspo        no gradient for the whole sequence once the sequence's ratio leaves a range
    cispo       the ratio is a bounded weight, the gradient never stops
    sapo        a smooth gate closes as the ratio moves away from 1

Dimension key: B sequences, T targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jdistill.losses.masked import fill

# exp(20) = 4.9e8: far beyond any clip range, and still finite after a product with an advantage and a sum over tokens.
_MAX_LOG_RATIO = 20.0


def probability_ratio(logprobs: Float[Array, "B T"], proximal_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Compute exp(logprobs - proximal_logprobs), clipped to [exp(-20), exp(20)] to avoid overflow."""
    return jnp.exp(jnp.clip(logprobs - proximal_logprobs, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))


def mean_log_ratio(
    logprobs: Float[Array, "B T"], proximal_logprobs: Float[Array, "B T"], loss_mask: Bool[Array, "B T"]
) -> Float[Array, "B 1"]:
    """Average each sequence's log ratio over its scored targets (0 if none); its exp is the geometric mean ratio."""
    log_ratio_BT = fill(logprobs, loss_mask) - fill(proximal_logprobs, loss_mask)
    count_B1 = jnp.sum(loss_mask, axis=1, keepdims=True, dtype=log_ratio_BT.dtype)
    return jnp.sum(log_ratio_BT, axis=1, keepdims=True) / jnp.maximum(count_B1, 1)


def ppo_clip(
    logprobs: Float[Array, "B T"],
    proximal_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    *,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> Float[Array, "B T"]:
    """Compute PPO's clipped surrogate loss, per token.

    Args:
        logprobs: sampled tokens under the parameters being trained, in nats.
        proximal_logprobs: the same tokens under the proximal policy, in nats.
        advantages: one number per token, without a gradient.
        clip_low: no gradient below ratio 1 - clip_low where the advantage is negative.
        clip_high: no gradient above ratio 1 + clip_high where the advantage is positive; None: clip_low. A value above
            clip_low is DAPO's clip-higher.
        dual_clip: c > 1 bounds the loss to c * |advantage| where the advantage is negative, so that a token that has
            become far more likely cannot dominate; None: off.

    Returns:
        Loss per token, to be reduced by `masked`. Fill unscored targets of all arguments first (`masked.fill`), or call
        it through `POLICIES`, which does so.

    Raises:
        ValueError: dual_clip is not above 1.

    Reference:
        Schulman et al., arXiv 1707.06347, eq. 7; Ye et al. (dual clip), arXiv 1912.09729, eq. 5; Yu et al. (DAPO,
        clip-higher), arXiv 2503.14476.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be above 1 (1 would stop on-policy tokens too), got {dual_clip}")
    loss_BT = _clipped(probability_ratio(logprobs, proximal_logprobs), advantages, clip_low, clip_high)
    if dual_clip is not None:
        # A positive advantage makes the loss negative, so the bound has no effect there.
        loss_BT = jnp.minimum(loss_BT, dual_clip * jnp.abs(advantages))
    return loss_BT


def clip_is_active(
    logprobs: Float[Array, "B T"],
    proximal_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    *,
    clip_low: float = 0.2,
    clip_high: float | None = None,
) -> Bool[Array, "B T"]:
    """Return which tokens have no gradient because of `ppo_clip`'s clip (dual_clip is not considered)."""
    return _is_clipped(probability_ratio(logprobs, proximal_logprobs), advantages, clip_low, clip_high)


def gspo(
    logprobs: Float[Array, "B T"],
    proximal_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    *,
    clip_low: float = 3e-4,
    clip_high: float | None = None,
) -> Float[Array, "B T"]:
    """Apply PPO's clip to one ratio per sequence, the geometric mean of its tokens' ratios; loss per token.

    This is GSPO's token form: the ratio has the sequence's value and each token's own gradient. If all tokens of a
    sequence share one advantage, value and gradient equal those of GSPO's sequence loss; otherwise (e.g. a teacher's
    advantages) each token is pushed by its own advantage.

    Args:
        logprobs: sampled tokens under the parameters being trained, in nats.
        proximal_logprobs: the same tokens under the proximal policy, in nats.
        advantages: one number per token, without a gradient.
        loss_mask: true where a target is scored; values elsewhere are not read.
        clip_low: as in `ppo_clip`, for the sequence's ratio, which moves far less than that of a token. The paper uses
            3e-4, and 4e-4 for clip_high.
        clip_high: None: clip_low.

    Returns:
        Loss per token, 0 where the mask is false, to be reduced by `masked` (`masked_sequence_mean` in the paper).

    Reference:
        Zheng et al., arXiv 2507.18071, eq. 5 and 13.
    """
    logprobs, advantages = fill(logprobs, loss_mask), fill(advantages, loss_mask)
    return _clipped(_sequence_ratio(logprobs, proximal_logprobs, loss_mask), advantages, clip_low, clip_high)


def gspo_clip_is_active(
    logprobs: Float[Array, "B T"],
    proximal_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    *,
    clip_low: float = 3e-4,
    clip_high: float | None = None,
) -> Bool[Array, "B T"]:
    """Return which scored tokens have no gradient because of `gspo`'s clip."""
    logprobs, advantages = fill(logprobs, loss_mask), fill(advantages, loss_mask)
    return _is_clipped(_sequence_ratio(logprobs, proximal_logprobs, loss_mask), advantages, clip_low, clip_high)


def cispo(
    logprobs: Float[Array, "B T"],
    proximal_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    *,
    clip_low: float = 1.0,
    clip_high: float | None = 4.0,
) -> Float[Array, "B T"]:
    """Compute -weight * advantage * log p per token, where weight is the clipped ratio without a gradient.

    Rare tokens that decide an answer move far in one update; PPO's clip drops them from the next one, CISPO keeps them.
    Within the bounds the gradient is that of the unclipped ratio. The value is not meaningful.

    Args:
        logprobs: sampled tokens under the parameters being trained, in nats.
        proximal_logprobs: the same tokens under the proximal policy, in nats.
        advantages: one number per token, without a gradient.
        clip_low: the weight is at least 1 - clip_low; 1 means no bound, as in the paper.
        clip_high: the weight is at most 1 + clip_high; None: clip_low. The paper tunes it without giving the value; 4
            (a weight of at most 5) only affects tokens far off-policy.

    Returns:
        Loss per token, to be reduced by `masked`. Fill unscored targets of all arguments first (`masked.fill`), or call
        it through `POLICIES`, which does so.

    Reference:
        MiniMax, "MiniMax-M1", arXiv 2506.13585, eq. 4 and 5.
    """
    low, high = _bounds(clip_low, clip_high)
    weight_BT = jnp.clip(probability_ratio(logprobs, proximal_logprobs), low, high)
    return -jax.lax.stop_gradient(weight_BT) * advantages * logprobs


def cispo_clip_is_active(
    logprobs: Float[Array, "B T"],
    proximal_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    *,
    clip_low: float = 1.0,
    clip_high: float | None = 4.0,
) -> Bool[Array, "B T"]:
    """Return which tokens have a weight that `cispo` clips; they still have a gradient."""
    low, high = _bounds(clip_low, clip_high)
    ratio_BT = probability_ratio(logprobs, proximal_logprobs)
    return (advantages != 0) & ((ratio_BT < low) | (ratio_BT > high))


def sapo(
    logprobs: Float[Array, "B T"],
    proximal_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> Float[Array, "B T"]:
    """Compute -advantage * (4 / tau) * sigmoid(tau * (ratio - 1)), per token.

    The gradient is -advantage * ratio * g * grad log p with the gate g = 4 s (1 - s), s the sigmoid. The gate is 1
    on-policy and closes smoothly on both sides, whereas PPO's clip cuts off on one.

    Args:
        logprobs: sampled tokens under the parameters being trained, in nats.
        proximal_logprobs: the same tokens under the proximal policy, in nats.
        advantages: one number per token, without a gradient.
        tau_positive: rate at which the gate closes where the advantage is positive.
        tau_negative: rate elsewhere. Pushing a token down raises all others, so the paper closes this gate sooner.

    Returns:
        Loss per token, to be reduced by `masked`. Fill unscored targets of all arguments first (`masked.fill`), or call
        it through `POLICIES`, which does so.

    Raises:
        ValueError: a tau is not positive.

    Reference:
        Gao et al., "Soft Adaptive Policy Optimization", arXiv 2511.20347.
    """
    if tau_positive <= 0 or tau_negative <= 0:
        raise ValueError(f"tau must be above 0, got {tau_positive} and {tau_negative}")
    tau_BT = jnp.where(advantages > 0, tau_positive, tau_negative).astype(logprobs.dtype)
    ratio_BT = probability_ratio(logprobs, proximal_logprobs)
    return -advantages * 4 / tau_BT * jax.nn.sigmoid(tau_BT * (ratio_BT - 1))


# ---- the table ----


@dataclass(frozen=True)
class Policy:
    """A policy loss and what a trainer must know to call it."""

    name: str
    # f(logprobs, proximal_logprobs, advantages, loss_mask, **options) -> loss [B, T]
    function: Callable[..., Float[Array, "B T"]]
    # Same arguments, of the options only clip_low and clip_high -> bool [B, T]; None: the loss has no clip.
    clip_is_active: Callable[..., Bool[Array, "B T"]] | None
    options: tuple[str, ...]  # keyword arguments of `function`; also keys of the objective's configuration
    by_sequence: bool = False  # a token's loss depends on other tokens of its sequence

    @property
    def clip_options(self) -> tuple[str, ...]:
        """Keyword arguments that `clip_is_active` takes."""
        return tuple(name for name in self.options if name in ("clip_low", "clip_high"))


def _per_token(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add a mask as the fourth argument, which fills unscored targets of the other three."""

    def masked_function(logprobs, proximal_logprobs, advantages, loss_mask, **options):
        filled = (fill(x, loss_mask) for x in (logprobs, proximal_logprobs, advantages))
        return function(*filled, **options)

    return masked_function


_CLIP = ("clip_low", "clip_high")
# To add a policy, write its function and add a line here.
POLICIES = {
    policy.name: policy
    for policy in (
        Policy("ppo_clip", _per_token(ppo_clip), _per_token(clip_is_active), (*_CLIP, "dual_clip")),
        Policy("gspo", gspo, gspo_clip_is_active, _CLIP, by_sequence=True),
        Policy("cispo", _per_token(cispo), _per_token(cispo_clip_is_active), _CLIP),
        Policy("sapo", _per_token(sapo), None, ("tau_positive", "tau_negative")),
    )
}


def _bounds(clip_low: float, clip_high: float | None) -> tuple[float, float]:
    return 1 - clip_low, 1 + (clip_low if clip_high is None else clip_high)


def _clipped(
    ratio_BT: Float[Array, "B T"], advantages: Float[Array, "B T"], clip_low: float, clip_high: float | None
) -> Float[Array, "B T"]:
    return jnp.maximum(-advantages * ratio_BT, -advantages * jnp.clip(ratio_BT, *_bounds(clip_low, clip_high)))


def _is_clipped(
    ratio_BT: Float[Array, "B T"], advantages: Float[Array, "B T"], clip_low: float, clip_high: float | None
) -> Bool[Array, "B T"]:
    low, high = _bounds(clip_low, clip_high)
    return ((advantages > 0) & (ratio_BT > high)) | ((advantages < 0) & (ratio_BT < low))


def _sequence_ratio(
    logprobs: Float[Array, "B T"], proximal_logprobs: Float[Array, "B T"], loss_mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Return a ratio with the sequence's value and each token's own gradient; `logprobs` must be filled."""
    log_ratio_B1 = jax.lax.stop_gradient(mean_log_ratio(logprobs, proximal_logprobs, loss_mask))
    held_B1 = jnp.clip(log_ratio_B1, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return jnp.exp(held_B1) * jnp.exp(logprobs - jax.lax.stop_gradient(logprobs))
