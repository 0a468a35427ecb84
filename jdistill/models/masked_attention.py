"""Attention with sliding windows that differ by layer, softcaps and other scales, for the families that have them.

Slower than causal_attention, which models use unless they need one of these: each block of queries is multiplied with
all keys, while causal_attention stops at the diagonal.

Dimension key: B rows, S queries, M keys, N query heads, K key-value heads, G = N / K, H head_dim, C blocks, Q queries
per block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_BLOCK_QUERIES = 128  # scores of this many exist at once. 64 to 256 are equally fast on two cores


def masked_attention(
    q_BSNH: Float[Array, "B S N H"],
    k_BMKH: Float[Array, "B M K H"],
    v_BMKH: Float[Array, "B M K H"],
    slots_BS: Int[Array, "#B S"],
    *,
    window: Int[Array, ""] | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B S N H"]:
    """Attends from each query to the keys in its own slot and in the slots before it; logits and softmax are float32.

    Rows longer than one block are computed block by block, and again in the backward pass, so that the scores of all
    queries never exist at once.

    Args:
        q_BSNH: queries.
        k_BMKH: keys by slot.
        v_BMKH: values by slot.
        slots_BS: slot of each query.
        window: number of slots that a query sees, its own included; traced, because layers differ. None: all.
        scale: factor of the products of queries and keys.
        softcap: c; the scaled products x become c * tanh(x / c). None: no cap.
    """
    S = q_BSNH.shape[1]
    num_blocks = -(-S // _BLOCK_QUERIES)

    def attend(block):
        return _attend(*block, k_BMKH, v_BMKH, window=window, scale=scale, softcap=softcap)

    def cut(x):
        """Reshapes [B, S, ...] to [C, B, Q, ...], padded with zeros."""
        x = jnp.pad(x, [(0, 0), (0, num_blocks * _BLOCK_QUERIES - S)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], num_blocks, _BLOCK_QUERIES, *x.shape[2:]), 1, 0)

    if num_blocks == 1:
        return attend((q_BSNH, slots_BS))
    # prevent_cse=False: in a loop XLA cannot merge the recomputation with the forward pass, and a barrier costs time.
    a_CBQNH = jax.lax.map(jax.checkpoint(attend, prevent_cse=False), (cut(q_BSNH), cut(slots_BS)))
    a_BCQNH = jnp.moveaxis(a_CBQNH, 0, 1)
    return a_BCQNH.reshape(a_BCQNH.shape[0], -1, *q_BSNH.shape[2:])[:, :S]


def _attend(q_BSNH, slots_BS, k_BMKH, v_BMKH, *, window, scale, softcap):
    keys_M = jnp.arange(k_BMKH.shape[1])
    mask_BSM = keys_M <= slots_BS[:, :, None]
    if window is not None:
        mask_BSM &= keys_M > slots_BS[:, :, None] - window
    mask_B1SM = mask_BSM[:, None]
    if softcap is None:
        return jax.nn.dot_product_attention(q_BSNH, k_BMKH, v_BMKH, mask=mask_B1SM, scale=scale)
    B, S, N, H = q_BSNH.shape
    K = k_BMKH.shape[2]
    q_BSKGH = q_BSNH.reshape(B, S, K, N // K, H)
    logits_BKGSM = jnp.einsum("BSKGH,BMKH->BKGSM", q_BSKGH, k_BMKH, preferred_element_type=jnp.float32) * scale
    logits_BKGSM = softcap * jnp.tanh(logits_BKGSM / softcap)
    # Not -inf: an idle row, whose position is outside the cache, may see no slot, and its softmax would be NaN.
    logits_BKGSM = jnp.where(mask_B1SM[:, :, None], logits_BKGSM, jnp.finfo(jnp.float32).min)
    probs_BKGSM = jax.nn.softmax(logits_BKGSM, axis=-1).astype(v_BMKH.dtype)
    return jnp.einsum("BKGSM,BMKH->BSKGH", probs_BKGSM, v_BMKH).reshape(B, S, N, H)
