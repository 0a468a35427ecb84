"""Accuracy, response length and endings of a model on a task's problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jdistill.rollout.sampler import Completion, Sampler
from jdistill.student import hosts
from jdistill.tasks import Problem, Task


@dataclass(frozen=True)
class EvalResult:
    """Means over the problems, one completion each."""

    num_problems: int
    accuracy: float  # share of problems whose reward is 1, the full reward
    mean_reward: float
    mean_response_tokens: float  # the stop token included
    stop_share: float  # share of completions that ended by themselves rather than by the length limit


def evaluate(
    sampler: Sampler,
    params: Any,
    task: Task,
    problems: Sequence[Problem],
    *,
    temperature: float,
    greedy: bool,
    seed: int,
    max_rows: int = 512,
    on_answer: Callable[[Problem, Completion, float], None] | None = None,
) -> EvalResult:
    """Samples one completion for each problem and rewards it; several hosts share the problems.

    Args:
        sampler: with the task's stop tokens.
        params: the decoder's state.
        temperature: of sampling; of no effect on greedy answers.
        seed: the same seed, problems and parameters give the same answers; problem i draws the same seed however many
            there are.
        max_rows: problems that are decoded at once; bounds the memory of the cache.
        on_answer: called with (problem, completion, reward) as each completion ends: progress, a file of answers.

    Raises:
        ValueError: no problems; a prompt that the sampler does not take.
    """
    if not problems:
        raise ValueError("evaluate: no problems; ask the task for at least one (--num-prompts, eval.num_prompts)")
    if max_rows < 1:
        raise ValueError(f"evaluate: max_rows must be at least 1, got {max_rows}")
    seed_N = np.random.default_rng(seed).integers(0, 2**32, len(problems), dtype=np.uint32)
    reward_N = np.zeros(len(problems))
    length_N, stopped_N, answered_N = (np.zeros(len(problems), np.int32) for _ in range(3))
    # Of several hosts each has every so many-th problem.
    own = range(len(problems))[jax.process_index() :: hosts.count()]
    with sampler.on_its_devices():
        for start in range(0, len(own), max_rows):
            group = own[start : start + max_rows]
            for completion in sampler.sample(
                params,
                [problems[n].prompt_ids for n in group],
                seeds=seed_N[np.array(group)],
                temperature=temperature,
                greedy=greedy,
            ):
                n = group[completion.index]
                problem = problems[n]
                reward = float(task.reward(problem, completion.completion_ids))
                reward_N[n] = reward
                length_N[n] = len(completion.completion_ids)
                stopped_N[n] = completion.finish_reason == "stop"
                answered_N[n] = 1
                if on_answer is not None:
                    on_answer(problem, completion, reward)
    reward_N, length_N, stopped_N, answered_N = map(hosts.total, (reward_N, length_N, stopped_N, answered_N))
    assert (answered_N == 1).all(), "a problem without an answer would pass for a wrong one"
    return EvalResult(
        num_problems=len(problems),
        accuracy=float(np.mean(reward_N == 1.0)),
        mean_reward=float(reward_N.mean()),
        mean_response_tokens=float(length_N.mean()),
        stop_share=float(stopped_N.mean()),
    )
