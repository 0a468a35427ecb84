"""Drawing one token per row from its logits: truncation, the draw itself, log-probs, candidates.

Dimension key: `B` rows, `V` vocabulary, `K` candidates, `J` blocks of the vocabulary, `b` tokens of a block.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, UInt32

_BLOCK = 128  # about sqrt(V) for today's vocabularies, so that both stages of the draw are short


class Truncation(NamedTuple):
    """Which tokens may be drawn, by their logits after the temperature; None: no such limit.

    Applied in this order: each limit looks at the tokens that the ones before it kept.
    """

    top_k: int | None = None  # the k most likely tokens
    top_p: float | None = None  # the most likely tokens that together have a share of p
    min_p: float | None = None  # tokens at least p times as likely as the most likely one

    def __call__(self, logits_BV: Float[jax.Array, "B V"]) -> Float[jax.Array, "B V"] | None:
        """Returns the logits with -inf at tokens that may not be drawn, or None if all may. Ties are kept together."""
        if self == (None, None, None):
            return None
        least_B1 = jnp.full((logits_BV.shape[0], 1), -jnp.inf)
        if self.top_k is not None:
            k = min(self.top_k, logits_BV.shape[1])
            least_B1 = jnp.maximum(least_B1, jax.lax.top_k(logits_BV, k)[0][:, -1:])
        if self.top_p is not None:
            sorted_BV = jnp.sort(jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf), axis=-1, descending=True)
            share_BV = jax.nn.softmax(sorted_BV, axis=-1)
            # A token is kept if those before it have a share below p, so the first one always is.
            is_kept_BV = jnp.cumsum(share_BV, axis=-1) - share_BV < self.top_p
            least_B1 = jnp.min(jnp.where(is_kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        if self.min_p is not None:
            least_B1 = jnp.maximum(least_B1, logits_BV.max(axis=-1, keepdims=True) + math.log(self.min_p))
        return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def draw_tokens(
    logits_BV: Float[jax.Array, "B V"],
    seed_B: UInt32[jax.Array, "B"],
    position_B: Int[jax.Array, "B"],
    greedy: Bool[jax.Array, ""] | bool,
    allowed_BV: Float[jax.Array, "B V"] | None = None,
) -> tuple[Int[jax.Array, "B"], Float[jax.Array, "B"]]:
    """Draws one token per row from softmax(logits), or takes the most likely one.

    Inverse transform in two stages: a block of the vocabulary, then a token in that block, with one uniform number
    each. The usual Gumbel trick needs V random numbers per token.

    Args:
        logits_BV: float32, already divided by the temperature.
        seed_B: uint32, one per request.
        position_B: int32, position of the drawn token in its row. The draw depends on seed, position and logits alone.
        greedy: takes the most likely token, the first one of a tie.
        allowed_BV: the logits with -inf at tokens that may not be drawn; None: all may be.

    Returns:
        int32[B] tokens and float32[B] their log-probs in nats, over the whole vocabulary.
    """
    num_rows, vocab_size = logits_BV.shape
    max_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    weight_BV = jnp.exp(logits_BV - max_B1)
    total_B = None
    if allowed_BV is not None:
        total_B = weight_BV.sum(axis=-1)
        # Relative to the maximum of the allowed ones: the most likely token need not be among them.
        weight_BV = jnp.exp(allowed_BV - jnp.max(allowed_BV, axis=-1, keepdims=True))
    padded_BV = jnp.pad(weight_BV, ((0, 0), (0, -vocab_size % _BLOCK)))
    weight_BJb = padded_BV.reshape(num_rows, -1, _BLOCK)
    weight_BJ = weight_BJb.sum(axis=-1)

    def most_likely() -> jax.Array:
        return jnp.argmax(logits_BV if allowed_BV is None else allowed_BV, axis=-1).astype(jnp.int32)

    def drawn() -> jax.Array:
        uniform_B2 = jax.vmap(_two_uniforms)(seed_B, position_B)
        block_B = _inverse_transform(weight_BJ, uniform_B2[:, 0])
        weight_Bb = jnp.take_along_axis(weight_BJb, block_B[:, None, None], axis=1)[:, 0]
        return block_B * _BLOCK + _inverse_transform(weight_Bb, uniform_B2[:, 1])

    token_B = jax.lax.cond(greedy, most_likely, drawn)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    total_B = weight_BJ.sum(axis=-1) if total_B is None else total_B
    return token_B, chosen_B - max_B1[:, 0] - jnp.log(total_B)


def most_likely_tokens(logits_BV: Float[jax.Array, "B V"], num_candidates: int) -> Int[jax.Array, "B K"]:
    """Returns int32[B, K], the K = num_candidates most likely tokens of each row, best first; K may be 0."""
    if not num_candidates:
        return jnp.zeros((logits_BV.shape[0], 0), jnp.int32)
    return jax.lax.top_k(logits_BV, num_candidates)[1].astype(jnp.int32)


def _two_uniforms(seed: jax.Array, position: jax.Array) -> jax.Array:
    # The generator is named because completions must not change with jax_default_prng_impl.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
    return jax.random.uniform(key, (2,))


def _inverse_transform(weight_BJ: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """Returns the first column at which the running sum exceeds uniform * total; never one of weight 0."""
    # A parallel prefix sum need not be monotonic in its last digit: without the mask an impossible token could be drawn
    # about once in 2^24 times, with a log-prob of -inf. The largest entry is the total, so some column always exceeds.
    running_BJ = jnp.where(weight_BJ > 0, jnp.cumsum(weight_BJ, axis=-1), 0.0)
    target_B1 = uniform_B[:, None] * running_BJ.max(axis=-1, keepdims=True)
    return jnp.argmax(running_BJ > target_B1, axis=-1).astype(jnp.int32)
