"""What training changes from step to step on the device, and what it never changes.

Dimension key: D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int


class ValueHead(NamedTuple):
    """The critic of `advantage: gae`: a linear map of the student's hidden states; float32."""

    kernel: Float[Array, "D"]
    bias: Float[Array, ""]


class TrainState(NamedTuple):
    """All that changes from step to step on the device."""

    params: nnx.State  # float32 masters
    opt_state: optax.OptState
    step: Int[Array, ""]  # steps done
    value_head: ValueHead | None = None


def init_state(
    params: nnx.State,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    *,
    value_width: int | None = None,
) -> TrainState:
    """Makes the state before the first step; each optimizer moment is sharded as its parameter is.

    The first step reuses the memory of `params`: these arrays must not be read after it.

    Args:
        params: `nnx.split(decoder, nnx.Param)[1]`, float32.
        optimizer: from `optimizer.make_optimizer`.
        mesh: that params are sharded over; None: one device.
        value_width: D, to train a value head too, which starts at 0; None: no value head.

    Raises:
        ValueError: a parameter is not float32.
    """
    wrong = {str(x.dtype) for x in jax.tree.leaves(params)} - {"float32"}
    if wrong:
        raise ValueError(
            f"parameters to train must be float32 masters, got {sorted(wrong)}: set model.compute_dtype alone"
        )
    head = None
    if value_width is not None:
        head = ValueHead(jnp.zeros(value_width), jnp.zeros(()))
    if mesh is None:
        state = TrainState(params, optimizer.init(trained_by_optimizer(params, head)), jnp.zeros((), jnp.int32), head)
        # Committed to their device, as the step returns them; otherwise the second step would compile again.
        return jax.device_put(state, jax.tree.map(lambda x: x.sharding, state))
    everywhere = NamedSharding(mesh, PartitionSpec())
    head = jax.device_put(head, everywhere)
    trained = trained_by_optimizer(params, head)
    shardings = moment_shardings(jax.eval_shape(optimizer.init, trained), trained, everywhere)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(trained)
    return TrainState(params, opt_state, jax.device_put(jnp.zeros((), jnp.int32), everywhere), head)


def moment_shardings(opt_state: Any, trained: Any, everywhere: NamedSharding) -> Any:
    """Shards an optimizer's state: a moment as the parameter whose path its own path ends with.

    State of another shape (Adafactor's rows and columns, counts) is small and replicated. optax.tree_map_params would
    not do: it cannot see through the masks of an optimizer that combines two, such as Muon.
    """
    params = {tuple(map(str, path)): param for path, param in jax.tree_util.tree_leaves_with_path(trained)}

    def sharding(path: Any, moment: jax.ShapeDtypeStruct) -> NamedSharding:
        names = tuple(map(str, path))
        ends = (params.get(names[start:]) for start in range(len(names)))
        return next((p.sharding for p in ends if p is not None and p.shape == moment.shape), everywhere)

    return jax.tree_util.tree_map_with_path(sharding, opt_state)


def trained_by_optimizer(params: nnx.State, head: ValueHead | None) -> Any:
    """The pytree that the optimizer updates."""
    return params if head is None else (params, head)


class Frozen(NamedTuple):
    """Parameters that no update changes; sharded over the mesh as the trained ones are."""

    base: nnx.State = nnx.State({})  # the weights under the adapters; empty where all weights are trained
    reference: nnx.State | None = None  # of objective.reference, without adapters
