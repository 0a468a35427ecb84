"""The device mesh (data, fsdp, tensor), and where batches and parameters lie on it.

The table logical axis -> mesh axis is models.partitioning.MESH_AXES, beside the parameters that it is about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jdistill.config import MeshSection
from jdistill.models.partitioning import param_shardings

__all__ = ["AXES", "BATCH_AXES", "batch_sharding", "make_mesh", "mesh_sizes", "param_shardings", "replicated"]

AXES = ("data", "fsdp", "tensor")
# fsdp shards parameters and, like data, the rows of a batch.
BATCH_AXES = ("data", "fsdp")


def make_mesh(section: MeshSection, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a config section over all devices (of all hosts), with Auto axes.

    Auto: the compiler places what is in between. (With Explicit axes, the default of jax.make_mesh, every gather and
    einsum would have to name its output's sharding.)

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(section, len(devices), f"{devices[0].platform} device(s)")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_sizes(section: MeshSection, num_devices: int, what: str = "device(s)") -> dict[str, int]:
    """The size of each axis, -1 filled in. Raises ValueError as `make_mesh` does."""
    sizes = {axis: getattr(section, axis) for axis in AXES}
    asked = ", ".join(f"{axis} = {size}" for axis, size in sizes.items())
    wrong = [axis for axis, size in sizes.items() if size < 1 and size != -1]
    rest = [axis for axis, size in sizes.items() if size == -1]
    if wrong or len(rest) > 1:
        raise ValueError(
            f"mesh: {asked}: sizes are at least 1, and at most one of them is -1 (all devices that are left)"
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    if rest:
        sizes[rest[0]] = num_devices // known
    if math.prod(sizes.values()) != num_devices:
        raise ValueError(
            f"mesh: {asked} does not fit {num_devices} {what}: the sizes have to multiply to {num_devices}; "
            f"set {rest[0] if rest else AXES[0]} = -1 for all that are left, and the others to divisors"
        )
    return sizes


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For arrays [B, ...]: rows over data and fsdp, the rest whole. B has to be a multiple of data * fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """For scalars and what every device needs whole."""
    return NamedSharding(mesh, PartitionSpec())
