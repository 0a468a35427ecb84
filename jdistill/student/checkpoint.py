"""Saves and restores a run's checkpoints with Orbax: written atomically in the background, restored onto any mesh."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from jdistill.student.state import TrainState

DIRECTORY = "checkpoints"


class Checkpoints:
    """The checkpoints of one run, in run_dir/checkpoints/<step>/.

    A checkpoint has these items: `params`, `optimizer` (optimizer state, step, value head), `pending` (host arrays, if
    any), `about` (JSON: `extra` as given to `save`, and the shapes of the other items, so that another model's
    checkpoint is recognised before it is read).
    Orbax writes under a temporary name and renames, so a checkpoint cut short by a crash is never listed.

    Args:
        run_dir: the run's directory; created if missing.
        keep: number of newest checkpoints to keep; None: all.
        base: for a run with adapters, the fingerprint of the base weights, which are not saved; None: no adapters.
    """

    def __init__(self, run_dir: str | pathlib.Path, *, keep: int | None = None, base: str | None = None):
        self._base = base
        self._directory = pathlib.Path(run_dir).resolve() / DIRECTORY
        self._manager = ocp.CheckpointManager(
            self._directory,
            item_names=("params", "optimizer", "pending", "about"),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    def latest_step(self) -> int | None:
        """Returns the newest step that is saved or being saved; None if there is none."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: TrainState, extra: Mapping[str, Any], pending: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Copies the state to the host and writes it in the background; `close` waits until it is written.

        Args:
            step: number of completed steps.
            state: may be sharded; may be donated to a step as soon as this returns.
            extra: JSON that a resume needs, e.g. the position in the data.
            pending: arrays of completions that have been sampled but not trained on.
        """
        params, optimizer = nnx.to_pure_dict(state.params), _optimizer_item(state)
        shapes = {"params": _shapes(params), "optimizer": _shapes(optimizer)}
        arrays = dict(pending or {})
        about = {"extra": dict(extra), "shapes": shapes, "base": self._base}
        about["pending"] = {name: [list(x.shape), str(x.dtype)] for name, x in arrays.items()}
        items = {"params": ocp.args.StandardSave(params), "optimizer": ocp.args.StandardSave(optimizer)}
        if arrays:
            items["pending"] = ocp.args.StandardSave(arrays)
        self._manager.save(step, args=ocp.args.Composite(**items, about=ocp.args.JsonSave(about)))

    def restore(self, state: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """Returns the saved state, with the shapes and shardings of `state`, and the `extra` saved with it.

        Args:
            state: state of the same model and optimizer; its values are not read.
            step: step of the checkpoint; None: the newest.

        Raises:
            FileNotFoundError: there is no checkpoint, or none of this step.
            ValueError: the checkpoint is of another model or optimizer.
        """
        step = self._find(step)
        params, optimizer = nnx.to_pure_dict(state.params), _optimizer_item(state)
        about = self._about(step, params=params, optimizer=optimizer)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(_abstract(params)),
                optimizer=ocp.args.StandardRestore(_abstract(optimizer)),
            ),
        )
        new_params = jax.tree.unflatten(jax.tree.structure(state.params), jax.tree.leaves(restored.params))
        leaves = [restored.optimizer["leaves"][name] for name in sorted(optimizer["leaves"])]
        opt_state, value_head = jax.tree.unflatten(jax.tree.structure((state.opt_state, state.value_head)), leaves)
        return TrainState(new_params, opt_state, restored.optimizer["step"], value_head), about["extra"]

    def restore_pending(self, step: int | None = None) -> dict[str, np.ndarray] | None:
        """Returns the `pending` given to `save`, or None if it was empty. Raises the same errors as `restore`."""
        step = self._find(step)
        shapes = self._about(step).get("pending")
        if not shapes:
            return None
        empty = {name: np.empty(shape, dtype) for name, (shape, dtype) in shapes.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(pending=ocp.args.StandardRestore(empty)))
        return {name: np.asarray(x) for name, x in restored.pending.items()}

    def restore_params(self, params: nnx.State, step: int | None = None) -> nnx.State:
        """Returns only the saved parameters, with the shapes and shardings of `params`. Raises as `restore` does."""
        step = self._find(step)
        saved = nnx.to_pure_dict(params)
        self._about(step, params=saved)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(params=ocp.args.StandardRestore(_abstract(saved)))
        )
        return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(restored.params))

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.close()

    def _find(self, step: int | None) -> int:
        self._manager.wait_until_finished()
        steps = sorted(self._manager.all_steps())
        if not steps or (step is not None and step not in steps):
            wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise FileNotFoundError(
                f"{wanted} in {self._directory} (there: {steps or 'none'}): was the run saved yet? See checkpoint.every"
            )
        return steps[-1] if step is None else step

    def _about(self, step: int, **items: Any) -> dict[str, Any]:
        """Reads a checkpoint's JSON, and checks its shapes and base weights against those to be restored."""
        about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
        for name, tree in items.items():
            saved, wanted = about["shapes"][name], _shapes(tree)
            different = [
                f"{key}: saved {saved.get(key, 'nothing')}, wanted {wanted.get(key, 'nothing')}"
                for key in sorted(set(saved) | set(wanted))
                if saved.get(key) != wanted.get(key)
            ]
            if different:
                raise ValueError(
                    f"{self._directory / str(step)} is of another model or optimizer ({len(different)} of its arrays "
                    f"differ, e.g. {'; '.join(different[:3])}): give the model.path that the run was started with"
                )
        if self._base != about.get("base"):
            raise ValueError(
                f"{self._directory / str(step)} holds adapters for other weights than these: model.path was "
                "changed since, or is another model; give the unchanged model.path that the run was started with"
            )
        return about


def restore_params(
    run_dir: str | pathlib.Path,
    decoder: nnx.Module,
    step: int | None = None,
    *,
    kind: type[nnx.Param] = nnx.Param,
    base: str | None = None,
) -> int:
    """Loads a run's saved parameters into a decoder; returns their step.

    Args:
        run_dir: directory of a `jdistill train` run.
        decoder: a decoder of the run's architecture; the values of its parameters are replaced.
        step: step of the checkpoint; None: the newest.
        kind: kind of the parameters that the run trained; see models.trained_kind.
        base: for a run with adapters, the fingerprint of the decoder's other weights.

    Raises:
        FileNotFoundError: there is no such run or checkpoint.
        ValueError: the checkpoint is of another model.
    """
    if not (pathlib.Path(run_dir) / DIRECTORY).is_dir():
        raise FileNotFoundError(f"{run_dir} has no {DIRECTORY}/: it is not the directory of a run with a checkpoint")
    checkpoints = Checkpoints(run_dir, base=base)
    try:
        step = checkpoints._find(step)
        nnx.update(decoder, checkpoints.restore_params(nnx.state(decoder, kind), step))
    finally:
        checkpoints.close()
    return step


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    # A list of leaves: a checkpoint must not depend on the names of the tuples that optax nests.
    leaves = jax.tree.leaves((state.opt_state, state.value_head))
    return {"leaves": {f"{i:04d}": leaf for i, leaf in enumerate(leaves)}, "step": state.step}


def _abstract(tree: Any) -> Any:
    def one(x: jax.Array) -> jax.ShapeDtypeStruct:
        sharding = x.sharding if isinstance(x, jax.Array) else None
        return jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=sharding)

    return jax.tree.map(one, tree)


def _shapes(tree: Any) -> dict[str, list[int]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): list(jnp.shape(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
