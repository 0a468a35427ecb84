"""Gemma 3's tensors in a Hugging Face checkpoint: Gemma 2's names, and the norms of queries and keys."""

from jdistill.models.gemma2.params import TENSORS as GEMMA2_TENSORS
from jdistill.models.qwen3.params import TENSORS as QWEN3_TENSORS

TENSORS = {**QWEN3_TENSORS, **GEMMA2_TENSORS}
