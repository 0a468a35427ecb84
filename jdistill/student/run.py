"""Assembles a run, restores its position from the newest checkpoint, and saves it."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from rich.console import Console

from jdistill import checkpoint_files, models, tasks
from jdistill.config import ConfigError, TrainConfig
from jdistill.fingerprint import model_fingerprint
from jdistill.models.precision import cast_params
from jdistill.rollout.collect import Collector, Rollout
from jdistill.rollout.sampled import SampledBatch
from jdistill.rollout.sampler import Sampler, Weights
from jdistill.student import hosts, sharding
from jdistill.student.checkpoint import Checkpoints
from jdistill.student.metrics import MetricsWriter
from jdistill.student.optimizer import make_optimizer
from jdistill.student.progress import Progress
from jdistill.student.recipe import Recipe, make_recipe, notes
from jdistill.student.run_dir import RunDirectory
from jdistill.student.state import TrainState, init_state
from jdistill.student.step import TrainStep, make_train_step
from jdistill.student.teacher import RemoteTeacher
from jdistill.tasks.base import Task


@dataclasses.dataclass
class Position:
    """Where a run stands: all that a checkpoint restores."""

    state: TrainState
    step: int = 0  # steps done
    sampled_tokens: int = 0  # for training
    num_problems: int = 0  # asked of the task, for the batches that were trained on
    pending: Rollout | None = None  # with rollout.ahead: the rollout that the next step trains on


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of one run, which stay the same from its first step to its last."""

    config: TrainConfig
    recipe: Recipe
    task: Task
    teacher: RemoteTeacher | None
    sampler: Sampler
    collector: Collector
    policy: SamplingPolicy
    train_step: TrainStep
    checkpoints: Checkpoints
    writer: MetricsWriter | None  # on the first process alone
    progress: Progress

    def write(self, position: Position, values: dict[str, float], timings: dict[str, float]) -> None:
        """Appends the line of the step that was just finished to the metrics files."""
        if self.writer is not None:
            self.writer.write(position.step, values, timings)

    def save(self, position: Position) -> None:
        """Saves the position, unless it is saved already."""
        if position.step == self.checkpoints.latest_step():
            return
        extra = {
            "step": position.step,
            "sampled_tokens": position.sampled_tokens,
            "num_problems": position.num_problems,
        }
        pending = None if position.pending is None else position.pending.batch.to_arrays()
        self.checkpoints.save(position.step, position.state, extra, pending)


def make_run(
    config: TrainConfig, directory: RunDirectory, stack: contextlib.ExitStack, *, label: str
) -> tuple[Run, Position]:
    """Makes the parts of a run, in an order in which cheap mistakes show first, and restores its position.

    Args:
        config: configuration of the run.
        directory: its directory, locked; taken for the run when nothing is left that often fails.
        stack: closes the parts.
        label: heads the progress line.

    Raises:
        ConfigError: the configuration does not fit the data, the devices, the model, the checkpoint or the teacher.
        TeacherError: no teacher is up before the deadline.
    """
    progress = _make_progress(config, label)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_rows(config, mesh.shape)
    task = _make_task(config)
    model_config = models.config_from_hf(config.model.path)
    _check_lengths(config, model_config)
    teacher = None
    if config.objective.has_distillation:
        # It takes its share of the memory before the student does.
        teacher = RemoteTeacher(config, model_config, task, directory.path, stack, say=progress.say)
    recipe = make_recipe(config) if teacher is None else teacher.recipe
    # The sampler has a whole copy of the parameters on each host.
    own_mesh, host_mesh = (mesh, None) if hosts.count() == 1 else hosts.meshes(mesh)
    stack.enter_context(jax.set_mesh(mesh))
    decoder = _load_student(config, mesh)
    graphdef, params, base = nnx.split(decoder, models.trained_kind(decoder.config), ...)
    sampler = _make_sampler(config, recipe, task, graphdef, own_mesh)
    policy = SamplingPolicy(sampler, base, None if host_mesh is None else HostCopy(decoder, own_mesh, host_mesh))
    own = hosts.own_part(config.rollout.num_prompts)
    collector = Collector(
        config, task, sampler, teacher, own_prompts=own, maximum=hosts.maximum, show_phase=progress.phase
    )
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    state = init_state(params, optimizer, mesh, value_width=model_config.hidden_size if recipe.has_critic else None)
    reference = None if recipe.reference is None else _load_reference(config, model_config, base, mesh)
    train_step = make_train_step(graphdef, config, optimizer, mesh, recipe=recipe, base=base, reference=reference)
    # Only the adapters are in a checkpoint, so it records the fingerprint of the weights that they adapt.
    adapted = model_fingerprint(config.model.path, config.model.compute_dtype) if base else None
    place = _place(mesh, teacher)
    if not directory.resumes:
        directory.begin(place, progress.say)
    checkpoints = Checkpoints(directory.path, keep=config.checkpoint.keep, base=adapted)
    stack.enter_context(contextlib.closing(checkpoints))
    position = _restore(checkpoints, state, task, collector)
    if directory.resumes:
        directory.resume_at(position.step, place, progress.say)
    writer = _make_writer(directory, position, stack) if hosts.is_first() else None
    progress.begin_at(position.step)
    stack.enter_context(progress)
    run = Run(config, recipe, task, teacher, sampler, collector, policy, train_step, checkpoints, writer, progress)
    return run, position


# ---- the parameters that sample ----


class SamplingPolicy:
    """The weights that sampling reads, prepared once per update.

    Args:
        sampler: prepares them.
        base: frozen weights beside the trained ones.
        host_copy: brings them onto this host's devices; None: they are there.
    """

    def __init__(self, sampler: Sampler, base: nnx.State, host_copy: HostCopy | None):
        self._sampler = sampler
        self._base = base
        self._host_copy = host_copy
        self._weights: Weights | None = None

    def weights(self, state: TrainState) -> Weights:
        """All weights of the model, on this host's devices; `state` must be the same until `forget` is called."""
        if self._weights is None:
            params = nnx.merge_state(state.params, self._base)
            self._weights = self._sampler.prepare(params if self._host_copy is None else self._host_copy(params))
        return self._weights

    def forget(self) -> None:
        """Frees the copy; called before an update changes the parameters."""
        self._weights = None


class HostCopy:
    """Brings parameters that are sharded over all hosts onto each host's devices, in the dtype that sampling reads.

    One program gathers them over hosts; they stay sharded over a host's devices.
    """

    def __init__(self, decoder: models.Decoder, own: Mesh, host_mesh: Mesh):
        self._shardings = models.param_shardings(decoder, own)
        self._gather = jax.jit(
            lambda params: cast_params(params, decoder.compute_dtype),
            out_shardings=models.param_shardings(decoder, host_mesh),
        )

    def __call__(self, params: nnx.State) -> nnx.State:
        """The parameters on this host's devices."""

        def own(x: jax.Array, sharding: NamedSharding) -> jax.Array:
            parts = [shard.data for shard in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

        return jax.tree.map(own, self._gather(params), self._shardings)


# ---- the parts ----


def _make_writer(directory: RunDirectory, position: Position, stack: contextlib.ExitStack) -> MetricsWriter:
    """The metrics files, without the lines of steps that a resumed run makes again."""
    writer = stack.enter_context(contextlib.closing(MetricsWriter(directory.path)))
    writer.truncate_to(position.step if position.step else -1)
    return writer


def _place(mesh: Mesh, teacher: RemoteTeacher | None) -> dict[str, Any]:
    """Where a run runs, as far as its directory records it."""
    fingerprints = {} if teacher is None else teacher.fingerprints
    return {"devices": mesh.size, "processes": hosts.count(), "teachers": fingerprints}


def _make_progress(config: TrainConfig, label: str) -> Progress:
    """The progress of the run, which begins with what should be known of its configuration."""
    progress = Progress(label, config.num_steps, None if hosts.is_first() else Console(quiet=True))
    for note in notes(config):
        progress.say(note)
    return progress


def _make_task(config: TrainConfig) -> Task:
    if config.model.init == "checkpoint":
        checkpoint_files.check_checkpoint(config.model.path)
    return tasks.create_task(
        config.task.name,
        config.task.options,
        config.model.path,
        seed=config.seed,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
    )


def _check_lengths(config: TrainConfig, model_config: models.DecoderConfig) -> None:
    longest, limit = config.rollout.max_length, model_config.max_position_embeddings
    if longest > limit:
        raise ConfigError(
            f"rollout.max_prompt_tokens + rollout.max_new_tokens = {longest}, but {config.model.path} has "
            f"max_position_embeddings = {limit}: lower the first two"
        )


def _model_options(config: TrainConfig, mesh: Mesh) -> dict[str, Any]:
    return {"compute_dtype": config.model.compute_dtype, "remat": config.model.remat, "mesh": mesh}


def _load_student(config: TrainConfig, mesh: Mesh) -> models.Decoder:
    options, lora = _model_options(config, mesh), models.lora_of(config.model.lora)
    if config.model.init == "random":
        return models.random_init(config.model.path, config.seed, **options)
    if lora is not None:  # weights that no update changes need no float32 masters
        options["param_dtype"] = config.model.compute_dtype
    return models.load(config.model.path, lora=lora, seed=config.seed, **options)


def _load_reference(config: TrainConfig, model_config: models.DecoderConfig, base: nnx.State, mesh: Mesh) -> nnx.State:
    """The frozen parameters of objective.reference."""
    section = config.objective.reference
    assert section is not None
    if base and pathlib.Path(section.path).resolve() == pathlib.Path(config.model.path).resolve():
        return base  # already loaded
    checkpoint_files.check_checkpoint(section.path)
    if models.config_from_hf(section.path) != model_config:
        raise ConfigError(
            f"objective.reference.path: {section.path} has another architecture than {config.model.path}; a reference "
            "is an earlier state of the student: another model is a teacher"
        )
    options = _model_options(config, mesh)
    if config.model.lora is not None:
        options["param_dtype"] = config.model.compute_dtype
    return nnx.split(models.load(section.path, **options), nnx.Param)[1]


def _make_sampler(config: TrainConfig, recipe: Recipe, task: Task, graphdef: nnx.GraphDef, mesh: Mesh) -> Sampler:
    rollout = config.rollout
    return Sampler(
        graphdef,
        max_prompt_tokens=rollout.max_prompt_tokens,
        max_new_tokens=rollout.max_new_tokens,
        stop_token_ids=task.stop_token_ids,
        num_candidates=recipe.num_candidates,
        max_rows=rollout.max_rows,
        min_new_tokens=rollout.min_new_tokens,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        min_p=rollout.min_p,
        stop_strings=rollout.stop_strings,
        decode=task.decode,
        include_stop=rollout.include_stop_str_in_output,
        cache_dtype=rollout.cache_dtype,
        chunk_tokens=rollout.chunk_tokens,
        mesh=mesh,
    )


def _restore(checkpoints: Checkpoints, state: TrainState, task: Task, collector: Collector) -> Position:
    """The position of the newest checkpoint, or the beginning."""
    if checkpoints.latest_step() is None:
        return Position(state)
    state, extra = checkpoints.restore(state)
    position = Position(state, int(extra["step"]), int(extra["sampled_tokens"]), int(extra["num_problems"]))
    if (arrays := checkpoints.restore_pending()) is not None:
        position.pending = collector.resume(SampledBatch.from_arrays(arrays, task))
    return position
