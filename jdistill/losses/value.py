"""The value head's loss, and how well it foresees.

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
    """Half the squared error of the values, as a loss per token.

    Args:
        values: of the head being trained, before each target's token is chosen.
        old_values: the same at the beginning of the step, those that `advantages.gae` was given; no gradient.
        returns: of `advantages.gae`; no gradient.
        clip: the error is the larger one of the value's and of the value held within this of its old one, so that a
            value that has moved that far towards its return has no gradient any more; None: off, and old_values are
            not read. In the returns' units.

    Returns:
        Loss per token, to be reduced by `masked`; (v - R)^2 / 2, so its gradient is the error. Fill unscored targets of
        all arguments first (`masked.fill`).

    Raises:
        ValueError: clip not above 0.

    Reference:
        Schulman et al., arXiv 1707.06347, eq. 9; the clip is that of their code (Engstrom et al., arXiv 2005.12729,
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
    """1 - Var(returns - values) / Var(returns) over scored targets: 1 foresees all, 0 no more than a constant does.

    Below 0 the values are worse than a constant. 0 where the returns are all the same, as in an empty batch: there is
    nothing to explain.

    Args:
        values: of the head.
        returns: of `advantages.gae`.
        loss_mask: true where a target is scored; what stands elsewhere is not read.
    """
    values_BT, returns_BT = fill(values, loss_mask), fill(returns, loss_mask)

    def variance(x_BT: Float[Array, "B T"]) -> Float[Array, ""]:
        return masked_mean(jnp.square(x_BT - masked_mean(x_BT, loss_mask)), loss_mask)

    largest = jnp.max(jnp.where(loss_mask, returns_BT, -jnp.inf), initial=-jnp.inf)
    # Not Var(returns) > 0: eight returns of 0.1 have a float32 variance of 5e-17.
    varies = jnp.any(loss_mask & (returns_BT != largest))
    total = jnp.where(varies, variance(returns_BT), 1)
    return jnp.where(varies & (total > 0), 1 - variance(returns_BT - values_BT) / jnp.where(total > 0, total, 1), 0)
