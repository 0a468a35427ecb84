"""The training step as the loop calls it: `(state, batch) -> (state, metrics)`, whole or part by part.

Compiled once per shape of the batch; program.py is what is compiled.

Dimension key: R rows of a part, T targets, A parts of an update.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from jdistill.config import TrainConfig
from jdistill.student import hosts, objective
from jdistill.student.batch import TrainBatch
from jdistill.student.forward import Forward
from jdistill.student.placement import Placement, row_lengths
from jdistill.student.program import StepProgram
from jdistill.student.recipe import Recipe, make_recipe
from jdistill.student.state import Frozen, TrainState, trained_by_optimizer


class Gradient(NamedTuple):
    """The summed gradient of the parts added so far; see `TrainStep.begin`."""

    grads: Any  # of the trained parameters
    metrics: tuple[dict[str, jax.Array], ...]  # of each part; the loss is multiplied by the part's share
    counts: tuple[tuple[int, int], ...]  # of each part: scored tokens, and sequences with any
    places: tuple[tuple[int, int], ...]  # of each part: real tokens and places
    totals: tuple[int, int]  # scored tokens and sequences of all parts together


class TrainStep:
    """`(state, batch) -> (state, metrics)`; made by `make_train_step`. The given state is donated.

    Where the parts of an update become ready one after another, as a teacher scores them, `begin`, `add` and `apply`
    make the same step: a part is computed while the next one is still being scored.

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
        self._config = config
        self._recipe = recipe
        self.placement = Placement(mesh, packs=config.optimizer.packing)
        self._forward = Forward(graphdef, config, recipe, self.placement.mesh)
        self.program = StepProgram(config, recipe, optimizer, self.placement, self._forward)
        self.frozen = frozen
        self._vocab_size: int | None = None  # known with the first state
        self._compiled: Any = None
        self._compiled_add: Any = None
        self._compiled_apply: Any = None

    def __call__(self, state: TrainState, batch: TrainBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        """Makes one step; `batch` holds numpy arrays or arrays on the devices.

        Raises:
            ValueError: the batch lacks what the objective needs, or does not split into minibatches and devices.
        """
        section = self._config.optimizer
        self._check(state, batch, num_parts=section.minibatches * section.accumulate)
        batch, packing = self.placement.place(batch, section.minibatches, section.accumulate)
        if self._compiled is None:
            # A state returned with another sharding would compile everything again.
            shardings = jax.tree.map(lambda x: x.sharding, state)
            self._compiled = jax.jit(self.program.step, donate_argnums=0, out_shardings=(shardings, None))
        return self._compiled(state, batch, self.frozen, packing)

    def _check(self, state: TrainState, batch: TrainBatch, *, num_parts: int) -> None:
        if self._vocab_size is None:
            self._vocab_size = self._forward.decoder(state.params, self.frozen.base).config.vocab_size
        objective.check_batch(self._recipe, batch, num_parts=num_parts, vocab_size=self._vocab_size)

    def begin(self, state: TrainState, *, num_tokens: int, num_sequences: int) -> Gradient:
        """Begins an update that has no parts yet.

        Args:
            state: to be updated.
            num_tokens: scored tokens of all parts together.
            num_sequences: sequences with a scored token, of all parts together.
        """
        if not self._recipe.takes_parts:
            raise ValueError("steps by parts need optimizer.accumulate > 1, minibatches: 1, and no value head")
        trained = trained_by_optimizer(state.params, state.value_head)
        grads = jax.tree.map(lambda x: jnp.zeros_like(x, device=x.sharding), trained)
        return Gradient(grads, (), (), (), (num_tokens, num_sequences))

    def add(self, state: TrainState, gradient: Gradient, part: TrainBatch) -> Gradient:
        """Adds one part to the gradient, which is donated. Returns at once, while the device computes.

        Args:
            state: the same for all parts.
            gradient: from `begin`, or from the previous `add`.
            part: rows on the host; each new pair of row count and length compiles once.

        Raises:
            ValueError: the part lacks what the objective needs, or does not split into devices.
        """
        self._check(state, part, num_parts=1)
        mask_RT = part.loss_mask
        own = mask_RT.sum(), mask_RT.any(axis=1).sum(), row_lengths(mask_RT).sum(), mask_RT.size
        *counts, num_real, num_padded = map(int, hosts.total(np.array(own, np.int32)))
        part, packing = self.placement.place(part, 1, 1)
        if self._compiled_add is None:
            shardings = jax.tree.map(lambda x: x.sharding, gradient.grads)
            self._compiled_add = jax.jit(self.program.add_part, donate_argnums=2, out_shardings=(shardings, None))
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
        """Makes the update, and returns the metrics of all parts together; the state is donated.

        Raises:
            ValueError: a part is missing, or one too many was added.
        """
        num_tokens, num_sequences = (sum(count) for count in zip((0, 0), *gradient.counts, strict=True))
        if (num_tokens, num_sequences) != gradient.totals:
            raise ValueError(
                f"parts with {num_tokens} scored tokens in {num_sequences} sequences have come, but begin() was told "
                f"{gradient.totals[0]} in {gradient.totals[1]}"
            )
        if self._compiled_apply is None:
            shardings = jax.tree.map(lambda x: x.sharding, state)
            self._compiled_apply = jax.jit(self.program.apply_parts, donate_argnums=0, out_shardings=(shardings, None))
        counts_A2 = np.asarray(gradient.counts, np.float32)
        state, metrics = self._compiled_apply(state, gradient.grads, gradient.metrics, counts_A2)
        num_real, num_places = (sum(number) for number in zip(*gradient.places, strict=True))
        metrics["padding_share"] = jnp.float32(1 - num_real / num_places)
        return state, metrics


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
    """Makes the training step of a run.

    Args:
        graphdef: `nnx.split(decoder, models.trained_kind(decoder.config), ...)[0]`; compute dtype and remat are the
            decoder's.
        config: of the run: objective, temperature, minibatches.
        optimizer: the one that the state was made with.
        mesh: that the state is sharded over; None: one device.
        recipe: the resolved objective; None: `make_recipe(config)`, for a teacher that can score candidates.
        base: the last result of that split, the weights under the adapters; None: there are no adapters.
        reference: parameters of the frozen model of objective.reference, without adapters; None: no reference.

    Raises:
        ConfigError: the objective's gradient is not what its name says.
        ValueError: objective.reference without parameters, or the reverse.
    """
    recipe = make_recipe(config) if recipe is None else recipe
    if (recipe.reference is None) != (reference is None):
        raise ValueError("objective.reference and the reference's parameters belong together: give both or none")
    frozen = Frozen(nnx.State({}) if base is None else base, reference)
    return TrainStep(graphdef, config, recipe, optimizer, mesh, frozen)
