"""The training loop: collect a rollout, update, evaluate, write a line of metrics, save."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Mapping

import jax

from jdistill.config import TrainConfig
from jdistill.student import devices, hosts, recipe
from jdistill.student.advantage_watch import AdvantageWatch
from jdistill.student.batch import TrainBatch
from jdistill.student.compilations import COMPILATIONS
from jdistill.student.evaluate import held_out_accuracy
from jdistill.student.run import Position, Run, make_run
from jdistill.student.run_dir import RunDirectory
from jdistill.student.signals import Stopped, StopSignals
from jdistill.student.update import Update, on_policy_update, supervised_update


class TrainingError(RuntimeError):
    """Training cannot continue; the state of the last good step is saved, and the message names the remedy."""


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False, label: str | None = None) -> None:
    """Trains a student and writes metrics and checkpoints to `config.run_dir`.

    Args:
        config: configuration of the run.
        resume: continue from the newest checkpoint in run_dir, exactly as if the run had never stopped.
        overwrite: delete an earlier run in run_dir, once this one begins.
        label: heads the progress line; default: the name of the run directory.

    Raises:
        ConfigError: the configuration does not fit the data, the checkpoint, the teacher, or the run being resumed.
        TeacherError: no scores before the deadline; the state is saved.
        TrainingError: NaN; the state is saved.
        Stopped: SIGINT or SIGTERM; the state is saved.
    """
    recipe.check(config)
    asked, (config, note) = config, devices.reserve(config)  # before anything asks JAX for its devices
    hosts.check_split(config)
    directory = RunDirectory(asked, resume=resume, overwrite=overwrite)
    if note and hosts.is_first():
        print(note, file=sys.stderr)
    with StopSignals() as stop, contextlib.ExitStack() as stack:
        stack.enter_context(directory.locked())
        try:
            run, position = make_run(config, directory, stack, label=label or directory.path.name)
            try:
                _loop(run, position, stop)
            except BaseException as e:
                _save_after(e, run, position)
                raise
        except (Stopped, TrainingError):
            raise
        except BaseException as e:
            if hosts.count() > 1:  # the other processes do not know of the error, and would wait for this one
                hosts.leave(e)
            raise


def _loop(run: Run, position: Position, stop: StopSignals) -> None:
    """Trains from `position`, which it advances, to the last step."""
    config = run.config
    if position.step == 0 and config.eval.every:
        values: dict[str, float] = {"sampled_tokens": 0}
        timings = _evaluate(run, position, values)
        run.write(position, values, timings)
        run.progress.step(0, values)
    watch = AdvantageWatch()
    while position.step < config.num_steps:
        started, compiled = time.monotonic(), (COMPILATIONS.count, COMPILATIONS.seconds)
        update = on_policy_update(run, position) if run.recipe.on_policy else supervised_update(run, position)
        values, timings = update.values, update.timings
        run.progress.phase("training")
        with stop.held():  # the state and its line in metrics.jsonl change together
            values |= _apply(run, position, update)
            timings["step_s"] = time.monotonic() - started
            timings["compilations"] = COMPILATIONS.count - compiled[0]
            timings["compile_s"] = COMPILATIONS.seconds - compiled[1]
            timings["tokens_per_s"] = update.num_tokens / timings["step_s"]
            is_last = position.step == config.num_steps
            if _is_due(config.eval.every, position.step) or (is_last and config.eval.every):
                timings |= _evaluate(run, position, values)
            run.write(position, values, timings)
            if _is_due(config.checkpoint.every, position.step) or is_last:
                run.save(position)
        run.progress.step(position.step, values | timings)
        if (warning := watch.warning(values, is_last=is_last)) is not None:
            run.progress.say(warning)


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _apply(run: Run, position: Position, update: Update) -> dict[str, float]:
    """Makes the update, advances the position, and returns the metrics of the step.

    Raises:
        TrainingError: the loss or the gradient is not finite; the position stays as it was.
    """
    began = time.monotonic()
    run.policy.forget()  # the step takes over the memory of the parameters
    if isinstance(update.content, TrainBatch):
        position.state, results = run.train_step(position.state, update.content)
    else:
        position.state, results = run.train_step.apply(position.state, update.content)
    results = {name: float(value) for name, value in jax.device_get(results).items()}
    update.timings["train_s"] = update.timings.get("train_s", 0.0) + time.monotonic() - began
    if not results.pop("finite"):
        raise TrainingError(not_finite(position.step + 1, results))
    position.step += 1
    position.num_problems, position.pending = update.num_problems, update.pending
    if run.recipe.on_policy:
        position.sampled_tokens += update.num_tokens
        results["sampled_tokens"] = position.sampled_tokens
    return results


def not_finite(step: int, results: Mapping[str, float]) -> str:
    """Names what was NaN or infinite in the metrics of a step, and the remedy for that cause."""
    broken = [name for name, value in results.items() if not math.isfinite(value)]
    student = [name for name in ("entropy", "sampler_gap_mean") if name in broken]
    teacher = [name for name in ("reverse_kl", "distill_loss") if name in broken]
    if teacher and not student:
        remedy = (
            "The student's own log-probs are finite, so the teacher's numbers or token ids are the cause, and a lower "
            "learning rate does not help: look at its log, score a completion with `jdistill score`, and compare the "
            "two checkpoints and their dtypes"
        )
    else:
        remedy = "Lower optimizer.learning_rate or optimizer.clip_norm, or set model.compute_dtype: float32"
    return f"NaN or infinity in {', '.join(broken)} of step {step}; the update was not made. {remedy}"


def _evaluate(run: Run, position: Position, values: dict[str, float]) -> dict[str, float]:
    """Adds the held-out accuracy to `values`; returns how long it took."""
    run.progress.phase("evaluating")
    began, config = time.monotonic(), run.config
    values |= held_out_accuracy(
        run.sampler,
        run.policy.weights(position.state),
        run.task,
        run.task.eval_problems(config.eval.num_prompts),
        temperature=config.rollout.temperature,
        seed=config.seed,
        greedy_too=config.eval.greedy,
    )
    return {"eval_s": time.monotonic() - began}


def _save_after(error: BaseException, run: Run, position: Position) -> None:
    """Saves the position after an error that stops the run, and says so in a note on the error."""
    # With several processes only these errors are raised by all of them, and saving takes all of them.
    if position.step and (hosts.count() == 1 or isinstance(error, Stopped | TrainingError)):
        run.save(position)
        error.add_note(
            f"The state of step {position.step} is saved: the same command with --resume continues from there."
        )
