"""The axes of the device mesh, and how the rows of a batch lie on them.

How parameters lie on these axes is the table `partitioning.MESH_AXES`.
"""

from __future__ import annotations

from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
# fsdp shards parameters and, like data, the rows of a batch.
BATCH_AXES = ("data", "fsdp")


def num_batch_shards(mesh: Mesh) -> int:
    """Number of devices over which the rows of a batch are split; the tensor axis repeats them."""
    return mesh.size // mesh.shape.get("tensor", 1)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays [B, ...]: rows over data and fsdp, other dims whole. B must be a multiple of data * fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays that every device holds whole, such as scalars."""
    return NamedSharding(mesh, PartitionSpec())
