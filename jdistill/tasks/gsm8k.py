r"""Grade-school mathematics (GSM8K) from local JSONL files of `{"question": ..., "answer": "... #### 72"}`.

By default the answer has the published format: the final number after `####`. `answer_format: boxed` asks for
`\boxed{}` instead, which chat models know better. The last such number is compared exactly with the reference.

Reference: Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021.
"""

from __future__ import annotations

import dataclasses
import decimal
import re
from typing import Any, Literal

import numpy as np
import pydantic

from jdistill.config import Section
from jdistill.tasks.answers import final_number
from jdistill.tasks.base import Problem, Task, epoch_permutation, render_chats, without_special_tokens
from jdistill.tasks.response import Response
from jdistill.text_files import read_json_lines

INSTRUCTIONS = {
    "####": 'Let\'s think step by step and output the final answer after "####".',
    "boxed": "Please reason step by step, and put your final answer within \\boxed{}.",
}


class Gsm8kOptions(Section):
    """`task.options` of gsm8k."""

    train_path: str = pydantic.Field(description="JSONL file of the training problems")
    test_path: str = pydantic.Field(description="JSONL file of the held-out problems, which keep the file's order")
    answer_format: Literal["####", "boxed"] = pydantic.Field(
        "####", description="answer format that the prompt asks for and the reward expects"
    )
    enable_thinking: bool | None = pydantic.Field(
        None, description="passed to the chat template (Qwen3); null: the template's default"
    )
    keep_calculator: bool = pydantic.Field(
        False, description="keep the calculator marks of the published answers (`<<48/2=24>>`) in supervised solutions"
    )


class Gsm8k(Task):
    """GSM8K problems; the reward is 1.0 if a completion ended and its final number is right, else 0.0."""

    name = "gsm8k"
    Options = Gsm8kOptions

    def __init__(self, options: Section, tokenizer: Any, *, seed: int, max_prompt_tokens: int | None) -> None:
        super().__init__(options, tokenizer, seed=seed, max_prompt_tokens=max_prompt_tokens)
        assert isinstance(options, Gsm8kOptions)
        self.answer_format = options.answer_format
        self.keep_calculator = options.keep_calculator
        self._template_options = {} if options.enable_thinking is None else {"enable_thinking": options.enable_thinking}
        if self.turn_end.appended_id is None:
            raise ValueError(
                f"the tokenizer in {tokenizer.name_or_path} has no end token, so solutions cannot end: "
                "set eos_token in its tokenizer_config.json"
            )
        self._train = self._read(options.train_path, "train")
        self._eval = self._read(options.test_path, "eval")
        self.num_train = len(self._train)
        self.num_eval = len(self._eval)
        self._order: tuple[int, np.ndarray] = (0, epoch_permutation(seed, 0, self.num_train))

    def train_problem(self, index: int) -> Problem:
        """Visits every line once per epoch, in an order that (seed, epoch) determines."""
        epoch, place = divmod(index, len(self._train))
        if self._order[0] != epoch:
            self._order = (epoch, epoch_permutation(self.seed, epoch, len(self._train)))
        return dataclasses.replace(self._train[self._order[1][place]], index=index)

    def eval_problems(self, num: int) -> list[Problem]:
        """Returns the first `num` lines of the test file."""
        self._check_num_eval(num)
        return self._eval[:num]

    def reward(self, problem: Problem, response: Response) -> float:
        """Returns 1.0 for the right number; a completion that was cut off has no final answer, even with a number."""
        return float(self._answer(response) == decimal.Decimal(problem.data["answer"]))

    def is_readable(self, response: Response) -> bool:
        """Returns whether a response ended with a number in the format that the prompt asks for."""
        return self._answer(response) is not None

    def _answer(self, response: Response) -> decimal.Decimal | None:
        if not response.ended:
            return None
        return final_number(without_special_tokens(response.text, self.tokenizer), self.answer_format)

    def solution_ids(self, problem: Problem) -> np.ndarray:
        """Returns the published reasoning, the final answer in the format that the prompt asks for, the end token."""
        reasoning = problem.data["solution"]
        if not self.keep_calculator:
            reasoning = re.sub(r"<<[^<>]*>>", "", reasoning)
        answer = problem.data["answer"]
        final = f"#### {answer}" if self.answer_format == "####" else f"\\boxed{{{answer}}}"
        ids = self.tokenizer(f"{reasoning}\n{final}", add_special_tokens=False)["input_ids"]
        return np.array([*ids, self.turn_end.appended_id], np.int32)

    def _read(self, path: str, split: Literal["train", "eval"]) -> list[Problem]:
        """Reads and tokenizes all problems of a file, so that a bad line fails before the first step."""
        lines = _read_jsonl(path)
        chats = [
            [{"role": "user", "content": f"{question}\n{INSTRUCTIONS[self.answer_format]}"}]
            for _, question, _, _ in lines
        ]
        texts = render_chats(self.tokenizer, chats, "task gsm8k", **self._template_options)
        # The template already writes the special tokens; a tokenizer that adds a BOS would add a second one.
        all_ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        problems = []
        for (number, question, solution, answer), ids in zip(lines, all_ids, strict=True):
            if self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
                raise ValueError(
                    f"{path} line {number}: the prompt has {len(ids)} tokens, but rollout.max_prompt_tokens is "
                    f"{self.max_prompt_tokens}: raise it, or remove the line"
                )
            data = {"question": question, "solution": solution, "answer": answer}
            problems.append(Problem(len(problems), split, np.array(ids, np.int32), data))
        return problems


def _read_jsonl(path: str) -> list[tuple[int, str, str, str]]:
    """Reads (line number from 1, question, reasoning, answer) of each line that is not blank."""
    lines = []
    try:
        objects = list(read_json_lines(path, "with question and answer"))
    except OSError as e:
        raise ValueError(
            f"task gsm8k cannot read {path} ({e.strerror}): set task.options.train_path and task.options.test_path"
        ) from e
    for number, line in objects:
        where = f"{path} line {number}"
        for field in ("question", "answer"):
            if not isinstance(line.get(field), str) or not line[field].strip():
                raise ValueError(
                    f"{where}: expected a string in {field!r}, got {line.get(field)!r}; fields: {sorted(line)}"
                )
        reasoning, marker, _ = line["answer"].rpartition("####")
        answer = final_number(line["answer"], "####")
        if not marker or answer is None:
            raise ValueError(f"{where}: expected an answer that ends in '#### number', got ...{line['answer'][-40:]!r}")
        lines.append((number, line["question"].strip(), reasoning.strip(), f"{answer:f}"))
    if not lines:
        raise ValueError(f'{path} is empty: expected one {{"question": ..., "answer": ...}} per line')
    return lines
