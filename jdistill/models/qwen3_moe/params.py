"""Qwen3-MoE's tensors in a Hugging Face checkpoint: Qwen3's names, and one tensor for each expert."""

from jdistill.models.checkpoint import LINEAR
from jdistill.models.qwen3.params import TENSORS as QWEN3_TENSORS

TENSORS = {
    **QWEN3_TENSORS,
    "layers.router": ("model.layers.{layer}.mlp.gate.weight", LINEAR),
    "layers.gate": ("model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight", LINEAR),
    "layers.up": ("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight", LINEAR),
    "layers.down": ("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight", LINEAR),
}
