"""Reinforcement learning plus on-policy distillation in JAX, with a teacher behind gRPC."""

__version__ = "0.1.0"
