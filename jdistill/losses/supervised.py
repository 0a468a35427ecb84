"""The supervised objective.

Dimension key: B sequences, T targets.
"""

from __future__ import annotations

from jaxtyping import Array, Float


def cross_entropy(logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Minus the log-probability of the target, in nats per token.

    Args:
        logprobs: of the targets under the parameters being trained, in nats.
    """
    return -logprobs
