"""Rewards -> advantages.

Dimension key: P prompts, G completions of each prompt.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def grpo(
    rewards: Float[Array | np.ndarray, "P G"], *, normalize_std: bool = True, epsilon: float = 1e-6
) -> Float[Array, "P G"]:
    """Each completion's reward relative to the other completions of its prompt.

    Args:
        rewards: one number for each completion.
        normalize_std: divide by the group's sample standard deviation (G - 1 in its denominator, which is what TRL,
            verl and Tunix compute); False leaves the scale alone, as Dr. GRPO does.
        epsilon: added to the standard deviation.

    Returns:
        Advantages; exactly 0 in a group whose rewards are all the same.

    Raises:
        ValueError: fewer than two completions a prompt.

    Reference:
        Shao et al., "DeepSeekMath", arXiv 2402.03300, section 4.1; Liu et al. (Dr. GRPO), arXiv 2503.20783.
    """
    rewards = jnp.asarray(rewards)
    if rewards.shape[1] < 2:
        raise ValueError(
            f"GRPO compares the completions of one prompt, got {rewards.shape[1]} of each: "
            "rollout.num_completions must be at least 2"
        )
    centered_PG = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    if normalize_std:
        centered_PG = centered_PG / (jnp.std(rewards, axis=1, ddof=1, keepdims=True) + epsilon)
    # Eight rewards of 0.1 have a float32 mean of 0.1 + 7e-9: with epsilon = 1e-6 an advantage of 0.007.
    same_P1 = jnp.all(rewards == rewards[:, :1], axis=1, keepdims=True)
    return jnp.where(same_P1, 0.0, centered_PG)
