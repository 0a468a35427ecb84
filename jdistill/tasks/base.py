"""What a task is: numbered training problems, fixed held-out problems, a reward.

Dimension key: `R` tokens of a completion, `N` problems of a file.
"""

from __future__ import annotations

import abc
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from jdistill.config import ConfigError, Section, parse


@dataclass(frozen=True, eq=False)
class Problem:
    """One prompt and what its reward needs."""

    index: int  # the argument of train_problem, or the place in eval_problems
    split: Literal["train", "eval"]
    prompt_ids: np.ndarray  # int32
    data: Mapping[str, Any]  # of the task's own making, e.g. the right answer


class Task(abc.ABC):
    """Prompts and rewards in the tokens of one tokenizer.

    `train_problem` is a pure function of its index and the task's seed, so that a resumed run sees what an
    uninterrupted one would, whatever was asked before.
    """

    name: ClassVar[str]  # the key in TASKS
    Options: ClassVar[type[Section]]  # schema of `task.options`

    stop_token_ids: tuple[int, ...]  # a completion ends with the first of these, and includes it
    num_train: int | None  # different training problems; None: practically unbounded
    num_eval: int  # how many held-out problems can be asked for

    def __init__(self, options: Section, tokenizer: Any, *, seed: int, max_prompt_tokens: int | None) -> None:
        self.options = options
        self.tokenizer = tokenizer
        self.seed = seed
        self.max_prompt_tokens = max_prompt_tokens

    @classmethod
    def create(
        cls,
        options: Mapping[str, Any],
        tokenizer_path: str | pathlib.Path,
        *,
        seed: int = 0,
        max_prompt_tokens: int | None = None,
    ) -> Task:
        """Checks the options, loads the tokenizer, makes the task. See `jdistill.tasks.create_task`."""
        try:
            checked = parse(cls.Options, dict(options), source=f"task.options of {cls.name}")
        except ConfigError as e:
            if not cls.Options.model_fields:
                raise ConfigError(f"task.options of {cls.name}: this task has no options, got {sorted(options)}") from e
            raise
        return cls(checked, load_tokenizer(tokenizer_path), seed=seed, max_prompt_tokens=max_prompt_tokens)

    @abc.abstractmethod
    def train_problem(self, index: int) -> Problem:
        """Training problem number `index` (0, 1, 2 ... without end)."""

    @abc.abstractmethod
    def eval_problems(self, num: int) -> list[Problem]:
        """The first `num` held-out problems: always the same ones, whatever the seed, and never training problems.

        Raises:
            ValueError: there are fewer.
        """

    @abc.abstractmethod
    def reward(self, problem: Problem, completion_ids: np.ndarray) -> float:
        """Reward of int32[R] sampled tokens, the stop token included where the completion ended by itself."""

    @abc.abstractmethod
    def solution_ids(self, problem: Problem) -> np.ndarray:
        """int32[R], a right completion with its stop token, for the supervised objective.

        Raises:
            ValueError: the task has none, with the reason.
        """

    def privileged_prompt_ids(self, problem: Problem) -> np.ndarray:
        """int32, the prompt as a teacher sees it that knows more than the student: the solution, say.

        Raises:
            ValueError: the task has none.
        """
        raise ValueError(f"task {self.name} has no privileged prompt: set teacher.privileged: false")

    def teacher(self, problem: Problem) -> str:
        """Which of `teacher.several` scores this problem's completions.

        Raises:
            ValueError: the task does not say.
        """
        raise ValueError(f"task {self.name} names no teacher for its problems: give one teacher, not teacher.several")

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some tokens, special tokens included."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def ended(self, completion_ids: np.ndarray) -> bool:
        """Whether the completion ended by itself, rather than by a length limit."""
        return len(completion_ids) > 0 and int(completion_ids[-1]) in self.stop_token_ids

    def _check_num_eval(self, num: int) -> None:
        if not 0 <= num <= self.num_eval:
            raise ValueError(
                f"{num} held-out problems asked of task {self.name}, which has {self.num_eval}: "
                f"set eval.num_prompts to at most {self.num_eval}"
            )


def load_tokenizer(path: str | pathlib.Path) -> Any:
    """The Hugging Face tokenizer of a checkpoint directory; never from the network.

    Raises:
        ValueError: no directory, or no tokenizer that can be read in it.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise ValueError(f"no directory {path}: model.path must be a checkpoint directory with a tokenizer in it")
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(
            f"{path} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json): copy it from the checkpoint "
            "that the model comes from"
        )
    from transformers import AutoTokenizer  # slow to import, and not needed to look at TASKS

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as e:  # tokenizers raises bare Exception for a damaged file
        raise ValueError(f"the tokenizer in {path} cannot be loaded: {e}") from e


def epoch_permutation(seed: int, epoch: int, num: int) -> np.ndarray:
    """int64[N], a permutation that is a pure function of its arguments.

    Sorts the raw output of a counter-based generator: numpy promises that it never changes, which it does not promise
    for `Generator.permutation`, and a resumed run may meet a newer numpy.
    """
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(num), kind="stable")
