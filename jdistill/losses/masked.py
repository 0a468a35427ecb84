"""Reduces tokens to a scalar, sums over later tokens, and fills unscored targets.

All reductions have the signature reduce(x, loss_mask, length=...), though only `masked_constant_mean` needs a length.

Dimension key: B sequences, T targets.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def fill(x: Float[Array, "B T *rest"], loss_mask: Bool[Array, "B T"], value: float = 0.0) -> Float[Array, "B T *rest"]:
    """Replace unscored targets by `value`; call it on every input of a loss before the first product.

    Masking only the loss is not enough: a padded target may hold -inf or NaN, and the gradient through it is
    0 * inf = NaN. A filled target has a finite value and gradient 0.

    Args:
        x: any array per target.
        loss_mask: true where a target is scored.
        value: replacement at the other targets.
    """
    return jnp.where(jnp.expand_dims(loss_mask, tuple(range(2, x.ndim))), x, jnp.asarray(value, x.dtype))


def decayed_suffix_sum(x: Float[Array, "B T"], decay: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Compute y_t = x_t + decay_t * y_{t+1} as an associative scan over affine maps: log2(T) steps instead of T."""

    def compose(later, earlier):
        decay_later, x_later = later
        decay_earlier, x_earlier = earlier
        return decay_earlier * decay_later, x_earlier + decay_earlier * x_later

    return jax.lax.associative_scan(compose, (decay, x), reverse=True, axis=1)[1]


def masked_mean(
    x: Float[Array, "B T"], loss_mask: Bool[Array, "B T"], *, length: int | None = None
) -> Float[Array, ""]:
    """Average over all scored targets of the batch, so that each token has the same weight; 0 if nothing is scored.

    Args:
        x: one number per token.
        loss_mask: true where a target is scored.
        length: unused.

    Reference:
        Yu et al. (DAPO), arXiv 2503.14476, section 3.3.
    """
    count = jnp.sum(loss_mask, dtype=x.dtype)
    return jnp.sum(fill(x, loss_mask)) / jnp.maximum(count, 1)


def masked_sequence_mean(
    x: Float[Array, "B T"], loss_mask: Bool[Array, "B T"], *, length: int | None = None
) -> Float[Array, ""]:
    """Average each sequence's mean over its scored targets, so that each sequence has the same weight.

    Tokens of a long sequence weigh less than those of a short one. Sequences without a scored target are left out; 0 if
    no sequence remains.

    Args:
        x: one number per token.
        loss_mask: true where a target is scored.
        length: unused.

    Reference:
        Shao et al., "DeepSeekMath" (GRPO), arXiv 2402.03300, eq. 3.
    """
    count_B = jnp.sum(loss_mask, axis=1, dtype=x.dtype)
    mean_B = jnp.sum(fill(x, loss_mask), axis=1) / jnp.maximum(count_B, 1)
    return jnp.sum(mean_B) / jnp.maximum(jnp.sum(count_B > 0, dtype=x.dtype), 1)


def masked_constant_mean(
    x: Float[Array, "B T"], loss_mask: Bool[Array, "B T"], *, length: int | None = None
) -> Float[Array, ""]:
    """Divide the sum over all scored targets by (number of sequences with a scored target * length).

    Each token has the same weight, independent of the lengths of the batch's other sequences. Up to the constant this
    is the mean over sequences of each sequence's sum, whose policy gradient is that of the expected reward.

    Args:
        x: one number per token.
        loss_mask: true where a target is scored.
        length: constant divisor, the maximum number of tokens of a completion (rollout.max_new_tokens).

    Returns:
        The scalar; 0 if nothing is scored.

    Raises:
        ValueError: length is missing or below 1.

    Reference:
        Liu et al. (Dr. GRPO), arXiv 2503.20783.
    """
    if length is None or length < 1:
        raise ValueError(f"the constant reduction needs a length of at least 1, e.g. max_new_tokens; got {length}")
    num_sequences = jnp.sum(jnp.any(loss_mask, axis=1), dtype=x.dtype)
    return jnp.sum(fill(x, loss_mask)) / (jnp.maximum(num_sequences, 1) * length)


REDUCTIONS = {
    "token_mean": masked_mean,
    "sequence_mean": masked_sequence_mean,
    "constant": masked_constant_mean,
}
