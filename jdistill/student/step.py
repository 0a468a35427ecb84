"""One training step: batch -> loss -> gradient -> update, compiled once for each shape of the batch.

Dimension key: B sequences, S tokens of a row, T = S - 1 targets, K candidates, U updates of a step (minibatches).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jdistill.config import ObjectiveSection, TrainConfig
from jdistill.losses import distillation, masked, policy_gradient, supervised
from jdistill.student.batch import TrainBatch
from jdistill.student.logprobs import TargetLogprobs, target_logprobs
from jdistill.student.optimizer import make_schedule
from jdistill.student.sharding import batch_sharding, param_shardings


class TrainState(NamedTuple):
    """All that changes from step to step on the device."""

    params: nnx.State  # float32 masters
    opt_state: optax.OptState
    step: Int[Array, ""]  # steps done


def init_state(params: nnx.State, optimizer: optax.GradientTransformation, mesh: Mesh | None = None) -> TrainState:
    """The state before the first step; the optimizer's moments lie where their parameters do.

    The first step takes over the memory of `params`: whoever else holds these arrays must not read them after it.

    Args:
        params: `nnx.split(decoder, nnx.Param)[1]`, float32.
        optimizer: from `optimizer.make_optimizer`.
        mesh: on which params lie; None: one device.

    Raises:
        ValueError: parameters in another dtype than float32.
    """
    wrong = {str(x.dtype) for x in jax.tree.leaves(params)} - {"float32"}
    if wrong:
        raise ValueError(
            f"parameters to train must be float32 masters, got {sorted(wrong)}: set model.compute_dtype alone"
        )
    if mesh is None:
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    everywhere = NamedSharding(mesh, PartitionSpec())
    shardings = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, param: param.sharding,
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda _: everywhere,
    )
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    return TrainState(params, opt_state, jax.device_put(jnp.zeros((), jnp.int32), everywhere))


class TrainStep:
    """`(state, batch) -> (state, metrics)`; made by `make_train_step`. The state given is used up (donated).

    Metrics are float32 scalars on the device; `metrics.METRICS` says what each means. One more, `finite`, is false if
    the loss or a gradient was NaN or infinite: then the returned state equals the given one, and training should stop.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        config: TrainConfig,
        optimizer: optax.GradientTransformation,
        mesh: Mesh | None,
    ):
        self._graphdef = graphdef
        self._config = config
        self._optimizer = optimizer
        self._mesh = mesh if mesh is not None and mesh.size > 1 else None
        self._schedule = make_schedule(config.optimizer, config.num_steps)
        self._compiled: Any = None

    def __call__(self, state: TrainState, batch: TrainBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step; `batch` holds numpy arrays or arrays on the devices.

        Raises:
            ValueError: the batch lacks what the objective needs, or does not split into minibatches and devices.
        """
        check_batch(self._config, batch)
        if self._compiled is None:
            # A state that came back elsewhere than it was would compile everything again.
            shardings = jax.tree.map(lambda x: x.sharding, state)
            self._compiled = jax.jit(self.step, donate_argnums=0, out_shardings=(shardings, None))
        if self._mesh is not None:
            batch = jax.device_put(batch, batch_sharding(self._mesh))
        return self._compiled(state, batch)

    def step(self, state: TrainState, batch: TrainBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        """The pure function that is compiled."""
        num_updates = self._config.optimizer.minibatches
        if num_updates == 1:
            new, metrics = self._update(state, batch)
        else:
            new, metrics = self._updates(state, batch, num_updates)
        metrics["learning_rate"] = self._schedule(state.step * num_updates)
        ok = metrics["finite"]
        # Of all or nothing: with several updates this keeps a second copy of the state while the step runs.
        new = jax.tree.map(lambda after, before: jnp.where(ok, after, before), new, state)
        return new._replace(step=state.step + ok.astype(jnp.int32)), metrics

    def _updates(self, state: TrainState, batch: TrainBatch, num: int) -> tuple[TrainState, dict[str, jax.Array]]:
        """Row b is in minibatch b % num: each device splits its own rows, and no prompt is alone in an update."""

        def split(x):
            x = x.reshape(x.shape[0] // num, num, *x.shape[1:]).swapaxes(0, 1)
            if self._mesh is None:
                return x
            spec = PartitionSpec(None, *batch_sharding(self._mesh).spec)
            return jax.lax.with_sharding_constraint(x, NamedSharding(self._mesh, spec))

        new, metrics_U = jax.lax.scan(self._update, state, jax.tree.map(split, batch))
        metrics = {
            name: jnp.max(values) if name.endswith("_max") else jnp.mean(values)
            for name, values in metrics_U.items()
            if name != "finite"
        }
        return new, metrics | {"finite": jnp.all(metrics_U["finite"])}

    def _update(self, state: TrainState, batch: TrainBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        grad_fn = jax.value_and_grad(self._loss, has_aux=True)
        (loss, metrics), grads = grad_fn(state.params, batch)
        if self._mesh is not None:
            shardings = param_shardings(nnx.merge(self._graphdef, state.params), self._mesh)
            grads = jax.lax.with_sharding_constraint(grads, shardings)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {"loss": loss, "grad_norm": grad_norm, "finite": jnp.isfinite(loss) & jnp.isfinite(grad_norm)}
        return TrainState(params, opt_state, state.step), metrics

    def _loss(self, params: nnx.State, batch: TrainBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        config, objective = self._config, self._config.objective
        on_policy = objective.kind == "on_policy"
        decoder = nnx.merge(self._graphdef, params)
        inputs_BT, targets_BT = batch.tokens[:, :-1], batch.tokens[:, 1:]
        positions_BT = jnp.broadcast_to(jnp.arange(inputs_BT.shape[1]), inputs_BT.shape)
        hidden_BTD, _ = decoder(inputs_BT, positions_BT)
        scored = target_logprobs(
            hidden_BTD,
            decoder.head_DV(),
            targets_BT,
            batch.loss_mask,
            batch.candidate_ids if distillation_kind(objective, batch) == "topk_reverse_kl" else None,
            temperature=config.rollout.temperature if on_policy else 1.0,
            chunk_tokens=objective.chunk_tokens,
            mesh=self._mesh,
        )
        loss, metrics = (_on_policy_loss if on_policy else _supervised_loss)(objective, scored, batch)
        return loss, metrics | {"entropy": masked.masked_mean(scored.entropy, batch.loss_mask)}


def make_train_step(
    graphdef: nnx.GraphDef, config: TrainConfig, optimizer: optax.GradientTransformation, mesh: Mesh | None = None
) -> TrainStep:
    """The step of a run.

    Args:
        graphdef: `nnx.split(decoder, nnx.Param)[0]`; compute dtype and remat are the decoder's.
        config: of the run: objective, temperature, minibatches.
        optimizer: the one that the state was made with.
        mesh: on which the state lies; None: one device.
    """
    return TrainStep(graphdef, config, optimizer, mesh)


def distillation_kind(objective: ObjectiveSection, batch: TrainBatch) -> str | None:
    """Which distillation term a batch is trained with: "topk_reverse_kl", "sampled_reverse_kl", or None.

    `auto` takes what the batch has: candidates where the teacher could score them.
    """
    if objective.kind == "supervised" or objective.distill_loss_weight == 0:
        return None
    if objective.distillation == "auto":
        return "sampled_reverse_kl" if batch.candidate_ids is None else "topk_reverse_kl"
    return objective.distillation


def check_batch(config: TrainConfig, batch: TrainBatch) -> None:
    """Whether a batch has what the objective reads. Raises ValueError."""
    objective, num_updates = config.objective, config.optimizer.minibatches
    needed = []
    if objective.kind == "on_policy":
        needed += ["sampler_logprobs"]
        if objective.rl_loss_weight > 0:
            needed += ["advantages"]
    kind = distillation_kind(objective, batch)
    if kind is not None:
        needed += ["teacher_logprobs"]
    if kind == "topk_reverse_kl":
        needed += ["candidate_ids", "teacher_candidate_logprobs"]
    missing = [name for name in needed if getattr(batch, name) is None]
    if missing:
        raise ValueError(
            f"the objective needs {', '.join(missing)}, which the batch does not have: score the completions (and "
            "their candidates) before make_batch, or change objective.distillation or the weights"
        )
    num_rows = len(batch.tokens)
    if num_rows % num_updates:
        raise ValueError(f"optimizer.minibatches = {num_updates} does not divide the batch's {num_rows} rows")
    if isinstance(batch.loss_mask, np.ndarray) and not batch.loss_mask.any():
        raise ValueError("no target of the batch is scored: there is nothing to learn from it")


def _supervised_loss(objective: ObjectiveSection, scored: TargetLogprobs, batch: TrainBatch):
    return masked.REDUCTIONS[objective.reduction](supervised.cross_entropy(scored.logprobs), batch.loss_mask), {}


def _on_policy_loss(objective: ObjectiveSection, scored: TargetLogprobs, batch: TrainBatch):
    """rl_loss_weight * policy + distill_loss_weight * distillation.

    The sampled reverse KL is an advantage, so there the weights are on the advantages: it is added to RL's after the
    groups were normalised and before the clip, and one ratio clips both.
    """
    mask_BT = batch.loss_mask
    reduce = masked.REDUCTIONS[objective.reduction]
    kind = distillation_kind(objective, batch)
    # fill() before any product: what unscored targets hold must not touch a value or a gradient.
    logprobs_BT = masked.fill(scored.logprobs, mask_BT)
    sampler_BT = masked.fill(batch.sampler_logprobs, mask_BT)
    advantages_BT = jnp.zeros_like(logprobs_BT)
    if objective.rl_loss_weight > 0:
        advantages_BT += objective.rl_loss_weight * masked.fill(batch.advantages, mask_BT)
    if kind == "sampled_reverse_kl":
        # Under the parameters being trained, not the sampler's: with several updates a step, the ratio times this is
        # the gradient of the KL where the student is now.
        advantages_BT += objective.distill_loss_weight * distillation.sampled_reverse_kl_advantage(
            logprobs_BT, batch.teacher_logprobs, mask_BT, discount=objective.distill_discount
        )

    loss, metrics = jnp.zeros(()), {}
    if objective.rl_loss_weight > 0 or kind == "sampled_reverse_kl":
        clip = {"clip_low": objective.clip_low, "clip_high": objective.clip_high}
        policy_loss = reduce(policy_gradient.ppo_clip(logprobs_BT, sampler_BT, advantages_BT, **clip), mask_BT)
        clipped_BT = policy_gradient.clip_is_active(logprobs_BT, sampler_BT, advantages_BT, **clip)
        metrics["policy_loss"] = policy_loss
        metrics["clip_fraction"] = masked.masked_mean(clipped_BT.astype(jnp.float32), mask_BT)
        loss += policy_loss
    if kind == "topk_reverse_kl":
        kl_BT = distillation.topk_reverse_kl(
            masked.fill(scored.candidate_logprobs, mask_BT), masked.fill(batch.teacher_candidate_logprobs, mask_BT)
        )
        metrics["distill_loss"] = reduce(kl_BT, mask_BT)
        metrics["reverse_kl"] = masked.masked_mean(kl_BT, mask_BT)
        loss += objective.distill_loss_weight * metrics["distill_loss"]
    elif kind == "sampled_reverse_kl":
        gap_BT = logprobs_BT - masked.fill(batch.teacher_logprobs, mask_BT)
        metrics["reverse_kl"] = masked.masked_mean(gap_BT, mask_BT)

    ratio_BT = policy_gradient.probability_ratio(logprobs_BT, sampler_BT)
    sampler_gap_BT = jnp.abs(logprobs_BT - sampler_BT)
    metrics |= {
        "ratio_mean": masked.masked_mean(ratio_BT, mask_BT),
        "ratio_max": jnp.max(masked.fill(ratio_BT, mask_BT)),
        "sampler_gap_mean": masked.masked_mean(sampler_gap_BT, mask_BT),
        "sampler_gap_max": jnp.max(sampler_gap_BT),
    }
    return loss, jax.lax.stop_gradient(metrics)
