import json
import pathlib
import re
from decimal import Decimal

import numpy as np
import pytest

from jdistill.tasks import create_task
from tests.tasks import chat_tokenizer
from tests.tasks.responses import respond

DATA = pathlib.Path(__file__).parents[3] / "shared" / "data" / "gsm8k"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chat_tokenizer.write_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make(tokenizer, tmp_path):
    def make(train=None, test=None, *, tokenizer=tokenizer, max_prompt_tokens=None, **options):
        good = json.dumps({"question": "What is 70 plus 2?", "answer": "70 + 2 = <<70+2=72>>72\n#### 72"})
        (tmp_path / "train.jsonl").write_text(good if train is None else train)
        (tmp_path / "test.jsonl").write_text(good if test is None else test)
        paths = {"train_path": str(tmp_path / "train.jsonl"), "test_path": str(tmp_path / "test.jsonl")}
        return create_task("gsm8k", paths | options, tokenizer, max_prompt_tokens=max_prompt_tokens)

    return make


def completion(task, text, end=True):
    ids = task.tokenizer(text, add_special_tokens=False)["input_ids"]
    return np.array([*ids, task.tokenizer.eos_token_id] if end else ids, np.int32)


def test_the_prompt_is_what_the_chat_template_tokenizes(make):
    for enable_thinking in (None, True, False):
        task = make(enable_thinking=enable_thinking)
        prompt_ids = task.train_problem(0).prompt_ids
        content = 'What is 70 plus 2?\nLet\'s think step by step and output the final answer after "####".'
        kwargs = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        expected = task.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **kwargs,
        )
        assert prompt_ids.tolist() == expected["input_ids"]
        assert task.decode(prompt_ids).endswith("</think>\n\n") == (enable_thinking is False)
    boxed = make(answer_format="boxed")
    assert "within \\boxed{}.<|im_end|>" in boxed.decode(boxed.train_problem(0).prompt_ids)


def test_solutions_follow_the_prompts_format(make):
    def text(**options):
        task = make(**options)
        problem = task.train_problem(0)
        assert task.reward(problem, respond(task, task.solution_ids(problem))) == 1.0
        return task.decode(task.solution_ids(problem))

    assert text() == "70 + 2 = 72\n#### 72<|im_end|>"
    assert text(keep_calculator=True) == "70 + 2 = <<70+2=72>>72\n#### 72<|im_end|>"
    assert text(answer_format="boxed") == "70 + 2 = 72\n\\boxed{72}<|im_end|>"


def test_a_completion_is_right_only_with_the_number_and_a_stop_token(make):
    task = make()
    problem = task.eval_problems(1)[0]
    assert task.stop_token_ids == (258, 256)  # the tokenizer's, and the other one of generation_config.json
    assert task.reward(problem, respond(task, completion(task, "#### 72.0"))) == 1.0
    assert task.reward(problem, respond(task, completion(task, "#### 72", end=False))) == 0.0
    assert task.reward(problem, respond(task, [*completion(task, "#### 72", end=False), 256])) == 1.0
    assert task.reward(problem, respond(task, completion(task, "#### 73"))) == 0.0
    assert task.reward(problem, respond(task, completion(task, "72"))) == 0.0


def test_an_answer_is_readable_where_it_ended_with_a_number(make):
    task = make()
    texts = {"#### 73": True, "#### 72 or 73": False, "72": False, "#### 7,2": False}
    for text, readable in texts.items():
        assert task.is_readable(respond(task, completion(task, text))) == readable
        assert not task.is_readable(respond(task, completion(task, text, end=False)))


def test_every_epoch_visits_every_line_once_in_another_order(make):
    lines = [{"question": f"What is {i}?", "answer": f"#### {i}"} for i in range(11)]
    task = make("\n".join(map(json.dumps, lines)))
    epochs = [[task.train_problem(11 * e + i).data["answer"] for i in range(11)] for e in range(3)]
    assert all(sorted(map(int, epoch)) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("", r"train.jsonl is empty: expected one"),
        ("\n \n", r"train.jsonl is empty"),
        ('{"question": "a", "answer": "#### 1"}\n{"question": ', r"train.jsonl line 2 is not JSON"),
        ('\n["question"]', r"train.jsonl line 2: expected an object, .* got list"),
        ('{"question": "a"}', r"train.jsonl line 1: expected a string in 'answer', got None; fields: \['question'\]"),
        ('{"question": 3, "answer": "#### 1"}', r"train.jsonl line 1: expected a string in 'question', got 3"),
        ('{"question": "a", "answer": "72"}', r"train.jsonl line 1: expected an answer that ends in '#### number'"),
        ('{"question": "a", "answer": "#### many"}', r"train.jsonl line 1: expected an answer that ends in"),
    ],
)
def test_a_bad_file_is_an_error_that_names_file_and_line(make, train, message):
    with pytest.raises(ValueError, match=message):
        make(train)


def test_a_file_that_is_not_text_is_an_error_that_names_file_and_line(make, tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"question": "prix en £", "answer": "#### 1"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.jsonl line 1 is not UTF-8 .*iconv -f LATIN1"):
        make(train_path=str(tmp_path / "latin.jsonl"))


def test_a_missing_file_names_the_option_to_set(make):
    with pytest.raises(ValueError, match=r"cannot read nowhere.jsonl \(No such file or directory\): set task.options"):
        make(train_path="nowhere.jsonl")


def test_a_prompt_over_the_limit_names_file_and_line(make):
    long = json.dumps({"question": "x" * 200, "answer": "#### 1"})
    with pytest.raises(
        ValueError, match=r"test.jsonl line 1: the prompt has \d+ tokens, but rollout.max_prompt_tokens is 150"
    ):
        make(test=long, max_prompt_tokens=150)


def test_a_tokenizer_without_a_chat_template_is_refused(make, tmp_path):
    path = chat_tokenizer.write_chat_tokenizer(tmp_path / "base", chat_template=None)
    with pytest.raises(ValueError, match=r"has no chat template.*use an instruction-tuned checkpoint"):
        make(tokenizer=path)


NAMED = [{"name": "rag", "template": "a"}, {"name": "tool_use", "template": "b"}]


def test_named_chat_templates_without_a_default_are_refused_with_the_remedy(make, tmp_path):
    path = chat_tokenizer.write_chat_tokenizer(tmp_path / "named", chat_template=NAMED)
    with pytest.raises(ValueError, match=r"the chat templates rag, tool_use and none named default.*rename one"):
        make(tokenizer=path)
    default = {"name": "default", "template": chat_tokenizer.CHAT_TEMPLATE}
    chat_tokenizer.write_chat_tokenizer(path, chat_template=[*NAMED, default])
    make(tokenizer=path)


def test_a_template_that_refuses_the_prompts_is_named(make, tmp_path):
    template = "{{ raise_exception('no user, please') }}"
    path = chat_tokenizer.write_chat_tokenizer(tmp_path / "refuses", chat_template=template)
    with pytest.raises(ValueError, match=r"the chat template of .* refuses the prompts of task gsm8k: no user, please"):
        make(tokenizer=path)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the published GSM8K files are not in {DATA}")
@pytest.mark.parametrize("answer_format", ["####", "boxed"])
def test_every_published_solution_is_right_and_an_answer_off_by_one_is_wrong(tokenizer, answer_format):
    options = {"train_path": str(DATA / "train.jsonl"), "test_path": str(DATA / "test.jsonl")}
    task = create_task("gsm8k", options | {"answer_format": answer_format}, tokenizer)
    assert (task.num_train, task.num_eval) == (7473, 1319)
    # The answer as the data set's authors extract it, independent of final_number.
    published = [
        re.search(r"#### (\-?[0-9\.\,]+)", json.loads(line)["answer"])[1].replace(",", "")
        for line in (DATA / "test.jsonl").read_text().splitlines()
    ]
    problems = task.eval_problems(task.num_eval)
    assert [Decimal(p.data["answer"]) for p in problems] == list(map(Decimal, published))
    problems += [task.train_problem(i) for i in range(task.num_train)]
    for problem in problems:
        assert task.reward(problem, respond(task, task.solution_ids(problem))) == 1.0, problem.data
        wrong = Decimal(problem.data["answer"]) + 1
        text = f"#### {wrong}" if answer_format == "####" else f"\\boxed{{{wrong}}}"
        assert task.reward(problem, respond(task, completion(task, text))) == 0.0, problem.data
