"""Causal attention within rows and from new tokens to a cache, in the fastest form for each backend.

Dimension key: B rows, S tokens, N query heads, K key-value heads, H head_dim, M cache slots, Q = N / K * S queries per
key-value head.
"""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

logger = logging.getLogger(__name__)

# Size of one block of scores: about one core's share of the CPU cache. A larger block is as slow as all scores at once,
# a smaller one loses time to the loop; 0.5 to 2 MiB made no difference on two cores.
_BLOCK_BYTES = 1 << 20
_LEAST_QUERIES = 64  # per block
_MOST_BLOCKS = 8  # per row: blocks are unrolled, so each adds compile time


def causal_attention(
    q_BSNH: Float[Array, "B S N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
) -> Float[Array, "B S N H"]:
    """Attends from each token to itself and the tokens before it in its row.

    On a single CPU device, one block of queries of a few rows at a time attends to the keys up to the block's end:
    blocks above the diagonal are skipped, and scores stay in the CPU cache and are recomputed in the backward pass (3.5
    times as fast as all scores at once, forward and backward, for 16 rows of 256 tokens). NVIDIA GPUs use cuDNN's flash
    attention if it supports the shapes and the dtype.

    Logits and softmax are float32 for every dtype.
    """
    if jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1:
        return _in_blocks(q_BSNH, k_BSKH, v_BSKH)
    args, kwargs = (q_BSNH, k_BSKH, v_BSKH), {"is_causal": True}
    implementation = None
    if jax.default_backend() == "gpu" and q_BSNH.dtype in (jnp.bfloat16, jnp.float16):
        try:
            jax.eval_shape(lambda *a: jax.nn.dot_product_attention(*a, **kwargs, implementation="cudnn"), *args)
            implementation = "cudnn"
        except (RuntimeError, NotImplementedError, ValueError) as e:
            logger.warning("cuDNN attention is not available, so all scores are held in memory: %s", e)
    return jax.nn.dot_product_attention(*args, **kwargs, implementation=implementation)


def cached_attention(
    q_BSNH: Float[Array, "B S N H"],
    k_BKHM: Float[Array, "B K H M"],
    v_BKMH: Float[Array, "B K M H"],
    positions_BS: Int[Array, "B S"],
) -> Float[Array, "B S N H"]:
    """Attends from each token to the slots of a cache up to its own position.

    Not jax.nn.dot_product_attention: for one query per row and this layout of the cache, two plain matrix products are
    five times as fast on the CPU. Logits and softmax are float32 for every dtype.
    """
    B, S, N, H = q_BSNH.shape
    K, M = k_BKHM.shape[1], k_BKHM.shape[3]
    # Query heads and tokens share one dim, so each (row, key-value head) is one matrix product.
    q_BKQH = q_BSNH.reshape(B, S, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    logits_BKQM = jnp.einsum("BKQH,BKHM->BKQM", q_BKQH, k_BKHM, preferred_element_type=jnp.float32) * H**-0.5
    visible_B1QM = jnp.tile(jnp.arange(M) <= positions_BS[:, :, None], (1, N // K, 1))[:, None]
    weights_BKQM = jax.nn.softmax(jnp.where(visible_B1QM, logits_BKQM, -jnp.inf), axis=-1)
    a_BKQH = jnp.einsum("BKQM,BKMH->BKQH", weights_BKQM.astype(v_BKMH.dtype), v_BKMH)
    return a_BKQH.reshape(B, K, N // K, S, H).transpose(0, 3, 1, 2, 4).reshape(B, S, N, H)


def _in_blocks(q_BSNH, k_BSKH, v_BSKH):
    B, S, N, _ = q_BSNH.shape
    size = max(_LEAST_QUERIES, -(-S // _MOST_BLOCKS))

    def some_rows(x):
        q_RSNH, k_RSKH, v_RSKH = x
        blocks = []
        for start in range(0, S, size):
            stop = min(start + size, S)
            mask = (jnp.arange(start, stop)[:, None] >= jnp.arange(stop))[None, None]
            queries = q_RSNH[:, start:stop]
            blocks.append(jax.nn.dot_product_attention(queries, k_RSKH[:, :stop], v_RSKH[:, :stop], mask=mask))
        return jnp.concatenate(blocks, axis=1)

    most_rows = max(_BLOCK_BYTES // (4 * N * min(size, S) * S), 1)
    rows = max(r for r in range(1, B + 1) if B % r == 0 and r <= most_rows)
    x = jax.tree.map(lambda x: x.reshape(B // rows, rows, *x.shape[1:]), (q_BSNH, k_BSKH, v_BSKH))
    # prevent_cse=False: in a loop XLA cannot merge the recomputation with the forward pass, and a barrier costs time.
    return jax.lax.map(jax.checkpoint(some_rows, prevent_cse=False), x).reshape(q_BSNH.shape)
