"""The only reductions from tokens to a scalar, the sum over what comes later, and the fill that keeps padding out.

All reductions are called alike, reduce(x, loss_mask, length=...), though only `masked_constant_mean` needs a length.

Dimension key: B sequences, T targets.
"""

from __future__ import annotations

import jax
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


def decayed_suffix_sum(x: Float[Array, "B T"], decay: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """y_t = x_t + decay_t * y_{t+1}, as a scan over affine maps: log2(T) steps instead of T."""

    def compose(later, earlier):
        decay_later, x_later = later
        decay_earlier, x_earlier = earlier
        return decay_earlier * decay_later, x_earlier + decay_earlier * x_later

    return jax.lax.associative_scan(compose, (decay, x), reverse=True, axis=1)[1]


def masked_mean(
    x: Float[Array, "B T"], loss_mask: Bool[Array, "B T"], *, length: int | None = None
) -> Float[Array, ""]:
    """Mean over all scored targets of the batch: each token counts the same; 0 if nothing is scored.

    Args:
        x: per token.
        loss_mask: true where a target is scored.
        length: not used.

    Reference:
        Yu et al. (DAPO), arXiv 2503.14476, section 3.3.
    """
    count = jnp.sum(loss_mask, dtype=x.dtype)
    return jnp.sum(fill(x, loss_mask)) / jnp.maximum(count, 1)


def masked_sequence_mean(
    x: Float[Array, "B T"], loss_mask: Bool[Array, "B T"], *, length: int | None = None
) -> Float[Array, ""]:
    """Mean over sequences of each sequence's mean over its scored targets: each sequence counts the same.

    A long sequence's tokens count less than a short one's. Sequences without a scored target do not count; 0 if there
    is no other.

    Args:
        x: per token.
        loss_mask: true where a target is scored.
        length: not used.

    Reference:
        Shao et al., "DeepSeekMath" (GRPO), arXiv 2402.03300, eq. 3.
    """
    count_B = jnp.sum(loss_mask, axis=1, dtype=x.dtype)
    mean_B = jnp.sum(fill(x, loss_mask), axis=1) / jnp.maximum(count_B, 1)
    return jnp.sum(mean_B) / jnp.maximum(jnp.sum(count_B > 0, dtype=x.dtype), 1)


def masked_constant_mean(
    x: Float[Array, "B T"], loss_mask: Bool[Array, "B T"], *, length: int | None = None
) -> Float[Array, ""]:
    """Sum over all scored targets / (number of sequences with a scored target * length); 0 if nothing is scored.

    Each token counts the same, and how much does not depend on how long the batch's other sequences are: up to the
    constant it is the mean over sequences of each sequence's sum, whose policy gradient is that of the expected reward.

    Args:
        x: per token.
        loss_mask: true where a target is scored.
        length: the constant; the most tokens that a completion may have (rollout.max_new_tokens).

    Raises:
        ValueError: no length, or one below 1.

    Reference:
        Liu et al. (Dr. GRPO), arXiv 2503.20783.
    """
    if length is None or length < 1:
        raise ValueError(f"the constant reduction divides by length, such as max_new_tokens; got {length}")
    num_sequences = jnp.sum(jnp.any(loss_mask, axis=1), dtype=x.dtype)
    return jnp.sum(fill(x, loss_mask)) / (jnp.maximum(num_sequences, 1) * length)


REDUCTIONS = {
    "token_mean": masked_mean,
    "sequence_mean": masked_sequence_mean,
    "constant": masked_constant_mean,
}
