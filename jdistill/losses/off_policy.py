"""Weights of tokens whose sampler was another policy than the one that the ratio of a policy loss is relative to.

Three policies are at work: the sampler drew the tokens, the proximal policy is where this step's updates began, the
current one is being trained. A policy loss bounds current / proximal; what is here corrects for proximal / sampler,
which is not 1 where the sampler is some steps old, or computes in another precision.

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
    level: Literal["token", "sequence", "sequence_product"] = "token",
    lower: float | None = None,
    upper: float | None = None,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """exp(proximal - sampler), by which a policy loss per token is multiplied, and the targets that are left.

    Which gradient the weighted loss has, as long as no bound holds (J is the expected reward of a sequence):

        token               at the sampler's prefixes: better next tokens, with the rest of the answer left to the
                            sampler. The usual choice: one ratio a token, so little variance.
        sequence            no policy's exactly. One weight a sequence, the geometric mean of its tokens' ratios, which
                            is what is usually meant by a sequence-level ratio: its size does not grow with the length.
        sequence_product    that of J, exactly, where current = proximal: the sequence's own ratio, whose variance
                            grows exponentially with the length.

    Args:
        proximal_logprobs: of the sampled tokens under the proximal policy, in nats.
        sampler_logprobs: of the same tokens when they were sampled, in nats.
        loss_mask: true where a target is scored; what stands elsewhere is not read.
        action: "clamp" holds the weight within the bounds (truncated importance sampling): biased towards what the
            sampler does. "mask" takes targets out of the loss whose weight is outside (rejection), whole sequences with
            a sequence's level.
        level: see above.
        lower: of the weight; None: none.
        upper: of the weight; None: none.

    Returns:
        The weight without a gradient, 0 where the target does not count; and the mask, smaller after a rejection. A
        loss reduced under it is a mean over what is left; under the old mask, rejected targets count as 0, so a batch
        that lost half its targets pulls half as much (AReaL's choice).

    Raises:
        ValueError: bounds that exclude 1, the weight of a sampler that is right, or a mask without a bound.

    Reference:
        Hilton et al. (decoupled PPO), arXiv 2110.00641; Espeholt et al. (truncation), arXiv 1802.01561; Fu et al.
        (AReaL), arXiv 2505.24298.
    """
    if action == "mask" and lower is None and upper is None:
        raise ValueError('action="mask" rejects what is outside lower and upper, and neither is given: set upper')
    if (lower is not None and lower > 1) or (upper is not None and upper < 1):
        raise ValueError(f"1, the weight on-policy, must be within lower and upper, got [{lower}, {upper}]")
    proximal_BT, sampler_BT = fill(proximal_logprobs, loss_mask), fill(sampler_logprobs, loss_mask)
    match level:
        case "token":
            weight_BT = probability_ratio(proximal_BT, sampler_BT)
        case "sequence":
            log_ratio_B1 = mean_log_ratio(proximal_BT, sampler_BT, loss_mask)
            weight_BT = jnp.broadcast_to(probability_ratio(log_ratio_B1, jnp.zeros_like(log_ratio_B1)), loss_mask.shape)
        case "sequence_product":
            log_ratio_B1 = jnp.sum(proximal_BT - sampler_BT, axis=1, keepdims=True)
            weight_BT = jnp.broadcast_to(probability_ratio(log_ratio_B1, jnp.zeros_like(log_ratio_B1)), loss_mask.shape)
        case _:
            raise ValueError(f'level must be "token", "sequence" or "sequence_product", got "{level}"')
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
