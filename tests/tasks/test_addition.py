import json
import random

import numpy as np
import pytest

from jdistill.tasks import addition, create_task
from tests.tasks.responses import respond


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    addition.write_tokenizer(path)
    return create_task("addition", {}, path)


def encode(task, text):
    """Encodes with the tokenizer rather than the task's table."""
    return np.array(task.tokenizer(text)["input_ids"], np.int32)


def test_the_solution_is_the_published_example():
    assert addition.solution("850", "636") == "0+6+0=06,5+3+0=08,8+6+0=14,#1486"


def test_solutions_are_right_in_every_column_and_in_the_answer():
    draw = random.Random(0)
    for _ in range(500):
        a, b = draw.randrange(1000), draw.randrange(1000)
        *columns, answer = addition.solution(f"{a:03}", f"{b:03}").split(",")
        assert int(answer.removeprefix("#")) == a + b and len(answer) == 5
        carry = 0
        for place, column in enumerate(columns):
            left, _, right = column.partition("=")
            digit_a, digit_b, carry_in = map(int, left.split("+"))
            assert (digit_a, digit_b, carry_in) == (a // 10**place % 10, b // 10**place % 10, carry)
            assert int(right) == digit_a + digit_b + carry_in and len(right) == 2
            carry = (a % 10 ** (place + 1) + b % 10 ** (place + 1)) // 10 ** (place + 1)


def test_a_prompt_has_8_tokens_and_a_solution_33(task):
    problem = task.train_problem(5)
    assert len(problem.prompt_ids) == 8 and len(task.solution_ids(problem)) == 33
    assert task.decode(problem.prompt_ids) == f"{problem.data['a']}+{problem.data['b']}="


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("0+6+0=06,5+3+0=08,8+6+0=14,#1486<end>", 1.0),
        ("#1486<end>", 1.0),  # only the answer counts
        ("9#1486<end>", 1.0),
        ("#1486", 0.0),  # not ended
        ("#1487<end>", 0.0),
        ("#01486<end>", 0.0),
        ("#1486,<end>", 0.0),
        ("#1486#1486<end>", 0.0),
        ("#1487#1486<end>", 0.0),  # the first answer counts: no guessing on
        ("#14<pad>86<end>", 0.0),
        ("1486<end>", 0.0),
        ("<end>", 0.0),
    ],
)
def test_the_reward_is_an_exact_match_of_what_follows_the_hash(task, completion, reward):
    a, b = "850", "636"
    problem = addition.Problem(0, "train", encode(task, f"{a}+{b}="), {"a": a, "b": b, "answer": "1486"})
    assert task.reward(problem, respond(task, encode(task, completion))) == reward


def test_an_eighth_of_all_prompts_is_held_out_in_every_carry_class():
    """A linear modular hash once held out no problem of one class: see the docstring of is_held_out."""
    held_out, total = np.zeros(8, int), np.zeros(8, int)
    draw = random.Random(1)
    for _ in range(40_000):
        a, b = draw.randrange(1000), draw.randrange(1000)
        carries = [(a % 10**i + b % 10**i) // 10**i for i in (1, 2, 3)]
        carry_class = carries[0] + 2 * carries[1] + 4 * carries[2]
        total[carry_class] += 1
        held_out[carry_class] += addition.is_held_out(f"{a:03}+{b:03}=")
    assert total.min() > 2000
    np.testing.assert_allclose(held_out / total, 1 / 8, atol=5 * (1 / 8 * 7 / 8 / total.min()) ** 0.5)


def test_held_out_problems_are_the_same_in_every_version(task):
    """Results of runs are compared across versions: these five problems were recorded with the first version."""
    prompts = [task.decode(p.prompt_ids) for p in task.eval_problems(5)]
    assert prompts == ["500+876=", "840+644=", "361+604=", "887+460=", "091+359="]
    assert all(map(addition.is_held_out, prompts))


def test_training_problems_cover_the_carry_classes_evenly(task):
    ones_carry = [
        int(p.data["a"][-1]) + int(p.data["b"][-1]) >= 10 for p in (task.train_problem(i) for i in range(4000))
    ]
    assert abs(np.mean(ones_carry) - 0.45) < 5 * (0.45 * 0.55 / 4000) ** 0.5  # 45 of the 100 pairs of digits carry


def test_other_widths_are_the_same_task(tmp_path):
    addition.write_tokenizer(tmp_path)
    task = create_task("addition", {"num_digits": 9}, tmp_path)
    problem = task.train_problem(0)
    assert len(problem.prompt_ids) + len(task.solution_ids(problem)) == 113 < addition.MAX_LENGTH
    assert task.reward(problem, respond(task, task.solution_ids(problem))) == 1.0
    with pytest.raises(ValueError, match="num_digits"):
        create_task("addition", {"num_digits": 1}, tmp_path)


def test_the_tokenizer_round_trips_through_transformers(task, tmp_path):
    tokenizer = task.tokenizer
    text = "850+636=0+6+0=06,5+3+0=08,8+6+0=14,#1486<end>"
    ids = tokenizer(text)["input_ids"]
    assert ids == [addition.VOCABULARY[c] for c in text.removesuffix("<end>")] + [15]
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (15, 14, 16)
    tokenizer.save_pretrained(tmp_path)
    assert create_task("addition", {}, tmp_path).tokenizer(text)["input_ids"] == ids


def test_a_tokenizer_of_another_model_is_refused(task, tmp_path):
    addition.write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<pad>"}))
    with pytest.raises(ValueError, match=r"its end token is '<pad>': create the models with examples/addition"):
        create_task("addition", {}, tmp_path)


@pytest.mark.parametrize(("num_layers", "num_params"), [(4, 789_888), (2, 396_032)])
def test_the_models_have_the_documented_sizes(tmp_path, num_layers, num_params):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    addition.write_model(tmp_path, num_layers=num_layers)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert sum(p.numel() for p in model.parameters()) == num_params
    assert (config.eos_token_id, config.pad_token_id, config.vocab_size) == (15, 14, 16)
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == 15
