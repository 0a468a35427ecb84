"""Where a batch goes: rows onto the devices of the mesh, and packed into lines without padding.

Dimension key: B sequences, T targets of a row, U updates of a step, A parts of an update, N = U * A parts of a step,
R = B / N rows of a part, G groups of a part's rows (devices that share it).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from jdistill import buckets
from jdistill.models.mesh import batch_sharding
from jdistill.models.packing import Packing, pack_rows
from jdistill.student import hosts
from jdistill.student.batch import TrainBatch

# Rows of one part, or of several parts with one more leading dim, and how they are packed.
Parts = tuple[TrainBatch, Packing | None]


class Placement:
    """Brings host batches onto the devices as the compiled step takes them.

    Args:
        mesh: of the run; None: one device.
        packs: whether rows are packed (optimizer.packing).
    """

    def __init__(self, mesh: Mesh | None, *, packs: bool):
        self.mesh = mesh if mesh is not None and mesh.size > 1 else None
        self._packs = packs

    def place(self, batch: TrainBatch, num_updates: int, num_parts: int) -> Parts:
        """Packs the rows where the run asks for it, and moves each row to its device.

        Args:
            batch: rows of this host.
            num_updates: U of the step.
            num_parts: A of each update.
        """
        packing = None
        if self._packs:
            batch, packing = self.pack(batch, num_updates, num_parts)
        if self.mesh is not None:
            batch = _global(batch, batch_sharding(self.mesh))
            packing = _global(packing, self._parts_sharding())
        return batch, packing

    def pack(self, batch: TrainBatch, num_updates: int, num_parts: int) -> tuple[TrainBatch, Packing]:
        """Orders the rows so that all parts have about the same number of tokens, and packs each part.

        A row stays in its update; within an update the loss is a sum over rows, so their order does not matter.

        Raises:
            ValueError: the batch is on the devices already.
        """
        if not isinstance(batch.loss_mask, np.ndarray):
            raise ValueError("optimizer.packing: rows are packed on the host: give the batch as numpy arrays")
        num_groups = 1
        if self.mesh is not None:  # the groups of this host: its rows stay on it
            num_groups = self.mesh.size // self.mesh.shape.get("tensor", 1) // hosts.count()
        U, A, T = num_updates, num_parts, batch.loss_mask.shape[1]
        lengths_B = np.asarray(row_lengths(batch.loss_mask))
        order = balanced_order(lengths_B, U, A, num_groups)
        batch, lengths_B = jax.tree.map(lambda x: x[order], batch), lengths_B[order]
        lengths_NR = [lengths_B[part :: U * A] for part in range(U * A)]
        most = hosts.maximum(max(int(rows.reshape(num_groups, -1).sum(axis=1).max()) for rows in lengths_NR))
        places = buckets.packed_places(most, lengths_NR[0].size // num_groups * T)
        packings = [pack_rows(lengths_R, T, num_groups=num_groups, places=places) for lengths_R in lengths_NR]
        return batch, Packing(*(np.stack(field) for field in zip(*packings, strict=True)))

    def split(self, x: Array, num: int) -> Array:
        """Splits rows into `num` parts: row b goes to part b % num.

        So each device splits its own rows, and the completions of a prompt are spread over the updates.
        """
        x = x.reshape(x.shape[0] // num, num, *x.shape[1:]).swapaxes(0, 1)
        return x if self.mesh is None else jax.lax.with_sharding_constraint(x, self._parts_sharding())

    def _parts_sharding(self) -> NamedSharding:
        """Sharding of arrays [parts, rows, ...]."""
        assert self.mesh is not None
        return NamedSharding(self.mesh, PartitionSpec(None, *batch_sharding(self.mesh).spec))


def row_lengths(mask_BT: Bool[Array, "B T"]) -> Int[Array, "B"]:
    """Length of each row up to its last scored target; nothing reads what follows."""
    return jnp.max(jnp.where(mask_BT, jnp.arange(1, mask_BT.shape[1] + 1), 0), axis=1)


def balanced_order(lengths_B: np.ndarray, num_updates: int, num_parts: int, num_groups: int) -> np.ndarray:
    """Orders rows so that all groups of all parts have about the same number of tokens; returns int [B].

    Row b stays in update b % num_updates. Longest rows first, each goes to the group with the fewest tokens that still
    has room.
    """
    order = np.empty(len(lengths_B), np.int64)
    rows_each = len(lengths_B) // (num_updates * num_parts * num_groups)
    for update in range(num_updates):
        rows = np.arange(update, len(lengths_B), num_updates)
        tokens, taken = np.zeros(num_parts * num_groups, np.int64), np.zeros(num_parts * num_groups, np.int64)
        for row in rows[np.argsort(-lengths_B[rows], kind="stable")]:
            target = int(np.argmin(np.where(taken < rows_each, tokens, np.iinfo(np.int64).max)))
            part, group = divmod(target, num_groups)
            place = group * rows_each + taken[target]  # in the part
            order[(place * num_parts + part) * num_updates + update] = row
            tokens[target] += lengths_B[row]
            taken[target] += 1
    return order


def _global(tree: Any, sharding: NamedSharding) -> Any:
    """Makes arrays on the mesh from the rows of each host."""
    if hosts.count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)
