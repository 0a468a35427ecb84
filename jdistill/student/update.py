"""Turns the rollout of a step, or supervised examples, into what the training step updates from.

Dimension key: B rows of this process, N rows of all processes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jdistill.config import TrainConfig
from jdistill.losses import advantages, weights
from jdistill.rollout.collect import Rollout, shape_rewards
from jdistill.rollout.completion import Completion
from jdistill.rollout.sampled import SampledBatch
from jdistill.student import hosts
from jdistill.student.batch import TrainBatch, make_batch, make_supervised_batch
from jdistill.student.run import Position, Run
from jdistill.student.step import Gradient
from jdistill.tasks.base import Problem, Task


class Update(NamedTuple):
    """One update, ready to be made."""

    # The batch; or, where the step takes parts, the gradient whose parts were computed while others were still being
    # scored.
    content: TrainBatch | Gradient
    num_tokens: int  # scored, over all processes
    values: dict[str, float]  # metrics
    timings: dict[str, float]
    # The position once the update is made.
    num_problems: int = 0
    pending: Rollout | None = None


def supervised_update(run: Run, position: Position) -> Update:
    """Makes a batch of the task's solutions."""
    began = time.monotonic()
    size = run.config.optimizer.batch_size
    part = hosts.own_part(size)
    problems = [run.task.train_problem(position.step * size + i) for i in range(part.start, part.stop)]
    solutions = [run.task.solution_ids(problem) for problem in problems]
    lengths = [len(p.prompt_ids) + len(ids) for p, ids in zip(problems, solutions, strict=True)]
    batch = make_supervised_batch(
        [problem.prompt_ids for problem in problems],
        solutions,
        max_length=run.config.rollout.max_length,
        min_length=hosts.maximum(max(lengths)),
    )
    return Update(batch, int(hosts.total(batch.loss_mask.sum())), {}, {"data_s": time.monotonic() - began})


def on_policy_update(run: Run, position: Position) -> Update:
    """Collects the rollout of the step, with rollout.ahead that of the next one too, and waits for its scores."""
    began, config = time.monotonic(), run.config
    rollout = position.pending
    if rollout is None:
        rollout = run.collector.collect(run.policy.weights(position.state), position.step, position.num_problems)
    next_problem, ahead = rollout.batch.next_problem, None
    if config.rollout.ahead and position.step + 1 < config.num_steps:
        # Meanwhile the teacher scores the rest of this step's completions.
        ahead = run.collector.collect(run.policy.weights(position.state), position.step + 1, next_problem)
    run.policy.forget()  # nothing more is sampled before the update: frees the memory for it
    sampled = time.monotonic()
    rows = _rows(run, rollout.batch)
    offload = run.teacher is not None and run.teacher.offload
    run.collector.send(rollout)
    if rollout.scoring is not None:
        run.progress.phase("waiting for the teacher")
    content: TrainBatch | Gradient
    if run.recipe.takes_parts and not offload:
        content, waited_s = _gradient_of_parts(run, position, rollout, rows)
    else:
        content = _batch(run, rollout, rows, np.arange(len(rows.advantages)))
        waited_s = time.monotonic() - sampled
    if offload:
        run.teacher.sleep()
    timings = {"rollout_s": sampled - began}
    if rollout.scoring is not None:
        timings["teacher_wait_s"] = waited_s
        timings["teacher_exposed_share"] = waited_s / max(rollout.scoring.busy_s, waited_s, 1e-9)
    if isinstance(content, Gradient):
        timings["train_s"] = time.monotonic() - sampled - waited_s
    values = rows.values | _readable_share(run.task, rollout.batch.completions)
    if config.objective.dynamic_sampling:
        values = values | {"dropped_completions": float(hosts.total(np.array(rollout.batch.num_dropped)))}
    return Update(content, rows.num_tokens, values, timings, next_problem, ahead)


class _Rows(NamedTuple):
    """What each row is trained with, and counts and means over all processes."""

    rewards: np.ndarray  # float32 [B], shaped
    advantages: np.ndarray  # float32 [B]; 0 without a reward, and with a critic
    distill_weights: np.ndarray | None  # float32 [B]; None: all the same
    num_tokens: int
    num_rows: int
    values: dict[str, float]


def _rows(run: Run, batch: SampledBatch) -> _Rows:
    rewards_B, completions = batch.rewards, batch.completions
    lengths_B = np.array([len(c.token_ids) - c.prompt_length for c in completions])
    shaped_B = shape_rewards(run.config, rewards_B, lengths_B)
    stopped_B = np.array([c.finish_reason == "stop" for c in completions])
    # Gathered from all processes, since some advantages are relative to all rows.
    all_N4 = hosts.gather(np.stack([shaped_B, rewards_B, lengths_B, stopped_B], axis=1).astype(np.float32))
    advantages_B, values = np.zeros_like(rewards_B), {}
    if run.recipe.group_advantage is not None:
        rewards_PG = all_N4[:, 0].reshape(run.config.rollout.num_prompts, -1)
        advantages_N = np.asarray(run.recipe.group_advantage(rewards_PG)).reshape(-1)
        advantages_B = advantages_N[hosts.own_part(len(advantages_N))]
        values["signal_share"] = signal_share(rewards_PG)
    means = all_N4[:, 1:].mean(axis=0, dtype=np.float64)
    names = ("reward", "response_length", "stopped_share")
    return _Rows(
        rewards=shaped_B,
        advantages=advantages_B,
        distill_weights=_distill_weights(run.config, run.task, batch.problems, rewards_B),
        num_tokens=int(all_N4[:, 2].sum(dtype=np.float64)),
        num_rows=len(all_N4),
        values=values | {name: float(mean) for name, mean in zip(names, means, strict=True)},
    )


def _readable_share(task: Task, completions: Sequence[Completion]) -> dict[str, float]:
    """Returns the metric over all processes; nothing for a task that does not define it."""
    readable_B = [task.is_readable(task.response(completion)) for completion in completions]
    if None in readable_B:
        return {}
    return {"readable_share": float(hosts.gather(np.array(readable_B, np.float32)[:, None]).mean(dtype=np.float64))}


def signal_share(rewards_PG: np.ndarray) -> float:
    """Share of groups whose rewards differ; with one completion per prompt the batch is the group."""
    groups = rewards_PG if rewards_PG.shape[1] > 1 else rewards_PG.T
    return float(np.mean(np.asarray(advantages.has_signal(groups))))


def _distill_weights(
    config: TrainConfig, task: Task, problems: Sequence[Problem], rewards_B: np.ndarray
) -> np.ndarray | None:
    """float32 [B], weight of each row in the distillation; None: all the same."""
    objective, teacher = config.objective, config.teacher
    weights_B: np.ndarray | None = None
    if not objective.has_distillation:
        return None
    if objective.distill_where == "wrong":
        each_B1 = np.ones((len(rewards_B), 1), bool)
        wrong_B1 = weights.reward_guided_mask(rewards_B, each_B1, threshold=objective.distill_threshold)
        weights_B = np.asarray(wrong_B1, np.float32)[:, 0]
    if objective.teacher_weights and teacher is not None and teacher.several:
        by_teacher_B = [objective.teacher_weights.get(task.teacher(problem), 1.0) for problem in problems]
        weights_B = np.asarray(by_teacher_B, np.float32) * (1 if weights_B is None else weights_B)
    return weights_B


def _gradient_of_parts(run: Run, position: Position, rollout: Rollout, rows: _Rows) -> tuple[Gradient, float]:
    """The gradient, each part computed while the next is being scored; and the time in which the device was idle.

    The parts are taken in the order in which their rows were sampled, which is about that in which they are scored.
    It is a function of the samples alone, so that a resumed run adds up in the same order.
    """
    scoring, waited_s = rollout.scoring, 0.0
    gradient = run.train_step.begin(position.state, num_tokens=rows.num_tokens, num_sequences=rows.num_rows)
    for indices in np.split(rollout.batch.order, run.config.optimizer.accumulate):
        if scoring is not None and not scoring.are_scored(indices):
            jax.block_until_ready(gradient.grads)  # from here on the teacher is what the step waits for
            waiting = time.monotonic()
            scoring.wait(indices)
            waited_s += time.monotonic() - waiting
        gradient = run.train_step.add(position.state, gradient, _batch(run, rollout, rows, indices))
    return gradient, waited_s


def _batch(run: Run, rollout: Rollout, rows: _Rows, indices: np.ndarray) -> TrainBatch:
    """The batch of some rows; waits for their scores."""
    completions = [rollout.batch.completions[index] for index in indices]
    return make_batch(
        completions,
        rows.advantages[indices],
        None if rollout.scoring is None else rollout.scoring.scores(indices),
        max_length=run.config.rollout.max_length,
        rewards=rows.rewards[indices] if run.recipe.has_critic else None,
        distill_weights=None if rows.distill_weights is None else rows.distill_weights[indices],
        min_length=hosts.maximum(max(len(completion.token_ids) for completion in completions)),
        num_shared_ids=run.recipe.num_shared_ids,
    )
