"""Llama 2 and 3: biases by flag, rope scaling llama3."""
