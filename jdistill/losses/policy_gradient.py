"""Policy losses: log-probs and advantages -> loss per token.

The ratio is that of the policy being trained to the proximal one, where this step's updates began. On-policy, at ratio
1, every loss here has REINFORCE's gradient, -advantage * grad log p: so RLOO and REINFORCE++ are an advantage
(`advantages`) with any of these, and have no loss of their own. They differ in what stops a token that has moved away:

    ppo_clip    its own ratio leaves a range: no gradient
    gspo        its sequence's ratio leaves a range: no gradient for all of the sequence
    cispo       its ratio as a weight is bounded, its gradient never stops
    sapo        a smooth gate, which closes with the distance from 1

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
    """exp(logprobs - proximal_logprobs), held between exp(-20) and exp(20) so that nothing overflows."""
    return jnp.exp(jnp.clip(logprobs - proximal_logprobs, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))


def mean_log_ratio(
    logprobs: Float[Array, "B T"], proximal_logprobs: Float[Array, "B T"], loss_mask: Bool[Array, "B T"]
) -> Float[Array, "B 1"]:
    """Of each sequence, over its scored targets; 0 if there is none. Its exp is their ratios' geometric mean."""
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
    """PPO's clipped surrogate, as a loss per token.

    Args:
        logprobs: of the sampled tokens under the parameters being trained, in nats.
        proximal_logprobs: of the same tokens under the parameters that the ratio is relative to.
        advantages: of the same tokens; no gradient should flow through them.
        clip_low: the ratio stops counting below 1 - clip_low where the advantage is negative.
        clip_high: and above 1 + clip_high where it is positive; None: clip_low. Larger than clip_low is DAPO's
            clip-higher.
        dual_clip: c > 1: where the advantage is negative, the loss is at most c * |advantage|, so that a token that
            has become far more likely cannot dominate; None: off.

    Returns:
        Loss per token, to be reduced by `masked`. Fill unscored targets of all arguments first (`masked.fill`), or call
        it through `POLICIES`, which does.

    Raises:
        ValueError: dual_clip not above 1.

    Reference:
        Schulman et al., arXiv 1707.06347, eq. 7; Ye et al. (dual clip), arXiv 1912.09729, eq. 5; Yu et al. (DAPO,
        clip-higher), arXiv 2503.14476.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be above 1 (at 1 it would stop on-policy tokens too), got {dual_clip}")
    loss_BT = _clipped(probability_ratio(logprobs, proximal_logprobs), advantages, clip_low, clip_high)
    if dual_clip is not None:
        # Where the advantage is positive the loss is negative, and this bound never holds.
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
    """True for the tokens whose gradient `ppo_clip` stops (the dual clip apart)."""
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
    """PPO's clip of one ratio a sequence, the geometric mean of its tokens' ratios, as a loss per token.

    In GSPO's token form: the ratio has the sequence's value and, at each token, that token's gradient. With the same
    advantage at all tokens this is GSPO's own loss, in value and gradient; with an advantage per token (a teacher's)
    each token is pushed by its own.

    Args:
        logprobs: of the sampled tokens under the parameters being trained, in nats.
        proximal_logprobs: of the same tokens under the parameters that the ratio is relative to.
        advantages: of the same tokens; no gradient should flow through them.
        loss_mask: true where a target is scored; what stands elsewhere is not read.
        clip_low: as in `ppo_clip`, of the sequence's ratio: a mean moves far less than a token does. The paper takes
            3e-4, and 4e-4 above.
        clip_high: None: clip_low.

    Returns:
        Loss per token, 0 where the mask is false, to be reduced by `masked`: the paper's is `masked_sequence_mean`.

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
    """True for the scored tokens whose gradient `gspo` stops."""
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
    """-weight * advantage * log p, the weight being the clipped ratio without its gradient, as a loss per token.

    Rare tokens on which an answer turns move far in one update; PPO's clip drops them from the next, this does not.
    Where no bound holds its gradient is that of the unclipped ratio. Its value says nothing.

    Args:
        logprobs: of the sampled tokens under the parameters being trained, in nats.
        proximal_logprobs: of the same tokens under the parameters that the ratio is relative to.
        advantages: of the same tokens; no gradient should flow through them.
        clip_low: the weight is at least 1 - clip_low; 1 is no bound, which is how the paper runs it.
        clip_high: and at most 1 + clip_high; None: clip_low. The paper tunes this one and does not print it; 4 (a
            weight of at most 5) only holds what is far off-policy.

    Returns:
        Loss per token, to be reduced by `masked`. Fill unscored targets of all arguments first (`masked.fill`), or call
        it through `POLICIES`, which does.

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
    """True for the tokens whose weight `cispo` bounds; they still have a gradient."""
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
    """-advantage * (4 / tau) * sigmoid(tau * (ratio - 1)), as a loss per token.

    The gradient is -advantage * ratio * g * grad log p with a gate g = 4 s (1 - s), s the sigmoid: 1 on-policy, and
    closing smoothly on both sides of it where PPO's clip cuts off on one.

    Args:
        logprobs: of the sampled tokens under the parameters being trained, in nats.
        proximal_logprobs: of the same tokens under the parameters that the ratio is relative to.
        advantages: of the same tokens; no gradient should flow through them.
        tau_positive: how fast the gate closes where the advantage is positive.
        tau_negative: and elsewhere. Pushing a token down raises all others, so the paper closes this one sooner.

    Returns:
        Loss per token, to be reduced by `masked`. Fill unscored targets of all arguments first (`masked.fill`), or call
        it through `POLICIES`, which does.

    Raises:
        ValueError: a tau that is not positive.

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
    """A policy loss, as a trainer needs to know it."""

    name: str
    # f(logprobs, proximal_logprobs, advantages, loss_mask, **options) -> loss [B, T]
    function: Callable[..., Float[Array, "B T"]]
    # Called like `function`, with clip_low and clip_high alone -> bool [B, T]; None: nothing is cut off.
    clip_is_active: Callable[..., Bool[Array, "B T"]] | None
    options: tuple[str, ...]  # keyword arguments of `function`, which are keys of the objective's configuration too
    by_sequence: bool = False  # the loss at a token depends on other tokens of its sequence

    @property
    def clip_options(self) -> tuple[str, ...]:
        """Keyword arguments of `clip_is_active`."""
        return tuple(name for name in self.options if name in ("clip_low", "clip_high"))


def _per_token(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a mask as its fourth argument: nothing of an unscored target is read."""

    def masked_function(logprobs, proximal_logprobs, advantages, loss_mask, **options):
        filled = (fill(x, loss_mask) for x in (logprobs, proximal_logprobs, advantages))
        return function(*filled, **options)

    return masked_function


_CLIP = ("clip_low", "clip_high")
# Adding a policy is its function and a line here.
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
    """The sequence's ratio in value, each token's own log-prob in gradient. `logprobs` are filled."""
    log_ratio_B1 = jax.lax.stop_gradient(mean_log_ratio(logprobs, proximal_logprobs, loss_mask))
    held_B1 = jnp.clip(log_ratio_B1, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return jnp.exp(held_B1) * jnp.exp(logprobs - jax.lax.stop_gradient(logprobs))
