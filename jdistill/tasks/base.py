"""Defines a task: numbered training problems, fixed held-out problems, a reward.

Dimension key: `R` tokens of a completion, `N` problems of a file.
"""

from __future__ import annotations

import abc
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from jdistill import checkpoint_files
from jdistill.config import ConfigError, Section, parse
from jdistill.rollout.completion import Completion
from jdistill.tasks.response import Response
from jdistill.tokenizer_check import check_tokenizer
from jdistill.turn_end import read_turn_end


@dataclass(frozen=True, eq=False)
class Problem:
    """One prompt, and the data that its reward needs."""

    index: int  # argument of train_problem, or position in eval_problems
    split: Literal["train", "eval"]
    prompt_ids: np.ndarray  # int32
    data: Mapping[str, Any]  # the task's own fields, e.g. the right answer


class Task(abc.ABC):
    """Prompts and rewards in the tokens of one tokenizer.

    `train_problem` is a pure function of its index and the task's seed, whatever was asked for before, so a resumed run
    sees the same problems as an uninterrupted one.
    """

    name: ClassVar[str]  # the key in TASKS
    Options: ClassVar[type[Section]]  # schema of `task.options`

    num_train: int | None  # number of distinct training problems; None: practically unbounded
    num_eval: int  # number of held-out problems

    def __init__(self, options: Section, tokenizer: Any, *, seed: int, max_prompt_tokens: int | None) -> None:
        self.options = options
        self.tokenizer = tokenizer
        self.turn_end = read_turn_end(tokenizer.name_or_path, tokenizer)  # how completions and solutions end
        self.seed = seed
        self.max_prompt_tokens = max_prompt_tokens

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a completion, which includes the first one sampled."""
        return self.turn_end.stop_token_ids

    @classmethod
    def create(
        cls,
        options: Mapping[str, Any],
        tokenizer_path: str | pathlib.Path,
        *,
        seed: int = 0,
        max_prompt_tokens: int | None = None,
    ) -> Task:
        """Checks the options, loads the tokenizer and creates the task; see `jdistill.tasks.create_task`."""
        try:
            checked = parse(cls.Options, dict(options), source=f"task.options of {cls.name}")
        except ConfigError as e:
            if not cls.Options.model_fields:
                raise ConfigError(f"task.options of {cls.name}: this task has no options, got {sorted(options)}") from e
            raise
        return cls(checked, load_tokenizer(tokenizer_path), seed=seed, max_prompt_tokens=max_prompt_tokens)

    @abc.abstractmethod
    def train_problem(self, index: int) -> Problem:
        """Returns training problem number `index`: 0, 1, 2 and so on without end."""

    @abc.abstractmethod
    def eval_problems(self, num: int) -> list[Problem]:
        """Returns the first `num` held-out problems: the same for every seed, and never training problems.

        Raises:
            ValueError: the task has fewer.
        """

    @abc.abstractmethod
    def reward(self, problem: Problem, response: Response) -> float:
        """Returns the reward of a response, which may have been cut off (`response.ended`)."""

    def is_readable(self, response: Response) -> bool | None:
        """Returns whether a response gives an answer that the reward can read, right or wrong; None: not defined."""
        return None

    @abc.abstractmethod
    def solution_ids(self, problem: Problem) -> np.ndarray:
        """Returns a right completion for the supervised objective: int32[R], its stop token included.

        Raises:
            ValueError: the task has no solutions; the message gives the reason.
        """

    def privileged_prompt_ids(self, problem: Problem) -> np.ndarray:
        """Returns the prompt of a teacher that knows more than the student, e.g. the solution: int32 token ids.

        Raises:
            ValueError: the task has no privileged prompt.
        """
        raise ValueError(f"task {self.name} has no privileged prompt: set teacher.privileged: false")

    def teacher(self, problem: Problem) -> str:
        """Returns the name in `teacher.several` of the teacher that scores this problem's completions.

        Raises:
            ValueError: the task does not choose between teachers.
        """
        raise ValueError(
            f"task {self.name} does not choose a teacher for each problem: give one teacher, not teacher.several"
        )

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of `ids`, special tokens included."""
        return decode_all(self.tokenizer, ids)

    def response(self, completion: Completion) -> Response:
        """Returns what the reward of a completion judges."""
        return Response(completion.text(self.decode), completion.completion_ids, completion.finish_reason)

    def _check_num_eval(self, num: int) -> None:
        if not 0 <= num <= self.num_eval:
            raise ValueError(
                f"{num} held-out problems were requested, but task {self.name} has {self.num_eval}: "
                f"set eval.num_prompts to at most {self.num_eval}"
            )


def load_tokenizer(path: str | pathlib.Path) -> Any:
    """Loads the Hugging Face tokenizer of a checkpoint directory; never from the network.

    Raises:
        ValueError: the directory does not exist, holds no readable tokenizer, or transformers loads another one than
            its files describe.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise ValueError(f"no directory {path}: model.path must be a checkpoint directory with a tokenizer in it")
    if not checkpoint_files.has_tokenizer(path):
        raise ValueError(
            f"{path} has no tokenizer ({', '.join(checkpoint_files.TOKENIZER_FILES)}): copy it from the checkpoint "
            "that the model comes from"
        )
    from transformers import AutoTokenizer  # imported here because it is slow, and listing TASKS does not need it

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as e:  # tokenizers raises bare Exception for a damaged file
        raise ValueError(f"the tokenizer in {path} cannot be loaded: {e}") from e
    check_tokenizer(path, tokenizer)
    return tokenizer


def render_chats(tokenizer: Any, chats: Sequence[Sequence[Mapping[str, str]]], what: str, **options: Any) -> list[str]:
    """Renders chats as the student's prompts, with its template's special tokens.

    Args:
        tokenizer: of the checkpoint.
        chats: messages with role and content.
        what: who needs the template, for error messages.
        options: for the template, e.g. enable_thinking.

    Raises:
        ValueError: there is no template, several without a default, or the template refuses these messages.
    """
    template, place = tokenizer.chat_template, tokenizer.name_or_path
    if not template:
        raise ValueError(
            f"the tokenizer in {place} has no chat template, which {what} needs for its prompts: use an "
            "instruction-tuned checkpoint, or put a chat_template.jinja beside tokenizer.json"
        )
    if isinstance(template, Mapping) and "default" not in template:
        raise ValueError(
            f"the tokenizer in {place} has the chat templates {', '.join(template)} and none named default, which "
            f"{what} needs: rename one of them in its tokenizer_config.json (or additional_chat_templates/)"
        )
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True, **options)
    except TemplateError as e:
        raise ValueError(f"the chat template of the tokenizer in {place} refuses the prompts of {what}: {e}") from None


def decode_all(tokenizer: Any, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text of `ids`, special tokens included and spaces as they are."""
    return tokenizer.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def without_special_tokens(text: str, tokenizer: Any) -> str:
    """Returns decoded text without the special tokens in it."""
    for token in sorted(tokenizer.all_special_tokens, key=len, reverse=True):  # one may contain another
        text = text.replace(token, "")
    return text


def epoch_permutation(seed: int, epoch: int, num: int) -> np.ndarray:
    """Returns a permutation, int64[N], that is a pure function of its arguments.

    It sorts the raw output of a counter-based generator, which numpy guarantees never to change; numpy gives no such
    guarantee for `Generator.permutation`, and a resumed run may use a newer numpy.
    """
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(num), kind="stable")
