"""`jdistill eval` on checkpoints of the addition task."""

import json

import pytest

from jdistill import cli, models
from jdistill.tasks import create_task
from jdistill.tasks.addition import write_model
from tests.tasks.responses import respond


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    write_model(root / "source", num_layers=1)
    models.save(models.random_init(root / "source", seed=0), root / "model", source=root / "source")
    return root / "model"


def run(capsys, *argv):
    code = cli.main(["eval", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_summary_is_the_mean_of_the_answers_file(checkpoint, capsys, tmp_path):
    file = tmp_path / "answers.jsonl"
    argv = ["--model", checkpoint, "--task", "addition", "--num-prompts", 40, "--max-new-tokens", 12, "--seed", 4]
    argv += ["--task-option", "num_digits=2", "--json"]
    code, out, _ = run(capsys, *argv, "--output", file)
    assert code == 0
    result = json.loads(out)
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(a["index"] for a in answers) == list(range(40))
    task = create_task("addition", {"num_digits": 2}, checkpoint)
    problems = task.eval_problems(40)
    for answer in answers:
        assert answer["prompt"] == task.decode(problems[answer["index"]].prompt_ids)
        assert answer["response"] == task.decode(answer["token_ids"])
        assert answer["reward"] == task.reward(problems[answer["index"]], respond(task, answer["token_ids"]))
    assert result["mean_reward"] == sum(a["reward"] for a in answers) / 40
    assert result["mean_response_tokens"] == sum(len(a["token_ids"]) for a in answers) / 40
    assert result["stop_share"] == sum(a["finish_reason"] == "stop" for a in answers) / 40
    assert 0 < result["stop_share"] < 1  # both endings occur
    assert (result["temperature"], result["greedy"], result["seed"]) == (1.0, False, 4)
    assert json.loads(run(capsys, *argv)[1]) == result


def test_text_says_what_was_measured_and_that_responses_were_cut(checkpoint, capsys):
    code, out, err = run(
        capsys, "--model", checkpoint, "--task", "addition", "--num-prompts", 3, "--greedy", "--max-new-tokens", 1
    )
    assert code == 0
    assert out.startswith("addition, 3 held-out problems, greedy: accuracy 0.000")
    assert "is --max-new-tokens too small for this task?" in err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--task", "additon"], "no task 'additon'; did you mean addition?"),
        (["--task", "addition", "--task-option", "digits=3"], "unknown key digits"),
        (["--task", "addition", "--task-option", "num_digits"], "expected name=value, got 'num_digits'"),
        (["--task", "addition", "--num-prompts", "0"], "--num-prompts must be at least 1, got 0"),
        (["--task", "addition", "--num-prompts", "1000000"], "task addition has 62500 held-out problems"),
        (["--task", "addition", "--output", "nowhere/a.jsonl"], "--output nowhere/a.jsonl: there is no directory"),
        (["--task", "addition", "--output", "."], "--output .: it is a directory"),
        (["--task", "addition", "--temperature", "-1"], "--temperature must be above 0"),
    ],
)
def test_a_wrong_request_is_answered_with_a_remedy_and_exit_code_2(checkpoint, capsys, argv, message):
    code, out, err = run(capsys, "--model", checkpoint, *argv)
    assert (code, out) == (2, "")
    assert message in err
