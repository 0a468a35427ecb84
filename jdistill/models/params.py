"""The parameters of a decoder: name, shape, logical axes and initial value of each.

Dimension key: L layers, D width, N query heads, K key-value heads, H head_dim, F MLP width, V vocabulary, E experts.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

from jdistill.models.config import DecoderConfig

LORA_SUFFIXES = ("_lora_a", "_lora_b")
# Number of input dims of a layer's matrix, after the dim of layers; 1 for matrices that are not listed.
NUM_IN = {"output": 2}


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: shape, logical axis of each dim (see partitioning.MESH_AXES), and initial value."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Literal["normal", "ones", "zeros", "fan_in"]

    @property
    def stacked(self) -> tuple[str, ...]:
        """The leading axes whose slices are separate tensors in a checkpoint: layers and experts."""
        return tuple(itertools.takewhile(lambda axis: axis in ("layer", "expert"), self.axes))


def param_specs(config: DecoderConfig) -> dict[str, ParamSpec]:
    """Lists every parameter of a decoder by its dotted name, e.g. "layers.query"."""
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


def _lora_specs(name: str, spec: ParamSpec, rank: int) -> dict[str, ParamSpec]:
    """Describes the two factors of a matrix's adapter: the first has its input dims, the second its output dims."""
    cut = 1 + NUM_IN.get(name.removeprefix("layers."), 1)
    a, b = (f"{name}{suffix}" for suffix in LORA_SUFFIXES)
    return {
        a: ParamSpec((*spec.shape[:cut], rank), (*spec.axes[:cut], None), "fan_in"),
        # Zero, so that an untrained adapter changes nothing.
        b: ParamSpec((spec.shape[0], rank, *spec.shape[cut:]), (spec.axes[0], None, *spec.axes[cut:]), "zeros"),
    }
