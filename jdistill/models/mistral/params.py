"""Mistral's tensors in a Hugging Face checkpoint: Llama's names."""

from jdistill.models.llama.params import TENSORS

__all__ = ["TENSORS"]
