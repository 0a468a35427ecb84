"""The forward pass of a part: hidden states, log-probs, values, and the loss of them.

Dimension key: T targets of a row, D width, K candidates, R rows of a part; packed: G lines of P places.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jdistill import models
from jdistill.config import TrainConfig
from jdistill.models.packing import Packing
from jdistill.student import objective
from jdistill.student.batch import TrainBatch
from jdistill.student.logprobs import TargetLogprobs, loss_of_targets, target_logprobs
from jdistill.student.placement import Parts
from jdistill.student.recipe import Recipe
from jdistill.student.state import ValueHead


class Forward:
    """Runs the student on the rows of one part.

    Args:
        graphdef: of the decoder.
        config: of the run.
        recipe: the resolved objective.
        mesh: over which rows and parameters are sharded; None: one device.
    """

    def __init__(self, graphdef: nnx.GraphDef, config: TrainConfig, recipe: Recipe, mesh: Mesh | None):
        self._graphdef = graphdef
        self._config = config
        self._recipe = recipe
        self._mesh = mesh

    def loss(
        self,
        trained: Any,
        base: nnx.State,
        part: Parts,
        step: Int[Array, ""],
        share: Float[Array, ""] | float = 1.0,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes a part's loss times its share of the update's loss, and the part's metrics.

        Args:
            trained: parameters and value head, which the gradient is taken of.
            base: the weights under the adapters.
            part: rows, and how they are packed.
            step: number of the step, for schedules.
            share: fraction of the update's loss that this part contributes.
        """
        (params, head), (rows, packing) = trained, part
        recipe = self._recipe
        candidate_ids = rows.candidate_ids if recipe.candidates_per_target else None
        if recipe.has_critic or not recipe.adds_over_targets:
            scored = self.score(params, base, rows, packing, head, candidate_ids)
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

    def score(
        self,
        params: nnx.State,
        base: nnx.State,
        rows: TrainBatch,
        packing: Packing | None,
        head: ValueHead | None = None,
        candidate_ids: Int[Array, "R T K"] | None = None,
    ) -> objective.Scored:
        """Computes log-probs, entropies and, with a value head, values of a part's targets."""
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

    def decoder(self, params: nnx.State, base: nnx.State) -> models.Decoder:
        """Joins the graph definition with trained and frozen parameters."""
        return nnx.merge(self._graphdef, params, base)

    def _asked(self, rows: TrainBatch, packing: Packing | None, candidate_ids: Int[Array, "R T K"] | None) -> Any:
        """Arranges (inputs, targets, mask, candidates) and positions as [R, T] or, packed, [G, P]."""
        asked = (rows.tokens[:, :-1], rows.tokens[:, 1:], rows.loss_mask, candidate_ids)
        positions = jnp.broadcast_to(jnp.arange(rows.loss_mask.shape[1]), rows.loss_mask.shape)
        return (asked, positions) if packing is None else jax.tree.map(packing.pack, (asked, positions))

    def _hidden(
        self, params: nnx.State, base: nnx.State, asked: Any, positions: jax.Array, packing: Packing | None
    ) -> tuple[models.Decoder, Float[Array, "R T D"]]:
        decoder = self.decoder(params, base)
        return decoder, decoder(asked[0], positions, packing=packing)[0]

    def _options(self, decoder: models.Decoder) -> dict[str, Any]:
        """Keyword arguments of target_logprobs and loss_of_targets."""
        return {
            "temperature": self._recipe.temperature,
            "chunk_tokens": self._config.objective.chunk_tokens,
            "mesh": self._mesh,
            "softcap": decoder.config.final_softcap,
        }
