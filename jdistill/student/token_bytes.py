"""The bytes of each token, as the tokenizer's own decoder gives them within a text.

The decoder treats added tokens like all others: Gemma 3's token of two U+2581 is two spaces. What it does only to the
first token of a text, such as dropping a space, is left out: completions continue a prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Decoders with which a token's bytes do not depend on its neighbours.
_DECODERS = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"}


class TokenBytes:
    """The bytes of a tokenizer's tokens by their ids.

    Args:
        tokenizer: Hugging Face fast tokenizer.

    Raises:
        ValueError: it has no fast implementation, or its tokens' bytes depend on their neighbours (as in WordPiece).
    """

    def __init__(self, tokenizer: Any):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        name = getattr(tokenizer, "name_or_path", tokenizer)
        if backend is None:
            raise ValueError(f"the tokenizer of {name} has no fast implementation (tokenizer.json): convert it")
        self._backend = backend
        steps = _steps(None if backend.decoder is None else json.loads(backend.decoder.__getstate__()))
        kinds = {step["type"] for step in steps}
        if not kinds <= _DECODERS or not kinds:
            raise ValueError(
                f"the tokenizer of {name} has {'the decoder ' + ', '.join(sorted(kinds)) if kinds else 'no decoder'}, "
                "so a token's text depends on its neighbours: use byte-level BPE or SentencePiece tokenizers for "
                "teacher and student"
            )
        self._falls_back = "ByteFallback" in kinds
        spell = _speller(steps)
        silent = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        silent.add(tokenizer.unk_token_id)
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self._bytes = [None if t is None or i in silent else spell(t) for i, t in enumerate(tokens)]
        self._is_byte = [t is not None and _BYTE.fullmatch(t) is not None for t in tokens]
        self._anchor = self._find_anchor()

    def __getitem__(self, token_id: int) -> bytes | None:
        """Returns a token's bytes; None if it has no text: special, unknown, or of an id that only the model has."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else None

    def are_decoded(self, ids: Sequence[int]) -> bool:
        """Returns whether the tokenizer decodes `ids`, after another text, to the bytes that this table has for them.

        Tokens without text must not be among them.
        """
        begin = [] if self._anchor is None else [self._anchor]
        found = self._backend.decode([*begin, *ids], skip_special_tokens=False)
        return _with_one_mark(found) == _with_one_mark(self._text([*begin, *ids]))

    def _text(self, ids: Sequence[int]) -> str:
        """Returns the text of the tokens' bytes; U+FFFD where they are not UTF-8."""
        text, run = "", b""
        for token_id in ids:
            piece = self[token_id]
            assert piece is not None, token_id
            if self._falls_back and not self._is_byte[token_id]:
                text += _decode_run(run) + piece.decode()
                run = b""
            else:
                run += piece
        return text + (_decode_run(run) if self._falls_back else run.decode(errors="replace"))

    def _find_anchor(self) -> int | None:
        """Returns a token of visible ASCII characters; at the start of a text it takes what would befall the first."""
        for token_id, piece in enumerate(self._bytes):
            if piece and piece.isascii() and piece.decode().isprintable() and b" " not in piece:
                if self._backend.decode([token_id], skip_special_tokens=False) == piece.decode():
                    return token_id
        return None


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Returns the decoder's steps in their order."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for one in decoder["decoders"] for step in _steps(one)]
    return [decoder]


def _speller(steps: Sequence[dict[str, Any]]) -> Callable[[str], bytes]:
    """Returns the function from a token to its bytes within a text."""
    from tokenizers import decoders

    replace: list[Callable[[str], str]] = []
    for step in steps:
        if step["type"] == "Metaspace":
            replace.append(lambda token, old=step["replacement"]: token.replace(old, " "))
        elif step["type"] == "Replace":
            ((kind, pattern),) = step["pattern"].items()
            if kind == "String":
                replace.append(lambda token, old=pattern, new=step["content"]: token.replace(old, new))
            else:
                from tokenizers import Regex

                one = decoders.Replace(Regex(pattern), step["content"])
                replace.append(lambda token, one=one: one.decode([token]))
    kinds = {step["type"] for step in steps}

    def spell(token: str) -> bytes:
        for function in replace:
            token = function(token)
        if "ByteLevel" in kinds and all(c in _BYTE_OF for c in token):
            return bytes(_BYTE_OF[c] for c in token)
        if "ByteFallback" in kinds and (match := _BYTE.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.encode()

    return spell


def _decode_run(run: bytes) -> str:
    """Decodes a run of byte tokens as ByteFallback does: if they are not UTF-8, each is U+FFFD."""
    try:
        return run.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(run)


def _with_one_mark(text: str) -> str:
    # How many replacement characters stand for some bytes differs between decoders.
    return re.sub("\ufffd+", "\ufffd", text)


def _byte_alphabet() -> dict[str, int]:
    """Maps the characters of byte-level BPE to bytes: printable bytes stand for themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
