"""Qwen2 and 2.5: query, key and value biases, nothing else unusual."""
