"""AdamW with a warm-up, a decay and gradient clipping, from the configuration."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jdistill.config import OptimizerSection


def make_schedule(section: OptimizerSection, num_steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates that were made.

    All updates of a step have the same rate. Step i of the warm-up (from 0) has (i + 1) / warmup_steps of the rate, so
    that none is wasted on 0; from there it goes to `end_factor` of it at the last step, num_steps - 1.
    """

    def schedule(num_updates: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(num_updates // section.minibatches, jnp.float32)
        warmup = jnp.minimum(1.0, (step + 1) / max(section.warmup_steps, 1))
        progress = jnp.clip((step - section.warmup_steps) / max(num_steps - 1 - section.warmup_steps, 1), 0.0, 1.0)
        match section.schedule:
            case "constant":
                left = jnp.ones_like(progress)
            case "linear":
                left = 1 - progress
            case "cosine":
                left = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        if section.schedule != "constant":
            left = section.end_factor + (1 - section.end_factor) * left
        return section.learning_rate * warmup * left

    return schedule


def make_optimizer(section: OptimizerSection, num_steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW; norms' scales and biases do not decay.

    Args:
        section: rates and sizes.
        num_steps: of the whole run, for the schedule.
    """

    def decays(params: optax.Params) -> optax.Params:
        # By name: with layers stacked a scale of a norm has two dims, like a matrix.
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not any(word in jax.tree_util.keystr(path) for word in ("norm", "bias")), params
        )

    return optax.chain(
        optax.clip_by_global_norm(section.clip_norm),
        optax.adamw(
            make_schedule(section, num_steps),
            b1=section.b1,
            b2=section.b2,
            eps=section.eps,
            weight_decay=section.weight_decay,
            mask=decays,
        ),
    )
