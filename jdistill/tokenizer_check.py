"""Compares a loaded tokenizer with its files: versions of transformers have built other tokenizers than tokenizer.json.

For example, transformers 5.8 to 5.19 give a byte-level tokenizer of class LlamaTokenizerFast the pre-tokenizer of
Llama 2, which loses every space: all rewards become 0, and no error says why.
"""

from __future__ import annotations

import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger(__name__)

# Spaces and runs of them, line breaks, digits, accents, scripts, emoji, code. Without a space at the start and without
# decomposed accents, where classes of transformers 5 differ slightly from many published files.
PROBE = (
    "a  b   c\n\n\tx = 3.14 + 1,234;  # don't stop\r\n"
    "caf\u00e9 na\u00efve \u00dcber \u4f60\u597d\u4e16\u754c \u65e5\u672c\u8a9e \ud55c\uad6d "
    "\U0001f600\U0001f44d\U0001f3fd <b>#### 72</b> 0123456789 "
)


def check_tokenizer(path: str | pathlib.Path, tokenizer: Any) -> None:
    """Encodes and decodes a probe text with a loaded tokenizer and with tokenizer.json itself.

    Args:
        path: checkpoint directory.
        tokenizer: what transformers loaded from it.

    Raises:
        ValueError: the two differ; names the versions, the first different ids and the remedy.
    """
    import tokenizers
    import transformers

    path = pathlib.Path(path)
    _compare_chat_templates(path)
    file = path / "tokenizer.json"
    if not file.exists():
        logger.warning("%s has no tokenizer.json: the tokenizer that transformers loads is not checked", path)
        return
    reference = tokenizers.Tokenizer.from_file(str(file))
    reference.no_truncation()
    reference.no_padding()
    probe = PROBE
    if not _encodes(reference, probe):  # a small vocabulary without an unknown token: digits and signs, say
        probe = "".join(character for character in PROBE if _encodes(reference, character))
    expected = reference.encode(probe, add_special_tokens=False).ids
    expected_text = reference.decode(expected, skip_special_tokens=False)
    try:
        got = list(tokenizer.encode(probe, add_special_tokens=False))
        got_text = tokenizer.decode(expected, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    except Exception as e:  # tokenizers raises bare Exception
        what = f"a probe text cannot be encoded ({e})"
    else:
        if got == expected and got_text == expected_text:
            return
        if got != expected:
            i = _first_difference(got, expected)
            what = f"a probe text becomes the ids {got[i : i + 6]} instead of {expected[i : i + 6]} (from token {i} on)"
        else:
            i = _first_difference(got_text, expected_text)
            what = f"the ids of a probe text become {got_text[i : i + 20]!r} instead of {expected_text[i : i + 20]!r}"
    raise ValueError(
        f"{path}: transformers {transformers.__version__} loads another tokenizer ({type(tokenizer).__name__}) than "
        f"tokenizer.json describes (read by tokenizers {tokenizers.__version__}): {what}. Install another version of "
        "transformers, or say which of the two is right. tokenizer.json: set tokenizer_class to TokenizersBackend in "
        "tokenizer_config.json (ignored for some model types, such as qwen2). The loaded one: write it with "
        "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    )


def _encodes(tokenizer: Any, text: str) -> bool:
    try:
        tokenizer.encode(text, add_special_tokens=False)
    except Exception:  # tokenizers raises bare Exception
        return False
    return True


def _first_difference(a: Sequence[Any], b: Sequence[Any]) -> int:
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))


def _compare_chat_templates(path: pathlib.Path) -> None:
    """Warns if a chat template is given twice and differently: transformers takes chat_template.jinja."""
    jinja, config = path / "chat_template.jinja", path / "tokenizer_config.json"
    if not (jinja.is_file() and config.is_file()):
        return
    try:
        other = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError):
        return  # transformers has read it, or has said what is wrong
    if isinstance(other, str) and other.strip() != jinja.read_text(encoding="utf-8").strip():
        logger.warning("%s: chat_template.jinja is used; tokenizer_config.json holds another chat template", path)
