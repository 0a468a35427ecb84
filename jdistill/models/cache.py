"""The key-value cache of decoding.

Dimension key: B sequences, S tokens, M cache slots, K key-value heads, H head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jdistill.models.config import DecoderConfig


class KVCache(NamedTuple):
    """Keys and values of each layer; the slot of a token is its position.

    The dims are in the order in which attention's matrix products read them: any other order would transpose the whole
    cache at every step. Each layer has an array, because a step would copy its part out of a stacked one.
    """

    k: tuple[Float[Array, "B K H M"], ...]
    v: tuple[Float[Array, "B K M H"], ...]

    @property
    def num_slots(self) -> int:
        """M, the slots of each sequence."""
        return self.k[0].shape[3]


def init_cache(config: DecoderConfig, batch: int, max_len: int, dtype: jnp.dtype | str) -> KVCache:
    """Makes an empty cache for `batch` sequences of up to `max_len` tokens."""
    K, H = config.num_kv_heads, config.head_dim
    return KVCache(
        tuple(jnp.zeros((batch, K, H, max_len), dtype) for _ in range(config.num_layers)),
        tuple(jnp.zeros((batch, K, max_len, H), dtype) for _ in range(config.num_layers)),
    )


def resize_cache(cache: KVCache, num_slots: int) -> KVCache:
    """Grows the cache to `num_slots` slots; the new ones are empty."""
    more = num_slots - cache.num_slots
    return KVCache(
        tuple(jnp.pad(k, ((0, 0), (0, 0), (0, 0), (0, more))) for k in cache.k),
        tuple(jnp.pad(v, ((0, 0), (0, 0), (0, more), (0, 0))) for v in cache.v),
    )


def write(
    cache: Float[Array, "..."], positions: Int[Array, "B S"], x: Float[Array, "B S K H"], *, slots: int
) -> Float[Array, "..."]:
    """Puts x at [row, position]; a position outside the cache writes nothing.

    Args:
        cache: keys [B, K, H, M] or values [B, K, M, H] of one layer.
        positions: slot of each token.
        x: keys or values of the tokens.
        slots: which dim of the cache has the slots.
    """
    # One scatter whose batch dim is the row: a cache sharded by rows stays where it is.
    return jax.lax.scatter(
        cache,
        positions[..., None],
        x.astype(cache.dtype),
        jax.lax.ScatterDimensionNumbers(
            update_window_dims=(2, 3),
            inserted_window_dims=(slots,),
            scatter_dims_to_operand_dims=(slots,),
            operand_batching_dims=(0,),
            scatter_indices_batching_dims=(0,),
        ),
        mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    )
