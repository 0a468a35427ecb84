"""Decoder: the transformer that all families share; they differ by flags of DecoderConfig.

Parameters of all layers are stacked ([L, ...]) and the layers run in one `lax.scan`, so compile time does not grow with
depth. Decoding alone unrolls them: a step does so little that slices of stacked arrays would be a third of it. Masters
stay in their own dtype (float32) and are cast at use; norms, rotary embeddings and softmax are float32.

Dimension key: B sequences, S tokens, M cache slots, L layers, D width, N query heads, K key-value heads, H head_dim,
F MLP width, V vocabulary, E experts.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jdistill.models import moe
from jdistill.models.attention import cached_attention, causal_attention
from jdistill.models.config import DecoderConfig
from jdistill.models.masked_attention import masked_attention
from jdistill.models.packing import Packing

Remat = Literal["none", "layer"]

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True)}
_NO_WINDOW = 2**30  # the window of a layer without one; position - window still fits an int32


class KVCache(NamedTuple):
    """Keys and values of each layer, at the slot of their position.

    Laid out as attention's matrix products read them (in another order each step would transpose all of it), and an
    array a layer (a step would copy its part out of a stacked one).
    """

    k: tuple[Float[Array, "B K H M"], ...]
    v: tuple[Float[Array, "B K M H"], ...]

    @property
    def num_slots(self) -> int:
        """M."""
        return self.k[0].shape[3]


def init_cache(config: DecoderConfig, batch: int, max_len: int, dtype: jnp.dtype | str) -> KVCache:
    """An empty cache for `batch` sequences of up to `max_len` tokens."""
    K, H = config.num_kv_heads, config.head_dim
    return KVCache(
        tuple(jnp.zeros((batch, K, H, max_len), dtype) for _ in range(config.num_layers)),
        tuple(jnp.zeros((batch, K, max_len, H), dtype) for _ in range(config.num_layers)),
    )


def resize_cache(cache: KVCache, num_slots: int) -> KVCache:
    """The cache with `num_slots` slots, the new ones empty."""
    more = num_slots - cache.num_slots
    return KVCache(
        tuple(jnp.pad(k, ((0, 0), (0, 0), (0, 0), (0, more))) for k in cache.k),
        tuple(jnp.pad(v, ((0, 0), (0, 0), (0, more), (0, 0))) for v in cache.v),
    )


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, the logical axis of each dim (see partitioning.MESH_AXES), and how it starts."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Literal["normal", "ones", "zeros", "fan_in"]

    @property
    def stacked(self) -> tuple[str, ...]:
        """The leading axes over which a checkpoint has a tensor each: of layers, and of experts."""
        return tuple(itertools.takewhile(lambda axis: axis in ("layer", "expert"), self.axes))


def param_specs(config: DecoderConfig) -> dict[str, ParamSpec]:
    """Every parameter of a decoder by its dotted name, e.g. "layers.query"."""
    scale = "zeros" if config.norm_plus_one else "ones"
    L, D, N, K = config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads
    H, F, V = config.head_dim, config.intermediate_size, config.vocab_size
    specs = {
        "embed": ParamSpec((V, D), ("vocab", "width"), "normal"),
        "layers.attention_norm": ParamSpec((L, D), ("layer", None), scale),
        "layers.query": ParamSpec((L, D, N, H), ("layer", "width", "heads", None), "normal"),
        "layers.key": ParamSpec((L, D, K, H), ("layer", "width", "kv_heads", None), "normal"),
        "layers.value": ParamSpec((L, D, K, H), ("layer", "width", "kv_heads", None), "normal"),
        "layers.output": ParamSpec((L, N, H, D), ("layer", "heads", None, "width"), "normal"),
        "layers.mlp_norm": ParamSpec((L, D), ("layer", None), scale),
        "final_norm": ParamSpec((D,), (None,), scale),
    }
    if config.num_experts:
        E = config.num_experts
        specs["layers.router"] = ParamSpec((L, D, E), ("layer", "width", None), "normal")
        specs["layers.gate"] = ParamSpec((L, E, D, F), ("layer", "expert", None, "mlp"), "normal")
        specs["layers.up"] = ParamSpec((L, E, D, F), ("layer", "expert", None, "mlp"), "normal")
        specs["layers.down"] = ParamSpec((L, E, F, D), ("layer", "expert", "mlp", None), "normal")
    else:
        specs["layers.gate"] = ParamSpec((L, D, F), ("layer", "width", "mlp"), "normal")
        specs["layers.up"] = ParamSpec((L, D, F), ("layer", "width", "mlp"), "normal")
        specs["layers.down"] = ParamSpec((L, F, D), ("layer", "mlp", "width"), "normal")
    if config.post_norms:
        specs["layers.post_attention_norm"] = ParamSpec((L, D), ("layer", None), scale)
        specs["layers.post_mlp_norm"] = ParamSpec((L, D), ("layer", None), scale)
    if config.qk_norm:
        specs["layers.query_norm"] = ParamSpec((L, H), ("layer", None), scale)
        specs["layers.key_norm"] = ParamSpec((L, H), ("layer", None), scale)
    if config.qkv_bias:
        specs["layers.query_bias"] = ParamSpec((L, N, H), ("layer", "heads", None), "zeros")
        specs["layers.key_bias"] = ParamSpec((L, K, H), ("layer", "kv_heads", None), "zeros")
        specs["layers.value_bias"] = ParamSpec((L, K, H), ("layer", "kv_heads", None), "zeros")
    if config.output_bias:
        specs["layers.output_bias"] = ParamSpec((L, D), ("layer", None), "zeros")
    if config.mlp_bias:
        specs["layers.gate_bias"] = ParamSpec((L, F), ("layer", "mlp"), "zeros")
        specs["layers.up_bias"] = ParamSpec((L, F), ("layer", "mlp"), "zeros")
        specs["layers.down_bias"] = ParamSpec((L, D), ("layer", None), "zeros")
    for target in config.lora.targets if config.lora is not None else ():
        specs |= _lora_specs(f"layers.{target}", specs[f"layers.{target}"], config.lora.rank)
    if not config.tie_word_embeddings:
        specs["head"] = ParamSpec((D, V), ("width", "vocab"), "normal")
    return specs


LORA_SUFFIXES = ("_lora_a", "_lora_b")
# Of a layer's matrices, how many dims (after that of layers) are summed over; 1 for all others.
NUM_IN = {"output": 2}


def _lora_specs(name: str, spec: ParamSpec, rank: int) -> dict[str, ParamSpec]:
    """The adapter of one matrix: its own dims, split between the two factors."""
    cut = 1 + NUM_IN.get(name.removeprefix("layers."), 1)
    a, b = (f"{name}{suffix}" for suffix in LORA_SUFFIXES)
    return {
        a: ParamSpec((*spec.shape[:cut], rank), (*spec.axes[:cut], None), "fan_in"),
        # Zero, so that the model begins as it is without the adapter.
        b: ParamSpec((spec.shape[0], rank, *spec.shape[cut:]), (spec.axes[0], None, *spec.axes[cut:]), "zeros"),
    }


class Layers(nnx.Module):
    """The stacked parameters of all layers, one attribute each."""


class Decoder(nnx.Module):
    """A causal language model without its loss.

    Args:
        config: shape and flags.
        rngs: for the random start; weights are normal with `config.initializer_range`, biases 0, norms the identity.
        compute_dtype: of activations and of the parameters at use.
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
                # As PEFT starts them: uniform, up to 1 / sqrt of the number of inputs.
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
        """Hidden states after the final norm, in compute dtype, and the cache with these tokens in it.

        Without a cache a token attends to itself and the tokens before it in its row; with a packing its row is the
        packing's, and tokens, positions and hidden states are lines of packed tokens. With a cache the keys and values
        of a token are written to the slot of its position, and it attends to all slots up to that one: right-padded
        prompts need no lengths, since what padding wrote is overwritten before anything attends to it. A position >= M
        writes nothing (an idle row).

        Args:
            tokens_BS: ids in [0, V); padding too (an id outside gives NaN).
            positions_BS: rotary position, and slot in the cache; not negative.
            packing: what it packed are the tokens and positions; only without a cache.
            cache: from `init_cache`, `prefill` or the previous call. Donate it to update it in place.
            layers: with a cache, the layers' parameters from `unstacked`, for whoever calls this in a loop.
        """
        if cache is not None and packing is not None:
            raise ValueError("packing with a cache: packed rows cannot be decoded; give one of the two")
        with jax.default_matmul_precision(_matmul_precision(self.compute_dtype)):
            hidden_BSD, cached = self._forward(tokens_BS, positions_BS, packing, cache, layers)
        return hidden_BSD, cached if cache is not None else None

    def prefill(
        self, tokens_BS: Int[Array, "B S"], positions_BS: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S D"], KVCache]:
        """Hidden states as without a cache, and a cache of S slots with these tokens in it."""
        with jax.default_matmul_precision(_matmul_precision(self.compute_dtype)):
            hidden_BSD, (k_LBSKH, v_LBSKH) = self._forward(tokens_BS, positions_BS, None, None, None)
        return hidden_BSD, KVCache(
            tuple(k_BSKH.transpose(0, 2, 3, 1) for k_BSKH in k_LBSKH), tuple(v.swapaxes(1, 2) for v in v_LBSKH)
        )

    def unstacked(self) -> list[dict[str, Array]]:
        """The parameters of each layer, as decoding reads them: once for many steps."""
        weights = {name: param[...] for name, param in nnx.state(self.layers, nnx.Param).items()}
        return [{name: w[layer] for name, w in weights.items()} for layer in range(self.config.num_layers)]

    def _forward(self, tokens_BS, positions_BS, packing, cache, layers):
        config, dtype = self.config, self.compute_dtype
        rotation = _rotation(config, positions_BS)
        if cache is not None:
            num_slots = cache.num_slots
        else:
            num_slots = tokens_BS.shape[1] if packing is None else packing.place_of.shape[2]
        if config.local_rope is not None:
            local_rotation = _rotation(dataclasses.replace(config, rope=config.local_rope), positions_BS)
        # A window that holds the whole row changes nothing.
        windowed = config.sliding_window is not None and config.sliding_window < num_slots
        # What the plain attention does not do; every other model takes the path below that is fast.
        special = windowed or config.attention_softcap is not None or config.attention_scale is not None

        def project(x, w, name):
            """x times the matrix of that name, and its adapter's share where it has one."""
            num_in = NUM_IN.get(name, 1)
            y = _project(x, w[name].astype(dtype), num_in)
            if config.lora is not None and name in config.lora.targets:
                a, b = (w[name + suffix].astype(dtype) for suffix in LORA_SUFFIXES)
                y += config.lora.scale * _project(_project(x, a, num_in), b)
            return y

        def norm(x, scale):
            # In float32: 1 + weight in bfloat16 would round a small weight away.
            scale = 1.0 + scale.astype(jnp.float32) if config.norm_plus_one else scale
            return _rms_norm(x, scale, config.rms_norm_eps)

        def special_attention(q_BSNH, k_BMKH, v_BMKH, w):
            # Without a cache a token's place in its row decides, whatever position it is given.
            return masked_attention(
                q_BSNH,
                k_BMKH,
                v_BMKH,
                jnp.arange(num_slots)[None] if cache is None else positions_BS,
                window=w["window"] if windowed else None,
                scale=config.attention_scale or config.head_dim**-0.5,
                softcap=config.attention_softcap,
            )

        def attention(x_BSD, w, cached):
            q_BSNH, k_BSKH, v_BSKH = (project(x_BSD, w, name) for name in ("query", "key", "value"))
            if config.qkv_bias:
                q_BSNH += w["query_bias"].astype(dtype)
                k_BSKH += w["key_bias"].astype(dtype)
                v_BSKH += w["value_bias"].astype(dtype)
            if config.qk_norm:
                q_BSNH = norm(q_BSNH, w["query_norm"])
                k_BSKH = norm(k_BSKH, w["key_norm"])
            turn = rotation
            if config.local_rope is not None:
                turn = jax.tree.map(lambda a, b: jnp.where(w["window"] < _NO_WINDOW, a, b), local_rotation, rotation)
            q_BSNH, k_BSKH = _rotate(q_BSNH, turn), _rotate(k_BSKH, turn)
            if cached is None:
                cached = (k_BSKH, v_BSKH)
                if packing is not None:
                    q_BSNH, k_BSKH, v_BSKH = packing.unpack(q_BSNH), packing.unpack(k_BSKH), packing.unpack(v_BSKH)
                if special:
                    a_BSNH = special_attention(q_BSNH, k_BSKH, v_BSKH, w)
                else:
                    a_BSNH = causal_attention(q_BSNH, k_BSKH, v_BSKH)
                if packing is not None:
                    a_BSNH = packing.pack(a_BSNH)
            else:
                cached = (
                    _write(cached[0], positions_BS, k_BSKH, slots=3),
                    _write(cached[1], positions_BS, v_BSKH, slots=2),
                )
                k_BKHM, v_BKMH = (x.astype(dtype) for x in cached)
                if special:
                    a_BSNH = special_attention(q_BSNH, k_BKHM.transpose(0, 3, 1, 2), v_BKMH.swapaxes(1, 2), w)
                else:
                    a_BSNH = cached_attention(q_BSNH, k_BKHM, v_BKMH, positions_BS)
            y_BSD = project(a_BSNH, w, "output")
            return (y_BSD + w["output_bias"].astype(dtype) if config.output_bias else y_BSD), cached

        def mlp(x_BSD, w):
            if config.num_experts:
                w = {name: w[name].astype(dtype) for name in ("router", "gate", "up", "down")}
                return moe.mlp(
                    x_BSD,
                    *w.values(),
                    num_experts_per_tok=config.num_experts_per_tok,
                    norm_topk_prob=config.norm_topk_prob,
                )
            gate_BSF, up_BSF = project(x_BSD, w, "gate"), project(x_BSD, w, "up")
            if config.mlp_bias:
                gate_BSF += w["gate_bias"].astype(dtype)
                up_BSF += w["up_bias"].astype(dtype)
            y_BSD = project(_ACTIVATIONS[config.hidden_act](gate_BSF) * up_BSF, w, "down")
            return y_BSD + w["down_bias"].astype(dtype) if config.mlp_bias else y_BSD

        def block(x_BSD, w, cached):
            y_BSD, cached = attention(norm(x_BSD, w["attention_norm"]), w, cached)
            x_BSD = x_BSD + (norm(y_BSD, w["post_attention_norm"]) if config.post_norms else y_BSD)
            y_BSD = mlp(norm(x_BSD, w["mlp_norm"]), w)
            return x_BSD + (norm(y_BSD, w["post_mlp_norm"]) if config.post_norms else y_BSD), cached

        x_BSD = jnp.take(self.embed[...], tokens_BS, axis=0, mode="fill", fill_value=jnp.nan).astype(dtype)
        if config.scale_embedding:
            # The factor is rounded to the compute dtype too, as the models were trained.
            x_BSD *= jnp.asarray(math.sqrt(config.hidden_size), dtype)
        windows = {}
        if config.sliding_window is not None:
            # Scanned like the weights, so that layers that differ are still one loop.
            all_windows = [config.sliding_window if sliding else _NO_WINDOW for sliding in config.sliding_layers]
            windows = {"window": jnp.asarray(all_windows, jnp.int32)}
        if cache is None:
            weights = {name: param[...] for name, param in nnx.state(self.layers, nnx.Param).items()}

            def step(x_BSD, w):
                return block(x_BSD, w, None)

            # prevent_cse=False: inside scan nothing can be merged with the first forward pass, and the barrier costs.
            step = jax.checkpoint(step, prevent_cse=False) if self.remat == "layer" else step
            # Keys and values that nobody asks for cost nothing: the compiler leaves them out.
            x_BSD, cached = jax.lax.scan(step, x_BSD, weights | windows)
        else:
            all_cached = []
            for layer, w in enumerate(self.unstacked() if layers is None else layers):
                w = {**w, **{name: x[layer] for name, x in windows.items()}}
                x_BSD, one = block(x_BSD, w, (cache.k[layer], cache.v[layer]))
                all_cached.append(one)
            cached = KVCache(*map(tuple, zip(*all_cached, strict=True)))
        return norm(x_BSD, self.final_norm[...]), cached

    def head_DV(self) -> Float[Array, "D V"]:  # noqa: N802
        """The output projection in compute dtype: the transposed embedding where they are tied."""
        table = self.embed[...].T if self.config.tie_word_embeddings else self.head[...]
        return table.astype(self.compute_dtype)

    def logits(self, hidden: Float[Array, "*tokens D"]) -> Float[Array, "*tokens V"]:
        """float32 logits of hidden states, softcapped where the model is."""
        with jax.default_matmul_precision(_matmul_precision(self.compute_dtype)):
            logits = jnp.einsum("...D,DV->...V", hidden, self.head_DV(), preferred_element_type=jnp.float32)
        softcap = self.config.final_softcap
        return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _matmul_precision(dtype: jnp.dtype) -> str:
    # On NVIDIA GPUs the default for float32 is TF32, whose 10-bit mantissa is not what float32 promises.
    return "highest" if dtype == jnp.float32 else "default"


def _project(x, w, num_in: int = 1):
    """x [B, S, *in] times w [*in, *out] -> [B, S, *out]; `num_in` dims are summed over.

    As one matrix product over B * S rows: with two dims the gradient of w is a contraction over both, for which
    XLA's CPU backend first writes transposed copies of the activations (an MLP's backward pass took 1.5 times as long).
    """
    batch, (in_dims, out_dims) = x.shape[:2], (w.shape[:num_in], w.shape[num_in:])
    y = x.reshape(math.prod(batch), math.prod(in_dims)) @ w.reshape(math.prod(in_dims), math.prod(out_dims))
    return y.reshape(*batch, *out_dims)


def _rms_norm(x, scale, epsilon: float):
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


def _rotation(config: DecoderConfig, positions_BS):
    """float32 (cos, sin), each [B, S, 1, H/2]."""
    angles = positions_BS[:, :, None, None].astype(jnp.float32) * config.rope.inverse_frequencies(config.head_dim)
    return config.rope.attention_factor * jnp.cos(angles), config.rope.attention_factor * jnp.sin(angles)


def _rotate(x_BSNH, rotation):
    """Rotates the pairs (i, i + H/2), the layout of Hugging Face's weights."""
    cos, sin = rotation
    first, second = jnp.split(x_BSNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BSNH.dtype)


def _write(cache, positions_BS, x_BSKH, *, slots: int):
    """Puts x at [row, position]; a position outside the cache writes nothing. `slots`: the dim of the slots."""
    # One scatter whose batch dim is the row: a cache sharded by rows stays where it is.
    return jax.lax.scatter(
        cache,
        positions_BS[..., None],
        x_BSKH.astype(cache.dtype),
        jax.lax.ScatterDimensionNumbers(
            update_window_dims=(2, 3),
            inserted_window_dims=(slots,),
            scatter_dims_to_operand_dims=(slots,),
            operand_batching_dims=(0,),
            scatter_indices_batching_dims=(0,),
        ),
        mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    )
