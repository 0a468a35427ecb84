"""From the configuration's mesh section to a device mesh; `models.mesh` names its axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from jdistill.config import MeshSection
from jdistill.models.mesh import AXES


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
            f"set {rest[0] if rest else AXES[0]} = -1 for all remaining devices, and the others to divisors"
        )
    return sizes
