"""Qwen3 MoE: Qwen3 with a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any

from jdistill.models.config import DecoderConfig
from jdistill.models.families import qwen2, qwen3
from jdistill.models.hf_config import HFFields, hf_fields
from jdistill.models.layouts import LINEAR

ARCHITECTURE = "Qwen3MoeForCausalLM"
HIDDEN_ACT = "silu"

# Parameter -> (name pattern in the checkpoint, layout).
TENSORS = {
    **qwen3.TENSORS,
    "layers.router": ("model.layers.{layer}.mlp.gate.weight", LINEAR),
    "layers.gate": ("model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight", LINEAR),
    "layers.up": ("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight", LINEAR),
    "layers.down": ("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight", LINEAR),
}


def from_hf(fields: HFFields) -> DecoderConfig:
    """Reads a config.json; defaults are those of transformers' Qwen3MoeConfig, but the main sizes are required."""
    attention_bias = fields.take("attention_bias", bool, False)
    num_layers = fields.take("num_hidden_layers", int)
    num_heads = fields.take("num_attention_heads", int)
    hidden_size = fields.take("hidden_size", int)
    max_position_embeddings = fields.take("max_position_embeddings", int, 32768)
    qwen2.refuse_sliding_window(fields, num_layers)
    # Layers are stacked, so a dense layer among those with experts is not supported.
    fields.refuse_unless("decoder_sparse_step", 1)
    fields.refuse_unless("mlp_only_layers", [])
    fields.take("intermediate_size", int, 6144)  # size of dense layers, which are refused above
    fields.take("router_aux_loss_coef", float, 0.001)  # for an auxiliary loss that we do not have
    fields.take("output_router_logits", bool, False)
    fields.refuse_unless("use_qk_norm", True)
    return DecoderConfig(
        family="qwen3_moe",
        vocab_size=fields.take("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=fields.take("moe_intermediate_size", int),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.take("num_key_value_heads", int, 4),
        # Unlike Qwen3Config, Qwen3MoeConfig has no default for head_dim.
        head_dim=fields.take("head_dim", int, hidden_size // num_heads),
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=fields.take("rms_norm_eps", float, 1e-6),
        rope=fields.rope(max_position_embeddings=max_position_embeddings),
        qk_norm=True,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        tie_word_embeddings=fields.take("tie_word_embeddings", bool, False),
        initializer_range=fields.take("initializer_range", float, 0.02),
        num_experts=fields.take_alike(("num_experts", "num_local_experts"), int, 128),  # the second in transformers 5
        num_experts_per_tok=fields.take("num_experts_per_tok", int, 8),
        norm_topk_prob=fields.take("norm_topk_prob", bool, False),
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the config.json that `from_hf` reads back."""
    return {
        "architectures": [ARCHITECTURE],
        **hf_fields(config),
        "attention_bias": config.qkv_bias,
        "moe_intermediate_size": config.intermediate_size,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
