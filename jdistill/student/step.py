"""One training step: batch -> loss -> gradient -> update, compiled once for each shape of the batch.

Before the first update a step looks at the whole batch once more where its objective needs it: for the log-probs of the
policy that the ratio is relative to, for those of a frozen reference, and for the value head's estimates.

A step's rows are taken in parts: U updates (minibatches) of A parts each, whose gradients add up (accumulation), and
each part alone is ever in a forward or backward pass. A part's rows may be packed, so that padding costs nothing.

Dimension key: B sequences, S tokens of a row, T = S - 1 targets, D width, K candidates, U updates of a step, A parts of
an update, N = U * A parts of a step, R = B / N rows of a part, G groups of a part's rows (devices that share it).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jdistill import buckets, models
from jdistill.config import TrainConfig
from jdistill.losses import advantages, masked, value
from jdistill.models.mesh import batch_sharding
from jdistill.models.packing import Packing, pack_rows
from jdistill.student import hosts, objective
from jdistill.student.batch import TrainBatch
from jdistill.student.logprobs import TargetLogprobs, loss_of_targets, target_logprobs
from jdistill.student.optimizer import make_schedule
from jdistill.student.recipe import Recipe, make_recipe


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
    shardings = moment_shardings(jax.eval_shape(optimizer.init, trained), trained, everywhere)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(trained)
    return TrainState(params, opt_state, jax.device_put(jnp.zeros((), jnp.int32), everywhere), head)


def moment_shardings(opt_state: Any, trained: Any, everywhere: NamedSharding) -> Any:
    """Of an optimizer's state: a moment lies as its parameter does, whose path its own ends with.

    What has another shape (Adafactor's rows and columns, counts) is small: each device has it whole. Not
    optax.tree_map_params, which cannot see through the masks of an optimizer that is two in one, as Muon is.
    """
    params = {tuple(map(str, path)): param for path, param in jax.tree_util.tree_leaves_with_path(trained)}

    def sharding(path: Any, moment: jax.ShapeDtypeStruct) -> NamedSharding:
        names = tuple(map(str, path))
        ends = (params.get(names[start:]) for start in range(len(names)))
        return next((p.sharding for p in ends if p is not None and p.shape == moment.shape), everywhere)

    return jax.tree_util.tree_map_with_path(sharding, opt_state)


def _trained(params: nnx.State, head: ValueHead | None) -> Any:
    """What the optimizer sees."""
    return params if head is None else (params, head)


class Frozen(NamedTuple):
    """Parameters that no update changes; they lie on the mesh as those that are trained do."""

    base: nnx.State = nnx.State({})  # the weights that adapters stand beside; empty where all are trained
    reference: nnx.State | None = None  # of objective.reference, without adapters


class Gradient(NamedTuple):
    """Of those parts of an update that have come so far; see `TrainStep.begin`."""

    grads: Any  # of what is trained
    metrics: tuple[dict[str, jax.Array], ...]  # of each part; its loss is times its share
    counts: tuple[tuple[int, int], ...]  # scored tokens, and sequences that have any, of each part
    places: tuple[tuple[int, int], ...]  # real tokens and places of each part
    totals: tuple[int, int]  # scored tokens and sequences of all parts that will come


class TrainStep:
    """`(state, batch) -> (state, metrics)`; made by `make_train_step`. The state given is used up (donated).

    Where the parts of an update come one after another, as a teacher scores them, `begin`, `add` and `apply` make the
    same step: a part is computed while the next one is still being scored.

    Metrics are float32 scalars on the device; `metrics.METRICS` says what each means. One more, `finite`, is false if
    the loss or a gradient was NaN or infinite: then the returned state equals the given one, and training should stop.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        config: TrainConfig,
        recipe: Recipe,
        optimizer: optax.GradientTransformation,
        mesh: Mesh | None,
        frozen: Frozen,
    ):
        self._graphdef = graphdef
        self._config = config
        self._recipe = recipe
        self._optimizer = optimizer
        self._mesh = mesh if mesh is not None and mesh.size > 1 else None
        self.frozen = frozen
        self._schedule = make_schedule(config.optimizer, config.num_steps)
        self._compiled: Any = None
        self._compiled_add: Any = None
        self._compiled_apply: Any = None

    def __call__(self, state: TrainState, batch: TrainBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step; `batch` holds numpy arrays or arrays on the devices.

        Raises:
            ValueError: the batch lacks what the objective needs, or does not split into minibatches and devices.
        """
        section = self._config.optimizer
        objective.check_batch(self._recipe, batch, num_parts=section.minibatches * section.accumulate)
        batch, packing = self._placed(batch, section.minibatches, section.accumulate)
        if self._compiled is None:
            # A state that came back elsewhere than it was would compile everything again.
            shardings = jax.tree.map(lambda x: x.sharding, state)
            self._compiled = jax.jit(self.step, donate_argnums=0, out_shardings=(shardings, None))
        return self._compiled(state, batch, self.frozen, packing)

    def begin(self, state: TrainState, *, num_tokens: int, num_sequences: int) -> Gradient:
        """An update of which no part has come yet.

        Args:
            state: that it will be an update of.
            num_tokens: scored, of all parts that will come.
            num_sequences: with a scored token, likewise.
        """
        if not self._recipe.takes_parts:
            raise ValueError("steps by parts need optimizer.accumulate > 1, minibatches: 1, and no value head")
        trained = _trained(state.params, state.value_head)
        grads = jax.tree.map(lambda x: jnp.zeros_like(x, device=x.sharding), trained)
        return Gradient(grads, (), (), (), (num_tokens, num_sequences))

    def add(self, state: TrainState, gradient: Gradient, part: TrainBatch) -> Gradient:
        """The gradient with one part more; the one given is used up. Returns at once, while the device computes.

        Args:
            state: the same for all parts.
            gradient: from `begin`, or from `add` of the last part.
            part: some rows, on the host; parts may differ in their number and length, each new pair of which compiles.

        Raises:
            ValueError: the part lacks what the objective needs, or does not split into devices.
        """
        objective.check_batch(self._recipe, part, num_parts=1)
        mask_RT = part.loss_mask
        own = mask_RT.sum(), mask_RT.any(axis=1).sum(), _lengths(mask_RT).sum(), mask_RT.size
        *counts, num_real, num_padded = map(int, hosts.total(np.array(own, np.int32)))
        part, packing = self._placed(part, 1, 1)
        if self._compiled_add is None:
            shardings = jax.tree.map(lambda x: x.sharding, gradient.grads)
            self._compiled_add = jax.jit(self._add, donate_argnums=2, out_shardings=(shardings, None))
        share = objective.share_of_loss(self._config, *counts, *gradient.totals)
        grads, metrics = self._compiled_add(
            (state.params, state.value_head), state.step, gradient.grads, part, packing, self.frozen, share
        )
        num_places = num_padded if packing is None else packing.token_of.size
        return gradient._replace(
            grads=grads,
            metrics=(*gradient.metrics, metrics),
            counts=(*gradient.counts, (counts[0], counts[1])),
            places=(*gradient.places, (num_real, num_places)),
        )

    def apply(self, state: TrainState, gradient: Gradient) -> tuple[TrainState, dict[str, jax.Array]]:
        """The update, and the metrics of all parts together; the state is used up.

        Raises:
            ValueError: a part has not come, or one too many has.
        """
        num_tokens, num_sequences = (sum(count) for count in zip((0, 0), *gradient.counts, strict=True))
        if (num_tokens, num_sequences) != gradient.totals:
            raise ValueError(
                f"parts with {num_tokens} scored tokens in {num_sequences} sequences have come, but begin() was told "
                f"{gradient.totals[0]} in {gradient.totals[1]}"
            )
        if self._compiled_apply is None:
            shardings = jax.tree.map(lambda x: x.sharding, state)
            self._compiled_apply = jax.jit(self._apply, donate_argnums=0, out_shardings=(shardings, None))
        counts_A2 = np.asarray(gradient.counts, np.float32)
        state, metrics = self._compiled_apply(state, gradient.grads, gradient.metrics, counts_A2)
        num_real, num_places = (sum(number) for number in zip(*gradient.places, strict=True))
        metrics["padding_share"] = jnp.float32(1 - num_real / num_places)
        return state, metrics

    def _add(self, trained, step, grads, rows, packing, frozen, share):
        """What `add` compiles."""
        parts = jax.tree.map(lambda x: x[None], rows), packing
        parts = self._prepare(trained, parts, frozen)
        part = jax.tree.map(lambda x: x[0], parts)
        (loss, metrics), more = jax.value_and_grad(self._loss, has_aux=True)(trained, frozen.base, part, step, share)
        return jax.tree.map(jnp.add, grads, _trained(*more)), metrics | {"loss": loss}

    def _apply(self, state, grads, metrics, counts_A2):
        """What `apply` compiles."""
        metrics_A = jax.tree.map(lambda *values: jnp.stack(values), *metrics)
        shares = objective.shares_of_parts(self._config, counts_A2[:, 0], counts_A2[:, 1])
        loss = jnp.sum(metrics_A.pop("loss"))
        new, metrics = self._updated(state, grads, objective.join_metrics(metrics_A, shares) | {"loss": loss})
        return self._finished(state, new, metrics)

    def _placed(self, batch: TrainBatch, num_updates: int, num_parts: int) -> tuple[TrainBatch, Packing | None]:
        """A batch as its program takes it: packed if that is asked for, and each row where it will be needed."""
        packing = None
        if self._config.optimizer.packing:
            batch, packing = self._pack(batch, num_updates, num_parts)
        if self._mesh is not None:
            batch = _global(batch, batch_sharding(self._mesh))
            packing = _global(packing, self._parts_sharding())
        return batch, packing

    def _pack(self, batch: TrainBatch, num_updates: int, num_parts: int) -> tuple[TrainBatch, Packing]:
        """The rows in another order, so that all parts have about as many tokens, and the packing of each part.

        The rows of an update stay its rows; where a loss adds over rows, their order means nothing.
        """
        if not isinstance(batch.loss_mask, np.ndarray):
            raise ValueError("optimizer.packing: rows are packed on the host: give the batch as numpy arrays")
        num_groups = 1
        if self._mesh is not None:  # those of this host: its rows stay on it
            num_groups = self._mesh.size // self._mesh.shape.get("tensor", 1) // hosts.count()
        U, A, T = num_updates, num_parts, batch.loss_mask.shape[1]
        lengths_B = np.asarray(_lengths(batch.loss_mask))
        order = _balanced_order(lengths_B, U, A, num_groups)
        batch, lengths_B = jax.tree.map(lambda x: x[order], batch), lengths_B[order]
        lengths_NR = [lengths_B[part :: U * A] for part in range(U * A)]
        most = hosts.maximum(max(int(rows.reshape(num_groups, -1).sum(axis=1).max()) for rows in lengths_NR))
        places = buckets.packed_places(most, lengths_NR[0].size // num_groups * T)
        packings = [pack_rows(lengths_R, T, num_groups=num_groups, places=places) for lengths_R in lengths_NR]
        return batch, Packing(*(np.stack(field) for field in zip(*packings, strict=True)))

    def step(
        self,
        state: TrainState,
        batch: TrainBatch,
        frozen: Frozen,
        packing: Packing | None = None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """The pure function that is compiled. The fields of `packing` are stacked: [N, ...]."""
        section = self._config.optimizer
        U, A = section.minibatches, section.accumulate
        parts = (jax.tree.map(lambda x: self._split(x, U * A), batch), packing)
        parts = self._prepare((state.params, state.value_head), parts, frozen)
        if U == 1:
            new, metrics = self._update(state, parts, frozen.base)
        else:
            # Part n is of update n % U.
            parts = jax.tree.map(lambda x: x.reshape(A, U, *x.shape[1:]).swapaxes(0, 1), parts)
            new, metrics_U = jax.lax.scan(lambda state, parts: self._update(state, parts, frozen.base), state, parts)
            metrics = {
                name: (jnp.all if name == "finite" else jnp.max if name.endswith("_max") else jnp.mean)(values)
                for name, values in metrics_U.items()
            }
        num_places = batch.loss_mask.size if packing is None else packing.token_of.size
        metrics["padding_share"] = 1 - jnp.sum(_lengths(batch.loss_mask)) / num_places
        rows = parts[0]
        if rows.values is not None:
            flat = [x.reshape(-1, x.shape[-1]) for x in (rows.values, rows.returns, rows.loss_mask)]
            metrics["explained_variance"] = value.explained_variance(*flat)
        return self._finished(state, new, metrics)

    def _finished(
        self, state: TrainState, new: TrainState, metrics: dict[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """The state after a step whose updates gave `new`."""
        metrics["learning_rate"] = self._schedule(state.step * self._config.optimizer.minibatches)
        ok = metrics["finite"]
        # Of all or nothing: with several updates this keeps a second copy of the state while the step runs.
        new = jax.tree.map(lambda after, before: jnp.where(ok, after, before), new, state)
        return new._replace(step=state.step + ok.astype(jnp.int32)), metrics

    def _parts_sharding(self) -> NamedSharding:
        """Of arrays [parts, rows, ...]."""
        assert self._mesh is not None
        return NamedSharding(self._mesh, PartitionSpec(None, *batch_sharding(self._mesh).spec))

    def _split(self, x: Array, num: int) -> Array:
        """Row b is in part b % num: each device splits its own rows, and no prompt is alone in an update."""
        x = x.reshape(x.shape[0] // num, num, *x.shape[1:]).swapaxes(0, 1)
        return x if self._mesh is None else jax.lax.with_sharding_constraint(x, self._parts_sharding())

    def _prepare(self, trained: tuple[nnx.State, ValueHead | None], parts: _Parts, frozen: Frozen) -> _Parts:
        """Adds what the objective needs of all rows before the first update."""
        asked, (rows, packing), (params, head) = self._config.objective, parts, trained
        if not self._recipe.on_policy:
            return parts

        def score(params, base, head=None):
            scored = _one_by_one(lambda part: self._score(params, base, *part, head), parts)
            return jax.lax.stop_gradient(scored)

        recompute = self._recipe.recomputes_proximal
        if recompute or head is not None:
            now = score(params, frozen.base, head)
            if recompute:
                rows = rows._replace(proximal_logprobs=now.logprobs)
            if head is not None:
                shape, mask_BT = now.values.shape, rows.loss_mask.reshape(-1, now.values.shape[-1])
                values_BT = masked.fill(now.values.reshape(mask_BT.shape), mask_BT)
                rewards_BT = masked.fill(rows.token_rewards.reshape(mask_BT.shape), mask_BT)
                advantages_BT, returns_BT = advantages.gae(
                    rewards_BT, values_BT, mask_BT, discount=asked.discount, gae_lambda=asked.gae_lambda
                )
                advantages_BT = advantages.whiten(advantages_BT, mask_BT)
                rows = rows._replace(
                    advantages=advantages_BT.reshape(shape),
                    values=values_BT.reshape(shape),
                    returns=returns_BT.reshape(shape),
                )
        if frozen.reference is not None:
            # Where there are adapters, with adapters of zeros: the model that they stand on.
            model = (frozen.reference, frozen.base)
            if frozen.base:
                model = (jax.tree.map(jnp.zeros_like, params), frozen.reference)
            rows = rows._replace(reference_logprobs=score(*model).logprobs)
        return rows, packing

    def _update(self, state: TrainState, parts: _Parts, base: nnx.State) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update from its A parts."""
        grads, metrics = self._gradient((state.params, state.value_head), base, parts, state.step)
        param_grads, head_grads = grads
        if self._mesh is not None:
            decoder = self._decoder(state.params, base)
            shardings = nnx.filter_state(
                models.param_shardings(decoder, self._mesh), models.trained_kind(decoder.config)
            )
            param_grads = jax.lax.with_sharding_constraint(param_grads, shardings)
        return self._updated(state, _trained(param_grads, head_grads), metrics)

    def _updated(
        self, state: TrainState, grads: Any, metrics: dict[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """The state after one update with this gradient."""
        trained = _trained(state.params, state.value_head)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = self._optimizer.update(grads, state.opt_state, trained)
        new = optax.apply_updates(trained, updates)
        params, head = (new, None) if state.value_head is None else new
        metrics |= {"grad_norm": grad_norm, "finite": jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)}
        return TrainState(params, opt_state, state.step, head), metrics

    def _gradient(
        self, trained: Any, base: nnx.State, parts: _Parts, step: Int[Array, ""]
    ) -> tuple[Any, dict[str, jax.Array]]:
        """The gradient of the loss over all parts, and the metrics, as if they had been one."""
        grad_fn = jax.value_and_grad(self._loss, has_aux=True)
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
        loss = jnp.sum(metrics_A.pop("loss"))  # each times its share
        return grads, objective.join_metrics(metrics_A, shares) | {"loss": loss}

    def backward_of(self, trained: Any, frozen: Frozen, rows: TrainBatch) -> Any:
        """The backward pass of these rows: a pytree of what it holds on to, for whoever counts its bytes."""

        def loss(trained):
            parts = (jax.tree.map(lambda x: jnp.asarray(x)[None], rows), None)
            rows_, _ = self._prepare(trained, parts, frozen)
            part = (jax.tree.map(lambda x: x[0], rows_), None)
            return self._loss(trained, frozen.base, part, jnp.zeros((), jnp.int32))[0]

        return jax.vjp(loss, trained)[1]

    def _loss(
        self,
        trained: Any,
        base: nnx.State,
        part: _Parts,
        step: Int[Array, ""],
        share: Float[Array, ""] | float = 1.0,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        (params, head), (rows, packing) = trained, part
        recipe = self._recipe
        candidate_ids = rows.candidate_ids if recipe.candidates_per_target else None
        if recipe.has_critic or not recipe.adds_over_targets:
            scored = self._score(params, base, rows, packing, head, candidate_ids)
            loss, metrics = objective.loss(self._config, recipe, scored, rows, step)
            return share * loss, metrics

        def both(found: TargetLogprobs, given: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            rows, packing, step = given
            scored = objective.Scored(*found)
            scored = scored if packing is None else jax.tree.map(packing.unpack, scored)
            return objective.loss(self._config, recipe, scored, rows, step)

        asked, positions = self._asked(rows, packing, candidate_ids)
        decoder, hidden = self._hidden(params, base, asked, positions, packing)
        given = (rows, packing, step)
        loss, found = loss_of_targets(
            lambda *arguments: both(*arguments)[0],
            given,
            hidden,
            decoder.head_DV(),
            *asked[1:],
            **self._options(decoder),
        )
        return share * loss, both(found, given)[1]

    def _decoder(self, params: nnx.State, base: nnx.State) -> models.Decoder:
        return nnx.merge(self._graphdef, params, base)

    def _asked(self, rows: TrainBatch, packing: Packing | None, candidate_ids: Int[Array, "R T K"] | None) -> Any:
        """(inputs, targets, mask, candidates) and positions, [R, T] or, packed, [G, P]."""
        asked = (rows.tokens[:, :-1], rows.tokens[:, 1:], rows.loss_mask, candidate_ids)
        positions = jnp.broadcast_to(jnp.arange(rows.loss_mask.shape[1]), rows.loss_mask.shape)
        return (asked, positions) if packing is None else jax.tree.map(packing.pack, (asked, positions))

    def _hidden(
        self, params: nnx.State, base: nnx.State, asked: Any, positions: jax.Array, packing: Packing | None
    ) -> tuple[models.Decoder, Float[Array, "R T D"]]:
        decoder = self._decoder(params, base)
        return decoder, decoder(asked[0], positions, packing=packing)[0]

    def _options(self, decoder: models.Decoder) -> dict[str, Any]:
        """Of target_logprobs."""
        config = self._config
        return {
            "temperature": self._recipe.temperature,
            "chunk_tokens": config.objective.chunk_tokens,
            "mesh": self._mesh,
            "softcap": decoder.config.final_softcap,
        }

    def _score(
        self,
        params: nnx.State,
        base: nnx.State,
        rows: TrainBatch,
        packing: Packing | None,
        head: ValueHead | None = None,
        candidate_ids: Int[Array, "R T K"] | None = None,
    ) -> objective.Scored:
        """The forward pass over a part, and what is read from it."""
        asked, positions = self._asked(rows, packing, candidate_ids)
        decoder, hidden = self._hidden(params, base, asked, positions, packing)
        scored = target_logprobs(hidden, decoder.head_DV(), *asked[1:], **self._options(decoder))
        values = None
        if head is not None:
            values = jnp.einsum(
                "btd,d->bt", hidden.astype(jnp.float32), head.kernel, precision=jax.lax.Precision.HIGHEST
            )
            values += head.bias
        scored = objective.Scored(*scored, values)
        return scored if packing is None else jax.tree.map(packing.unpack, scored)


# Rows of a part, or of several with one dim more, and how they are packed.
_Parts = tuple[TrainBatch, Packing | None]


def _global(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays on the mesh, of each host's own rows."""
    if hosts.count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def _lengths(mask_BT: Bool[Array, "B T"]) -> Int[Array, "B"]:
    """Of each row; what comes after its last scored target is of no use to anything."""
    return jnp.max(jnp.where(mask_BT, jnp.arange(1, mask_BT.shape[1] + 1), 0), axis=1)


def _one_by_one(f: Any, parts: _Parts) -> Any:
    """f of each part, stacked; without a loop where there is one."""
    if len(parts[0].tokens) == 1:
        return jax.tree.map(lambda x: x[None], f(jax.tree.map(lambda x: x[0], parts)))
    return jax.lax.map(f, parts)


def _balanced_order(lengths_B: np.ndarray, num_updates: int, num_parts: int, num_groups: int) -> np.ndarray:
    """Rows in an order in which all groups of all parts have about as many tokens; int [B].

    Row b stays in update b % num_updates. The longest first, each to the group with the fewest tokens that has room.
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


def make_train_step(
    graphdef: nnx.GraphDef,
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    *,
    recipe: Recipe | None = None,
    base: nnx.State | None = None,
    reference: nnx.State | None = None,
) -> TrainStep:
    """The step of a run.

    Args:
        graphdef: `nnx.split(decoder, models.trained_kind(decoder.config), ...)[0]`; compute dtype and remat are the
            decoder's.
        config: of the run: objective, temperature, minibatches.
        optimizer: the one that the state was made with.
        mesh: on which the state lies; None: one device.
        recipe: the resolved objective; None: `make_recipe(config)`, for a teacher that can score candidates.
        base: the last of what that split gives, the weights that adapters stand beside; None: there are no adapters.
        reference: parameters of the frozen model of objective.reference, without adapters; None: there is none.

    Raises:
        ConfigError: the objective's gradient is not what its name says.
        ValueError: objective.reference without parameters, or the reverse.
    """
    recipe = make_recipe(config) if recipe is None else recipe
    if (recipe.reference is None) != (reference is None):
        raise ValueError("objective.reference and the reference's parameters belong together: give both or none")
    frozen = Frozen(nnx.State({}) if base is None else base, reference)
    return TrainStep(graphdef, config, recipe, optimizer, mesh, frozen)
