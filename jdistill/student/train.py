"""The loop: prompts -> rollout -> reward + teacher -> update, with a way back from every stop."""

from __future__ import annotations

import contextlib
import json
import logging
import pathlib
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from types import FrameType
from typing import Any

import jax
import numpy as np
from flax import nnx

from jdistill import checkpoint_files, models, tasks
from jdistill.client import Teacher, TeacherClient
from jdistill.config import ConfigError, TrainConfig
from jdistill.losses import advantages
from jdistill.student import sharding
from jdistill.student.batch import TrainBatch, make_batch, make_supervised_batch
from jdistill.student.checkpoint import Checkpoints
from jdistill.student.evaluate import evaluate
from jdistill.student.metrics import MetricsWriter
from jdistill.student.optimizer import make_optimizer
from jdistill.student.progress import Progress
from jdistill.student.rollout import Completion, Sampler
from jdistill.student.step import init_state, make_train_step
from jdistill.student.teacher_process import TeacherProcess
from jdistill.wire import credentials
from jdistill.wire.types import SequenceToScore, ServerInfo, TokenScores

logger = logging.getLogger(__name__)

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
    if jax.process_count() > 1:
        raise ConfigError(f"one process trains, {jax.process_count()} were started: multi-host is not supported yet")
    run_dir = _prepare_run_dir(config, resume=resume, overwrite=overwrite)
    with _StopSignals() as stop, contextlib.ExitStack() as stack:
        trainer = _Trainer(config, run_dir, stack, label or run_dir.name)
        trainer.run(stop)


class _Trainer:
    """The parts of one run, made in an order in which the cheap mistakes show first."""

    def __init__(self, config: TrainConfig, run_dir: pathlib.Path, stack: contextlib.ExitStack, label: str):
        self.config = config
        self.on_policy = config.objective.kind == "on_policy"
        self.progress = Progress(label, config.num_steps)
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
        self.client: TeacherClient | None = None
        self.num_candidates = 0
        if self.on_policy and config.objective.distill_loss_weight > 0:
            self._connect(run_dir, stack)
        self.mesh = sharding.make_mesh(config.mesh)
        stack.enter_context(jax.set_mesh(self.mesh))
        kwargs = {"compute_dtype": config.model.compute_dtype, "remat": config.model.remat, "mesh": self.mesh}
        if config.model.init == "random":
            decoder = models.random_init(config.model.path, config.seed, **kwargs)
        else:
            decoder = models.load(config.model.path, **kwargs)
        graphdef, params = nnx.split(decoder, nnx.Param)
        self.sampler = Sampler(
            graphdef,
            max_prompt_tokens=config.rollout.max_prompt_tokens,
            max_new_tokens=config.rollout.max_new_tokens,
            stop_token_ids=self.task.stop_token_ids,
            num_candidates=self.num_candidates,
            chunk_tokens=config.rollout.chunk_tokens,
            mesh=self.mesh,
        )
        optimizer = make_optimizer(config.optimizer, config.num_steps)
        self.state = init_state(params, optimizer, self.mesh)
        self.train_step = make_train_step(graphdef, config, optimizer, self.mesh)
        self.checkpoints = stack.enter_context(contextlib.closing(Checkpoints(run_dir, keep=config.checkpoint.keep)))
        self.step = 0
        self.sampled_tokens = 0
        if self.checkpoints.latest_step() is not None:
            self.state, extra = self.checkpoints.restore(self.state)
            self.step = int(extra["step"])
            self.sampled_tokens = int(extra["sampled_tokens"])
        self.writer = stack.enter_context(contextlib.closing(MetricsWriter(run_dir)))
        self.writer.truncate_to(self.step if self.step else -1)
        self.progress.begin_at(self.step)
        stack.enter_context(self.progress)

    def _check_lengths(self) -> None:
        rollout, limit = self.config.rollout, self.model_config.max_position_embeddings
        longest = rollout.max_prompt_tokens + rollout.max_new_tokens
        if longest > limit:
            raise ConfigError(
                f"rollout.max_prompt_tokens + rollout.max_new_tokens = {longest}, but {self.config.model.path} "
                f"has max_position_embeddings = {limit}: make the first two smaller"
            )

    def _connect(self, run_dir: pathlib.Path, stack: contextlib.ExitStack) -> None:
        teacher, objective = self.config.teacher, self.config.objective
        assert teacher is not None
        endpoints = teacher.endpoints
        if teacher.spawn is not None:
            spawn = teacher.spawn.model_copy(update={"offload": teacher.offload or teacher.spawn.offload})
            sidecar = stack.enter_context(TeacherProcess(spawn, run_dir / "teacher.log"))
            endpoints = [sidecar.endpoint]
        assert endpoints is not None
        token_file = teacher.token_file
        self.client = stack.enter_context(
            TeacherClient(
                Teacher(endpoints, model=teacher.model),
                credentials=credentials.channel_credentials(
                    ca=teacher.tls_ca, cert=teacher.tls_cert, key=teacher.tls_key
                ),
                token=None if token_file is None else lambda: credentials.read_token(token_file),
                deadline_s=teacher.deadline_s,
                max_in_flight=teacher.max_in_flight,
                batch_tokens=teacher.batch_tokens,
                hedge_after_s=teacher.hedge_after_s,
                stall_s=teacher.stall_s,
                expected_tokenizer_fingerprint=checkpoint_files.tokenizer_fingerprint(self.config.model.path),
                on_wait=lambda message: self.progress.say(message or "the teacher is back"),
            )
        )
        if teacher.offload:
            self.client.wake()  # a run that was killed may have left it asleep
            self.client.check_can_sleep()  # now rather than after the first rollout
        info = self.client.info()
        num_candidates = min(objective.distill_top_k, self.model_config.vocab_size)
        can = info.model.max_candidate_count >= num_candidates
        if objective.distillation == "topk_reverse_kl" and not can:
            raise ConfigError(
                "objective.distillation: topk_reverse_kl needs a teacher that scores "
                f"{num_candidates} candidates a token; {info.engine} {info.engine_version} at "
                f"{endpoints[0]} scores {info.model.max_candidate_count}: lower "
                "objective.distill_top_k, use another engine, or set objective.distillation: sampled_reverse_kl"
            )
        self.num_candidates = num_candidates if can and objective.distillation != "sampled_reverse_kl" else 0
        if objective.distillation == "auto" and not can:
            logger.warning(
                "%s %s cannot score %d candidates a token: distilling from the sampled tokens alone",
                info.engine,
                info.engine_version,
                num_candidates,
            )
        check_teacher(self.config, self.model_config, info)
        if teacher.offload:
            self.client.sleep()  # before the student takes its memory

    def run(self, stop: _StopSignals) -> None:
        config = self.config
        try:
            if self.step == 0 and config.eval.every:
                values: dict[str, float] = {"sampled_tokens": 0}
                timings = self._evaluate(values)
                self.writer.write(0, values, timings)
                self.progress.step(0, values)
            while self.step < config.num_steps:
                started = time.monotonic()
                batch, values, timings = self._on_policy_batch() if self.on_policy else self._supervised_batch()
                num_tokens = int(batch.loss_mask.sum())
                self.progress.phase("training")
                with stop.held():  # the state and its line in metrics.jsonl change together
                    began = time.monotonic()
                    self.state, results = self.train_step(self.state, batch)
                    results = {name: float(value) for name, value in jax.device_get(results).items()}
                    timings["train_s"] = time.monotonic() - began
                    if not results.pop("finite"):
                        raise TrainingError(
                            f"NaN or infinity in the loss or the gradient of step {self.step + 1} "
                            f"(loss {results['loss']}, gradient norm {results['grad_norm']}); the update was not made. "
                            "Lower optimizer.learning_rate or optimizer.clip_norm, or set model.compute_dtype: float32"
                        )
                    self.step += 1
                    values |= results
                    if self.on_policy:
                        self.sampled_tokens += num_tokens
                        values["sampled_tokens"] = self.sampled_tokens
                    timings["step_s"] = time.monotonic() - started
                    timings["tokens_per_s"] = num_tokens / timings["step_s"]
                    last = self.step == config.num_steps
                    if config.eval.every and (self.step % config.eval.every == 0 or last):
                        timings |= self._evaluate(values)
                    self.writer.write(self.step, values, timings)
                    if last or (config.checkpoint.every and self.step % config.checkpoint.every == 0):
                        self._save()
                self.progress.step(self.step, values | timings)
        except BaseException as e:
            if self.step:
                if self.step != self.checkpoints.latest_step():
                    self._save()
                e.add_note(
                    f"The state of step {self.step} is saved: the same command with --resume goes on from there."
                )
            raise

    def _save(self) -> None:
        self.checkpoints.save(self.step, self.state, {"step": self.step, "sampled_tokens": self.sampled_tokens})

    def _on_policy_batch(self) -> tuple[TrainBatch, dict[str, float], dict[str, float]]:
        """Samples a batch; every completion goes to the reward and the teacher as it ends."""
        rollout = self.config.rollout
        began = time.monotonic()
        self.progress.phase("sampling")
        first = self.step * rollout.num_prompts
        problems = [self.task.train_problem(first + i) for i in range(rollout.num_prompts)]
        rows = [problem for problem in problems for _ in range(rollout.num_completions)]
        completions: list[Completion | None] = [None] * len(rows)
        rewards_B = np.zeros(len(rows), np.float32)
        futures: dict[int, Future[TokenScores]] = {}
        # An offloaded teacher has no memory while the student samples: it scores the finished rollout at once.
        offload = self.config.teacher is not None and self.config.teacher.offload
        for completion in self.sampler.sample(
            self.state.params,
            [problem.prompt_ids for problem in rows],
            seeds=_seeds(self.config.seed, self.step, len(rows)),
            temperature=rollout.temperature,
        ):
            index, start = completion.index, completion.prompt_length
            completions[index] = completion
            rewards_B[index] = self.task.reward(rows[index], completion.token_ids[start:])
            if self.client is not None and not offload:
                futures[index] = self.client.submit(_to_score(completion), temperature=rollout.temperature)
        sampled = time.monotonic()
        finished = [completion for completion in completions if completion is not None]
        assert len(finished) == len(rows)
        scores: list[TokenScores] | None = None
        if self.client is not None and offload:
            self.progress.phase("waking the teacher")
            self.client.wake()
            self.progress.phase("waiting for the teacher")
            scores = self.client.score([_to_score(c) for c in finished], temperature=rollout.temperature)
            self.client.sleep()
        elif self.client is not None:
            self.progress.phase("waiting for the teacher")
            scores = [futures[index].result() for index in range(len(rows))]
        scored = time.monotonic()
        rewards_PG = rewards_B.reshape(rollout.num_prompts, rollout.num_completions)
        advantages_PG = np.zeros_like(rewards_PG)
        if self.config.objective.rl_loss_weight:
            advantages_PG = np.asarray(advantages.grpo(rewards_PG))
        batch = make_batch(
            finished,
            advantages_PG.reshape(-1),
            scores,
            max_length=rollout.max_prompt_tokens + rollout.max_new_tokens,
        )
        response_lengths_B = [len(c.token_ids) - c.prompt_length for c in finished]
        values = {
            "reward": float(rewards_B.mean()),
            "response_length": float(np.mean(response_lengths_B)),
            "stopped_share": float(np.mean([c.finish_reason == "stop" for c in finished])),
        }
        timings = {"rollout_s": sampled - began}
        if self.client is not None:
            timings["teacher_wait_s"] = scored - sampled
        return batch, values, timings

    def _supervised_batch(self) -> tuple[TrainBatch, dict[str, float], dict[str, float]]:
        began = time.monotonic()
        size = self.config.optimizer.batch_size
        problems = [self.task.train_problem(self.step * size + i) for i in range(size)]
        batch = make_supervised_batch(
            [problem.prompt_ids for problem in problems],
            [self.task.solution_ids(problem) for problem in problems],
            max_length=self.config.rollout.max_prompt_tokens + self.config.rollout.max_new_tokens,
        )
        return batch, {}, {"data_s": time.monotonic() - began}

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
                self.state.params,
                self.task,
                problems,
                temperature=config.rollout.temperature,
                greedy=greedy,
                seed=config.seed,
            )
            values[name] = result.accuracy
        return {"eval_s": time.monotonic() - began}


def check_teacher(config: TrainConfig, model_config: models.DecoderConfig, info: ServerInfo) -> None:
    """The preflight: whether this teacher can score what this student will sample.

    Raises:
        ConfigError: vocabulary, length or temperature does not fit; names both sides and the remedy.
    """
    teacher = info.model
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    if model_config.vocab_size > teacher.vocab_size:
        raise ConfigError(
            f"the student's vocabulary has {model_config.vocab_size} ids, the teacher's {teacher.vocab_size}: it "
            "cannot score all that the student may sample; use a teacher of the same family"
        )
    if longest > teacher.max_sequence_length:
        raise ConfigError(
            f"rollout.max_prompt_tokens + rollout.max_new_tokens = {longest}, but the teacher takes sequences of at "
            f"most {teacher.max_sequence_length} tokens: lower them, or raise the teacher's max_sequence_length"
        )
    if config.rollout.temperature != 1 and not teacher.any_temperature:
        raise ConfigError(
            f"rollout.temperature = {config.rollout.temperature}, but {info.engine} {info.engine_version} gives "
            "log-probabilities at temperature 1 only: set rollout.temperature: 1, or use an engine with any_temperature"
        )


def _to_score(completion: Completion) -> SequenceToScore:
    span = (completion.prompt_length, len(completion.token_ids))
    return SequenceToScore(completion.token_ids, (span,), completion.candidate_ids)


def _seeds(seed: int, step: int, num: int) -> np.ndarray:
    """uint32 [num]: a function of its arguments alone, so that a resumed run samples what the first one would have."""
    return np.random.SeedSequence([seed, step]).generate_state(num, np.uint32)


def _prepare_run_dir(config: TrainConfig, *, resume: bool, overwrite: bool) -> pathlib.Path:
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
    return run_dir


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
        if self._held:
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
        if self._pending is not None:
            raise Stopped(self._pending)
