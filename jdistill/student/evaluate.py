"""Accuracy, response length and endings of a model on a task's problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jdistill.student.rollout import Completion, Sampler
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
    """Samples one completion for each problem and rewards it.

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
    reward_N = np.full(len(problems), np.nan)  # NaN so that a problem without an answer could not pass for a wrong one
    length_N = np.zeros(len(problems), np.int64)
    stopped_N = np.zeros(len(problems), bool)
    for start in range(0, len(problems), max_rows):
        group = problems[start : start + max_rows]
        for completion in sampler.sample(
            params,
            [problem.prompt_ids for problem in group],
            seeds=seed_N[start : start + max_rows],
            temperature=temperature,
            greedy=greedy,
        ):
            problem = group[completion.index]
            reward = float(task.reward(problem, completion.completion_ids))
            n = start + completion.index
            reward_N[n] = reward
            length_N[n] = len(completion.completion_ids)
            stopped_N[n] = completion.finish_reason == "stop"
            if on_answer is not None:
                on_answer(problem, completion, reward)
    return EvalResult(
        num_problems=len(problems),
        accuracy=float(np.mean(reward_N == 1.0)),
        mean_reward=float(reward_N.mean()),
        mean_response_tokens=float(length_N.mean()),
        stop_share=float(stopped_N.mean()),
    )
