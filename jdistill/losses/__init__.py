"""Advantages, policies, distillation, corrections: pure functions on [B, T], jax.numpy only."""

from jdistill.losses import (
    advantages,
    distillation,
    estimators,
    masked,
    off_policy,
    policy_gradient,
    segments,
    supervised,
    value,
    weights,
)

__all__ = [
    "advantages",
    "distillation",
    "estimators",
    "masked",
    "off_policy",
    "policy_gradient",
    "segments",
    "supervised",
    "value",
    "weights",
]
