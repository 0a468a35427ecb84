"""Mistral 7B, Nemo and Small: Llama with an optional sliding window."""

from __future__ import annotations

from typing import Any

from jdistill.models.config import DecoderConfig
from jdistill.models.families import llama
from jdistill.models.hf_config import HFFields, hf_fields

ARCHITECTURE = "MistralForCausalLM"
HIDDEN_ACT = "silu"

# Parameter -> (name pattern in the checkpoint, layout).
TENSORS = llama.TENSORS


def from_hf(fields: HFFields) -> DecoderConfig:
    """Reads a config.json; defaults are those of transformers' MistralConfig, but the main sizes are required."""
    num_layers = fields.take("num_hidden_layers", int)
    num_heads = fields.take("num_attention_heads", int)
    hidden_size = fields.take("hidden_size", int)
    max_position_embeddings = fields.take("max_position_embeddings", int, 4096 * 32)
    # An absent field means a window of 4096 (7B v0.1), null means none (all later releases).
    window = fields.take_unless_null("sliding_window", int, 4096)
    return DecoderConfig(
        family="mistral",
        vocab_size=fields.take("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=fields.take("intermediate_size", int),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.take_unless_null("num_key_value_heads", int, 8) or num_heads,
        head_dim=fields.take("head_dim", int, hidden_size // num_heads),
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=fields.take("rms_norm_eps", float, 1e-6),
        rope=fields.rope(max_position_embeddings=max_position_embeddings),
        tie_word_embeddings=fields.take("tie_word_embeddings", bool, False),
        initializer_range=fields.take("initializer_range", float, 0.02),
        sliding_window=window,
        sliding_layers=() if window is None else (True,) * num_layers,
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the config.json that `from_hf` reads back."""
    return {"architectures": [ARCHITECTURE], **hf_fields(config), "sliding_window": config.sliding_window}
