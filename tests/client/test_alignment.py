"""Masks become spans and scores return to the grid, for any mask; padding is never read."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill.client import alignment
from jdistill.wire.errors import InvalidRequestError
from jdistill.wire.types import TokenScores


def test_the_worked_example_of_the_docstring():
    assert alignment.mask_to_spans(np.array([0, 1, 1, 0, 1], bool)) == ((2, 4), (5, 6))
    assert alignment.mask_to_spans(np.zeros(4, bool)) == ()


def score(sequence, top_k):
    """Returns, per scored position, a number that depends on its whole prefix."""
    positions = sequence.scored_positions()
    prefix = np.cumsum(sequence.token_ids * np.arange(1, len(sequence.token_ids) + 1))
    logprobs = -(prefix[positions] % 8191).astype(np.float32) / 64
    candidates = None
    if sequence.candidate_ids is not None:
        candidates = logprobs[:, None] - sequence.candidate_ids.astype(np.float32)
    return TokenScores(
        logprobs=logprobs,
        top_ids=(positions[:, None] + np.arange(top_k)).astype(np.int32) if top_k else None,
        top_logprobs=logprobs[:, None] - np.arange(top_k, dtype=np.float32) if top_k else None,
        candidate_logprobs=candidates,
        token_crc=0,
    )


@st.composite
def batches(draw):
    num_rows, num_tokens = draw(st.integers(0, 4)), draw(st.integers(2, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    tokens_BS = rng.integers(0, 90, (num_rows, num_tokens))
    lengths_B = rng.integers(0, num_tokens + 1, num_rows)
    mask_BT = rng.random((num_rows, num_tokens - 1)) < draw(st.sampled_from([0.1, 0.5, 0.9, 1.0]))
    mask_BT &= np.arange(1, num_tokens) < lengths_B[:, None]
    candidates_BTC = rng.integers(0, 90, (num_rows, num_tokens - 1, 3)) if draw(st.booleans()) else None
    return tokens_BS, lengths_B, mask_BT, candidates_BTC, draw(st.sampled_from([0, 2])), rng


def align(tokens_BS, mask_BT, lengths_B, candidates_BTC, top_k):
    rows, sequences = alignment.to_sequences(tokens_BS, mask_BT, lengths_B=lengths_B, candidate_ids_BTC=candidates_BTC)
    builder = alignment.BatchBuilder(mask_BT, top_k=top_k, candidate_count=0 if candidates_BTC is None else 3)
    for b, sequence in reversed(list(zip(rows, sequences, strict=True))):  # as they come, in any order
        builder.put(b, score(sequence, top_k))
    return builder.finish()


@settings(max_examples=200, deadline=None)
@given(batches())
def test_every_scored_target_gets_the_score_of_its_token_and_the_rest_get_none(batch):
    tokens_BS, lengths_B, mask_BT, candidates_BTC, top_k, _ = batch
    got = align(tokens_BS, mask_BT, lengths_B, candidates_BTC, top_k)
    np.testing.assert_array_equal(got.valid, mask_BT)
    for b, t in np.ndindex(*mask_BT.shape):
        if not mask_BT[b, t]:
            assert np.isnan(got.logprobs[b, t])
            assert got.candidate_logprobs is None or np.isnan(got.candidate_logprobs[b, t]).all()
            assert not top_k or (np.isnan(got.top_logprobs[b, t]).all() and (got.top_ids[b, t] == -1).all())
            continue
        prefix = sum(int(tokens_BS[b, i]) * (i + 1) for i in range(t + 2))  # tokens 0 .. t + 1
        expected = np.float32(-(prefix % 8191)) / np.float32(64)
        assert got.logprobs[b, t] == expected
        if candidates_BTC is not None:
            np.testing.assert_array_equal(got.candidate_logprobs[b, t], expected - candidates_BTC[b, t])
        if top_k:
            assert got.top_ids[b, t].tolist() == [t + 1, t + 2]


@settings(max_examples=200, deadline=None)
@given(batches())
def test_alignment_never_depends_on_padding(batch):
    tokens_BS, lengths_B, mask_BT, candidates_BTC, top_k, rng = batch
    first = align(tokens_BS, mask_BT, lengths_B, candidates_BTC, top_k)
    padding_BS = np.arange(tokens_BS.shape[1]) >= lengths_B[:, None]
    other_BS = np.where(padding_BS, rng.integers(-(2**31), 2**31, tokens_BS.shape), tokens_BS)
    other_BTC = None if candidates_BTC is None else np.where(mask_BT[..., None], candidates_BTC, -7)
    for lengths in (lengths_B, None):
        for got, expected in zip(align(other_BS, mask_BT, lengths, other_BTC, top_k), first, strict=True):
            np.testing.assert_array_equal(got, expected)


def test_nothing_after_the_last_scored_token_is_sent():
    tokens_BS = np.arange(12).reshape(2, 6)
    mask_BT = np.array([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0]], bool)
    rows, (sequence,) = alignment.to_sequences(tokens_BS, mask_BT)
    assert rows == [0]
    assert sequence.token_ids.tolist() == [0, 1, 2, 3, 4]
    assert sequence.spans == ((2, 3), (4, 5))


GOOD = {"tokens_BS": np.zeros((2, 4), int), "loss_mask_BT": np.ones((2, 3), bool)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_mask_BT": np.ones((2, 4), bool)}, "one shorter"),
        ({"loss_mask_BT": np.ones((2, 3))}, "float64, expected bool"),
        ({"tokens_BS": np.zeros((2, 4))}, "float64"),
        ({"tokens_BS": np.zeros(4, int)}, r"expected integers of shape \[B, S\]"),
        ({"lengths_B": np.array([4, 3])}, r"loss_mask_BT\[1, 2\] asks for token 3 of row 1, which has 3 tokens"),
        ({"lengths_B": np.array([4, 5])}, r"lengths_B\[1\] = 5, but a row has 4 tokens"),
        ({"lengths_B": np.array([4])}, r"expected integers of shape \(2,\)"),
        ({"candidate_ids_BTC": np.zeros((2, 4, 2), int)}, r"expected \[2, 3, C\]"),
    ],
)
def test_arrays_of_different_shapes_are_refused(change, message):
    with pytest.raises(InvalidRequestError, match=message):
        alignment.to_sequences(**{**GOOD, **change})
