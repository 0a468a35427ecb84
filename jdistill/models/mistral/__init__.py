"""Mistral 7B, Nemo and Small: Llama with a sliding window, or without."""
