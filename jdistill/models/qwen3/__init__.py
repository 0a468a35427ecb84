"""Qwen3 (dense): query and key norms, head_dim of its own."""
