"""Gemma 2's tensors in a Hugging Face checkpoint: Llama's names, but for the norms around the MLP."""

from jdistill.models.checkpoint import VECTOR
from jdistill.models.llama.params import TENSORS as LLAMA_TENSORS

TENSORS = {
    **LLAMA_TENSORS,
    # Llama has this name for the norm before the MLP.
    "layers.post_attention_norm": ("model.layers.{layer}.post_attention_layernorm.weight", VECTOR),
    "layers.mlp_norm": ("model.layers.{layer}.pre_feedforward_layernorm.weight", VECTOR),
    "layers.post_mlp_norm": ("model.layers.{layer}.post_feedforward_layernorm.weight", VECTOR),
}
