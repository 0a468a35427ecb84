"""The loop: prompts -> rollout -> reward + teacher -> update, with a way back from every stop."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from rich.console import Console

from jdistill import checkpoint_files, models, tasks
from jdistill.config import ConfigError, TrainConfig
from jdistill.fingerprint import model_fingerprint
from jdistill.losses import advantages, weights
from jdistill.rollout.sampler import Completion, Sampler
from jdistill.student import hosts, sharding
from jdistill.student import recipe as recipes
from jdistill.student.batch import TrainBatch, make_batch, make_supervised_batch
from jdistill.student.checkpoint import Checkpoints
from jdistill.student.compilations import COMPILATIONS
from jdistill.student.evaluate import evaluate
from jdistill.student.metrics import MetricsWriter
from jdistill.student.optimizer import make_optimizer
from jdistill.student.progress import Progress
from jdistill.student.sampled import SampledBatch
from jdistill.student.step import Gradient, init_state, make_train_step
from jdistill.student.teacher import BatchScoring, RemoteTeacher
from jdistill.tasks.base import Problem

# Keys of a run's configuration that may differ when it is resumed: none of them changes a number.
MAY_CHANGE_ON_RESUME = ("teacher", "checkpoint")


class TrainingError(RuntimeError):
    """Training cannot go on; the state of the last good step is saved, and the message says how to go on."""


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM came; the state is saved. `exit_code` is what shells expect of it."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False, label: str | None = None) -> None:
    """Trains as `config` says; what comes of it is in `config.run_dir`.

    Args:
        config: what to do.
        resume: go on from the newest checkpoint in run_dir, exactly as if it had never stopped.
        overwrite: delete an earlier run in run_dir first.
        label: what the progress line is headed with; default: the run directory's name.

    Raises:
        ConfigError: the configuration does not fit the data, the checkpoint, the teacher, or the run being resumed.
        TeacherError: no scores before the deadline; the state is saved.
        TrainingError: NaN; the state is saved.
        Stopped: SIGINT or SIGTERM; the state is saved.
    """
    recipes.check(config)
    _check_hosts(config)
    run_dir = pathlib.Path(config.run_dir)
    hosts.from_first(lambda: _prepare_run_dir(config, resume=resume, overwrite=overwrite))
    with _StopSignals() as stop, contextlib.ExitStack() as stack:
        try:
            trainer = _Trainer(config, run_dir, stack, label or run_dir.name)
            trainer.run(stop)
        except (Stopped, TrainingError):
            raise
        except BaseException as e:
            if hosts.count() > 1:  # alone: the others know nothing of it, and will never answer again
                hosts.leave(e)
            raise


class _Trainer:
    """The parts of one run, made in an order in which the cheap mistakes show first."""

    def __init__(self, config: TrainConfig, run_dir: pathlib.Path, stack: contextlib.ExitStack, label: str):
        self.config = config
        self.progress = Progress(label, config.num_steps, None if hosts.is_first() else Console(quiet=True))
        if config.model.init == "checkpoint":
            checkpoint_files.check_checkpoint(config.model.path)
        self.task = tasks.create_task(
            config.task.name,
            config.task.options,
            config.model.path,
            seed=config.seed,
            max_prompt_tokens=config.rollout.max_prompt_tokens,
        )
        self.model_config = models.config_from_hf(config.model.path)
        self._check_lengths()
        self.teacher: RemoteTeacher | None = None
        if config.objective.has_distillation:
            self.teacher = RemoteTeacher(config, self.model_config, self.task, run_dir, stack, say=self.progress.say)
        self.recipe = recipes.make_recipe(config) if self.teacher is None else self.teacher.recipe
        self.mesh = sharding.make_mesh(config.mesh)
        # What samples has a whole copy of the parameters on each host.
        own_mesh, host_mesh = (self.mesh, None) if hosts.count() == 1 else hosts.meshes(self.mesh)
        stack.enter_context(jax.set_mesh(self.mesh))
        kwargs: dict[str, Any] = {"compute_dtype": config.model.compute_dtype, "remat": config.model.remat}
        kwargs["mesh"] = self.mesh
        lora = models.lora_of(config.model.lora)
        if config.model.init == "random":
            decoder = models.random_init(config.model.path, config.seed, **kwargs)
        else:
            if lora is not None:  # weights that no update changes need no masters
                kwargs["param_dtype"] = config.model.compute_dtype
            decoder = models.load(config.model.path, lora=lora, seed=config.seed, **kwargs)
        self._to_own = None if host_mesh is None else _ToOwn(decoder, own_mesh, host_mesh)
        graphdef, params, self.base = nnx.split(decoder, models.trained_kind(decoder.config), ...)
        self.sampler = Sampler(
            graphdef,
            max_prompt_tokens=config.rollout.max_prompt_tokens,
            max_new_tokens=config.rollout.max_new_tokens,
            stop_token_ids=self.task.stop_token_ids,
            num_candidates=self.recipe.num_candidates,
            max_rows=config.rollout.max_rows,
            min_new_tokens=config.rollout.min_new_tokens,
            top_k=config.rollout.top_k,
            top_p=config.rollout.top_p,
            min_p=config.rollout.min_p,
            stop_strings=config.rollout.stop_strings,
            decode=self.task.decode,
            cache_dtype=config.rollout.cache_dtype,
            chunk_tokens=config.rollout.chunk_tokens,
            mesh=own_mesh,
        )
        optimizer = make_optimizer(config.optimizer, config.num_steps)
        value_width = self.model_config.hidden_size if self.recipe.has_critic else None
        self.state = init_state(params, optimizer, self.mesh, value_width=value_width)
        reference = self._load_reference(**kwargs)
        self.train_step = make_train_step(
            graphdef, config, optimizer, self.mesh, recipe=self.recipe, base=self.base, reference=reference
        )
        # Only the adapters are in a checkpoint, so it says beside which weights they stood.
        base = model_fingerprint(config.model.path, config.model.compute_dtype) if self.base else None
        self.checkpoints = stack.enter_context(
            contextlib.closing(Checkpoints(run_dir, keep=config.checkpoint.keep, base=base))
        )
        self.step = 0
        self.sampled_tokens = 0
        self.num_problems = 0  # that were asked of the task, for the batches that are trained on
        self.pending: _Rollout | None = None  # of rollout.ahead: what the next step trains on
        if self.checkpoints.latest_step() is not None:
            self.state, extra = self.checkpoints.restore(self.state)
            self.step = int(extra["step"])
            self.sampled_tokens = int(extra["sampled_tokens"])
            self.num_problems = int(extra["num_problems"])
            if (arrays := self.checkpoints.restore_pending()) is not None:
                self.pending = self._taken_up(SampledBatch.from_arrays(arrays, self.task))
        self.writer: MetricsWriter | None = None
        if hosts.is_first():
            self.writer = stack.enter_context(contextlib.closing(MetricsWriter(run_dir)))
            self.writer.truncate_to(self.step if self.step else -1)
        self.progress.begin_at(self.step)
        stack.enter_context(self.progress)

    def _load_reference(self, **kwargs: Any) -> nnx.State | None:
        """The parameters of objective.reference, which stay as they are."""
        section = self.config.objective.reference
        if self.recipe.reference is None:
            return None
        if self.base and pathlib.Path(section.path).resolve() == pathlib.Path(self.config.model.path).resolve():
            return self.base  # already there
        checkpoint_files.check_checkpoint(section.path)
        if models.config_from_hf(section.path) != self.model_config:
            raise ConfigError(
                f"objective.reference.path: {section.path} is of another architecture than {self.config.model.path}; a "
                "reference is an earlier state of the student: another model is a teacher"
            )
        return nnx.split(models.load(section.path, **kwargs), nnx.Param)[1]

    def _policy(self) -> nnx.State:
        """All parameters of the model that samples, on this host's devices."""
        params = nnx.merge_state(self.state.params, self.base)
        return params if self._to_own is None else self._to_own(params)

    def _check_lengths(self) -> None:
        rollout, limit = self.config.rollout, self.model_config.max_position_embeddings
        longest = rollout.max_prompt_tokens + rollout.max_new_tokens
        if longest > limit:
            raise ConfigError(
                f"rollout.max_prompt_tokens + rollout.max_new_tokens = {longest}, but {self.config.model.path} "
                f"has max_position_embeddings = {limit}: make the first two smaller"
            )

    def run(self, stop: _StopSignals) -> None:
        config = self.config
        try:
            if self.step == 0 and config.eval.every:
                values: dict[str, float] = {"sampled_tokens": 0}
                timings = self._evaluate(values)
                self._write(values, timings)
                self.progress.step(0, values)
            while self.step < config.num_steps:
                started, compiled = time.monotonic(), (COMPILATIONS.count, COMPILATIONS.seconds)
                make = self._on_policy_update if self.recipe.on_policy else self._supervised_update
                update, num_tokens, values, timings, after = make()
                self.progress.phase("training")
                with stop.held():  # the state and its line in metrics.jsonl change together
                    began = time.monotonic()
                    if isinstance(update, TrainBatch):
                        self.state, results = self.train_step(self.state, update)
                    else:
                        self.state, results = self.train_step.apply(self.state, update)
                    results = {name: float(value) for name, value in jax.device_get(results).items()}
                    timings["train_s"] = timings.get("train_s", 0.0) + time.monotonic() - began
                    if not results.pop("finite"):
                        raise TrainingError(
                            f"NaN or infinity in the loss or the gradient of step {self.step + 1} "
                            f"(loss {results['loss']}, gradient norm {results['grad_norm']}); the update was not made. "
                            "Lower optimizer.learning_rate or optimizer.clip_norm, or set model.compute_dtype: float32"
                        )
                    self.step += 1
                    self.num_problems, self.pending = after
                    values |= results
                    if self.recipe.on_policy:
                        self.sampled_tokens += num_tokens
                        values["sampled_tokens"] = self.sampled_tokens
                    timings["step_s"] = time.monotonic() - started
                    timings["compilations"] = COMPILATIONS.count - compiled[0]
                    timings["compile_s"] = COMPILATIONS.seconds - compiled[1]
                    timings["tokens_per_s"] = num_tokens / timings["step_s"]
                    last = self.step == config.num_steps
                    if config.eval.every and (self.step % config.eval.every == 0 or last):
                        timings |= self._evaluate(values)
                    self._write(values, timings)
                    if last or (config.checkpoint.every and self.step % config.checkpoint.every == 0):
                        self._save()
                self.progress.step(self.step, values | timings)
        except BaseException as e:
            # Of several hosts the others may be elsewhere, and a save takes all of them.
            if self.step and (hosts.count() == 1 or isinstance(e, Stopped | TrainingError)):
                if self.step != self.checkpoints.latest_step():
                    self._save()
                e.add_note(
                    f"The state of step {self.step} is saved: the same command with --resume goes on from there."
                )
            raise

    def _write(self, values: dict[str, float], timings: dict[str, float]) -> None:
        if self.writer is not None:
            self.writer.write(self.step, values, timings)

    def _save(self) -> None:
        counts = {"sampled_tokens": self.sampled_tokens, "num_problems": self.num_problems}
        pending = None if self.pending is None else self.pending.batch.to_arrays()
        self.checkpoints.save(self.step, self.state, {"step": self.step, **counts}, pending)

    def _on_policy_update(self) -> _Update:
        """Samples a batch, gives out its rewards, has it scored.

        Returns:
            What the update is made of: the batch; or, where the step takes parts, the gradient, whose parts were
            computed while others were still being scored. Then the number of scored tokens, metrics and timings.
        """
        rollout, objective = self.config.rollout, self.config.objective
        began = time.monotonic()
        batch, scoring = self.pending or self._roll_out(self.step, self.num_problems)
        ahead = None
        if rollout.ahead and self.step + 1 < self.config.num_steps:
            # Meanwhile the teacher scores what is left of this step's.
            ahead = self._roll_out(self.step + 1, batch.next_problem)
        rows, completions, rewards_B, order, num_dropped, next_problem = batch
        sampled = time.monotonic()
        lengths_B = np.array([len(c.token_ids) - c.prompt_length for c in completions])
        shaped_B = self._shape(rewards_B, lengths_B)
        stopped_B = np.array([c.finish_reason == "stop" for c in completions])
        # Of all hosts' rows: some advantages are relative to all of them.
        all_N4 = hosts.gather(np.stack([shaped_B, rewards_B, lengths_B, stopped_B], axis=1).astype(np.float32))
        advantages_B = np.zeros_like(rewards_B)
        if self.recipe.group_advantage is not None:
            advantages_N = np.asarray(
                self.recipe.group_advantage(all_N4[:, 0].reshape(rollout.num_prompts, -1))
            ).reshape(-1)
            advantages_B = advantages_N[hosts.own_part(len(advantages_N))]
        weights_B = None if self.teacher is None else self._distill_weights(rows, rewards_B)

        def batch_of(indices: Sequence[int]) -> TrainBatch:
            return make_batch(
                [completions[index] for index in indices],
                advantages_B[indices],
                None if scoring is None else scoring.scores(indices),
                max_length=rollout.max_prompt_tokens + rollout.max_new_tokens,
                rewards=shaped_B[indices] if self.recipe.has_critic else None,
                distill_weights=None if weights_B is None else weights_B[indices],
                min_length=hosts.maximum(max(len(completions[index].token_ids) for index in indices)),
            )

        offload = self.teacher is not None and self.teacher.offload
        if scoring is not None:
            if offload:
                self.progress.phase("waking the teacher")
                self.teacher.wake()
            self.progress.phase("waiting for the teacher")
            scoring.submit_rest(rows, completions)
        num_tokens, waited_s = int(all_N4[:, 2].sum(dtype=np.float64)), 0.0
        update: TrainBatch | Gradient
        if self.recipe.takes_parts and not offload:
            # In the order in which they were sampled, which is about that in which they are scored; and it is a
            # function of the samples alone, so that a resumed run adds up in the same order.
            update = self.train_step.begin(self.state, num_tokens=num_tokens, num_sequences=len(all_N4))
            for indices in np.split(order, self.config.optimizer.accumulate):
                if scoring is not None and not scoring.are_scored(indices):
                    jax.block_until_ready(update.grads)  # from here on it is the teacher that is waited for
                    waiting = time.monotonic()
                    scoring.wait(indices)
                    waited_s += time.monotonic() - waiting
                update = self.train_step.add(self.state, update, batch_of(indices))
        else:
            update = batch_of(np.arange(len(rows)))
            waited_s = time.monotonic() - sampled
        if offload:
            self.teacher.sleep()
        values = {
            name: float(mean)
            for name, mean in zip(
                ("reward", "response_length", "stopped_share"),
                all_N4[:, 1:].mean(axis=0, dtype=np.float64),
                strict=True,
            )
        }
        if objective.dynamic_sampling:
            values["dropped_completions"] = float(hosts.total(np.array(num_dropped)))
        timings = {"rollout_s": sampled - began}
        if scoring is not None:
            timings["teacher_wait_s"] = waited_s
            timings["teacher_exposed_share"] = waited_s / max(scoring.busy_s, waited_s, 1e-9)
        if isinstance(update, Gradient):
            timings["train_s"] = time.monotonic() - sampled - waited_s
        return update, num_tokens, values, timings, (next_problem, ahead)

    def _taken_up(self, batch: SampledBatch) -> _Rollout:
        """A batch of an earlier process, sent to the teacher again."""
        scoring = None if self.teacher is None else self.teacher.new_batch()
        if scoring is not None:
            scoring.submit_rest(batch.problems, batch.completions)
        return _Rollout(batch, scoring)

    def _roll_out(self, step: int, next_problem: int) -> _Rollout:
        """Samples num_prompts groups for a step, from that problem on, and sends them to the teacher.

        With dynamic sampling groups whose rewards are all the same give way to others, for so many rounds of prompts at
        most; without it every completion goes to the teacher as it ends.
        """
        rollout, num_rounds = self.config.rollout, self.config.objective.dynamic_sampling
        first_problem, P, G = next_problem, rollout.num_prompts // hosts.count(), rollout.num_completions
        scoring = None if self.teacher is None else self.teacher.new_batch()
        at_once = self.teacher is not None and not self.teacher.offload and not num_rounds
        with_signal: list[_Group] = []
        without: list[_Group] = []
        for number in range(max(1, num_rounds)):
            self.progress.phase("sampling" if number == 0 else f"sampling, round {number + 1}")
            part = hosts.own_part(rollout.num_prompts)
            problems = [self.task.train_problem(next_problem + i) for i in range(part.start, part.stop)]
            next_problem += rollout.num_prompts
            rows = [problem for problem in problems for _ in range(G)]
            completions: list[Completion | None] = [None] * len(rows)
            rewards_B = np.zeros(len(rows), np.float32)
            order: list[int] = []
            seeds_N = _seeds(self.config.seed, step, G * rollout.num_prompts, number)
            policy = self._policy()
            with self.sampler.on_its_devices():
                for completion in self.sampler.sample(
                    policy,
                    [problem.prompt_ids for problem in rows],
                    seeds=seeds_N[part.start * G : part.stop * G],
                    temperature=rollout.temperature,
                ):
                    index = completion.index
                    order.append(index)
                    completions[index] = completion
                    rewards_B[index] = self.task.reward(rows[index], completion.completion_ids)
                    if at_once:
                        scoring.submit(index, rows[index], completion)
            finished = [completion for completion in completions if completion is not None]
            assert len(finished) == len(rows)
            if not num_rounds:
                return _Rollout(SampledBatch(rows, finished, rewards_B, np.array(order), 0, next_problem), scoring)
            lengths_B = np.array([len(c.completion_ids) for c in finished])
            has_signal_P = np.asarray(advantages.has_signal(self._shape(rewards_B, lengths_B).reshape(P, G)))
            for p in range(P):
                part = slice(p * G, (p + 1) * G)
                group = _Group(rows[part], finished[part], rewards_B[part])
                (with_signal if has_signal_P[p] else without).append(group)
            if len(with_signal) >= P:
                break
        # Some hosts may have needed more rounds than others.
        next_problem = first_problem + hosts.maximum(next_problem - first_problem)
        num_sampled = (len(with_signal) + len(without)) * G
        groups = (with_signal + without)[:P]
        finished = [completion for group in groups for completion in group.completions]
        batch = SampledBatch(
            [problem for group in groups for problem in group.problems],
            finished,
            np.concatenate([group.rewards for group in groups]),
            np.argsort([len(completion.token_ids) for completion in finished], kind="stable"),
            num_sampled - P * G,
            next_problem,
        )
        if rollout.ahead and scoring is not None:  # else when it is the step's turn
            scoring.submit_rest(batch.problems, batch.completions)
        return _Rollout(batch, scoring)

    def _shape(self, rewards_B: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        """The rewards that train: the task's, less what the last tokens of a long completion cost."""
        if not (buffer := self.config.objective.overlong_buffer):
            return rewards_B
        max_length = self.config.rollout.max_new_tokens
        return rewards_B + np.asarray(advantages.overlong_penalty(lengths_B, max_length=max_length, buffer=buffer))

    def _distill_weights(self, rows: list[Problem], rewards_B: np.ndarray) -> np.ndarray | None:
        """float32 of each row; None: all the same."""
        objective, teacher = self.config.objective, self.config.teacher
        weights_B: np.ndarray | None = None
        if objective.distill_where == "wrong":
            each_B1 = np.ones((len(rewards_B), 1), bool)
            wrong_B1 = weights.reward_guided_mask(rewards_B, each_B1, threshold=objective.distill_threshold)
            weights_B = np.asarray(wrong_B1, np.float32)[:, 0]
        if objective.teacher_weights and teacher is not None and teacher.several:
            by_teacher_B = [objective.teacher_weights.get(self.task.teacher(problem), 1.0) for problem in rows]
            weights_B = np.asarray(by_teacher_B, np.float32) * (1 if weights_B is None else weights_B)
        return weights_B

    def _supervised_update(self) -> _Update:
        began = time.monotonic()
        size = self.config.optimizer.batch_size
        part = hosts.own_part(size)
        problems = [self.task.train_problem(self.step * size + i) for i in range(part.start, part.stop)]
        solutions = [self.task.solution_ids(problem) for problem in problems]
        lengths = [len(p.prompt_ids) + len(ids) for p, ids in zip(problems, solutions, strict=True)]
        batch = make_supervised_batch(
            [problem.prompt_ids for problem in problems],
            solutions,
            max_length=self.config.rollout.max_prompt_tokens + self.config.rollout.max_new_tokens,
            min_length=hosts.maximum(max(lengths)),
        )
        return batch, int(hosts.total(batch.loss_mask.sum())), {}, {"data_s": time.monotonic() - began}, (0, None)

    def _evaluate(self, values: dict[str, float]) -> dict[str, float]:
        """Adds held-out results to `values`; returns how long it took."""
        self.progress.phase("evaluating")
        began = time.monotonic()
        config = self.config
        problems = self.task.eval_problems(config.eval.num_prompts)
        for name, greedy in (("eval/accuracy", False), ("eval/accuracy_greedy", True)):
            if greedy and not config.eval.greedy:
                continue
            result = evaluate(
                self.sampler,
                self._policy(),
                self.task,
                problems,
                temperature=config.rollout.temperature,
                greedy=greedy,
                seed=config.seed,
            )
            values[name] = result.accuracy
        return {"eval_s": time.monotonic() - began}


class _Rollout(NamedTuple):
    """What was sampled for a step, and its scoring; None without a teacher."""

    batch: SampledBatch
    scoring: BatchScoring | None


# What an update is made of, the number of its tokens, metrics, timings; and what holds once it is made: the next
# problem, and the next step's rollout if it is there already.
_Update = tuple[TrainBatch | Gradient, int, dict[str, float], dict[str, float], tuple[int, _Rollout | None]]


class _Group(NamedTuple):
    """The completions of one prompt."""

    problems: list[Problem]
    completions: list[Completion]
    rewards: np.ndarray


class _ToOwn:
    """Brings parameters that lie over all hosts onto each host's own devices, in the dtype that sampling reads.

    One program: they are gathered over hosts, and stay sharded over a host's devices.
    """

    def __init__(self, decoder: models.Decoder, own: Mesh, host_mesh: Mesh):
        def cast(path: Any, x: jax.Array) -> jax.Array:
            # Norms are multiplied in float32, whatever the rest is computed in.
            return x if "norm" in jax.tree_util.keystr(path) else x.astype(decoder.compute_dtype)

        self._shardings = sharding.param_shardings(decoder, own)
        self._gather = jax.jit(
            lambda params: jax.tree_util.tree_map_with_path(cast, params),
            out_shardings=sharding.param_shardings(decoder, host_mesh),
        )

    def __call__(self, params: nnx.State) -> nnx.State:
        def own(x: jax.Array, sharding: NamedSharding) -> jax.Array:
            parts = [shard.data for shard in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

        return jax.tree.map(own, self._gather(params), self._shardings)


def _check_hosts(config: TrainConfig) -> None:
    """Whether a run can be split over the processes there are. Raises ConfigError."""
    num = hosts.count()
    if num == 1:
        return
    on_policy = config.objective.kind == "on_policy"
    key = "rollout.num_prompts" if on_policy else "optimizer.batch_size"
    size = config.rollout.num_prompts if on_policy else config.optimizer.batch_size
    if size % num:
        raise ConfigError(f"{key} = {size} does not split over {num} processes: each samples its own prompts")
    if config.rollout.ahead:
        raise ConfigError(f"rollout.ahead: 1 is for one process, and there are {num}: leave it out")
    teacher = config.teacher
    if teacher is not None and teacher.offload:
        raise ConfigError(f"teacher.offload is for one process, and there are {num}: give the teacher its own devices")
    if teacher is not None and teacher.spawn is not None:
        names = {name.tobytes() for name in hosts.gather(_host_name()[None])}
        if len(names) > 1:
            raise ConfigError(
                f"teacher.spawn: the sidecar listens on loopback, and the processes are on {len(names)} hosts: start "
                "it with `jdistill teacher`, and give teacher.endpoints"
            )


def _host_name() -> np.ndarray:
    return np.frombuffer(hashlib.sha256(socket.gethostname().encode()).digest()[:8], np.uint8)


def _seeds(seed: int, step: int, num: int, number: int = 0) -> np.ndarray:
    """uint32 [num]: a function of its arguments alone, so that a resumed run samples what the first one would have."""
    key = [seed, step, number] if number else [seed, step]
    return np.random.SeedSequence(key).generate_state(num, np.uint32)


def _prepare_run_dir(config: TrainConfig, *, resume: bool, overwrite: bool) -> None:
    run_dir = pathlib.Path(config.run_dir)
    stored_path = run_dir / "config.json"
    if overwrite and run_dir.exists():
        if any(run_dir.iterdir()) and not stored_path.exists():
            raise ConfigError(f"{run_dir} holds no run of jdistill: it is not overwritten; delete it yourself")
        shutil.rmtree(run_dir)
    if stored_path.exists():
        if not resume:
            raise ConfigError(
                f"{run_dir} holds a run already: --resume goes on with it, --overwrite begins anew, run_dir=... goes "
                "elsewhere"
            )
        _check_same(json.loads(stored_path.read_text()), config, run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    stored_path.write_text(config.model_dump_json(indent=2))


def _check_same(stored: dict[str, Any], config: TrainConfig, run_dir: pathlib.Path) -> None:
    now = config.model_dump(mode="json")
    different = [
        f"{key}: was {stored.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(set(stored) | set(now))
        if key not in MAY_CHANGE_ON_RESUME and stored.get(key) != now.get(key)
    ]
    if different:
        raise ConfigError(
            f"{run_dir} was made with another configuration, so the resumed run would not be the same run. "
            "Set the old values, or take another run_dir.\n  " + "\n  ".join(different)
        )


class _StopSignals:
    """Turns SIGINT and SIGTERM into Stopped, but never between an update and its line in the metrics file."""

    def __init__(self) -> None:
        self._held = False
        self._pending: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids handlers
            for signum in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(signum) is signal.SIG_IGN:
                    continue  # a job in the background of a shell: Ctrl-C is for somebody else
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._held or hosts.count() > 1:  # of several hosts all stop after the same step
            self._pending = signum
        else:
            raise Stopped(signum)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A signal that comes in this block is raised at its end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if signum := hosts.maximum(self._pending or 0):
            raise Stopped(signum)
