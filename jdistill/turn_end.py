"""Where a turn ends: the token ids that stop sampling, and the id that training appends to a solution."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from jdistill.checkpoint_files import GENERATION_CONFIG, read_generation_config


@dataclasses.dataclass(frozen=True, slots=True)
class TurnEnd:
    """The end of an assistant's turn, in the ids of one tokenizer.

    Qwen3: `TurnEnd((151645, 151643), 151645)`: `<|im_end|>` and `<|endoftext|>` stop, `<|im_end|>` is appended.
    """

    stop_token_ids: tuple[int, ...]  # sampling stops at the first of these and keeps it; () if the checkpoint has none
    appended_id: int | None  # ends supervised solutions and a cross-tokenizer teacher's completions; None: no such id

    def __post_init__(self) -> None:
        # Otherwise a student that learned its solutions would never stop.
        assert self.appended_id is None or self.appended_id in self.stop_token_ids, self


def read_turn_end(path: str | pathlib.Path, tokenizer: Any) -> TurnEnd:
    """Reads where a turn ends from a checkpoint directory and its tokenizer.

    Args:
        path: checkpoint directory; generation_config.json is read, if there is one.
        tokenizer: the directory's Hugging Face tokenizer; None: it has no tokenizer.

    Returns:
        The tokenizer's end token first, then the others of generation_config.json in its order; the tokenizer's is
        the one appended.

    Raises:
        ValueError: generation_config.json is damaged, or its eos_token_id is neither an id nor a list of ids.
    """
    # The whole rule stands here. It does not look at the chat template, whose own end may be neither of these ids (a
    # base model's tokenizer with an instruction template), nor at config.json.
    appended_id = None if tokenizer is None or tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
    own = () if appended_id is None else (appended_id,)
    return TurnEnd(tuple(dict.fromkeys((*own, *_generation_stop_ids(path)))), appended_id)


def _generation_stop_ids(path: str | pathlib.Path) -> list[int]:
    """Returns eos_token_id of generation_config.json as a list; Qwen3 has two, most models one."""
    value = read_generation_config(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int for token_id in ids):
        raise ValueError(
            f"{pathlib.Path(path) / GENERATION_CONFIG}: expected eos_token_id to be a token id or a list of ids, "
            f"got {value!r}"
        )
    return ids
