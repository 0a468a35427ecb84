"""Contract of every task in TASKS: listing a task and giving a recipe for its options here is enough to test it."""

import json
import subprocess
import sys

import numpy as np
import pytest

from jdistill.tasks import TASKS, create_task
from jdistill.tasks.addition import write_tokenizer
from tests.tasks.chat_tokenizer import write_chat_tokenizer
from tests.tasks.responses import respond


def write_gsm8k(path, num, offset=0):
    lines = [
        {"question": f"What is {i} plus {i}?", "answer": f"{i} + {i} = <<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"}
        for i in range(offset, offset + num)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(params=TASKS)
def recipe(request, tmp_path):
    if request.param == "addition":
        write_tokenizer(tmp_path / "tokenizer")
        options = {}
    elif request.param == "gsm8k":
        write_chat_tokenizer(tmp_path / "tokenizer")
        options = {
            "train_path": write_gsm8k(tmp_path / "train.jsonl", 37),
            "test_path": write_gsm8k(tmp_path / "test.jsonl", 20, offset=1000),
        }
    else:
        raise AssertionError(f"task {request.param} is in TASKS: add its options here")
    return request.param, options, tmp_path / "tokenizer"


def test_train_problems_are_a_pure_function_of_seed_and_index(recipe):
    name, options, tokenizer = recipe
    forwards = create_task(name, options, tokenizer, seed=3)
    backwards = create_task(name, options, tokenizer, seed=3)
    indices = [*range(90), 10**6]
    expected = {i: forwards.train_problem(i) for i in indices}
    for i in reversed(indices):
        problem = backwards.train_problem(i)
        assert problem.prompt_ids.tolist() == expected[i].prompt_ids.tolist()
        assert problem.data == expected[i].data
        assert (problem.index, problem.split) == (i, "train")


def test_another_seed_gives_another_order_and_the_same_held_out_problems(recipe):
    name, options, tokenizer = recipe
    one, two = (create_task(name, options, tokenizer, seed=seed) for seed in (0, 1))
    first = [one.decode(one.train_problem(i).prompt_ids) for i in range(20)]
    second = [two.decode(two.train_problem(i).prompt_ids) for i in range(20)]
    assert first != second
    assert [p.data for p in one.eval_problems(20)] == [p.data for p in two.eval_problems(20)]


def test_fewer_held_out_problems_are_a_prefix_of_more(recipe):
    name, options, tokenizer = recipe
    task = create_task(name, options, tokenizer)
    many = task.eval_problems(20)
    assert [(p.index, p.split) for p in many] == [(i, "eval") for i in range(20)]
    assert [p.data for p in task.eval_problems(7)] == [p.data for p in many[:7]]
    with pytest.raises(ValueError, match=f"set eval.num_prompts to at most {task.num_eval}"):
        task.eval_problems(task.num_eval + 1)


def test_held_out_prompts_are_distinct_and_never_trained_on(recipe):
    name, options, tokenizer = recipe
    task = create_task(name, options, tokenizer)
    held_out = {p.prompt_ids.tobytes() for p in task.eval_problems(20)}
    assert len(held_out) == 20
    num = 2 * task.num_train if task.num_train is not None else 2000
    assert not held_out & {task.train_problem(i).prompt_ids.tobytes() for i in range(num)}


def test_the_solution_earns_1_and_another_problems_solution_0(recipe):
    name, options, tokenizer = recipe
    task = create_task(name, options, tokenizer)
    for problems in ([task.train_problem(i) for i in range(20)], task.eval_problems(20)):
        for problem, other in zip(problems, problems[1:] + problems[:1], strict=True):
            solution = task.solution_ids(problem)
            assert solution.dtype == problem.prompt_ids.dtype == np.int32
            assert solution[-1] in task.stop_token_ids and not np.isin(solution[:-1], task.stop_token_ids).any()
            assert task.reward(problem, respond(task, solution)) == 1.0
            assert task.reward(problem, respond(task, solution, include_stop=True)) == 1.0
            assert problem.data["answer"] != other.data["answer"]
            assert task.reward(problem, respond(task, task.solution_ids(other))) == 0.0
            assert task.reward(problem, respond(task, solution[:-1])) == 0.0  # cut off before its end
            assert task.reward(problem, respond(task, solution[:0])) == 0.0


def test_a_stop_string_ends_a_right_answer_as_a_stop_token_does(recipe):
    """It once gave 0.0: only a stop token counted as an end."""
    name, options, tokenizer = recipe
    task = create_task(name, options, tokenizer)
    problem, stop = task.eval_problems(1)[0], "=+"  # of characters that both tasks' tokenizers have
    ids = [*task.solution_ids(problem)[:-1], *(task.tokenizer.convert_tokens_to_ids(c) for c in stop)]
    assert task.reward(problem, respond(task, ids)) == 0.0  # cut off by chance where a stop string ends
    assert task.reward(problem, respond(task, ids, stop_string=stop)) == 1.0
    assert respond(task, ids, stop_string=stop, include_stop=True).text.endswith(stop)


def test_a_prompt_longer_than_the_limit_is_an_error_when_the_task_is_made(recipe):
    name, options, tokenizer = recipe
    task = create_task(name, options, tokenizer)
    longest = max(len(p.prompt_ids) for p in [*(task.train_problem(i) for i in range(37)), *task.eval_problems(20)])
    create_task(name, options, tokenizer, max_prompt_tokens=longest)
    with pytest.raises(ValueError, match=f"rollout.max_prompt_tokens is {longest - 1}"):
        create_task(name, options, tokenizer, max_prompt_tokens=longest - 1)


def test_an_unknown_option_names_the_nearest_one(recipe):
    name, options, tokenizer = recipe
    known = next(iter(type(create_task(name, options, tokenizer)).Options.model_fields))
    with pytest.raises(ValueError, match=rf"task.options of {name}: unknown key {known}x; did you mean {known}\?"):
        create_task(name, {**options, f"{known}x": 1}, tokenizer)


def test_a_directory_without_a_tokenizer_is_an_error_with_a_remedy(recipe, tmp_path):
    name, options, _ = recipe
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no tokenizer .*copy it from the checkpoint"):
        create_task(name, options, tmp_path / "empty")
    with pytest.raises(ValueError, match=r"no directory .*nowhere: model.path must be"):
        create_task(name, options, tmp_path / "nowhere")
    (tmp_path / "empty" / "tokenizer.json").write_text('{"half":')
    with pytest.raises(ValueError, match="cannot be loaded"):
        create_task(name, options, tmp_path / "empty")


def test_an_unknown_task_names_the_nearest_one():
    with pytest.raises(ValueError, match=r"no task 'adition'; did you mean addition\?"):
        create_task("adition", {}, "unused")
    with pytest.raises(ValueError, match="available: addition, gsm8k"):
        create_task("chess", {}, "unused")


def test_the_table_of_tasks_loads_neither_jax_nor_torch():
    modules = ", ".join(["jdistill.tasks", *(target.partition(":")[0] for target in TASKS.values())])
    code = f"import sys, {modules}; print({{'jax', 'torch'}} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
