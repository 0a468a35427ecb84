"""Llama 2 and 3: optional biases, llama3 rope scaling. The other families start from its tensor names."""

from __future__ import annotations

from typing import Any

from jdistill.models.config import DecoderConfig
from jdistill.models.hf_config import HFFields, hf_fields
from jdistill.models.layouts import LINEAR, LINEAR_FROM_HEADS, TABLE, VECTOR

ARCHITECTURE = "LlamaForCausalLM"
HIDDEN_ACT = "silu"

# Parameter -> (name pattern in the checkpoint, layout).
TENSORS = {
    "embed": ("model.embed_tokens.weight", TABLE),
    "layers.attention_norm": ("model.layers.{layer}.input_layernorm.weight", VECTOR),
    "layers.query": ("model.layers.{layer}.self_attn.q_proj.weight", LINEAR),
    "layers.key": ("model.layers.{layer}.self_attn.k_proj.weight", LINEAR),
    "layers.value": ("model.layers.{layer}.self_attn.v_proj.weight", LINEAR),
    "layers.output": ("model.layers.{layer}.self_attn.o_proj.weight", LINEAR_FROM_HEADS),
    "layers.query_bias": ("model.layers.{layer}.self_attn.q_proj.bias", VECTOR),
    "layers.key_bias": ("model.layers.{layer}.self_attn.k_proj.bias", VECTOR),
    "layers.value_bias": ("model.layers.{layer}.self_attn.v_proj.bias", VECTOR),
    "layers.output_bias": ("model.layers.{layer}.self_attn.o_proj.bias", VECTOR),
    "layers.mlp_norm": ("model.layers.{layer}.post_attention_layernorm.weight", VECTOR),
    "layers.gate": ("model.layers.{layer}.mlp.gate_proj.weight", LINEAR),
    "layers.up": ("model.layers.{layer}.mlp.up_proj.weight", LINEAR),
    "layers.down": ("model.layers.{layer}.mlp.down_proj.weight", LINEAR),
    "layers.gate_bias": ("model.layers.{layer}.mlp.gate_proj.bias", VECTOR),
    "layers.up_bias": ("model.layers.{layer}.mlp.up_proj.bias", VECTOR),
    "layers.down_bias": ("model.layers.{layer}.mlp.down_proj.bias", VECTOR),
    "final_norm": ("model.norm.weight", VECTOR),
    "head": ("lm_head.weight", LINEAR),
}


def from_hf(fields: HFFields) -> DecoderConfig:
    """Reads a config.json; defaults are those of transformers' LlamaConfig, but the main sizes are required."""
    attention_bias = fields.take("attention_bias", bool, False)
    num_heads = fields.take("num_attention_heads", int)
    hidden_size = fields.take("hidden_size", int)
    max_position_embeddings = fields.take("max_position_embeddings", int, 2048)
    return DecoderConfig(
        family="llama",
        vocab_size=fields.take("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=fields.take("intermediate_size", int),
        num_layers=fields.take("num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=fields.take("num_key_value_heads", int, num_heads),
        head_dim=fields.take("head_dim", int, hidden_size // num_heads),
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=fields.take("rms_norm_eps", float, 1e-6),
        rope=fields.rope(max_position_embeddings=max_position_embeddings),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.take("mlp_bias", bool, False),
        tie_word_embeddings=fields.take("tie_word_embeddings", bool, False),
        initializer_range=fields.take("initializer_range", float, 0.02),
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the config.json that `from_hf` reads back."""
    return {
        "architectures": [ARCHITECTURE],
        **hf_fields(config),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }
