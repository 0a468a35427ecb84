"""Gemma 2: softcaps, a sliding window in every other layer, norms before and after attention and MLP."""

from __future__ import annotations

from typing import Any

from jdistill.models.config import DecoderConfig, Rope
from jdistill.models.families import llama
from jdistill.models.hf_config import HFFields, hf_fields, layer_types
from jdistill.models.layouts import VECTOR

ARCHITECTURE = "Gemma2ForCausalLM"
HIDDEN_ACT = "gelu_pytorch_tanh"

# Parameter -> (name pattern in the checkpoint, layout).
TENSORS = {
    **llama.TENSORS,
    # In Llama checkpoints this name belongs to the norm before the MLP.
    "layers.post_attention_norm": ("model.layers.{layer}.post_attention_layernorm.weight", VECTOR),
    "layers.mlp_norm": ("model.layers.{layer}.pre_feedforward_layernorm.weight", VECTOR),
    "layers.post_mlp_norm": ("model.layers.{layer}.post_feedforward_layernorm.weight", VECTOR),
}


def from_hf(fields: HFFields) -> DecoderConfig:
    """Reads a config.json; defaults are those of transformers' Gemma2Config, but the main sizes are required."""
    return DecoderConfig(
        family="gemma2",
        attention_softcap=fields.take_unless_null("attn_logit_softcapping", float, 50.0),
        final_softcap=fields.take_unless_null("final_logit_softcapping", float, 30.0),
        **gemma_fields(fields, max_position_embeddings=8192, full_every=2, rope=None),
    )


def gemma_fields(
    fields: HFFields, *, max_position_embeddings: int, full_every: int, rope: Rope | None
) -> dict[str, Any]:
    """Reads the fields that Gemma 2 and 3 share, as arguments of DecoderConfig.

    Args:
        fields: of config.json.
        max_position_embeddings: default if config.json has none.
        full_every: without layer_types, the last of every `full_every` layers has full attention.
        rope: rotation of the layers with full attention; None: read from config.json.
    """
    fields.refuse_unless("hidden_activation", HIDDEN_ACT)
    fields.refuse_unless("use_bidirectional_attention", False)
    attention_bias = fields.take("attention_bias", bool, False)
    num_layers = fields.take("num_hidden_layers", int)
    max_position_embeddings = fields.take("max_position_embeddings", int, max_position_embeddings)
    window = fields.take_unless_null("sliding_window", int, 4096)
    fields.refuse_unless("sliding_window_size", window)  # the first releases had both fields
    sliding = fields.sliding_layers(num_layers, [(layer + 1) % full_every != 0 for layer in range(num_layers)])
    if window is None and any(sliding):
        fields.refuse(
            f"sliding_window is null, but {sum(sliding)} of {num_layers} layers are "
            "sliding_attention: set the window, or layer_types to full_attention"
        )
    return {
        "vocab_size": fields.take("vocab_size", int),
        "hidden_size": fields.take("hidden_size", int),
        "intermediate_size": fields.take("intermediate_size", int),
        "num_layers": num_layers,
        "num_heads": fields.take("num_attention_heads", int),
        "num_kv_heads": fields.take("num_key_value_heads", int, 4),
        "head_dim": fields.take("head_dim", int, 256),
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": fields.take("rms_norm_eps", float, 1e-6),
        "rope": fields.rope(max_position_embeddings=max_position_embeddings) if rope is None else rope,
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "tie_word_embeddings": fields.take("tie_word_embeddings", bool, True),
        "initializer_range": fields.take("initializer_range", float, 0.02),
        "hidden_act": HIDDEN_ACT,
        "sliding_window": window,
        "sliding_layers": () if window is None else sliding,
        "query_pre_attn_scalar": fields.take("query_pre_attn_scalar", float, 256.0),
        "norm_plus_one": True,
        "post_norms": True,
        "scale_embedding": True,
    }


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the config.json that `from_hf` reads back."""
    return {
        "architectures": [ARCHITECTURE],
        **gemma_hf_fields(config),
        "attn_logit_softcapping": config.attention_softcap,
    }


def gemma_hf_fields(config: DecoderConfig) -> dict[str, Any]:
    """Returns the fields of config.json that Gemma 2 and 3 share."""
    scalar = config.head_dim if config.query_pre_attn_scalar is None else config.query_pre_attn_scalar
    return {
        **hf_fields(config),
        "hidden_activation": config.hidden_act,
        "attention_bias": config.qkv_bias,
        # transformers accepts only an int.
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "sliding_window": config.sliding_window,
        "layer_types": layer_types(config) or ["full_attention"] * config.num_layers,
        "final_logit_softcapping": config.final_softcap,
    }
