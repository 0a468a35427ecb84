"""One transformer layer: attention and MLP with their norms, as functions of the layer's weights.

Norms, rotary embeddings and softmax are computed in float32, everything else in the compute dtype.

Dimension key: B sequences, S tokens, M cache slots, D width, N query heads, K key-value heads, H head_dim, F MLP width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jdistill.models import cache, moe
from jdistill.models.attention import cached_attention, causal_attention
from jdistill.models.config import DecoderConfig
from jdistill.models.masked_attention import masked_attention
from jdistill.models.packing import Packing
from jdistill.models.params import LORA_SUFFIXES, NUM_IN

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True)}
_NO_WINDOW = 2**30  # the window of a layer without one; position - window still fits an int32

Rotation = tuple[Float[Array, "B S 1 h"], Float[Array, "B S 1 h"]]  # cosine and sine; h = H / 2


@dataclasses.dataclass(frozen=True)
class Block:
    """What all layers of one forward pass share; calling it runs one layer. Made by `make_block`."""

    config: DecoderConfig
    dtype: jnp.dtype  # of activations, and of the parameters at use
    positions: Int[Array, "B S"]
    packing: Packing | None
    num_slots: int  # M of the cache; without one, the tokens of a row
    has_cache: bool
    rotation: Rotation
    local_rotation: Rotation | None  # of layers with a sliding window, where they differ

    def __call__(self, x_BSD: jax.Array, w: Mapping[str, jax.Array], cached: Any) -> tuple[jax.Array, Any]:
        """Runs one layer.

        Args:
            x_BSD: hidden states before the layer.
            w: the layer's parameters by name, and its "window" where the model has sliding windows.
            cached: keys [B, K, H, M] and values [B, K, M, H] of the layer; None: there is no cache.

        Returns:
            Hidden states after the layer, and the layer's cache with these tokens in it. Without a cache: the tokens'
            keys and values, each [B, S, K, H].
        """
        y_BSD, cached = self._attention(self.norm(x_BSD, w["attention_norm"]), w, cached)
        x_BSD = x_BSD + (self.norm(y_BSD, w["post_attention_norm"]) if self.config.post_norms else y_BSD)
        y_BSD = self._mlp(self.norm(x_BSD, w["mlp_norm"]), w)
        return x_BSD + (self.norm(y_BSD, w["post_mlp_norm"]) if self.config.post_norms else y_BSD), cached

    def norm(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        """Applies RMSNorm over the last dim."""
        # In float32: 1 + weight in bfloat16 would round a small weight away.
        scale = 1.0 + scale.astype(jnp.float32) if self.config.norm_plus_one else scale
        return _rms_norm(x, scale, self.config.rms_norm_eps)

    @property
    def _is_windowed(self) -> bool:
        # A window that holds the whole row changes nothing.
        return self.config.sliding_window is not None and self.config.sliding_window < self.num_slots

    @property
    def _needs_masked_attention(self) -> bool:
        """Whether the fast attention, which most models take, cannot compute this one."""
        config = self.config
        return self._is_windowed or config.attention_softcap is not None or config.attention_scale is not None

    def _project(self, x: jax.Array, w: Mapping[str, jax.Array], name: str) -> jax.Array:
        """Multiplies by the matrix of that name, and adds its adapter's output where it has one."""
        lora, num_in = self.config.lora, NUM_IN.get(name, 1)
        y = _project(x, w[name].astype(self.dtype), num_in)
        if lora is not None and name in lora.targets:
            a, b = (w[name + suffix].astype(self.dtype) for suffix in LORA_SUFFIXES)
            y += lora.scale * _project(_project(x, a, num_in), b)
        return y

    def _attention(self, x_BSD: jax.Array, w: Mapping[str, jax.Array], cached: Any) -> tuple[jax.Array, Any]:
        config, dtype = self.config, self.dtype
        q_BSNH, k_BSKH, v_BSKH = (self._project(x_BSD, w, name) for name in ("query", "key", "value"))
        if config.qkv_bias:
            q_BSNH += w["query_bias"].astype(dtype)
            k_BSKH += w["key_bias"].astype(dtype)
            v_BSKH += w["value_bias"].astype(dtype)
        if config.qk_norm:
            q_BSNH = self.norm(q_BSNH, w["query_norm"])
            k_BSKH = self.norm(k_BSKH, w["key_norm"])
        turn = self.rotation
        if self.local_rotation is not None:
            pair = (self.local_rotation, self.rotation)
            turn = jax.tree.map(lambda a, b: jnp.where(w["window"] < _NO_WINDOW, a, b), *pair)
        q_BSNH, k_BSKH = _rotate(q_BSNH, turn), _rotate(k_BSKH, turn)
        if cached is None:
            cached = (k_BSKH, v_BSKH)
            a_BSNH = self._attend_to_rows(q_BSNH, k_BSKH, v_BSKH, w)
        else:
            cached = (
                cache.write(cached[0], self.positions, k_BSKH, slots=3),
                cache.write(cached[1], self.positions, v_BSKH, slots=2),
            )
            a_BSNH = self._attend_to_cache(q_BSNH, *(x.astype(dtype) for x in cached), w)
        y_BSD = self._project(a_BSNH, w, "output")
        return (y_BSD + w["output_bias"].astype(dtype) if config.output_bias else y_BSD), cached

    def _attend_to_rows(
        self, q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, w: Mapping[str, jax.Array]
    ) -> jax.Array:
        """Attention of each token to itself and the tokens before it in its row."""
        packing = self.packing
        if packing is not None:
            q_BSNH, k_BSKH, v_BSKH = packing.unpack(q_BSNH), packing.unpack(k_BSKH), packing.unpack(v_BSKH)
        attend = functools.partial(self._masked_attention, w=w) if self._needs_masked_attention else causal_attention
        a_BSNH = attend(q_BSNH, k_BSKH, v_BSKH)
        return a_BSNH if packing is None else packing.pack(a_BSNH)

    def _attend_to_cache(
        self, q_BSNH: jax.Array, k_BKHM: jax.Array, v_BKMH: jax.Array, w: Mapping[str, jax.Array]
    ) -> jax.Array:
        """Attention of each token to the slots up to its own."""
        if self._needs_masked_attention:
            return self._masked_attention(q_BSNH, k_BKHM.transpose(0, 3, 1, 2), v_BKMH.swapaxes(1, 2), w)
        return cached_attention(q_BSNH, k_BKHM, v_BKMH, self.positions)

    def _masked_attention(
        self, q_BSNH: jax.Array, k_BMKH: jax.Array, v_BMKH: jax.Array, w: Mapping[str, jax.Array]
    ) -> jax.Array:
        config = self.config
        return masked_attention(
            q_BSNH,
            k_BMKH,
            v_BMKH,
            # Without a cache a token's place in its row decides, whatever position it is given.
            self.positions if self.has_cache else jnp.arange(self.num_slots)[None],
            window=w["window"] if self._is_windowed else None,
            scale=config.attention_scale or config.head_dim**-0.5,
            softcap=config.attention_softcap,
        )

    def _mlp(self, x_BSD: jax.Array, w: Mapping[str, jax.Array]) -> jax.Array:
        config, dtype = self.config, self.dtype
        if config.num_experts:
            return moe.mlp(
                x_BSD,
                *(w[name].astype(dtype) for name in ("router", "gate", "up", "down")),
                num_experts_per_tok=config.num_experts_per_tok,
                norm_topk_prob=config.norm_topk_prob,
            )
        gate_BSF, up_BSF = self._project(x_BSD, w, "gate"), self._project(x_BSD, w, "up")
        if config.mlp_bias:
            gate_BSF += w["gate_bias"].astype(dtype)
            up_BSF += w["up_bias"].astype(dtype)
        y_BSD = self._project(_ACTIVATIONS[config.hidden_act](gate_BSF) * up_BSF, w, "down")
        return y_BSD + w["down_bias"].astype(dtype) if config.mlp_bias else y_BSD


def make_block(
    config: DecoderConfig,
    dtype: jnp.dtype,
    positions: Int[Array, "B S"],
    *,
    packing: Packing | None,
    num_slots: int | None,
) -> Block:
    """Makes the layer of one forward pass.

    Args:
        config: shape and flags of the model.
        dtype: of the computation.
        positions: rotary position of each token, and its slot in the cache.
        packing: how rows were packed into lines; None: a line is a row.
        num_slots: M of the cache; None: there is no cache.
    """
    rotation = _rotation(config, positions)
    local_rotation = None
    if config.local_rope is not None:
        local_rotation = _rotation(dataclasses.replace(config, rope=config.local_rope), positions)
    has_cache = num_slots is not None
    if num_slots is None:
        num_slots = positions.shape[1] if packing is None else packing.place_of.shape[2]
    return Block(config, dtype, positions, packing, num_slots, has_cache, rotation, local_rotation)


def layer_windows(config: DecoderConfig) -> dict[str, Int[Array, "L"]]:
    """The attention window of each layer, scanned like its weights; empty for models without sliding windows."""
    if config.sliding_window is None:
        return {}
    windows_L = [config.sliding_window if sliding else _NO_WINDOW for sliding in config.sliding_layers]
    return {"window": jnp.asarray(windows_L, jnp.int32)}


def _project(x, w, num_in: int = 1):
    """Multiplies x [B, S, *in] by w [*in, *out], summing over `num_in` dims; returns [B, S, *out].

    It is one matrix product over B * S rows. With two batch dims the gradient of w is a contraction over both, for
    which XLA's CPU backend first writes transposed copies of the activations (an MLP's backward pass took 1.5 times as
    long).
    """
    batch, (in_dims, out_dims) = x.shape[:2], (w.shape[:num_in], w.shape[num_in:])
    y = x.reshape(math.prod(batch), math.prod(in_dims)) @ w.reshape(math.prod(in_dims), math.prod(out_dims))
    return y.reshape(*batch, *out_dims)


def _rms_norm(x, scale, epsilon: float):
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


def _rotation(config: DecoderConfig, positions_BS):
    """Cosine and sine of the rotary angles, float32."""
    angles = positions_BS[:, :, None, None].astype(jnp.float32) * config.rope.inverse_frequencies(config.head_dim)
    return config.rope.attention_factor * jnp.cos(angles), config.rope.attention_factor * jnp.sin(angles)


def _rotate(x_BSNH, rotation):
    """Rotates the pairs (i, i + H/2), the layout of Hugging Face's weights."""
    cos, sin = rotation
    first, second = jnp.split(x_BSNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BSNH.dtype)
