"""The supervised objective: cross-entropy.

Dimension key: B sequences, T targets.
"""

from __future__ import annotations

from jaxtyping import Array, Float


def cross_entropy(logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Return minus the log-probability of each target, in nats.

    Args:
        logprobs: targets under the parameters being trained, in nats.
    """
    return -logprobs
