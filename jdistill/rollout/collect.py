"""Collects the episodes of a step: prompts, sampling, rewards, dynamic sampling, and submission to the teacher.

Dimension key: P prompts of this process, G completions of a prompt, B = P * G completions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jdistill.config import TrainConfig
from jdistill.losses import advantages
from jdistill.rollout.completion import Completion
from jdistill.rollout.sampled import SampledBatch
from jdistill.rollout.sampler import Sampler, Weights
from jdistill.tasks.base import Problem, Task


class Scoring(Protocol):
    """The teacher's scoring of one batch, as far as collecting it is concerned."""

    def submit(self, index: int, problem: Problem, completion: Completion) -> None:
        """Sends completion number `index` of the batch."""

    def submit_rest(self, problems: Sequence[Problem], completions: Sequence[Completion]) -> None:
        """Sends the completions of the batch that have not been sent yet."""


class Teacher(Protocol):
    """The teacher, as far as collecting is concerned."""

    offload: bool  # it sleeps while the student samples

    def new_batch(self) -> Scoring:
        """Begins the scoring of one batch."""

    def wake(self) -> None:
        """Wakes a teacher that sleeps."""


class Rollout(NamedTuple):
    """The samples of one step, and their scoring; None without a teacher."""

    batch: SampledBatch
    scoring: Any  # what the teacher's new_batch() returned


class Collector:
    """Collects the rollouts of a run.

    Args:
        config: configuration of the run.
        task: source of the prompts and rewards.
        sampler: samples the completions, with the candidates that the teacher will score.
        teacher: scores the completions; None: there is none.
        own_prompts: slice of each round's rollout.num_prompts prompts that this process samples.
        maximum: returns the largest of all processes' numbers; called by all of them in the same order.
        show_phase: shows the user what is going on.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        sampler: Sampler,
        teacher: Teacher | None,
        *,
        own_prompts: slice,
        maximum: Callable[[int], int],
        show_phase: Callable[[str], None],
    ):
        self._config = config
        self._task = task
        self._sampler = sampler
        self._teacher = teacher
        self._own_prompts = own_prompts
        self._maximum = maximum
        self._show_phase = show_phase

    def collect(self, weights: Weights, step: int, first_problem: int) -> Rollout:
        """Samples the groups of one step and, unless the teacher sleeps, sends them to it.

        Args:
            weights: of the model that samples, from `sampler.prepare`.
            step: steps done; with the run's seed it determines what is sampled.
            first_problem: first training problem that the task has not been asked for.
        """
        rollout, num_rounds = self._config.rollout, self._config.objective.dynamic_sampling
        scoring = None if self._teacher is None else self._teacher.new_batch()
        if num_rounds:
            batch = self._sample_until_signal(weights, step, first_problem, num_rounds)
        else:
            # Every completion is trained on: the teacher gets each one as it ends.
            at_once = None if self._teacher is None or self._teacher.offload else scoring
            sampled = self._sample_round(weights, step, first_problem, 0, at_once)
            batch = SampledBatch(*sampled, num_dropped=0, next_problem=first_problem + rollout.num_prompts)
        found = Rollout(batch, scoring)
        if self._teacher is not None and not self._teacher.offload:
            self.send(found)
        return found

    def resume(self, batch: SampledBatch) -> Rollout:
        """Sends a batch that an earlier process sampled to the teacher again."""
        found = Rollout(batch, None if self._teacher is None else self._teacher.new_batch())
        self.send(found)
        return found

    def send(self, rollout: Rollout) -> None:
        """Sends the teacher, awake or woken for it, the completions that it has not been sent yet."""
        if self._teacher is None:
            return
        if self._teacher.offload:
            self._show_phase("waking the teacher")
            self._teacher.wake()
        rollout.scoring.submit_rest(rollout.batch.problems, rollout.batch.completions)

    def _sample_round(
        self, weights: Weights, step: int, first_problem: int, number: int, scoring: Scoring | None
    ) -> _Round:
        """Samples and rewards this process's prompts of one round; `scoring`, if any, gets each completion."""
        rollout, own = self._config.rollout, self._own_prompts
        G = rollout.num_completions
        self._show_phase("sampling" if number == 0 else f"sampling, round {number + 1}")
        prompts = [self._task.train_problem(first_problem + i) for i in range(own.start, own.stop)]
        problems = [problem for problem in prompts for _ in range(G)]
        completions: list[Completion | None] = [None] * len(problems)
        rewards_B = np.zeros(len(problems), np.float32)
        order: list[int] = []
        seeds_N = _seeds(self._config.seed, step, G * rollout.num_prompts, number)
        with self._sampler.on_its_devices():
            for completion in self._sampler.sample(
                weights,
                [problem.prompt_ids for problem in problems],
                seeds=seeds_N[own.start * G : own.stop * G],
                temperature=rollout.temperature,
            ):
                index = completion.index
                order.append(index)
                completions[index] = completion
                rewards_B[index] = self._task.reward(problems[index], self._task.response(completion))
                if scoring is not None:
                    scoring.submit(index, problems[index], completion)
        finished = [completion for completion in completions if completion is not None]
        assert len(finished) == len(problems)
        return _Round(problems, finished, rewards_B, np.array(order))

    def _sample_until_signal(self, weights: Weights, step: int, first_problem: int, num_rounds: int) -> SampledBatch:
        """Samples up to `num_rounds` rounds of prompts, until there are P groups with different rewards.

        Groups with equal rewards, which have no advantage to learn from, fill up what is missing after the last round.
        """
        G, next_problem = self._config.rollout.num_completions, first_problem
        num_prompts = self._own_prompts.stop - self._own_prompts.start
        with_signal: list[_Group] = []
        without: list[_Group] = []
        for number in range(num_rounds):
            problems, completions, rewards_B, _ = self._sample_round(weights, step, next_problem, number, None)
            next_problem += self._config.rollout.num_prompts
            lengths_B = np.array([len(c.completion_ids) for c in completions])
            shaped_B = shape_rewards(self._config, rewards_B, lengths_B)
            has_signal_P = np.asarray(advantages.has_signal(shaped_B.reshape(num_prompts, G)))
            for p in range(num_prompts):
                rows = slice(p * G, (p + 1) * G)
                group = _Group(problems[rows], completions[rows], rewards_B[rows])
                (with_signal if has_signal_P[p] else without).append(group)
            if len(with_signal) >= num_prompts:
                break
        # Some processes may have needed more rounds than others.
        next_problem = first_problem + self._maximum(next_problem - first_problem)
        groups = (with_signal + without)[:num_prompts]
        completions = [completion for group in groups for completion in group.completions]
        return SampledBatch(
            [problem for group in groups for problem in group.problems],
            completions,
            np.concatenate([group.rewards for group in groups]),
            np.argsort([len(completion.token_ids) for completion in completions], kind="stable"),
            num_dropped=(len(with_signal) + len(without) - num_prompts) * G,
            next_problem=next_problem,
        )


class _Round(NamedTuple):
    """One round of prompts; the first fields of a SampledBatch."""

    problems: list[Problem]  # of each completion
    completions: list[Completion]
    rewards: np.ndarray  # float32 [B]
    order: np.ndarray  # int [B], completions in the order in which they ended


class _Group(NamedTuple):
    """The G completions of one prompt."""

    problems: list[Problem]
    completions: list[Completion]
    rewards: np.ndarray


def shape_rewards(config: TrainConfig, rewards_B: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
    """The rewards to train on: the task's, less the penalty on the last tokens of a long completion."""
    if not (buffer := config.objective.overlong_buffer):
        return rewards_B
    max_length = config.rollout.max_new_tokens
    return rewards_B + np.asarray(advantages.overlong_penalty(lengths_B, max_length=max_length, buffer=buffer))


def _seeds(seed: int, step: int, num: int, number: int) -> np.ndarray:
    """uint32 [num], a pure function of the arguments: a resumed run samples what the first one would have."""
    key = [seed, step, number] if number else [seed, step]
    return np.random.SeedSequence(key).generate_state(num, np.uint32)
