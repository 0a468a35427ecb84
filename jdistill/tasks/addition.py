"""Fixed-width addition with a scratchpad: a task that a one-megabyte model learns in minutes on a CPU.

With three digits: prompt `850+636=`, response `0+6+0=06,5+3+0=08,8+6+0=14,#1486` and the end token. Each column, from
the ones up, is `digit+digit+carry=` and its two-digit sum; the answer after `#` has one digit more than the terms.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any

import numpy as np
import pydantic

from jdistill.config import Section
from jdistill.tasks.base import Problem, Task
from jdistill.tasks.response import Response

CHARACTERS = "0123456789+=,#"
PAD, END = "<pad>", "<end>"
VOCABULARY = {token: i for i, token in enumerate([*CHARACTERS, PAD, END])}
MAX_LENGTH = 128  # tokens; three digits need 41, nine 113


class AdditionOptions(Section):
    """`task.options` of addition."""

    num_digits: int = pydantic.Field(3, ge=2, le=9, description="digits of each term, zero-padded")
    teachers: tuple[str, ...] = pydantic.Field(
        (), strict=False, description="names in teacher.several; problem i goes to teacher i modulo their number"
    )


class Addition(Task):
    """Addition problems; the reward is 1.0 if a response ended and has the right answer after `#`, else 0.0."""

    name = "addition"
    Options = AdditionOptions

    def __init__(self, options: Section, tokenizer: Any, *, seed: int, max_prompt_tokens: int | None) -> None:
        super().__init__(options, tokenizer, seed=seed, max_prompt_tokens=max_prompt_tokens)
        assert isinstance(options, AdditionOptions)
        self.num_digits = options.num_digits
        self._id_of = {token: tokenizer.convert_tokens_to_ids(token) for token in [*CHARACTERS, END]}
        missing = sorted(token for token, i in self._id_of.items() if i is None or i == tokenizer.unk_token_id)
        if missing or tokenizer.eos_token != END:
            raise ValueError(
                f"task addition needs a tokenizer with one token for each of {CHARACTERS} and the end token {END}; "
                f"the one in {tokenizer.name_or_path} has no token for {missing}, "
                f"and its end token is {tokenizer.eos_token!r}: "
                "create the models with examples/addition/make_models.py"
            )
        self.num_train = None
        self.num_eval = (
            10 ** (2 * self.num_digits) // 16
        )  # about half of the held-out problems, so that few draws find them
        prompt_length = 2 * self.num_digits + 2
        if max_prompt_tokens is not None and prompt_length > max_prompt_tokens:
            raise ValueError(
                f"a prompt of task addition has {prompt_length} tokens, "
                f"but rollout.max_prompt_tokens is {max_prompt_tokens}: raise it"
            )

    def train_problem(self, index: int) -> Problem:
        """Draws a problem that is not held out from (seed, index)."""
        attempt = 0
        while is_held_out(prompt := self._draw(f"train/{self.seed}/{index}/{attempt}")):
            attempt += 1
        return self._problem(index, "train", prompt)

    def eval_problems(self, num: int) -> list[Problem]:
        """Draws `num` distinct held-out problems, the same for every seed."""
        self._check_num_eval(num)
        prompts: dict[str, None] = {}  # ordered
        draw = 0
        while len(prompts) < num:
            prompt = self._draw(f"eval/{draw}")
            draw += 1
            if is_held_out(prompt):
                prompts[prompt] = None
        return [self._problem(i, "eval", prompt) for i, prompt in enumerate(prompts)]

    def reward(self, problem: Problem, response: Response) -> float:
        """Returns 1.0 if the text between the first `#` and the end is the answer, whatever precedes it."""
        answer = response.text.removesuffix(END).partition("#")[2]
        return float(response.ended and answer == problem.data["answer"])

    def privileged_prompt_ids(self, problem: Problem) -> np.ndarray:
        """Returns the solution, a comma and the prompt."""
        a, b = problem.data["a"], problem.data["b"]
        return self._encode(f"{solution(a, b)},{a}+{b}=")

    def teacher(self, problem: Problem) -> str:
        """Assigns problems to `task.options.teachers` round-robin."""
        names = self.options.teachers
        if not names:
            raise ValueError("teacher.several needs task.options.teachers: list the teachers' names there")
        return names[problem.index % len(names)]

    def solution_ids(self, problem: Problem) -> np.ndarray:
        """Returns the scratchpad, the answer and the end token."""
        return self._encode([*solution(problem.data["a"], problem.data["b"]), END])

    def _draw(self, key: str) -> str:
        # A hash of a counter needs no stored state, and unlike a generator it cannot change with numpy's version.
        number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little")
        high, low = divmod(number % 10 ** (2 * self.num_digits), 10**self.num_digits)
        return f"{high:0{self.num_digits}}+{low:0{self.num_digits}}="

    def _problem(self, index: int, split: Any, prompt: str) -> Problem:
        a, _, b = prompt.removesuffix("=").partition("+")
        data = {"a": a, "b": b, "answer": f"{int(a) + int(b):0{self.num_digits + 1}}"}
        return Problem(index, split, self._encode(prompt), data)

    def _encode(self, tokens: Any) -> np.ndarray:
        return np.array([self._id_of[token] for token in tokens], np.int32)


def is_held_out(prompt: str) -> bool:
    """Returns whether a prompt such as `850+636=` is held out: an eighth of all prompts, chosen by a hash.

    A linear rule such as (a + b) % 8 would hold out whole carry classes, and held-out accuracy would then measure
    extrapolation to them.
    """
    return hashlib.blake2b(prompt.encode(), digest_size=1).digest()[0] % 8 == 0


def solution(a: str, b: str) -> str:
    """Returns the right response to `a+b=` without the end token; `a` and `b` are decimal strings of equal length."""
    columns = []
    carry = 0
    for digit_a, digit_b in zip(reversed(a), reversed(b), strict=True):
        column = int(digit_a) + int(digit_b) + carry
        columns.append(f"{digit_a}+{digit_b}+{carry}={column:02}")
        carry = column // 10
    return ",".join(columns) + f",#{int(a) + int(b):0{len(a) + 1}}"


def write_tokenizer(path: str | pathlib.Path) -> None:
    """Writes a Hugging Face fast tokenizer, one token per character: tokenizer.json and tokenizer_config.json."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # without a decoder, decoding puts spaces between the characters
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, END)])
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    _write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "eos_token": END,
            "model_max_length": MAX_LENGTH,
            "clean_up_tokenization_spaces": False,
        },
    )


def write_model(path: str | pathlib.Path, *, num_layers: int, dtype: str = "float32") -> None:
    """Writes a checkpoint directory without weights: config.json (Qwen3 shape, width 128) and the tokenizer.

    2 layers have 0.40 M parameters, 4 layers 0.79 M. `jdistill train` with `model.init: random` creates the weights.
    """
    path = pathlib.Path(path)
    write_tokenizer(path)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": len(VOCABULARY),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_LENGTH,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": num_layers,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": VOCABULARY[END],
        "pad_token_id": VOCABULARY[PAD],
        "torch_dtype": dtype,
    }
    _write_json(path / "config.json", config)
    # vLLM and transformers read the stop tokens of generation from here.
    _write_json(
        path / "generation_config.json",
        {"eos_token_id": VOCABULARY[END], "pad_token_id": VOCABULARY[PAD], "do_sample": True},
    )


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
