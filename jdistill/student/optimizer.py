"""Optimizers by name, each one of optax's, with a warm-up, a decay and gradient clipping, from the configuration."""

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


class Kind(NamedTuple):
    """One optimizer: how it is made of its rate, its options and what decays; and its options with their defaults."""

    make: Callable[..., optax.GradientTransformation]
    options: dict[str, float]


def _adamw(rate, decay, mask, *, b1, b2, eps):
    return optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=decay, mask=mask)


def _lion(rate, decay, mask, *, b1, b2):
    return optax.lion(rate, b1=b1, b2=b2, weight_decay=decay, mask=mask)


def _adafactor(rate, decay, mask):
    # The rate is the rate: by default it would be relative to each parameter's size.
    return optax.adafactor(
        rate, multiply_by_parameter_scale=False, weight_decay_rate=decay or None, weight_decay_mask=mask
    )


def _muon(rate, decay, mask, *, b1, b2, eps):
    # consistent_rms: updates of Adam's size, so that both halves share one rate (Liu et al., arXiv 2502.16982).
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


# Name -> what optimizer.name takes. b1 is the decay of the first moment (sgd: the momentum), b2 of the second.
OPTIMIZERS = {
    "adamw": Kind(_adamw, {"b1": 0.9, "b2": 0.95, "eps": 1e-8}),
    "lion": Kind(_lion, {"b1": 0.9, "b2": 0.99}),
    "adafactor": Kind(_adafactor, {}),
    "muon": Kind(_muon, {"b1": 0.9, "b2": 0.95, "eps": 1e-8}),  # for the layers' matrices; AdamW for the rest
    "sgd": Kind(_sgd, {"b1": 0.0}),
}

# Of the layers' matrices, stacked over layers (and experts): the dims that they sum over, and those that they make.
_IN_OUT = {name: ((1,), (2, 3)) for name in ("query", "key", "value")} | {"output": ((1, 2), (3,))}


def _matrices(params: optax.Params) -> Any:
    def dims(path, param):
        name = _name(path)
        if name in ("gate", "up", "down"):
            return MuonDimensionNumbers((param.ndim - 2,), (param.ndim - 1,))
        return MuonDimensionNumbers(*_IN_OUT[name]) if name in _IN_OUT else None

    return jax.tree_util.tree_map_with_path(dims, params)


def _name(path: Any) -> str:
    """A parameter's own name, e.g. "query_norm" of layers.query_norm."""
    # The keys alone: the last entry of a path is the attribute .value, and there is a parameter of that name too.
    return next((str(entry.key) for entry in reversed(path) if isinstance(entry, jax.tree_util.DictKey)), "")


def _decays(params: optax.Params) -> optax.Params:
    # By name: with layers stacked a scale of a norm has two dims, like a matrix.
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(word in jax.tree_util.keystr(path) for word in ("norm", "bias")), params
    )


def make_optimizer(section: OptimizerSection, num_steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then the optimizer of that name; norms' scales and biases do not decay.

    Args:
        section: name, rates and sizes.
        num_steps: of the whole run, for the schedule.

    Raises:
        ConfigError: an unknown name, or an option that the optimizer does not have.
    """
    kind = OPTIMIZERS.get(section.name)
    if kind is None:
        raise ConfigError(f"optimizer.name: {section.name!r} is none of {', '.join(OPTIMIZERS)}")
    given = {name: number for name in ("b1", "b2", "eps") if (number := getattr(section, name)) is not None}
    if wrong := sorted(set(given) - set(kind.options)):
        has = ", ".join(kind.options) or "none of b1, b2, eps"
        raise ConfigError(f"optimizer.{wrong[0]}: {section.name} has no such option (it has {has}): leave it out")
    schedule = make_schedule(section, num_steps)
    optimizer = kind.make(schedule, section.weight_decay, _decays, **(kind.options | given))
    if section.moment_dtype == "bfloat16":
        optimizer = in_bfloat16(optimizer)
    return optax.chain(optax.clip_by_global_norm(section.clip_norm), optimizer)


class RoundedState(NamedTuple):
    """The state of an optimizer whose arrays are kept in bfloat16, and how often it was rounded."""

    inner: Any
    count: jax.Array


def in_bfloat16(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer that computes in float32 and keeps its moments in bfloat16, in half of the memory.

    Rounded at random, up or down with the probability that makes the expectation exact: a moment moves by less than
    bfloat16's 1/256 a step (b2 = 0.999: by 1/1000), which rounding to nearest would lose every time. The randomness is
    a function of the number of updates, so that a resumed run goes on as it would have.
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
    """float32 -> bfloat16, which is its upper half: what is added to the lower half decides whether it carries."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (_hash(_places(x.shape) ^ _hash(seed)) & 0xFFFF)
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _places(shape: tuple[int, ...]) -> jax.Array:
    """uint32 of that shape: 0, 1, 2, ..."""
    strides = np.cumprod([1, *shape[:0:-1]], dtype=np.uint32)[::-1]
    return sum(jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * stride for dim, stride in enumerate(strides))


def _hash(x: jax.Array) -> jax.Array:
    """uint32 -> uint32, every bit of it a function of all bits of x.

    Wellons's lowbias32 (github.com/skeeto/hash-prospector), and not jax.random.bits: it is computed where it is used,
    while random bits would first be written, as much memory as the rounding saves.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return x ^ (x >> 16)
