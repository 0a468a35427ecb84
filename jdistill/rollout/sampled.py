"""The samples of one step, which a checkpoint can hold until they are trained on.

Dimension key: B completions, R sampled tokens of all completions, S tokens of one prompt and completion, K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jdistill.rollout.completion import Completion
from jdistill.tasks.base import Problem, Task


class SampledBatch(NamedTuple):
    """The rows of a step, group by group."""

    problems: list[Problem]
    completions: list[Completion]
    rewards: np.ndarray  # float32 [B]
    order: np.ndarray  # int [B], rows in the order in which they are trained on
    num_dropped: int  # completions sampled and not trained on
    next_problem: int  # first training problem that the task has not been asked for

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Returns the batch as arrays; of the problems only their indices, since the task makes their contents."""
        arrays = {
            "problems": np.array([problem.index for problem in self.problems], np.int64),
            "indices": np.array([c.index for c in self.completions], np.int32),
            "lengths": np.array([len(c.token_ids) for c in self.completions], np.int32),
            "prompt_lengths": np.array([c.prompt_length for c in self.completions], np.int32),
            "stopped": np.array([c.finish_reason == "stop" for c in self.completions], np.int32),
            "stop_string_spans": np.array(
                [c.stop_string_span or (-1, -1) for c in self.completions], np.int32
            ),  # [B, 2]
            "include_stop": np.array([c.include_stop for c in self.completions], np.int32),
            "token_ids": np.concatenate([c.token_ids for c in self.completions]),
            "sampler_logprobs": np.concatenate([c.sampler_logprobs for c in self.completions]),
            "rewards": self.rewards,
            "order": self.order.astype(np.int32),
            "counts": np.array([self.num_dropped, self.next_problem], np.int64),
        }
        if self.completions[0].candidate_ids is not None:
            arrays["candidate_ids"] = np.concatenate([c.candidate_ids for c in self.completions])  # [R, K]
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], task: Task) -> SampledBatch:
        """Restores the batch that `to_arrays` saved; `task` must be the same task."""
        lengths_B, prompt_lengths_B = arrays["lengths"], arrays["prompt_lengths"]
        token_ends_B, ends_B = np.cumsum(lengths_B), np.cumsum(lengths_B - prompt_lengths_B)
        completions = []
        for b, index in enumerate(arrays["indices"]):
            sampled = slice(ends_B[b] - (lengths_B[b] - prompt_lengths_B[b]), ends_B[b])
            start, end = map(int, arrays["stop_string_spans"][b])
            completions.append(
                Completion(
                    index=int(index),
                    token_ids=arrays["token_ids"][token_ends_B[b] - lengths_B[b] : token_ends_B[b]],
                    prompt_length=int(prompt_lengths_B[b]),
                    sampler_logprobs=arrays["sampler_logprobs"][sampled],
                    candidate_ids=arrays["candidate_ids"][sampled] if "candidate_ids" in arrays else None,
                    finish_reason="stop" if arrays["stopped"][b] else "length",
                    stop_string_span=None if start < 0 else (start, end),
                    include_stop=bool(arrays["include_stop"][b]),
                )
            )
        num_dropped, next_problem = map(int, arrays["counts"])
        problems = [task.train_problem(int(index)) for index in arrays["problems"]]
        return cls(problems, completions, arrays["rewards"], arrays["order"], num_dropped, next_problem)
