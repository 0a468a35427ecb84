"""A sampled batch that is saved and restored is the same batch."""

import dataclasses

import numpy as np
import pytest

from jdistill.rollout.completion import Completion
from jdistill.rollout.sampled import SampledBatch
from jdistill.tasks.base import Problem


class FakeTask:
    def train_problem(self, index):
        return Problem(index, "train", np.arange(index % 3 + 1, dtype=np.int32), {"answer": index})


@pytest.mark.parametrize("num_candidates", [0, 4])
def test_arrays_hold_all_of_a_batch(num_candidates):
    rng, task = np.random.default_rng(0), FakeTask()
    problems = [task.train_problem(number) for number in (7, 7, 9, 12)]
    completions = []
    for place, problem in enumerate(problems):
        length = int(rng.integers(1, 6))
        candidates = rng.integers(0, 50, (length, num_candidates)).astype(np.int32)
        completions.append(
            Completion(
                index=(3, 0, 1, 2)[place],
                token_ids=np.concatenate([problem.prompt_ids, rng.integers(0, 50, length)]).astype(np.int32),
                prompt_length=len(problem.prompt_ids),
                sampler_logprobs=rng.normal(size=length).astype(np.float32),
                candidate_ids=candidates if num_candidates else None,
                finish_reason=("stop", "length")[place % 2],
                stop_string_span=(1, 3) if place == 2 else None,
                include_stop=place > 1,
            )
        )
    batch = SampledBatch(problems, completions, rng.random(4).astype(np.float32), np.array([2, 0, 3, 1]), 8, 13)
    again = SampledBatch.from_arrays(batch.to_arrays(), task)
    assert (again.num_dropped, again.next_problem) == (8, 13)
    for name in ("rewards", "order"):
        np.testing.assert_array_equal(getattr(again, name), getattr(batch, name))
    pairs = [*zip(again.completions, completions, strict=True), *zip(again.problems, problems, strict=True)]
    for a, b in pairs:
        for field in dataclasses.fields(b):
            x, y = getattr(a, field.name), getattr(b, field.name)
            np.testing.assert_array_equal(x, y, err_msg=field.name)
            assert getattr(x, "dtype", None) == getattr(y, "dtype", None)
