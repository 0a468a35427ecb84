"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from jdistill.models.config import DecoderConfig
from jdistill.models.families import llama
from jdistill.models.hf_config import HFFields, hf_fields

ARCHITECTURE = "Qwen2ForCausalLM"
HIDDEN_ACT = "silu"

# Parameter -> (name pattern in the checkpoint, layout).
TENSORS = llama.TENSORS


def from_hf(fields: HFFields) -> DecoderConfig:
    """Reads a config.json; defaults are those of transformers' Qwen2Config, but the main sizes are required."""
    num_layers = fields.take("num_hidden_layers", int)
    num_heads = fields.take("num_attention_heads", int)
    hidden_size = fields.take("hidden_size", int)
    max_position_embeddings = fields.take("max_position_embeddings", int, 32768)
    refuse_sliding_window(fields, num_layers)
    return DecoderConfig(
        family="qwen2",
        vocab_size=fields.take("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=fields.take("intermediate_size", int),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.take("num_key_value_heads", int, num_heads),
        head_dim=fields.take("head_dim", int, hidden_size // num_heads),
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=fields.take("rms_norm_eps", float, 1e-6),
        rope=fields.rope(max_position_embeddings=max_position_embeddings),
        qkv_bias=True,
        tie_word_embeddings=fields.take("tie_word_embeddings", bool, False),
        initializer_range=fields.take("initializer_range", float, 0.02),
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the config.json that `from_hf` reads back."""
    return {"architectures": [ARCHITECTURE], **hf_fields(config)}


def refuse_sliding_window(fields: HFFields, num_layers: int) -> None:
    """Refuses sliding-window attention in any layer; a window that no layer uses is accepted."""
    window = fields.take("sliding_window", int, 4096)
    first_layer = fields.take("max_window_layers", int, 28)
    types = fields.take("layer_types", list, None)
    if types is None and fields.take("use_sliding_window", bool, False):
        types = ["sliding_attention" if layer >= first_layer else "full_attention" for layer in range(num_layers)]
    fields.take("use_sliding_window", bool, False)
    odd = sorted({str(kind) for kind in types or () if kind != "full_attention"})
    if odd:
        fields.refuse(
            f"use_sliding_window / layer_types ask for {', '.join(odd)} (window {window}), only full attention is "
            "supported"
        )
