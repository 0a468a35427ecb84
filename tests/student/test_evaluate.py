"""Evaluation of a fake sampler's completions against numbers calculated by hand."""

import contextlib

import numpy as np
import pytest

from jdistill.rollout.completion import Completion
from jdistill.student.evaluate import EvalResult, evaluate
from jdistill.tasks import create_task
from jdistill.tasks.addition import write_tokenizer


class FakeSampler:
    """Answers each problem with a given completion, in reverse order, and records the requests."""

    def __init__(self, task, answer_of):
        self.answer_of = answer_of
        self.stop = task.stop_token_ids[0]
        self.calls = []

    def on_its_devices(self):
        return contextlib.nullcontext()

    def sample(self, params, prompts, *, seeds, temperature, greedy):
        self.calls.append((params, [tuple(p) for p in prompts], list(seeds), temperature, greedy))
        for index in reversed(range(len(prompts))):
            ids = self.answer_of[tuple(prompts[index])]
            yield Completion(
                index=index,
                token_ids=np.concatenate([prompts[index], ids]),
                prompt_length=len(prompts[index]),
                sampler_logprobs=np.zeros(len(ids), np.float32),
                candidate_ids=None,
                finish_reason="stop" if ids[-1] == self.stop else "length",
            )


@pytest.fixture
def task(tmp_path):
    write_tokenizer(tmp_path)
    return create_task("addition", {}, tmp_path)


def test_metrics_are_means_over_problems_and_rewards_match_their_problem(task):
    problems = task.eval_problems(5)
    right = [task.solution_ids(problem) for problem in problems]
    answers = [right[0], right[0], right[2][:-1], right[3][:4], right[4]]  # 1 is another problem's; 2 and 3 do not end
    fake = FakeSampler(task, {tuple(p.prompt_ids): a for p, a in zip(problems, answers, strict=True)})
    seen = []
    result = evaluate(
        fake,
        "params",
        task,
        problems,
        temperature=0.5,
        greedy=True,
        seed=3,
        max_rows=2,
        on_answer=lambda *a: seen.append(a),
    )
    assert result == EvalResult(
        num_problems=5,
        accuracy=2 / 5,
        mean_reward=2 / 5,
        mean_response_tokens=np.mean([33, 33, 32, 4, 33]),
        stop_share=3 / 5,
    )
    assert [(problem.index, reward) for problem, _, reward in seen] == [(1, 0), (0, 1), (3, 0), (2, 0), (4, 1)]
    assert [len(prompts) for _, prompts, *_ in fake.calls] == [2, 2, 1]
    assert {(params, temperature, greedy) for params, _, _, temperature, greedy in fake.calls} == {
        ("params", 0.5, True)
    }


@pytest.mark.parametrize(("readable", "share"), [([True, False, True, True], 0.75), ([None] * 4, None)])
def test_readable_answers_are_counted_where_the_task_says_which_are(task, monkeypatch, readable, share):
    problems = task.eval_problems(4)
    fake = FakeSampler(task, {tuple(p.prompt_ids): task.solution_ids(p) for p in problems})
    told = {tuple(task.solution_ids(p)): value for p, value in zip(problems, readable, strict=True)}
    monkeypatch.setattr(task, "is_readable", lambda response: told[tuple(response.token_ids)])
    result = evaluate(fake, None, task, problems, temperature=1.0, greedy=True, seed=0)
    assert result.readable_share == share


def test_a_problems_seed_does_not_depend_on_the_number_of_problems(task):
    problems = task.eval_problems(9)
    fake = FakeSampler(task, {tuple(p.prompt_ids): task.solution_ids(p) for p in problems})

    def seeds(num, seed, max_rows):
        fake.calls.clear()
        evaluate(fake, None, task, problems[:num], temperature=1.0, greedy=False, seed=seed, max_rows=max_rows)
        return [int(s) for _, _, seeds, *_ in fake.calls for s in seeds]

    nine = seeds(9, 1, 512)
    assert len(set(nine)) == 9
    assert seeds(4, 1, 3) == nine[:4]
    assert set(seeds(9, 2, 512)).isdisjoint(nine)


def test_no_problems_are_an_error(task):
    with pytest.raises(ValueError, match="no problems; ask the task for at least one"):
        evaluate(FakeSampler(task, {}), None, task, [], temperature=1.0, greedy=False, seed=0)
