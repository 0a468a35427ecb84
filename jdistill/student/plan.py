"""Plans how much memory a run will take on each device: from shapes alone, before anything is loaded.

What is kept for the backward pass is not estimated: the training step itself is differentiated with shapes in place of
arrays, and what its backward pass holds on to is counted. So a family, an objective or an option that is added is
planned too.

Dimension key: R rows of a part, T targets of a row, L layers, D width, V vocabulary.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh

from jdistill import buckets, models
from jdistill.config import ConfigError, TrainConfig
from jdistill.models.mesh import AXES, BATCH_AXES
from jdistill.student.batch import TrainBatch
from jdistill.student.optimizer import make_optimizer
from jdistill.student.recipe import Recipe, make_recipe
from jdistill.student.sharding import check_rows, mesh_sizes
from jdistill.student.state import TrainState, ValueHead, moment_shardings
from jdistill.student.step import TrainStep, make_train_step


class Item(NamedTuple):
    """Something that a device keeps in memory."""

    name: str
    num_bytes: int  # on the device that has the most
    remedy: str = ""  # what makes it smaller


class Plan(NamedTuple):
    """What each device holds: always, while it trains, and while it samples."""

    always: list[Item]
    training: list[Item]
    sampling: list[Item]
    axes: dict[str, int]

    @property
    def peak_training(self) -> int:
        """Bytes."""
        return sum(item.num_bytes for item in self.always + self.training)

    @property
    def peak_sampling(self) -> int:
        """Bytes."""
        return sum(item.num_bytes for item in self.always + self.sampling)

    @property
    def peak(self) -> int:
        """Bytes: training and sampling take turns."""
        return max(self.peak_training, self.peak_sampling)


class Shapes(NamedTuple):
    """The arrays of a run, without their contents, as one device would have them if it were alone."""

    model: models.DecoderConfig
    recipe: Recipe
    graphdef: nnx.GraphDef
    state: TrainState
    batch: TrainBatch  # of zeros, with rows of the greatest length
    step: TrainStep


def make_shapes(config: TrainConfig, model: models.DecoderConfig | None = None) -> Shapes:
    """The shapes of a run's state and batch, and its step.

    Args:
        config: configuration of the run.
        model: architecture of the student; None: that of the directory model.path.
    """
    model = models.config_from_hf(config.model.path) if model is None else model
    recipe = make_recipe(config, vocab_size=model.vocab_size)  # `auto`: candidates, which take more memory
    decoder = _decoder(config, model)
    graphdef, params, base = nnx.split(decoder, models.trained_kind(decoder.config), ...)
    head = None
    if recipe.has_critic:
        width = model.hidden_size
        head = ValueHead(jax.ShapeDtypeStruct((width,), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32))
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    trained = params if head is None else (params, head)
    step_number = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(params, jax.eval_shape(optimizer.init, trained), step_number, head)
    reference = None
    if recipe.reference is not None:
        reference = nnx.state(_decoder(config, model, adapters=False), nnx.Param)
    step = make_train_step(graphdef, config, optimizer, recipe=recipe, base=base, reference=reference)
    return Shapes(model, recipe, graphdef, state, _batch(config, recipe), step)


class _Layout(NamedTuple):
    """How the arrays of a run are sharded over its devices."""

    axes: dict[str, int]
    num_shards: int  # of the rows
    decoder: models.Decoder  # shapes
    params: Any  # the trained ones, with their shardings
    moments: Any  # shardings of the optimizer's state
    base: Any  # shardings of the frozen weights


def make_plan(config: TrainConfig, num_devices: int, model: models.DecoderConfig | None = None) -> Plan:
    """Plans the memory of a run on `num_devices` devices.

    Activations are not divided by the tensor axis, which splits most of them, so with that axis the plan is above the
    truth. Nor does it count on packing.

    Args:
        config: configuration of the run.
        num_devices: devices that the mesh spans.
        model: architecture of the student; None: that of the directory model.path.

    Raises:
        ConfigError: the mesh does not fit the devices, or the rows do not split over them.
    """
    try:
        axes = mesh_sizes(config.mesh, num_devices)
    except ValueError as e:
        raise ConfigError(str(e)) from None
    check_rows(config, axes)
    shapes = make_shapes(config, model)
    layout = _layout(shapes, axes)
    num_rows = len(shapes.batch.tokens) // (config.optimizer.minibatches * config.optimizer.accumulate)
    part = jax.tree.map(lambda x: x[: num_rows // layout.num_shards], shapes.batch)
    sampling = _sampling(config, shapes, layout) if shapes.recipe.on_policy else []
    return Plan(_always(config, shapes, layout), _training(config, shapes, layout, part), sampling, axes)


def _layout(shapes: Shapes, axes: dict[str, int]) -> _Layout:
    mesh = AbstractMesh(tuple(axes.values()), AXES)
    params, base = shapes.state.params, shapes.step.frozen.base
    decoder = nnx.merge(shapes.graphdef, params, base)
    shardings = models.param_shardings(decoder, mesh)
    sharded = _with_shardings(params, nnx.filter_state(shardings, models.trained_kind(decoder.config)))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    moments = moment_shardings(shapes.state.opt_state, sharded, everywhere)
    frozen = nnx.filter_state(shardings, nnx.Not(nnx.LoRAParam)) if base else None
    return _Layout(axes, math.prod(axes[axis] for axis in BATCH_AXES), decoder, sharded, moments, frozen)


def _param_bytes(layout: _Layout) -> int:
    return _sharded_bytes(layout.params, jax.tree.map(lambda x: x.sharding, layout.params))


def _always(config: TrainConfig, shapes: Shapes, layout: _Layout) -> list[Item]:
    """What a device holds throughout the run."""
    param_bytes, base = _param_bytes(layout), shapes.step.frozen.base
    if base:
        whole_bytes = _sharded_bytes(base, layout.base)
        weights = [Item("adapters (float32)", param_bytes), Item("frozen weights", whole_bytes, "mesh.fsdp")]
    else:
        whole_bytes = param_bytes
        weights = [Item("parameters (float32 masters)", param_bytes, "mesh.fsdp")]
    moment_bytes = _sharded_bytes(shapes.state.opt_state, layout.moments)
    always = [
        *weights,
        Item(f"optimizer state ({config.optimizer.name})", moment_bytes, "optimizer.moment_dtype, mesh.fsdp"),
        Item("batch", _bytes(shapes.batch) // layout.num_shards),
    ]
    if shapes.recipe.reference is not None:
        always.append(Item("parameters of the reference", whole_bytes, "objective.reference"))
    return always


def _training(config: TrainConfig, shapes: Shapes, layout: _Layout, part: TrainBatch) -> list[Item]:
    """What a device holds while it trains on its rows of a part."""
    accumulates = config.optimizer.accumulate > 1
    logits = _logits_bytes(shapes, layout)
    chunk = min(config.objective.chunk_tokens, part.loss_mask.size)
    kept = activations(shapes, part)
    training = [
        Item("gradients", _param_bytes(layout) * (2 if accumulates else 1), "mesh.fsdp"),
        Item("activations kept for the backward pass", kept, "model.remat: layer, optimizer.accumulate"),
        Item("the layer being differentiated", _layer(config, shapes, part), "optimizer.accumulate"),
        Item("a chunk's logits, softmax and gradient", 3 * chunk * logits, "objective.chunk_tokens"),
    ]
    if not shapes.step.frozen.base:
        training.append(Item("gradient of the output projection", shapes.model.hidden_size * logits))
    if layout.axes["fsdp"] > 1:
        of_layers = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(layout.decoder.layers)))
        gathered = of_layers // shapes.model.num_layers + shapes.model.hidden_size * shapes.model.vocab_size
        num_bytes = gathered * jnp.dtype(config.model.compute_dtype).itemsize // layout.axes["tensor"]
        training.append(Item("a layer and the output projection, gathered", num_bytes))
    return training


def _sampling(config: TrainConfig, shapes: Shapes, layout: _Layout) -> list[Item]:
    """What a device holds while it samples."""
    rollout, dtype = config.rollout, jnp.dtype(config.model.compute_dtype)
    whole = sum(math.prod(x.shape) for x in jax.tree.leaves((shapes.state.params, shapes.step.frozen.base)))
    num_bytes = whole * dtype.itemsize // (layout.axes["fsdp"] * layout.axes["tensor"])
    rows = -(-min(rollout.max_rows or shapes.recipe.num_rows, shapes.recipe.num_rows) // layout.num_shards)
    num_slots = rollout.max_length
    cache = jax.eval_shape(lambda: models.init_cache(shapes.model, rows, num_slots, rollout.cache_dtype or dtype))
    return [
        Item(f"weights as the sampler reads them ({dtype})", num_bytes),
        Item("cache of keys and values", _bytes(cache), "rollout.max_rows, rollout.cache_dtype"),
        Item("logits of the next tokens", 3 * rows * _logits_bytes(shapes, layout), "rollout.max_rows"),
    ]


def _logits_bytes(shapes: Shapes, layout: _Layout) -> int:
    """Bytes of one token's logits."""
    return 4 * shapes.model.vocab_size // layout.axes["tensor"]


def activations(shapes: Shapes, part: TrainBatch) -> int:
    """Bytes that the backward pass of these rows holds on to, parameters left out."""
    trained, frozen = (shapes.state.params, shapes.state.value_head), shapes.step.frozen
    held = jax.eval_shape(
        lambda *given: jax.tree.leaves(shapes.step.program.backward_of(*given, part)), trained, frozen
    )
    own = collections.Counter((x.shape, x.dtype) for x in jax.tree.leaves((trained, frozen.base)))
    total = 0
    for x in held:
        if own[(x.shape, x.dtype)]:
            own[(x.shape, x.dtype)] -= 1
        else:
            total += x.size * x.dtype.itemsize
    return total


def compiled_bytes(shapes: Shapes) -> dict[str, int]:
    """Compiles the step for one device; returns XLA's bytes of its arguments, its temporaries, and their sum."""
    compiled = (
        jax.jit(shapes.step.program.step, donate_argnums=0)
        .lower(shapes.state, shapes.batch, shapes.step.frozen)
        .compile()
    )
    found = compiled.memory_analysis()
    arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
    return {"arguments": arguments, "temporaries": temporaries, "peak": arguments + temporaries}


def _decoder(config: TrainConfig, model: models.DecoderConfig, *, adapters: bool = True) -> models.Decoder:
    kwargs: dict[str, Any] = {"compute_dtype": config.model.compute_dtype, "remat": config.model.remat}
    lora = models.lora_of(config.model.lora)
    model = dataclasses.replace(model, lora=lora if adapters else None)
    decoder = nnx.eval_shape(lambda: models.Decoder(model, rngs=nnx.Rngs(0), **kwargs))
    if lora is not None:
        # What is not trained is kept in the dtype that it is used in.
        stored = nnx.map_state(
            lambda _, x: x.replace(jax.ShapeDtypeStruct(x.shape, kwargs["compute_dtype"])),
            nnx.state(decoder, nnx.Not(nnx.LoRAParam)),
        )
        nnx.update(decoder, stored)
    return decoder


def _batch(config: TrainConfig, recipe: Recipe) -> TrainBatch:
    """A batch of zeros with rows of the greatest length, as `make_batch` would give it."""
    max_length = config.rollout.max_length
    num_tokens = buckets.row_length(max_length, max_length)
    floats = np.zeros((recipe.num_rows, num_tokens - 1), np.float32)
    batch = TrainBatch(np.zeros((recipe.num_rows, num_tokens), np.int32), np.ones(floats.shape, bool))
    if not recipe.on_policy:
        return batch
    batch = batch._replace(sampler_logprobs=floats, advantages=floats)
    if recipe.has_critic:
        batch = batch._replace(token_rewards=floats)
    if recipe.distillation is not None:
        batch = batch._replace(teacher_logprobs=floats)
    if recipe.has_segments:
        batch = batch._replace(teacher_segments=floats.astype(np.int32))
    if recipe.candidates_per_target:
        shape = (*floats.shape, recipe.candidates_per_target)
        batch = batch._replace(
            candidate_ids=np.zeros(shape, np.int32), teacher_candidate_logprobs=np.zeros(shape, np.float32)
        )
    return batch


def _layer(config: TrainConfig, shapes: Shapes, part: TrainBatch) -> int:
    """What one layer holds while the backward pass is in it: all of its own activations, computed again or not."""
    sliding = shapes.model.sliding_layers[:1]
    one = dataclasses.replace(shapes.model, num_layers=1, sliding_layers=sliding)
    sizes = []
    for remat in ("none", "layer"):
        asked = config.model_copy(update={"model": config.model.model_copy(update={"remat": remat})})
        sizes.append(activations(make_shapes(asked, one), part))
    return sizes[0] - sizes[1]


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _sharded_bytes(shapes: Any, shardings: Any) -> int:
    parts = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, shapes, shardings)
    return sum(jax.tree.leaves(parts))


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
