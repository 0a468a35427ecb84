"""Qwen3 (dense): query and key norms, and a head_dim independent of hidden_size."""

from __future__ import annotations

from typing import Any

from jdistill.models.config import DecoderConfig
from jdistill.models.families import llama, qwen2
from jdistill.models.hf_config import HFFields, hf_fields
from jdistill.models.layouts import VECTOR

ARCHITECTURE = "Qwen3ForCausalLM"
HIDDEN_ACT = "silu"

# Parameter -> (name pattern in the checkpoint, layout).
TENSORS = {
    **llama.TENSORS,
    "layers.query_norm": ("model.layers.{layer}.self_attn.q_norm.weight", VECTOR),
    "layers.key_norm": ("model.layers.{layer}.self_attn.k_norm.weight", VECTOR),
}


def from_hf(fields: HFFields) -> DecoderConfig:
    """Reads a config.json; defaults are those of transformers' Qwen3Config, but the main sizes are required."""
    attention_bias = fields.take("attention_bias", bool, False)
    num_layers = fields.take("num_hidden_layers", int)
    num_heads = fields.take("num_attention_heads", int)
    max_position_embeddings = fields.take("max_position_embeddings", int, 32768)
    qwen2.refuse_sliding_window(fields, num_layers)
    return DecoderConfig(
        family="qwen3",
        vocab_size=fields.take("vocab_size", int),
        hidden_size=fields.take("hidden_size", int),
        intermediate_size=fields.take("intermediate_size", int),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.take("num_key_value_heads", int, num_heads),
        head_dim=fields.take("head_dim", int, 128),
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=fields.take("rms_norm_eps", float, 1e-6),
        rope=fields.rope(max_position_embeddings=max_position_embeddings),
        qk_norm=True,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        tie_word_embeddings=fields.take("tie_word_embeddings", bool, False),
        initializer_range=fields.take("initializer_range", float, 0.02),
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the config.json that `from_hf` reads back."""
    return {
        "architectures": [ARCHITECTURE],
        **hf_fields(config),
        "attention_bias": config.qkv_bias,
    }
