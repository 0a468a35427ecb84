"""Decoder: the transformer that all families share; they differ by flags of DecoderConfig.

Parameters of all layers are stacked ([L, ...]) and the layers run in one `lax.scan`, so compile time does not grow with
depth. Only decoding unrolls them: one step computes so little that slicing stacked arrays would take a third of it.
Masters stay float32 and are cast at use.

Dimension key: B sequences, S tokens, M cache slots, L layers, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jdistill.models.block import layer_windows, make_block
from jdistill.models.cache import KVCache
from jdistill.models.config import DecoderConfig
from jdistill.models.packing import Packing
from jdistill.models.params import LORA_SUFFIXES, param_specs

Remat = Literal["none", "layer"]


class Layers(nnx.Module):
    """The stacked parameters of all layers, one attribute per name."""


class Decoder(nnx.Module):
    """A causal language model without its loss.

    Args:
        config: shape and flags.
        rngs: for random initial values; weights are normal with `config.initializer_range`, biases are 0, norms the
            identity.
        compute_dtype: of activations, and of the parameters at use.
        remat: "layer" keeps only each layer's input for the backward pass, "none" everything.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        compute_dtype: jnp.dtype | str = "float32",
        remat: Remat = "none",
    ):
        if remat not in ("none", "layer"):
            raise ValueError(f"remat = {remat!r}: expected 'none' or 'layer'")
        self.config = config
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.remat = remat
        self.layers = Layers()
        for name, spec in param_specs(config).items():
            owner, _, attribute = name.rpartition(".")
            if spec.init == "normal":
                value = config.initializer_range * jax.random.normal(rngs.params(), spec.shape, jnp.float32)
            elif spec.init == "fan_in":
                # PEFT's initial values: uniform, up to 1 / sqrt of the number of inputs.
                limit = math.prod(spec.shape[1:-1]) ** -0.5
                value = jax.random.uniform(rngs.params(), spec.shape, jnp.float32, -limit, limit)
            else:
                value = jnp.full(spec.shape, 1.0 if spec.init == "ones" else 0.0, jnp.float32)
            kind = nnx.LoRAParam if name.endswith(LORA_SUFFIXES) else nnx.Param
            setattr(self.layers if owner else self, attribute, kind(value))

    def __call__(
        self,
        tokens_BS: Int[Array, "B S"],
        positions_BS: Int[Array, "B S"],
        *,
        packing: Packing | None = None,
        cache: KVCache | None = None,
        layers: Sequence[Mapping[str, Array]] | None = None,
    ) -> tuple[Float[Array, "B S D"], KVCache | None]:
        """Computes hidden states after the final norm, in compute dtype, and the cache with these tokens in it.

        Without a cache a token attends to itself and the tokens before it in its row; with a packing, rows are those
        that were packed, and tokens, positions and hidden states are lines of packed tokens. With a cache the keys and
        values of a token are written to the slot of its position, and it attends to all slots up to that one:
        right-padded prompts need no lengths, because the slots that padding wrote are overwritten before any token
        attends to them. A position >= M writes nothing (an idle row).

        Args:
            tokens_BS: ids in [0, V), padding included (an id outside gives NaN).
            positions_BS: rotary position, and slot in the cache; not negative.
            packing: how tokens and positions were packed; only without a cache.
            cache: from `init_cache`, `prefill` or the previous call. Donate it to update it in place.
            layers: with a cache, the layers' parameters from `unstacked`: a loop of calls then slices them once.
        """
        if cache is not None and packing is not None:
            raise ValueError("packing with a cache: packed rows cannot be decoded; give one of the two")
        with jax.default_matmul_precision(_matmul_precision(self.compute_dtype)):
            hidden_BSD, cached = self._forward(tokens_BS, positions_BS, packing, cache, layers)
        return hidden_BSD, cached if cache is not None else None

    def prefill(
        self, tokens_BS: Int[Array, "B S"], positions_BS: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S D"], KVCache]:
        """Computes hidden states without a cache, and a cache of S slots that holds these tokens."""
        with jax.default_matmul_precision(_matmul_precision(self.compute_dtype)):
            hidden_BSD, (k_LBSKH, v_LBSKH) = self._forward(tokens_BS, positions_BS, None, None, None)
        return hidden_BSD, KVCache(
            tuple(k_BSKH.transpose(0, 2, 3, 1) for k_BSKH in k_LBSKH), tuple(v.swapaxes(1, 2) for v in v_LBSKH)
        )

    def unstacked(self) -> list[dict[str, Array]]:
        """Slices the parameters of each layer, once for many decoding steps."""
        weights = {name: param[...] for name, param in nnx.state(self.layers, nnx.Param).items()}
        return [{name: w[layer] for name, w in weights.items()} for layer in range(self.config.num_layers)]

    def _forward(self, tokens_BS, positions_BS, packing, cache, layers):
        """Hidden states after the final norm; the cache, or without one the keys and values of all layers."""
        config = self.config
        num_slots = None if cache is None else cache.num_slots
        block = make_block(config, self.compute_dtype, positions_BS, packing=packing, num_slots=num_slots)
        x_BSD = jnp.take(self.embed[...], tokens_BS, axis=0, mode="fill", fill_value=jnp.nan).astype(self.compute_dtype)
        if config.scale_embedding:
            # The factor is rounded to the compute dtype too, as the models were trained.
            x_BSD *= jnp.asarray(math.sqrt(config.hidden_size), self.compute_dtype)
        windows = layer_windows(config)
        if cache is None:
            weights = {name: param[...] for name, param in nnx.state(self.layers, nnx.Param).items()}

            def step(x_BSD, w):
                return block(x_BSD, w, None)

            # prevent_cse=False: inside scan nothing can be merged with the first forward pass, and the barrier costs.
            step = jax.checkpoint(step, prevent_cse=False) if self.remat == "layer" else step
            # Keys and values that the caller does not use cost nothing: the compiler removes them.
            x_BSD, cached = jax.lax.scan(step, x_BSD, weights | windows)
        else:
            all_cached = []
            for layer, w in enumerate(self.unstacked() if layers is None else layers):
                w = {**w, **{name: x[layer] for name, x in windows.items()}}
                x_BSD, one = block(x_BSD, w, (cache.k[layer], cache.v[layer]))
                all_cached.append(one)
            cached = KVCache(*map(tuple, zip(*all_cached, strict=True)))
        return block.norm(x_BSD, self.final_norm[...]), cached

    def head_DV(self) -> Float[Array, "D V"]:  # noqa: N802
        """The output projection in compute dtype; for tied models the transposed embedding."""
        table = self.embed[...].T if self.config.tie_word_embeddings else self.head[...]
        return table.astype(self.compute_dtype)

    def logits(self, hidden: Float[Array, "*tokens D"]) -> Float[Array, "*tokens V"]:
        """Computes float32 logits of hidden states, with the model's softcap."""
        with jax.default_matmul_precision(_matmul_precision(self.compute_dtype)):
            logits = jnp.einsum("...D,DV->...V", hidden, self.head_DV(), preferred_element_type=jnp.float32)
        softcap = self.config.final_softcap
        return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _matmul_precision(dtype: jnp.dtype) -> str:
    # On NVIDIA GPUs the default for float32 is TF32, whose 10-bit mantissa is not what float32 promises.
    return "highest" if dtype == jnp.float32 else "default"
