"""One training step: batch -> loss -> gradient -> update, compiled once for each shape of the batch.

Before the first update a step looks at the whole batch once more where its objective needs it: for the log-probs of the
policy that the ratio is relative to, for those of a frozen reference, and for the value head's estimates.

Dimension key: B sequences, S tokens of a row, T = S - 1 targets, D width, K candidates, U updates of a step
(minibatches).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jdistill.config import TrainConfig
from jdistill.losses import advantages, masked
from jdistill.student import objective
from jdistill.student.batch import TrainBatch
from jdistill.student.logprobs import target_logprobs
from jdistill.student.optimizer import make_schedule
from jdistill.student.sharding import batch_sharding, param_shardings


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
    """The state before the first step; the optimizer's moments lie where their parameters do.

    The first step takes over the memory of `params`: whoever else holds these arrays must not read them after it.

    Args:
        params: `nnx.split(decoder, nnx.Param)[1]`, float32.
        optimizer: from `optimizer.make_optimizer`.
        mesh: on which params lie; None: one device.
        value_width: D, where a value head is to be trained too; it begins at 0. None: there is none.

    Raises:
        ValueError: parameters in another dtype than float32.
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
        state = TrainState(params, optimizer.init(_trained(params, head)), jnp.zeros((), jnp.int32), head)
        # Committed to their device, as the step gives them back: else the second step would compile again.
        return jax.device_put(state, jax.tree.map(lambda x: x.sharding, state))
    everywhere = NamedSharding(mesh, PartitionSpec())
    head = jax.device_put(head, everywhere)
    trained = _trained(params, head)
    shardings = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, param: param.sharding,
        jax.eval_shape(optimizer.init, trained),
        trained,
        transform_non_params=lambda _: everywhere,
    )
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(trained)
    return TrainState(params, opt_state, jax.device_put(jnp.zeros((), jnp.int32), everywhere), head)


def _trained(params: nnx.State, head: ValueHead | None) -> Any:
    """What the optimizer sees."""
    return params if head is None else (params, head)


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
        reference: nnx.State | None,
    ):
        self._graphdef = graphdef
        self._config = config
        self._optimizer = optimizer
        self._mesh = mesh if mesh is not None and mesh.size > 1 else None
        self._reference = reference
        self._schedule = make_schedule(config.optimizer, config.num_steps)
        self._compiled: Any = None

    def __call__(self, state: TrainState, batch: TrainBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step; `batch` holds numpy arrays or arrays on the devices.

        Raises:
            ValueError: the batch lacks what the objective needs, or does not split into minibatches and devices.
        """
        objective.check_batch(self._config, batch)
        if self._compiled is None:
            # A state that came back elsewhere than it was would compile everything again.
            shardings = jax.tree.map(lambda x: x.sharding, state)
            self._compiled = jax.jit(self.step, donate_argnums=0, out_shardings=(shardings, None))
        if self._mesh is not None:
            batch = jax.device_put(batch, batch_sharding(self._mesh))
        return self._compiled(state, batch, self._reference)

    def step(
        self, state: TrainState, batch: TrainBatch, reference: nnx.State | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """The pure function that is compiled."""
        num_updates = self._config.optimizer.minibatches
        batch = self._prepare(state, batch, reference)
        if num_updates == 1:
            new, metrics = self._update(state, batch)
        else:
            new, metrics = self._updates(state, batch, num_updates)
        metrics["learning_rate"] = self._schedule(state.step * num_updates)
        ok = metrics["finite"]
        # Of all or nothing: with several updates this keeps a second copy of the state while the step runs.
        new = jax.tree.map(lambda after, before: jnp.where(ok, after, before), new, state)
        return new._replace(step=state.step + ok.astype(jnp.int32)), metrics

    def _prepare(self, state: TrainState, batch: TrainBatch, reference: nnx.State | None) -> TrainBatch:
        """Adds what the objective needs of the whole batch before its first update."""
        asked, mask_BT = self._config.objective, batch.loss_mask
        if asked.kind != "on_policy":
            return batch
        recompute = asked.proximal == "recomputed" and self._config.optimizer.minibatches > 1
        if recompute or state.value_head is not None:
            now = jax.lax.stop_gradient(self._score(state.params, batch, state.value_head))
            if recompute:
                batch = batch._replace(proximal_logprobs=now.logprobs)
            if state.value_head is not None:
                values_BT = masked.fill(now.values, mask_BT)
                rewards_BT = masked.fill(batch.token_rewards, mask_BT)
                advantages_BT, returns_BT = advantages.gae(
                    rewards_BT, values_BT, mask_BT, discount=asked.discount, gae_lambda=asked.gae_lambda
                )
                advantages_BT = advantages.whiten(advantages_BT, mask_BT)
                batch = batch._replace(advantages=advantages_BT, values=values_BT, returns=returns_BT)
        if reference is not None:
            batch = batch._replace(reference_logprobs=jax.lax.stop_gradient(self._score(reference, batch)).logprobs)
        return batch

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
        (loss, metrics), grads = grad_fn((state.params, state.value_head), batch, state.step)
        param_grads, head_grads = grads
        if self._mesh is not None:
            shardings = param_shardings(nnx.merge(self._graphdef, state.params), self._mesh)
            param_grads = jax.lax.with_sharding_constraint(param_grads, shardings)
        grads, trained = _trained(param_grads, head_grads), _trained(state.params, state.value_head)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = self._optimizer.update(grads, state.opt_state, trained)
        new = optax.apply_updates(trained, updates)
        params, head = (new, None) if state.value_head is None else new
        metrics |= {"loss": loss, "grad_norm": grad_norm, "finite": jnp.isfinite(loss) & jnp.isfinite(grad_norm)}
        return TrainState(params, opt_state, state.step, head), metrics

    def _loss(
        self, trained: tuple[nnx.State, ValueHead | None], batch: TrainBatch, step: Int[Array, ""]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        params, head = trained
        term = objective.term_of(self._config.objective, batch)
        candidate_ids = None if term is None or term.needs_candidates is None else batch.candidate_ids
        scored = self._score(params, batch, head, candidate_ids)
        return objective.loss(self._config, scored, batch, step)

    def _score(
        self,
        params: nnx.State,
        batch: TrainBatch,
        head: ValueHead | None = None,
        candidate_ids: Int[Array, "B T K"] | None = None,
    ) -> objective.Scored:
        """The forward pass over a batch, and what is read from it."""
        config = self._config
        decoder = nnx.merge(self._graphdef, params)
        inputs_BT, targets_BT = batch.tokens[:, :-1], batch.tokens[:, 1:]
        positions_BT = jnp.broadcast_to(jnp.arange(inputs_BT.shape[1]), inputs_BT.shape)
        hidden_BTD, _ = decoder(inputs_BT, positions_BT)
        scored = target_logprobs(
            hidden_BTD,
            decoder.head_DV(),
            targets_BT,
            batch.loss_mask,
            candidate_ids,
            temperature=config.rollout.temperature if config.objective.kind == "on_policy" else 1.0,
            chunk_tokens=config.objective.chunk_tokens,
            mesh=self._mesh,
            softcap=decoder.config.final_softcap,
        )
        values_BT = None
        if head is not None:
            values_BT = jnp.einsum(
                "BTD,D->BT", hidden_BTD.astype(jnp.float32), head.kernel, precision=jax.lax.Precision.HIGHEST
            )
            values_BT += head.bias
        return objective.Scored(*scored, values_BT)


def make_train_step(
    graphdef: nnx.GraphDef,
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    *,
    reference: nnx.State | None = None,
) -> TrainStep:
    """The step of a run.

    Args:
        graphdef: `nnx.split(decoder, nnx.Param)[0]`; compute dtype and remat are the decoder's.
        config: of the run: objective, temperature, minibatches.
        optimizer: the one that the state was made with.
        mesh: on which the state lies; None: one device.
        reference: parameters of the frozen model of objective.reference; None: there is none.

    Raises:
        ConfigError: the objective's gradient is not what its name says.
        ValueError: objective.reference without parameters, or the reverse.
    """
    objective.check(config)
    if (objective.reference_of(config.objective) is None) != (reference is None):
        raise ValueError("objective.reference and the reference's parameters belong together: give both or none")
    return TrainStep(graphdef, config, optimizer, mesh, reference)
