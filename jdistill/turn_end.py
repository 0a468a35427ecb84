"""Where a turn ends: the token ids that stop sampling, and the id that training appends to a solution."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from jdistill.checkpoint_files import CONFIG, GENERATION_CONFIG, read_config, read_generation_config

# How a completion ended. stop: by itself, with a stop token or a stop string; length: at max_new_tokens.
FinishReason = Literal["stop", "length"]

# A message that no template changes, and that no template contains.
_PROBE = "jdistill"


@dataclasses.dataclass(frozen=True, slots=True)
class TurnEnd:
    """The end of an assistant's turn, in the ids of one tokenizer.

    Qwen3: `TurnEnd((151645, 151643), 151645)`: `<|im_end|>` and `<|endoftext|>` stop, `<|im_end|>` is appended.
    Gemma 3: `TurnEnd((106, 1), 106)`: `<end_of_turn>`, which its chat template writes, and `<eos>`.
    """

    stop_token_ids: tuple[int, ...]  # sampling stops at the first of these and keeps it; () if the checkpoint has none
    appended_id: int | None  # ends supervised solutions and a cross-tokenizer teacher's completions; None: no such id

    def __post_init__(self) -> None:
        # Otherwise a student that learned its solutions would never stop.
        assert self.appended_id is None or self.appended_id in self.stop_token_ids, self


def read_turn_end(path: str | pathlib.Path, tokenizer: Any) -> TurnEnd:
    """Reads where a turn ends from a checkpoint directory and its tokenizer.

    Every part that samples, rewards, supervises or aligns turns reads it here.

    Args:
        path: checkpoint directory, or a tokenizer's alone; generation_config.json and config.json are read if they
            exist.
        tokenizer: the directory's Hugging Face tokenizer; None: it has no tokenizer.

    Returns:
        As stop tokens: the token that the chat template writes after an assistant's message, the tokenizer's end token,
        and the files' ids in their order. The first of the former two is appended.

    Raises:
        ValueError: a file is damaged, or its eos_token_id is neither an id nor a list of ids.
    """
    from_template = _template_end_id(tokenizer)
    from_tokenizer = None if tokenizer is None or tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
    own = [token_id for token_id in (from_template, from_tokenizer) if token_id is not None]
    return TurnEnd(tuple(dict.fromkeys((*own, *_file_stop_ids(path)))), own[0] if own else None)


def _file_stop_ids(path: str | pathlib.Path) -> list[int]:
    """Returns eos_token_id of generation_config.json, or else of config.json, as transformers and vLLM do.

    config.json comes second because it often holds the default of its class, which means another token there.
    """
    path = pathlib.Path(path)
    value, file = read_generation_config(path).get("eos_token_id"), GENERATION_CONFIG
    if value is None and (path / CONFIG).is_file():
        config, file = read_config(path), CONFIG
        nested = config.get("text_config")
        value = config.get("eos_token_id")
        if value is None and isinstance(nested, Mapping):
            value = nested.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int for token_id in ids):
        raise ValueError(f"{path / file}: expected eos_token_id to be a token id or a list of ids, got {value!r}")
    return [token_id for token_id in ids if token_id >= 0]  # -1 stands for "none" in old checkpoints


def _template_end_id(tokenizer: Any) -> int | None:
    """Returns the added token that follows an assistant's message in the chat template; None if there is none.

    Whitespace around it, and whatever follows it, is not the end: `<|im_end|>` of Qwen's `<|im_end|>` and newline,
    `</s>` of Llama 2's space and `</s>`, `<|end|>` of Phi-3's `<|end|>`, newline and `<|endoftext|>`.
    """
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        if not tokenizer.chat_template:
            return None
        text, added = tokenizer.apply_chat_template(chat, tokenize=False), tokenizer.added_tokens_decoder
    except Exception:
        # A template may refuse this conversation, with any error, and mistral-common's tokenizers have none of these:
        # then the template says nothing about ends.
        return None
    _, probe, after = text.rpartition(_PROBE)
    after = after.lstrip()
    if not probe:
        return None
    ends = {str(token): token_id for token_id, token in added.items() if after.startswith(str(token))}
    return ends[max(ends, key=len)] if ends else None
