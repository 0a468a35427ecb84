"""Qwen3's tensors in a Hugging Face checkpoint: Llama's names, and the norms of queries and keys."""

from jdistill.models.checkpoint import VECTOR
from jdistill.models.llama.params import TENSORS as LLAMA_TENSORS

TENSORS = {
    **LLAMA_TENSORS,
    "layers.query_norm": ("model.layers.{layer}.self_attn.q_norm.weight", VECTOR),
    "layers.key_norm": ("model.layers.{layer}.self_attn.k_norm.weight", VECTOR),
}
