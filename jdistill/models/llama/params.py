"""Llama's tensors in a Hugging Face checkpoint: our parameter -> (its name there, its layout)."""

from jdistill.models.checkpoint import LINEAR, LINEAR_FROM_HEADS, TABLE, VECTOR

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
