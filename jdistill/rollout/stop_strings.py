"""Finds the stop string that ends a completion, by the rules of vLLM.

A stop string is searched for in the text of the completion alone, special tokens included. A completion ends with the
token that completes the first one; a string that is complete within the first `min_new_tokens` tokens does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class StopStringEnd(NamedTuple):
    """Where a stop string ends a completion."""

    num_tokens: int  # up to the token that completes the string
    span: tuple[int, int]  # characters of the string in the decoded completion: first, and one after the last


class StopStrings:
    """The stop strings of a sampler.

    Args:
        strings: not empty each.
        decode: token ids -> text.
        min_new_tokens: a string completed by one of this many first tokens is text like any other.
    """

    def __init__(self, strings: tuple[str, ...], decode: Callable[[np.ndarray], str], min_new_tokens: int):
        self._strings = strings
        self._decode = decode
        self._min_new_tokens = min_new_tokens

    def find(self, ids: np.ndarray, num_searched: int) -> StopStringEnd | None:
        """Returns the end of the completion int32[R]; None if no stop string ends it.

        Args:
            ids: the sampled tokens so far, without a stop token.
            num_searched: how many of them an earlier call has searched in vain.
        """
        first = max(self._min_new_tokens, num_searched)
        if len(ids) <= first:
            return None
        text, begin = self._text(ids), len(self._text(ids[:first]))
        ends = []
        for string in self._strings:
            start = text.find(string, max(begin - len(string) + 1, 0))
            if start >= 0:
                ends.append((start + len(string), start))
        if not ends:
            return None
        end, start = min(ends, key=lambda found: found[0])  # the first listed wins a tie
        low, high = first, len(ids)  # invariant: the text of `low` tokens ends before `end`, that of `high` does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if len(self._text(ids[:middle])) >= end else (middle, high)
        return StopStringEnd(high, (start, end))

    def _text(self, ids: np.ndarray) -> str:
        # The replacement characters at the end stand for a character whose other bytes are still to come.
        return self._decode(ids).rstrip("\ufffd")
