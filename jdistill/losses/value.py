"""The value head's loss and explained variance.

Dimension key: B sequences, T targets.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jdistill.losses.masked import fill, masked_mean


def value_loss(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    *,
    clip: float | None = None,
) -> Float[Array, "B T"]:
    """Compute half the squared error of the values, per token.

    Args:
        values: predictions of the head being trained, before each target's token is chosen.
        old_values: predictions at the start of the step, as given to `advantages.gae`; no gradient.
        returns: returns from `advantages.gae`; no gradient.
        clip: maximum distance from old_values, in units of the returns. The loss takes the larger of the errors of the
            value and of the value clipped to that distance, so a value that has moved that far towards its return has
            no gradient. None: no clip, old_values are not read.

    Returns:
        Loss per token, to be reduced by `masked`: (v - R)^2 / 2, whose gradient is the error. Fill unscored targets of
        all arguments first (`masked.fill`).

    Raises:
        ValueError: clip is not above 0.

    Reference:
        Schulman et al., arXiv 1707.06347, eq. 9; the clip follows their code (Engstrom et al., arXiv 2005.12729,
        section 3).
    """
    if clip is not None and clip <= 0:
        raise ValueError(f"clip must be above 0 (at 0 no value could move), got {clip}")
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    error_BT = jnp.square(values - returns)
    if clip is not None:
        near_BT = old_values + jnp.clip(values - old_values, -clip, clip)
        error_BT = jnp.maximum(error_BT, jnp.square(near_BT - returns))
    return error_BT / 2


def explained_variance(
    values: Float[Array, "B T"], returns: Float[Array, "B T"], loss_mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Compute 1 - Var(returns - values) / Var(returns) over scored targets.

    Args:
        values: predictions of the value head.
        returns: returns from `advantages.gae`.
        loss_mask: true where a target is scored; values elsewhere are not read.

    Returns:
        1 for perfect predictions, 0 for predictions no better than a constant, negative for worse ones; 0 if all
        returns are equal or nothing is scored.
    """
    values_BT, returns_BT = fill(values, loss_mask), fill(returns, loss_mask)

    def variance(x_BT: Float[Array, "B T"]) -> Float[Array, ""]:
        return masked_mean(jnp.square(x_BT - masked_mean(x_BT, loss_mask)), loss_mask)

    largest = jnp.max(jnp.where(loss_mask, returns_BT, -jnp.inf), initial=-jnp.inf)
    # Not Var(returns) > 0: eight returns of 0.1 have a float32 variance of 5e-17.
    varies = jnp.any(loss_mask & (returns_BT != largest))
    total = jnp.where(varies, variance(returns_BT), 1)
    return jnp.where(varies & (total > 0), 1 - variance(returns_BT - values_BT) / jnp.where(total > 0, total, 1), 0)
