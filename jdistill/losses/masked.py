"""The only reductions from tokens to a scalar, and the fill that keeps padding out of values and gradients.

Dimension key: B sequences, T targets.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def fill(x: Float[Array, "B T *rest"], loss_mask: Bool[Array, "B T"], value: float = 0.0) -> Float[Array, "B T *rest"]:
    """`x` where a target is scored, `value` elsewhere; call it on every input of a loss before the first product.

    Masking the loss alone is not enough: a padded target may hold -inf or NaN, and the gradient of what was computed
    from it is 0 * inf = NaN. What is filled first has a finite value and the gradient 0.

    Args:
        x: anything per target.
        loss_mask: true where a target is scored.
        value: what the other targets hold.
    """
    return jnp.where(jnp.expand_dims(loss_mask, tuple(range(2, x.ndim))), x, jnp.asarray(value, x.dtype))


def masked_mean(x: Float[Array, "B T"], loss_mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Mean over all scored targets of the batch: each token counts the same; 0 if nothing is scored.

    Args:
        x: per token.
        loss_mask: true where a target is scored.
    """
    count = jnp.sum(loss_mask, dtype=x.dtype)
    return jnp.sum(fill(x, loss_mask)) / jnp.maximum(count, 1)


def masked_sequence_mean(x: Float[Array, "B T"], loss_mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Mean over sequences of each sequence's mean over its scored targets: each sequence counts the same.

    Sequences without a scored target do not count; 0 if there is no other.

    Args:
        x: per token.
        loss_mask: true where a target is scored.
    """
    count_B = jnp.sum(loss_mask, axis=1, dtype=x.dtype)
    mean_B = jnp.sum(fill(x, loss_mask), axis=1) / jnp.maximum(count_B, 1)
    return jnp.sum(mean_B) / jnp.maximum(jnp.sum(count_B > 0, dtype=x.dtype), 1)


REDUCTIONS = {"token_mean": masked_mean, "sequence_mean": masked_sequence_mean}
