"""Corrects for a sampler that is not the proximal policy: weights exp(proximal - sampler), clamped or masked.

Three policies take part. The sampler drew the tokens, the proximal policy holds the parameters at the start of the
step, and the current policy is being trained. A policy loss bounds current / proximal; this module corrects for
proximal / sampler, which differs from 1 if the sampler is some steps old or computes in another precision.

Dimension key: B sequences, T targets.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jdistill.losses.masked import fill
from jdistill.losses.policy_gradient import mean_log_ratio, probability_ratio


def behavior_weight(
    proximal_logprobs: Float[Array, "B T"],
    sampler_logprobs: Float[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    *,
    action: Literal["clamp", "mask"] = "clamp",
    level: Literal["token", "sequence"] = "token",
    lower: float | None = None,
    upper: float | None = None,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Importance weight exp(proximal - sampler) of each token's policy loss, and the targets that remain.

    Args:
        proximal_logprobs: sampled tokens under the proximal policy, in nats.
        sampler_logprobs: the same tokens when they were sampled, in nats.
        loss_mask: true where a target is scored; values elsewhere are not read.
        action: "clamp" holds the weight within the bounds (truncated importance sampling), biased towards the sampler.
            "mask" removes targets with a weight outside the bounds (rejection).
        level: "token" is one ratio per token, the usual choice: little variance. Its gradient improves the next token
            at the sampler's prefixes. "sequence" is the geometric mean of a sequence's ratios, whose size does not grow
            with the length; its gradient is exact for no policy, and a rejection removes the whole sequence.
        lower, upper: bounds of the weight; None: unbounded.

    Returns:
        Weight without a gradient, 0 at targets that do not count; and the mask that remains. A loss reduced under it
        is a mean over the remaining targets. Under the old mask rejected targets count as 0, so a batch that lost
        half its targets pulls half as much (AReaL's choice).

    Raises:
        ValueError: bounds that exclude 1, the weight of an on-policy token, or a mask without a bound.

    Reference:
        Hilton et al. (decoupled PPO), arXiv 2110.00641; Espeholt et al. (truncation), arXiv 1802.01561; Fu et al.
        (AReaL), arXiv 2505.24298.
    """
    if action == "mask" and lower is None and upper is None:
        raise ValueError('action="mask" rejects what is outside lower and upper, and neither is given: set upper')
    if (lower is not None and lower > 1) or (upper is not None and upper < 1):
        raise ValueError(f"1, the weight on-policy, must be within lower and upper, got [{lower}, {upper}]")
    weight_BT = _weight(fill(proximal_logprobs, loss_mask), fill(sampler_logprobs, loss_mask), loss_mask, level)
    match action:
        case "clamp":
            weight_BT = jnp.clip(weight_BT, lower, upper)
        case "mask":
            if lower is not None:
                loss_mask = loss_mask & (weight_BT >= lower)
            if upper is not None:
                loss_mask = loss_mask & (weight_BT <= upper)
        case _:
            raise ValueError(f'action must be "clamp" or "mask", got "{action}"')
    return jax.lax.stop_gradient(fill(weight_BT, loss_mask)), loss_mask


def _weight(
    proximal_BT: Float[Array, "B T"], sampler_BT: Float[Array, "B T"], loss_mask: Bool[Array, "B T"], level: str
) -> Float[Array, "B T"]:
    match level:
        case "token":
            return probability_ratio(proximal_BT, sampler_BT)
        case "sequence":
            log_ratio_B1 = mean_log_ratio(proximal_BT, sampler_BT, loss_mask)
            return jnp.broadcast_to(probability_ratio(log_ratio_B1, jnp.zeros_like(log_ratio_B1)), loss_mask.shape)
        case _:
            raise ValueError(f'level must be "token" or "sequence", got "{level}"')
