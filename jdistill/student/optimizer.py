"""Builds the optimizer from the configuration: optax's, by name, with schedule, weight decay and gradient clipping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from jdistill.config import ConfigError, OptimizerSection


def make_schedule(section: OptimizerSection, num_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of updates made.

    All updates of a step use the same rate. Step i of the warm-up (from 0) uses (i + 1) / warmup_steps of the rate, so
    no step is wasted on rate 0; afterwards the rate decays to `end_factor` of it at the last step, num_steps - 1.
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


class Kind(NamedTuple):
    """One optimizer: its constructor, from (rate, decay, mask, **options), and its options with their defaults."""

    make: Callable[..., optax.GradientTransformation]
    options: dict[str, float]


def _adamw(rate, decay, mask, *, b1, b2, eps):
    return optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=decay, mask=mask)


def _lion(rate, decay, mask, *, b1, b2):
    return optax.lion(rate, b1=b1, b2=b2, weight_decay=decay, mask=mask)


def _adafactor(rate, decay, mask):
    # By default optax would scale the rate by each parameter's size.
    return optax.adafactor(
        rate, multiply_by_parameter_scale=False, weight_decay_rate=decay or None, weight_decay_mask=mask
    )


def _muon(rate, decay, mask, *, b1, b2, eps):
    # consistent_rms: updates have Adam's size, so Muon and AdamW share one rate (Liu et al., arXiv 2502.16982).
    return optax.contrib.muon(
        rate,
        eps=eps,
        weight_decay=decay,
        weight_decay_mask=mask,
        adam_b1=b1,
        adam_b2=b2,
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=0.2,
    )


def _sgd(rate, decay, mask, *, b1):
    return optax.chain(optax.add_decayed_weights(decay, mask), optax.sgd(rate, momentum=b1 or None))


# The values of optimizer.name. b1 is the decay of the first moment (sgd: the momentum), b2 that of the second.
OPTIMIZERS = {
    "adamw": Kind(_adamw, {"b1": 0.9, "b2": 0.95, "eps": 1e-8}),
    "lion": Kind(_lion, {"b1": 0.9, "b2": 0.99}),
    "adafactor": Kind(_adafactor, {}),
    "muon": Kind(_muon, {"b1": 0.9, "b2": 0.95, "eps": 1e-8}),  # for the layers' matrices; AdamW for the rest
    "sgd": Kind(_sgd, {"b1": 0.0}),
}

# Input and output dims of the attention matrices, which are stacked over layers.
_IN_OUT = {name: ((1,), (2, 3)) for name in ("query", "key", "value")} | {"output": ((1, 2), (3,))}


def _matrices(params: optax.Params) -> Any:
    def dims(path, param):
        name = _name(path)
        if name in ("gate", "up", "down"):
            return MuonDimensionNumbers((param.ndim - 2,), (param.ndim - 1,))
        return MuonDimensionNumbers(*_IN_OUT[name]) if name in _IN_OUT else None

    return jax.tree_util.tree_map_with_path(dims, params)


def _name(path: Any) -> str:
    """Returns the last part of a parameter's name, e.g. "query_norm" for layers.query_norm."""
    # Only dict keys: a path ends with the attribute .value, and there is a parameter called value too.
    return next((str(entry.key) for entry in reversed(path) if isinstance(entry, jax.tree_util.DictKey)), "")


def _decays(params: optax.Params) -> optax.Params:
    # By name: stacked over layers, the scale of a norm has two dims, like a matrix.
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(word in jax.tree_util.keystr(path) for word in ("norm", "bias")), params
    )


def check(section: OptimizerSection) -> None:
    """Raises ConfigError if the name is unknown, or the optimizer does not have a given option."""
    kind = OPTIMIZERS.get(section.name)
    if kind is None:
        raise ConfigError(f"optimizer.name: {section.name!r} is none of {', '.join(OPTIMIZERS)}")
    if wrong := sorted(set(_given(section)) - set(kind.options)):
        has = ", ".join(kind.options) or "none of b1, b2, eps"
        raise ConfigError(f"optimizer.{wrong[0]}: {section.name} has no such option (it has {has}): leave it out")


def _given(section: OptimizerSection) -> dict[str, float]:
    return {name: number for name in ("b1", "b2", "eps") if (number := getattr(section, name)) is not None}


def make_optimizer(section: OptimizerSection, num_steps: int) -> optax.GradientTransformation:
    """Builds clipping by the global norm, followed by the named optimizer; norm scales and biases do not decay.

    Args:
        section: the configuration.
        num_steps: number of steps of the whole run, for the schedule.

    Raises:
        ConfigError: the name is unknown, or the optimizer does not have a given option.
    """
    check(section)
    kind = OPTIMIZERS[section.name]
    schedule = make_schedule(section, num_steps)
    optimizer = kind.make(schedule, section.weight_decay, _decays, **(kind.options | _given(section)))
    if section.moment_dtype == "bfloat16":
        optimizer = in_bfloat16(optimizer)
    return optax.chain(optax.clip_by_global_norm(section.clip_norm), optimizer)


class RoundedState(NamedTuple):
    """State of an optimizer whose moments are kept in bfloat16, and the number of updates, which seeds the rounding."""

    inner: Any
    count: jax.Array


def in_bfloat16(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps an optimizer's moments in bfloat16, which halves their memory, and computes in float32.

    Rounding is stochastic, up or down with the probability that makes the expectation exact: per step a moment moves by
    less than bfloat16's resolution of 1/256 (b2 = 0.999: by 1/1000), and rounding to nearest would lose every change.
    The randomness is a function of the number of updates, so a resumed run equals the uninterrupted one.
    """

    def round_state(state: Any, count: jax.Array) -> Any:
        leaves, structure = jax.tree.flatten(state)
        seeds = (count.astype(jnp.uint32) * np.uint32(0x9E3779B9) + np.uint32(i) for i in range(len(leaves)))
        rounded = [_round_randomly(x, seed) if _is_moment(x) else x for x, seed in zip(leaves, seeds, strict=True)]
        return jax.tree.unflatten(structure, rounded)

    def init(params: optax.Params) -> RoundedState:
        count = jnp.zeros((), jnp.int32)
        return RoundedState(round_state(inner.init(params), count), count)

    def update(grads: optax.Updates, state: RoundedState, params: optax.Params | None = None):
        exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state.inner)
        updates, exact = inner.update(grads, exact, params)
        count = state.count + 1
        return updates, RoundedState(round_state(exact, count), count)

    return optax.GradientTransformation(init, update)


def _is_moment(x: jax.Array) -> bool:
    return x.dtype == jnp.float32 and x.ndim > 0


def _round_randomly(x: jax.Array, seed: jax.Array) -> jax.Array:
    """Rounds float32 to bfloat16, its upper 16 bits, up if adding random bits to the lower 16 carries."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (_hash(_places(x.shape) ^ _hash(seed)) & 0xFFFF)
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _places(shape: tuple[int, ...]) -> jax.Array:
    """Returns the flat index of each element, uint32 of that shape."""
    strides = np.cumprod([1, *shape[:0:-1]], dtype=np.uint32)[::-1]
    return sum(jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * stride for dim, stride in enumerate(strides))


def _hash(x: jax.Array) -> jax.Array:
    """Hashes uint32 to uint32 so that every output bit depends on all bits of x.

    Wellons's lowbias32 (github.com/skeeto/hash-prospector), not jax.random.bits: XLA fuses it into the rounding, while
    random bits would first be written to memory, as much as the rounding saves.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return x ^ (x >> 16)
