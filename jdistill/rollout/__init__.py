"""Samples completions and gathers a step's episodes."""
