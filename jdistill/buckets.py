"""Buckets: the few static sizes that lengths and row counts are rounded up to.

XLA compiles one program per shape, so every size that varies at run time is rounded up. All of these schemes trade
padding for compilations:

| size            | values                       | why                                                              |
|-----------------|------------------------------|------------------------------------------------------------------|
| `prompt_slots`  | 16, 32, 48, 64, 96, ...      | prefill pads prompts; fewer than 16 tokens are not faster        |
| `cache_slots`   | 128, 256, 384, 512, 768, ... | attention reads empty slots too: the cache starts small          |
| `decode_rows`   | 1, 2, 3, 4, 6, 8, 12, ...    | the batch shrinks as completions end                             |
| `prefill_rows`  | 1, 4, 16, 64, ...            | coarse, since admissions come in all sizes and run once each     |
| `row_length`    | 17, 25, 33, 49, 65, ...      | rows of a train batch: the ladder holds for the targets, T = S-1 |
| `scored_length` | 16, 24, 32, 48, 64, ...      | the jax engine pads each sequence by itself, whatever its batch  |
| `packed_places` | eighths of the padded tokens | a packed part of an update; less than an eighth is padding       |

All but `prefill_rows` and `packed_places` climb one ladder, powers of two and 1.5 times these, on which at most a third
of a size is padding (above its second rung). The transformers, vLLM and SGLang engines do not compile a program per
shape, so they need no buckets.
"""

from __future__ import annotations

SHORTEST_ROW = 16  # tokens; shorter sequences are padded to it


def prompt_slots(num_tokens: int, most: int) -> int:
    """Padded length of prompts of up to `num_tokens` tokens; at most `most`."""
    return min(_climb(num_tokens, 16), most)


def cache_slots(num_tokens: int, most: int) -> int:
    """Slots of a cache that has to hold `num_tokens` tokens; at most `most`."""
    return min(_climb(num_tokens, 128), most)


def decode_rows(num_rows: int) -> int:
    """Rows of one device that hold `num_rows` sequences."""
    return _climb(num_rows, 1)


def prefill_rows(num_rows: int) -> int:
    """Rows of one device for `num_rows` sequences, rounded up to a power of 4."""
    size = 1
    while size < num_rows:
        size *= 4
    return size


def row_length(num_tokens: int, max_length: int) -> int:
    """Tokens S of a train batch's rows, of which the longest has `num_tokens`.

    T = S - 1 is a power of two or 1.5 times one, at least 16, and at most what `max_length` tokens need, rounded up
    to 8.

    Raises:
        ValueError: max_length leaves no target, or is below num_tokens.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, a token and its target, got {max_length}")
    longest = -(-(max_length - 1) // 8) * 8
    if num_tokens > longest + 1:
        raise ValueError(f"{num_tokens} tokens do not fit rows of max_length = {max_length}")
    return min(_climb(max(num_tokens - 1, SHORTEST_ROW), SHORTEST_ROW // 2), longest) + 1


def scored_length(num_tokens: int, longest: int) -> int:
    """Padded length of one sequence that the jax engine scores; at most `longest`."""
    return min(_climb(max(num_tokens, SHORTEST_ROW), SHORTEST_ROW // 2), longest)


def packed_places(num_real: int, num_tokens: int) -> int:
    """Places for `num_real` real tokens out of `num_tokens` padded ones: the next eighth of `num_tokens`.

    Raises:
        ValueError: more real tokens than there are tokens.
    """
    if not 0 <= num_real <= num_tokens:
        raise ValueError(f"{num_real} real tokens in rows of {num_tokens}: a row cannot hold more than it has")
    return next(size for k in range(1, 9) if (size := -(-num_tokens * k // 8)) >= num_real)


def _climb(size: int, first: int) -> int:
    """The smallest rung of first * (1, 2, 3, 4, 6, 8, 12, 16, ...) that holds `size`."""
    power = first
    while power < size:
        power *= 2
    three_quarters = power * 3 // 4
    return three_quarters if power >= 4 * first and three_quarters >= size else power
