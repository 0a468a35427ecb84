"""The compiled part of a training step: pure functions of state and batch.

Before the first update a step evaluates the whole batch once more where its objective needs it: log-probs of the policy
that the ratio is relative to, log-probs of a frozen reference, and the value head's estimates.

A step's rows are split into parts: U updates (minibatches) of A parts each, whose gradients are summed (accumulation).
One part at a time is in a forward or backward pass.

Dimension key: B sequences, T targets, U updates of a step, A parts of an update, N = U * A parts of a step, R = B / N
rows of a part.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Int

from jdistill import models
from jdistill.config import TrainConfig
from jdistill.losses import advantages, masked, value
from jdistill.models.packing import Packing
from jdistill.student import objective
from jdistill.student.batch import TrainBatch
from jdistill.student.forward import Forward
from jdistill.student.optimizer import make_schedule
from jdistill.student.placement import Parts, Placement, row_lengths
from jdistill.student.recipe import Recipe
from jdistill.student.state import Frozen, TrainState, ValueHead, trained_by_optimizer


class StepProgram:
    """The pure functions of one run's step.

    Args:
        config: of the run.
        recipe: the resolved objective.
        optimizer: makes an update of a gradient.
        placement: splits rows over parts and devices.
        forward: computes the loss of a part.
    """

    def __init__(
        self,
        config: TrainConfig,
        recipe: Recipe,
        optimizer: optax.GradientTransformation,
        placement: Placement,
        forward: Forward,
    ):
        self._config = config
        self._recipe = recipe
        self._optimizer = optimizer
        self._placement = placement
        self._forward = forward
        self._schedule = make_schedule(config.optimizer, config.num_steps)

    def step(
        self,
        state: TrainState,
        batch: TrainBatch,
        frozen: Frozen,
        packing: Packing | None = None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Makes a whole step. The fields of `packing` are stacked: [N, ...]."""
        section = self._config.optimizer
        U, A = section.minibatches, section.accumulate
        parts = (jax.tree.map(lambda x: self._placement.split(x, U * A), batch), packing)
        parts = self._prepare((state.params, state.value_head), parts, frozen)
        if U == 1:
            new, metrics = self._update(state, parts, frozen.base)
        else:
            # Part n belongs to update n % U.
            parts = jax.tree.map(lambda x: x.reshape(A, U, *x.shape[1:]).swapaxes(0, 1), parts)
            new, metrics_U = jax.lax.scan(lambda state, parts: self._update(state, parts, frozen.base), state, parts)
            metrics = {
                name: (jnp.all if name == "finite" else jnp.max if name.endswith("_max") else jnp.mean)(values)
                for name, values in metrics_U.items()
            }
        num_places = batch.loss_mask.size if packing is None else packing.token_of.size
        metrics["padding_share"] = 1 - jnp.sum(row_lengths(batch.loss_mask)) / num_places
        rows = parts[0]
        if rows.values is not None:
            flat = [x.reshape(-1, x.shape[-1]) for x in (rows.values, rows.returns, rows.loss_mask)]
            metrics["explained_variance"] = value.explained_variance(*flat)
        return self._finished(state, new, metrics)

    def add_part(self, trained, step, grads, rows, packing, frozen, share):
        """Adds the gradient of one part, with `share` of the update's loss, to `grads`; also returns its metrics."""
        parts = jax.tree.map(lambda x: x[None], rows), packing
        parts = self._prepare(trained, parts, frozen)
        part = jax.tree.map(lambda x: x[0], parts)
        grad_fn = jax.value_and_grad(self._forward.loss, has_aux=True)
        (loss, metrics), more = grad_fn(trained, frozen.base, part, step, share)
        return jax.tree.map(jnp.add, grads, trained_by_optimizer(*more)), metrics | {"loss": loss}

    def apply_parts(self, state, grads, metrics, counts_A2):
        """Makes the update from the summed gradient of A parts, their metrics, and their counts of tokens and rows."""
        metrics_A = jax.tree.map(lambda *values: jnp.stack(values), *metrics)
        shares = objective.shares_of_parts(self._config, counts_A2[:, 0], counts_A2[:, 1])
        loss = jnp.sum(metrics_A.pop("loss"))
        new, metrics = self._updated(state, grads, objective.join_metrics(metrics_A, shares) | {"loss": loss})
        return self._finished(state, new, metrics)

    def backward_of(self, trained: Any, frozen: Frozen, rows: TrainBatch) -> Any:
        """Returns the backward pass of these rows: a pytree of the arrays that it keeps, for counting their bytes."""

        def loss(trained):
            parts = (jax.tree.map(lambda x: jnp.asarray(x)[None], rows), None)
            rows_, _ = self._prepare(trained, parts, frozen)
            part = (jax.tree.map(lambda x: x[0], rows_), None)
            return self._forward.loss(trained, frozen.base, part, jnp.zeros((), jnp.int32))[0]

        return jax.vjp(loss, trained)[1]

    def _prepare(self, trained: tuple[nnx.State, ValueHead | None], parts: Parts, frozen: Frozen) -> Parts:
        """Adds the fields that need all rows before the first update."""
        (rows, packing), (params, head) = parts, trained
        if not self._recipe.on_policy:
            return parts

        def score(params, base, head=None):
            scored = _one_by_one(lambda part: self._forward.score(params, base, *part, head), parts)
            return jax.lax.stop_gradient(scored)

        recompute = self._recipe.recomputes_proximal
        if recompute or head is not None:
            now = score(params, frozen.base, head)
            if recompute:
                rows = rows._replace(proximal_logprobs=now.logprobs)
            if head is not None:
                rows = self._with_advantages(rows, now.values)
        if frozen.reference is not None:
            # With adapters, the reference is the model under them: the same program with adapters of zeros.
            model = (frozen.reference, frozen.base)
            if frozen.base:
                model = (jax.tree.map(jnp.zeros_like, params), frozen.reference)
            rows = rows._replace(reference_logprobs=score(*model).logprobs)
        return rows, packing

    def _with_advantages(self, rows: TrainBatch, values: jax.Array) -> TrainBatch:
        """Adds the value head's estimates, and the advantages and returns that follow from them."""
        asked = self._config.objective
        shape, mask_BT = values.shape, rows.loss_mask.reshape(-1, values.shape[-1])
        values_BT = masked.fill(values.reshape(mask_BT.shape), mask_BT)
        rewards_BT = masked.fill(rows.token_rewards.reshape(mask_BT.shape), mask_BT)
        advantages_BT, returns_BT = advantages.gae(
            rewards_BT, values_BT, mask_BT, discount=asked.discount, gae_lambda=asked.gae_lambda
        )
        advantages_BT = advantages.whiten(advantages_BT, mask_BT)
        return rows._replace(
            advantages=advantages_BT.reshape(shape),
            values=values_BT.reshape(shape),
            returns=returns_BT.reshape(shape),
        )

    def _gradient(
        self, trained: Any, base: nnx.State, parts: Parts, step: Int[Array, ""]
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Computes the gradient of the loss over all parts, and its metrics, as if the parts were one."""
        grad_fn = jax.value_and_grad(self._forward.loss, has_aux=True)
        mask_ART = parts[0].loss_mask
        if len(mask_ART) == 1:
            (loss, metrics), grads = grad_fn(trained, base, jax.tree.map(lambda x: x[0], parts), step)
            return grads, metrics | {"loss": loss}
        counts = jnp.sum(mask_ART, axis=(1, 2)), jnp.sum(jnp.any(mask_ART, axis=2), axis=1)
        shares = objective.shares_of_parts(self._config, *counts)

        def add(total, part_and_share):
            part, share = part_and_share
            (loss, metrics), grads = grad_fn(trained, base, part, step, share)
            return jax.tree.map(jnp.add, total, grads), metrics | {"loss": loss}

        zero = jax.tree.map(jnp.zeros_like, trained)
        grads, metrics_A = jax.lax.scan(add, zero, (parts, shares.of_loss))
        loss = jnp.sum(metrics_A.pop("loss"))  # each is times its share already
        return grads, objective.join_metrics(metrics_A, shares) | {"loss": loss}

    def _update(self, state: TrainState, parts: Parts, base: nnx.State) -> tuple[TrainState, dict[str, jax.Array]]:
        """Makes one update from its A parts."""
        grads, metrics = self._gradient((state.params, state.value_head), base, parts, state.step)
        param_grads, head_grads = grads
        if self._placement.mesh is not None:
            decoder = self._forward.decoder(state.params, base)
            shardings = nnx.filter_state(
                models.param_shardings(decoder, self._placement.mesh), models.trained_kind(decoder.config)
            )
            param_grads = jax.lax.with_sharding_constraint(param_grads, shardings)
        return self._updated(state, trained_by_optimizer(param_grads, head_grads), metrics)

    def _updated(
        self, state: TrainState, grads: Any, metrics: dict[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Applies one gradient."""
        trained = trained_by_optimizer(state.params, state.value_head)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = self._optimizer.update(grads, state.opt_state, trained)
        new = optax.apply_updates(trained, updates)
        params, head = (new, None) if state.value_head is None else new
        metrics |= {"grad_norm": grad_norm, "finite": jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)}
        return TrainState(params, opt_state, state.step, head), metrics

    def _finished(
        self, state: TrainState, new: TrainState, metrics: dict[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Accepts `new` as the state after the step, or keeps the old one where it is not finite."""
        metrics["learning_rate"] = self._schedule(state.step * self._config.optimizer.minibatches)
        ok = metrics["finite"]
        # All or nothing: with several updates this keeps a second copy of the state while the step runs.
        new = jax.tree.map(lambda after, before: jnp.where(ok, after, before), new, state)
        return new._replace(step=state.step + ok.astype(jnp.int32)), metrics


def _one_by_one(f: Any, parts: Parts) -> Any:
    """Applies f to each part and stacks the results; a single part needs no loop."""
    if len(parts[0].tokens) == 1:
        return jax.tree.map(lambda x: x[None], f(jax.tree.map(lambda x: x[0], parts)))
    return jax.lax.map(f, parts)
