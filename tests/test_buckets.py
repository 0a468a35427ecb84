"""Static sizes: few of them, each large enough, and the ones that programs have always been compiled for."""

import math

import numpy as np
import pytest

from jdistill import buckets


def ladder(first):
    """First * 1, 2, 3, 4, 6, 8, 12, ..., listed."""
    return sorted({first} | {first * size for k in range(20) for size in (2 << k, 3 << k)})


def smallest(sizes, size):
    return next(s for s in sizes if s >= size)


@pytest.mark.parametrize("most", [1, 15, 16, 40, 1000, 5000])
def test_prompt_and_cache_slots_climb_from_16_and_128(most):
    for n in range(1, most + 1):
        assert buckets.prompt_slots(n, most) == min(smallest(ladder(16), n), most)
        assert buckets.cache_slots(n, most) == min(smallest(ladder(128), n), most)
    assert [buckets.prompt_slots(n, 10_000) for n in (16, 17, 33, 49, 65)] == [16, 32, 48, 64, 96]
    assert [buckets.cache_slots(n, 10_000) for n in (1, 129, 257, 385, 513)] == [128, 256, 384, 512, 768]


def test_rows_of_decoding_are_fine_and_those_of_prefill_coarse():
    rungs = ladder(1)
    for n in range(1, 3000):
        assert buckets.decode_rows(n) == smallest(rungs, n)
        assert buckets.prefill_rows(n) == 4 ** math.ceil(math.log(n, 4))
    assert [buckets.decode_rows(n) for n in (1, 2, 3, 4, 5, 7, 9)] == [1, 2, 3, 4, 6, 8, 12]
    for k in range(1, 12):
        assert [buckets.prefill_rows(4**k + d) for d in (-1, 0, 1)] == [4**k, 4**k, 4 ** (k + 1)]


@pytest.mark.parametrize("max_length", [2, 9, 17, 18, 41, 1024, 3000])
def test_row_lengths_are_few_and_waste_at_most_a_third(max_length):
    largest = -(-(max_length - 1) // 8) * 8
    targets = [*sorted(t for k in range(3, 31) for t in (2 << k, 3 << k) if t < largest), largest]
    sizes = {n: buckets.row_length(n, max_length) for n in range(2, max_length + 1)}
    assert all(size == smallest(targets, n - 1) + 1 for n, size in sizes.items())
    assert len(set(sizes.values())) <= 2 * np.log2(max_length)
    assert all(size - 1 <= max(16, 1.5 * (n - 1)) and (size - 1) % 8 == 0 for n, size in sizes.items())
    assert buckets.row_length(0, max_length) == targets[0] + 1
    assert buckets.row_length(max_length, max_length) == largest + 1 <= max_length + 8


def test_rows_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="max_length must be at least 2, a token and its target, got 1"):
        buckets.row_length(1, 1)
    with pytest.raises(ValueError, match="26 tokens do not fit rows of max_length = 20"):
        buckets.row_length(26, 20)


@pytest.mark.parametrize("longest", [10, 16, 17, 128, 1000])
def test_scored_lengths_hold_every_length_and_waste_at_most_a_third(longest):
    def step_by_step(n):  # 16 times 3/2, times 4/3, times 3/2, ...
        size = 16
        while size < n:
            size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
        return min(size, longest)

    sizes = {n: buckets.scored_length(n, longest) for n in range(2, longest + 1)}
    assert all(size == step_by_step(n) for n, size in sizes.items())
    assert all(n <= size <= longest for n, size in sizes.items())
    assert all(size < 1.5 * n for n, size in sizes.items() if n > 16)
    assert len(set(sizes.values())) <= 2 * np.log2(longest)
    assert [buckets.scored_length(n, 10_000) for n in (16, 17, 25, 33, 49, 65)] == [16, 24, 32, 48, 64, 96]


def test_packed_places_are_eighths():
    assert {buckets.packed_places(n, 64) for n in range(65)} == {8, 16, 24, 32, 40, 48, 56, 64}
    assert [buckets.packed_places(n, 5) for n in range(6)] == [1, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="9 real tokens in rows of 8"):
        buckets.packed_places(9, 8)
