"""Policy losses: log-probs and advantages -> loss per token.

Dimension key: B sequences, T targets.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# exp(20) = 4.9e8: far beyond any clip range, and still finite after a product with an advantage and a sum over tokens.
_MAX_LOG_RATIO = 20.0


def probability_ratio(logprobs: Float[Array, "B T"], proximal_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """exp(logprobs - proximal_logprobs), held between exp(-20) and exp(20) so that nothing overflows."""
    return jnp.exp(jnp.clip(logprobs - proximal_logprobs, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))


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
        Loss per token, to be reduced by `masked`.

    Raises:
        ValueError: dual_clip not above 1.

    Reference:
        Schulman et al., arXiv 1707.06347, eq. 7; Ye et al. (dual clip), arXiv 1912.09729, eq. 5; Yu et al. (DAPO,
        clip-higher), arXiv 2503.14476.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be above 1 (at 1 it would stop on-policy tokens too), got {dual_clip}")
    clip_high = clip_low if clip_high is None else clip_high
    ratio_BT = probability_ratio(logprobs, proximal_logprobs)
    clipped_BT = jnp.clip(ratio_BT, 1 - clip_low, 1 + clip_high)
    loss_BT = jnp.maximum(-advantages * ratio_BT, -advantages * clipped_BT)
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
    clip_high = clip_low if clip_high is None else clip_high
    ratio_BT = probability_ratio(logprobs, proximal_logprobs)
    return ((advantages > 0) & (ratio_BT > 1 + clip_high)) | ((advantages < 0) & (ratio_BT < 1 - clip_low))
