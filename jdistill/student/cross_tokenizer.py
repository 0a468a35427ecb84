"""Converts completions to the tokens of a teacher with another tokenizer, and its scores back to the student's tokens.

Both tokenisations are aligned by the bytes of the text. Where a student token and a teacher token end at the same byte,
there is a boundary; the tokens between two boundaries are a segment, and each side's log-prob of the segment is the sum
over its tokens. Bytes rather than characters, because a token may end inside a character.

    student   |Hel|lo| wor|ld|<end>|
    teacher   |Hello| w|orld|</s>|        segments: Hello, " world", the end

A segment is left out, never guessed, where the teacher's tokenizer changed the text (normalisation, lower case), where
the student's tokens are not UTF-8, after a special token inside the completion, beyond the teacher's longest sequence,
at the end of a truncated completion (a truncated word is split differently from a whole one), and where it has
suspiciously many tokens. A completion is left out as a whole if either tokenizer decodes its tokens to other bytes than
those that were aligned.

The prompt is not aligned: the task renders it for each tokenizer with that tokenizer's chat template. So there is
always a boundary between prompt and completion, although the teacher's tokenizer might merge tokens across it.

Dimension key: `R` student tokens of a completion, `U` teacher tokens of it, `P` teacher tokens of its prompt.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jdistill.student.token_bytes import TokenBytes


@dataclass(frozen=True, eq=False)
class Retokenized:
    """A prompt and its completion in the teacher's tokens."""

    token_ids: Int[np.ndarray, "S"]  # int32: the teacher's prompt, and the completion in the teacher's tokens
    spans: tuple[tuple[int, int], ...]  # the targets to score: the completion
    segment_ids: Int[np.ndarray, "R"]  # int32: segment of each student token, numbered from 0 in order; -1: not usable
    teacher_segment_ids: Int[np.ndarray, "U"]  # int32: the same for each teacher token


class CrossTokenizer:
    """Converts one tokenizer's tokens to another's; both are Hugging Face fast tokenizers.

    Args:
        student: tokenizer of the sampled tokens.
        teacher: tokenizer of the teacher.
        student_stop_ids: a completion that ends with one of these was not truncated.
        teacher_stop_id: the teacher's token in place of them.
        max_length: the teacher's longest sequence, in its tokens.
        max_segment_tokens: a segment with more tokens, on either side, is not used.

    Raises:
        ValueError: as `TokenBytes`.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        *,
        student_stop_ids: Collection[int],
        teacher_stop_id: int,
        max_length: int,
        max_segment_tokens: int = 16,
    ):
        from tokenizers import Tokenizer

        self._student_bytes = TokenBytes(student)
        self._teacher_bytes = TokenBytes(teacher)
        self._student_stop_ids = frozenset(student_stop_ids)
        self._teacher_stop_id = teacher_stop_id
        self._max_length = max_length
        self._max_segment_tokens = max_segment_tokens
        # A copy: a completion that spells a special token stays text, while the task's prompts use special tokens.
        self._backend = Tokenizer.from_str(teacher.backend_tokenizer.to_str())
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()

    def retokenize(self, teacher_prompt_ids: Int[np.ndarray, "P"], completion_ids: Int[np.ndarray, "R"]) -> Retokenized:
        """Converts a completion to the sequence that the teacher scores.

        Args:
            teacher_prompt_ids: the prompt in the teacher's tokens.
            completion_ids: the student's sampled tokens, with the stop token unless it was truncated.

        Raises:
            ValueError: the prompt leaves no room within the teacher's longest sequence.
        """
        room = self._max_length - len(teacher_prompt_ids)
        if room < 1:
            raise ValueError(
                f"a prompt has {len(teacher_prompt_ids)} teacher tokens, which leaves no room in the teacher's "
                f"{self._max_length}: raise the teacher's max_sequence_length, or lower rollout.max_prompt_tokens"
            )
        ended = len(completion_ids) > 0 and int(completion_ids[-1]) in self._student_stop_ids
        student_ids = [int(i) for i in (completion_ids[:-1] if ended else completion_ids)]
        pieces = [self._student_bytes[i] for i in student_ids]
        if None in pieces:  # a special token, which has no text
            pieces, ended = pieces[: pieces.index(None)], False
        student_ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        teacher_ids, teacher_ends, is_wrong = self._encode(b"".join(pieces))
        known_ids = [i for i in teacher_ids if self._teacher_bytes[i] is not None]
        comes_back = self._teacher_bytes.are_decoded(known_ids)
        length = student_ends[-1] if len(student_ends) else 0
        boundaries = np.intersect1d(student_ends, teacher_ends[teacher_ends >= 0])
        boundaries = np.union1d(boundaries[boundaries > 0], [length] if length else []).astype(np.int64)
        # A token belongs to the first boundary at or after its end. One that ends inside a character, or in text that
        # the teacher changed, belongs to the boundary of the next token that does not.
        teacher_ends = np.where(teacher_ends < 0, length, teacher_ends)
        teacher_of = np.searchsorted(boundaries, np.minimum.accumulate(teacher_ends[::-1])[::-1])
        student_of = np.searchsorted(boundaries, student_ends)
        is_wrong = np.logical_or.reduceat(is_wrong, [0, *boundaries[:-1]]) if len(boundaries) else np.zeros(0, bool)
        if len(boundaries) and not ended:
            is_wrong[-1] = True
        is_wrong = np.append(is_wrong, not ended)  # the last segment is the stop token
        if ended:
            student_of = np.append(student_of, len(boundaries))
            teacher_of = np.append(teacher_of, len(boundaries))
            teacher_ids = [*teacher_ids, self._teacher_stop_id]
        is_wrong[teacher_of[room:]] = True
        is_wrong |= not (comes_back and self._student_bytes.are_decoded(student_ids[: len(pieces)]))
        for of in (student_of, teacher_of):
            # A segment without tokens on one side cannot be compared.
            counts = np.bincount(of, minlength=len(is_wrong))
            is_wrong |= (counts == 0) | (counts > self._max_segment_tokens)
        numbers = np.where(is_wrong, -1, np.cumsum(~is_wrong) - 1).astype(np.int32)
        segment_ids = np.full(len(completion_ids), -1, np.int32)
        segment_ids[: len(student_of)] = numbers[student_of]
        teacher_segment_ids = numbers[teacher_of][:room]
        teacher_ids = teacher_ids[:room]
        if not teacher_ids:  # a request must score at least one token; this score is not used
            teacher_ids, teacher_segment_ids = [self._teacher_stop_id], np.full(1, -1, np.int32)
        token_ids = np.concatenate([teacher_prompt_ids, np.asarray(teacher_ids, np.int32)]).astype(np.int32)
        spans = ((len(teacher_prompt_ids), len(token_ids)),)
        return Retokenized(token_ids, spans, segment_ids, teacher_segment_ids)

    def _encode(self, raw: bytes) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Tokenizes N bytes with the teacher's tokenizer.

        Returns:
            The teacher's ids; the byte at which each ends (-1: inside a character or a replaced byte); bool[N], true at
            bytes that must not be used.
        """
        characters = raw.decode("utf-8", errors="surrogateescape")
        is_bad = np.array([0xDC80 <= ord(c) <= 0xDCFF for c in characters], bool)
        text = re.sub("[\udc80-\udcff]", "\ufffd", characters)
        encoded = text.encode()
        sizes = np.array([len(c.encode()) for c in text], np.int64)
        # Where each character begins, in `encoded` and in `raw`: they differ where raw is not UTF-8.
        starts = np.concatenate([[0], np.cumsum(sizes)])
        raw_starts = np.concatenate([[0], np.cumsum(np.where(is_bad, 1, sizes))])
        is_wrong = np.zeros(len(raw), bool)
        is_wrong[raw_starts[:-1][is_bad]] = True
        ids, offsets = self._split(text)
        pieces = [self._teacher_bytes[i] for i in ids]
        if None not in pieces and b"".join(pieces) == encoded:
            ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
            if not is_bad.any():
                return ids, ends, is_wrong
            # The byte of `raw` for each byte of `encoded`; -1 inside a replaced character.
            places = np.full(len(encoded) + 1, -1, np.int64)
            good = np.repeat(~is_bad, sizes)
            first = np.repeat(starts[:-1], sizes)
            places[:-1][good] = (np.arange(len(encoded)) - first + np.repeat(raw_starts[:-1], sizes))[good]
            places[starts] = raw_starts
            return ids, places[ends], is_wrong
        # The teacher's tokens spell another text: align by the characters they came from, and leave out differences.
        begins, ends = np.array(offsets, np.int64).reshape(-1, 2).T
        latest = np.minimum.accumulate(np.append(begins[1:], len(text))[::-1])[::-1]
        is_boundary = ends <= latest  # false if a later token holds a part of the same character
        begin, spelled = 0, b""
        for piece, end, closes in zip(pieces, ends, is_boundary, strict=True):
            spelled += b"\xff" if piece is None else piece
            if closes:
                if spelled != text[begin:end].encode():
                    is_wrong[raw_starts[begin] : raw_starts[end]] = True
                begin, spelled = end, b""
        is_wrong[raw_starts[begin] :] = True
        return ids, np.where(is_boundary, raw_starts[ends], -1), is_wrong

    def _split(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenizes a text that continues a prompt; returns the teacher's ids and their character ranges."""
        found = self._backend.encode(text, add_special_tokens=False)
        spelled = b"".join(self._teacher_bytes[i] or b"" for i in found.ids)
        if _num_spaces(spelled) > _num_spaces(text.encode()):
            # SentencePiece adds a space before a text, but a continuation has none: tokenize it after a line feed.
            longer = self._backend.encode("\n" + text, add_special_tokens=False)
            first = next((i for i, (begin, _) in enumerate(longer.offsets) if begin >= 1), None)
            if first is not None and all(end <= 1 for _, end in longer.offsets[:first]):
                return longer.ids[first:], [(begin - 1, end - 1) for begin, end in longer.offsets[first:]]
        return found.ids, found.offsets


def _num_spaces(text: bytes) -> int:
    """Returns how many spaces a text begins with."""
    return len(text) - len(text.lstrip(b" "))


def scatter(
    retokenized: Retokenized, logprobs: Float[np.ndarray, "U"]
) -> tuple[Float[np.ndarray, "R"], Int[np.ndarray, "R"]]:
    """Maps the teacher's scores to the student's tokens, for `losses.segments`: float32[R] nats, int32[R] segment ids.

    A segment's log-prob is at its last token; its other tokens and unusable tokens have 0.
    """
    segment_ids = retokenized.segment_ids
    used = retokenized.teacher_segment_ids >= 0
    sums = np.bincount(retokenized.teacher_segment_ids[used], weights=np.asarray(logprobs, np.float64)[used])
    out = np.zeros(len(segment_ids), np.float32)
    last = np.flatnonzero((segment_ids >= 0) & (segment_ids != np.append(segment_ids[1:], -1)))
    out[last] = sums[segment_ids[last]]
    return out, segment_ids
