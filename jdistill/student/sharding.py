"""From the configuration's mesh section to a device mesh; `models.mesh` names its axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

from jdistill.config import ConfigError, MeshSection, TrainConfig
from jdistill.models.mesh import AXES, BATCH_AXES


def make_mesh(section: MeshSection, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays a mesh over all devices (of all hosts), with Auto axes.

    With Auto axes the compiler shards intermediate arrays. (With Explicit axes, the default of jax.make_mesh, every
    gather and einsum would have to name its output's sharding.)

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(section, len(devices), f"{devices[0].platform} device(s)")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_sizes(section: MeshSection, num_devices: int, what: str = "device(s)") -> dict[str, int]:
    """Returns the size of each axis, with -1 filled in. Raises ValueError as `make_mesh` does."""
    sizes = {axis: getattr(section, axis) for axis in AXES}
    asked = ", ".join(f"{axis} = {size}" for axis, size in sizes.items())
    wrong = [axis for axis, size in sizes.items() if size < 1 and size != -1]
    rest = [axis for axis, size in sizes.items() if size == -1]
    if wrong or len(rest) > 1:
        raise ValueError(f"mesh: {asked}: sizes are at least 1, and at most one of them is -1 (all remaining devices)")
    known = math.prod(size for size in sizes.values() if size != -1)
    if rest:
        sizes[rest[0]] = num_devices // known
    if math.prod(sizes.values()) != num_devices:
        raise ValueError(
            f"mesh: {asked} does not fit {num_devices} {what}: the sizes have to multiply to {num_devices}; "
            f"set {rest[0] if rest else AXES[0]} = -1 for all remaining devices, and the others to divisors "
            f"({_list(_divisors(num_devices))})"
        )
    return sizes


def check_rows(config: TrainConfig, axes: Mapping[str, int]) -> None:
    """Checks that each part of an update splits over the axes of the batch.

    Raises:
        ConfigError: it does not; names the numbers of devices and of rows that would.
    """
    rollout, optimizer = config.rollout, config.optimizer
    num_parts, num_shards = optimizer.minibatches * optimizer.accumulate, math.prod(axes[axis] for axis in BATCH_AXES)
    on_policy = config.objective.kind == "on_policy"
    key = "rollout.num_prompts" if on_policy else "optimizer.batch_size"
    number, each = (rollout.num_prompts, rollout.num_completions) if on_policy else (optimizer.batch_size, 1)
    num_rows = number * each // num_parts
    if num_rows % num_shards == 0:
        return
    step = num_shards * num_parts // math.gcd(num_shards * num_parts, each)  # what `number` must be a multiple of
    fitting = [near for near in (number // step * step, number // step * step + step) if near]
    divisors = [divisor for divisor in _divisors(num_rows) if divisor < num_shards]
    sizes = " * ".join(f"mesh.{axis}" for axis in BATCH_AXES)
    completions = f" * rollout.num_completions ({each})" if on_policy else ""
    raise ConfigError(
        f"a part of an update has {num_rows} rows, which do not split over {sizes} = {num_shards} devices: {key} "
        f"({number}){completions} / (optimizer.minibatches * accumulate = {num_parts}). Set {key} to "
        f"{_list(fitting)}, or use {_list(divisors)} device(s) for the batch (hide some with CUDA_VISIBLE_DEVICES, or "
        "give them to mesh.tensor)"
    )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _list(numbers: Sequence[int]) -> str:
    return " or ".join([", ".join(map(str, numbers[:-1])), str(numbers[-1])]) if len(numbers) > 1 else str(numbers[0])
