"""Evaluates a model on a task's held-out problems: accuracy, response length, share of stopped completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jdistill.rollout.completion import Completion
from jdistill.rollout.sampler import Sampler, Weights
from jdistill.student import hosts
from jdistill.tasks import Problem, Task


@dataclass(frozen=True)
class EvalResult:
    """Means over the problems, with one completion each."""

    num_problems: int
    accuracy: float  # share of problems whose reward is 1, the full reward
    mean_reward: float
    mean_response_tokens: float  # stop token included
    stop_share: float  # share of completions that a stop token or stop string ended, rather than the length limit
    readable_share: float | None = None  # share with an answer that the task can read; None: the task does not say


def held_out_accuracy(
    sampler: Sampler,
    weights: Weights,
    task: Task,
    problems: Sequence[Problem],
    *,
    temperature: float,
    seed: int,
    greedy_too: bool = True,
) -> dict[str, float]:
    """Accuracy under the names of its metrics: of sampled answers and, with `greedy_too`, of greedy ones."""
    accuracy = {}
    for name, greedy in (("eval/accuracy", False), ("eval/accuracy_greedy", True)):
        if not greedy or greedy_too:
            result = evaluate(sampler, weights, task, problems, temperature=temperature, greedy=greedy, seed=seed)
            accuracy[name] = result.accuracy
    return accuracy


def evaluate(
    sampler: Sampler,
    weights: Weights,
    task: Task,
    problems: Sequence[Problem],
    *,
    temperature: float,
    greedy: bool,
    seed: int,
    max_rows: int = 512,
    on_answer: Callable[[Problem, Completion, float], None] | None = None,
) -> EvalResult:
    """Samples one completion per problem and rewards it; several processes share the problems.

    Args:
        sampler: made with the task's stop tokens.
        weights: from `sampler.prepare`.
        task: gives the rewards.
        problems: at least one.
        temperature: for sampling; it does not change greedy answers.
        greedy: take the most likely token at each position.
        seed: the same seed, problems and parameters give the same answers; the seed of problem i does not depend on
            the number of problems.
        max_rows: problems decoded at once; bounds the memory of the cache.
        on_answer: called with (problem, completion, reward) as each completion ends, e.g. to show progress.

    Raises:
        ValueError: no problems, or a prompt that the sampler refuses.
    """
    if not problems:
        raise ValueError("evaluate: no problems; ask the task for at least one (--num-prompts, eval.num_prompts)")
    if max_rows < 1:
        raise ValueError(f"evaluate: max_rows must be at least 1, got {max_rows}")
    seed_N = np.random.default_rng(seed).integers(0, 2**32, len(problems), dtype=np.uint32)
    answers = _Answers(len(problems))
    # Problems are assigned to processes round-robin.
    own = range(len(problems))[jax.process_index() :: hosts.count()]
    with sampler.on_its_devices():
        for start in range(0, len(own), max_rows):
            group = own[start : start + max_rows]
            prompts = [problems[n].prompt_ids for n in group]
            seeds = seed_N[np.array(group)]
            for completion in sampler.sample(weights, prompts, seeds=seeds, temperature=temperature, greedy=greedy):
                n = group[completion.index]
                response = task.response(completion)
                reward = float(task.reward(problems[n], response))
                answers.add(n, completion, reward, task.is_readable(response))
                if on_answer is not None:
                    on_answer(problems[n], completion, reward)
    return answers.result()


class _Answers:
    """What this process knows of the answer to each of N problems; 0 where another process has it."""

    def __init__(self, num_problems: int):
        self._rewards_N = np.zeros(num_problems)
        self._lengths_N, self._stopped_N, self._answered_N = (np.zeros(num_problems, np.int32) for _ in range(3))
        self._readable_N = np.zeros(num_problems, np.int32)  # 2: readable, 1: not, 0: the task does not say

    def add(self, n: int, completion: Completion, reward: float, is_readable: bool | None) -> None:
        self._rewards_N[n] = reward
        self._lengths_N[n] = len(completion.completion_ids)
        self._stopped_N[n] = completion.finish_reason == "stop"
        self._answered_N[n] = 1
        self._readable_N[n] = 0 if is_readable is None else 1 + is_readable

    def result(self) -> EvalResult:
        """The means over all processes' answers."""
        own = (self._rewards_N, self._lengths_N, self._stopped_N, self._answered_N, self._readable_N)
        rewards_N, lengths_N, stopped_N, answered_N, readable_N = map(hosts.total, own)
        assert (answered_N == 1).all(), "a problem without an answer would pass for a wrong one"
        return EvalResult(
            num_problems=len(rewards_N),
            accuracy=float(np.mean(rewards_N == 1.0)),
            mean_reward=float(rewards_N.mean()),
            mean_response_tokens=float(lengths_N.mean()),
            stop_share=float(stopped_N.mean()),
            readable_share=float(np.mean(readable_N == 2)) if (readable_N > 0).all() else None,
        )
