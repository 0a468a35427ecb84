"""Gemma 3 (text): sliding layers with separate rotary frequencies, query and key norms, and Gemma 2's block norms."""

from __future__ import annotations

from typing import Any

from jdistill.models.config import DecoderConfig, Rope
from jdistill.models.families import gemma2, qwen3
from jdistill.models.hf_config import HFFields

ARCHITECTURE = "Gemma3ForCausalLM"
HIDDEN_ACT = gemma2.HIDDEN_ACT

# Parameter -> (name pattern in the checkpoint, layout).
TENSORS = {**qwen3.TENSORS, **gemma2.TENSORS}


def from_hf(fields: HFFields) -> DecoderConfig:
    """Reads a config.json; defaults are those of transformers' Gemma3TextConfig, but the main sizes are required."""
    # transformers has the field but does not apply it.
    fields.refuse_unless("attn_logit_softcapping")
    pattern = fields.take("sliding_window_pattern", int, 6)
    fields.take("_sliding_window_pattern", int, pattern)  # layer_types is always beside it
    rope = _rope(fields, "full_attention", {"rope_theta": "rope_theta", "rope_scaling": "rope_scaling"}, 1_000_000.0)
    local_rope = _rope(fields, "sliding_attention", {"rope_local_base_freq": "rope_theta"}, 10_000.0)
    if local_rope.kind != "default":
        fields.refuse(
            f"rope_parameters.sliding_attention.rope_type = {local_rope.kind!r} is not supported (only 'default')"
        )
    shared = gemma2.gemma_fields(fields, max_position_embeddings=131_072, full_every=pattern, rope=rope)
    return DecoderConfig(
        family="gemma3_text",
        qk_norm=True,
        local_rope=None if shared["sliding_window"] is None else local_rope,
        final_softcap=fields.take("final_logit_softcapping", float, None),
        **shared,
    )


def _rope(fields: HFFields, kind: str, flat_names: dict[str, str], theta: float) -> Rope:
    """Reads the rotary embedding of one layer type, in either spelling.

    Args:
        fields: of config.json.
        kind: full_attention or sliding_attention, the key in `rope_parameters` (transformers 5).
        flat_names: the older fields of config.json -> their names in a model with a single rotation.
        theta: default of rope_theta.
    """
    flat = {name: fields.take(old, (dict, float), None) for old, name in flat_names.items()}
    both = fields.take("rope_parameters", dict, None)
    if both is not None and not set(both) <= {"full_attention", "sliding_attention"}:
        fields.refuse(f"rope_parameters = {both}: expected one entry for full_attention and one for sliding_attention")
        both = None
    length = fields.take("max_position_embeddings", int, 131_072)
    given = None if both is None else both.get(kind)
    flat_rope = fields.inner({"rope_theta": theta, **_set(flat)}).rope(max_position_embeddings=length)
    if given is None:
        return flat_rope
    one = fields.inner({"rope_parameters": {"rope_theta": theta, **_set(given)}})
    rope = one.rope(max_position_embeddings=length, name=f"rope_parameters.{kind}")
    if _set(flat) and rope != flat_rope:
        fields.refuse(f"rope_parameters.{kind} and {', '.join(flat_names)} disagree: delete the wrong one")
    return rope


def _set(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the config.json that `from_hf` reads back, in a spelling that all transformers versions read."""
    local = config.local_rope or Rope()
    return {"architectures": [ARCHITECTURE], **gemma2.gemma_hf_fields(config), "rope_local_base_freq": local.theta}
