"""Objectives as pure functions on the target grid [B, T]: per token in, per token out; `masked` alone reduces."""

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
