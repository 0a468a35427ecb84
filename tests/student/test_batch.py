"""Conversion of ragged completions to the target grid: every score at its token, none invented."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill.rollout.completion import Completion
from jdistill.student.batch import make_batch, make_supervised_batch
from jdistill.wire.types import TokenScores


def completion(index, prompt, response, *, k=0):
    """A completion whose numbers encode their position: 100 * index + position."""
    positions = np.arange(len(prompt), len(prompt) + len(response))
    label = 100 * index + positions
    return Completion(
        index=index,
        token_ids=np.array([*prompt, *response], np.int32),
        prompt_length=len(prompt),
        sampler_logprobs=(-label).astype(np.float32),
        candidate_ids=(label[:, None] * 10 + np.arange(k)).astype(np.int32) if k else None,
        finish_reason="stop",
    )


def scores(completion, *, k=0):
    """Teacher scores that encode their position too: the sampler's minus one half."""
    logprobs = completion.sampler_logprobs - 0.5
    candidates = (logprobs[:, None] - np.arange(k) / 100).astype(np.float32) if k else None
    return TokenScores(logprobs, None, None, candidates, token_crc=0)


def test_the_worked_example_of_the_docstring():
    batch = make_supervised_batch([np.array([5, 6])], [np.array([7, 2])], max_length=5)
    np.testing.assert_array_equal(batch.tokens[0], [5, 6, 7, 2, 2, 2, 2, 2, 2])
    np.testing.assert_array_equal(batch.loss_mask[0], [0, 1, 1, 0, 0, 0, 0, 0])
    assert batch.advantages is None and batch.teacher_logprobs is None


@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 30)), min_size=1, max_size=6), k=st.sampled_from([0, 3])
)
@settings(max_examples=50, deadline=None)
def test_every_number_is_written_at_the_target_of_its_token(sizes, k):
    completions = [completion(i, np.arange(p) + 1, np.arange(r) + 50, k=k) for i, (p, r) in enumerate(sizes)]
    advantages = np.arange(len(sizes), dtype=np.float32) - 1.5
    batch = make_batch(completions, advantages, [scores(c, k=k) for c in completions], max_length=50)
    assert int(batch.loss_mask.sum()) == sum(r for _, r in sizes)
    for b, (c, (p, r)) in enumerate(zip(completions, sizes, strict=True)):
        for t in range(batch.loss_mask.shape[1]):
            scored = p <= t + 1 < p + r
            assert batch.loss_mask[b, t] == scored
            label = 100 * b + t + 1
            assert batch.sampler_logprobs[b, t] == (-label if scored else 0)
            assert batch.teacher_logprobs[b, t] == (-label - 0.5 if scored else 0)
            assert batch.advantages[b, t] == (b - 1.5 if scored else 0)
            if k and scored:
                np.testing.assert_array_equal(batch.candidate_ids[b, t], label * 10 + np.arange(k))
                np.testing.assert_allclose(
                    batch.teacher_candidate_logprobs[b, t], -label - 0.5 - np.arange(k) / 100, rtol=1e-6
                )
        np.testing.assert_array_equal(batch.tokens[b, : p + r], c.token_ids)
        assert np.isin(batch.tokens[b, p + r :], c.token_ids).all()  # padding is a valid id
    assert (batch.candidate_ids is None) == (k == 0)
    assert {x.dtype for x in batch if x is not None} <= {np.dtype("int32"), np.dtype("float32"), np.dtype(bool)}


def test_without_a_teacher_the_teacher_fields_are_none():
    batch = make_batch([completion(0, [1], [2, 3], k=2)], np.ones(1), None, max_length=8)
    assert batch.teacher_logprobs is None and batch.candidate_ids is None and batch.teacher_candidate_logprobs is None


def test_a_missing_or_non_finite_teacher_score_is_an_error():
    c = completion(0, [1, 2], [3, 4, 5], k=2)
    good = scores(c, k=2)

    def make(score, c=c):
        return make_batch([c], np.ones(1), [score], max_length=16)

    make(good)
    with pytest.raises(ValueError, match=r"log-probs of completion 0 have shape \(2,\), expected \(3,\)"):
        make(dataclasses.replace(good, logprobs=good.logprobs[:2]))
    for bad in (np.nan, -np.inf):
        broken = good.logprobs.copy()
        broken[1] = bad
        with pytest.raises(ValueError, match=rf"hold {bad} at \[1\]: a missing score is never trained on"):
            make(dataclasses.replace(good, logprobs=broken))
    broken = good.candidate_logprobs.copy()
    broken[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"candidates of completion 0 hold nan at \[2, 1\]"):
        make(dataclasses.replace(good, candidate_logprobs=broken))
    with pytest.raises(ValueError, match="scored none of them"):
        make(dataclasses.replace(good, candidate_logprobs=None))
    with pytest.raises(ValueError, match="1 completions, 1 advantages, 2 scores"):
        make_batch([c], np.ones(1), [good, good], max_length=16)
    with pytest.raises(ValueError, match="same number of candidates"):
        other = completion(1, [1], [2], k=3)
        make_batch([c, other], np.ones(2), [good, scores(other, k=3)], max_length=16)


def test_rows_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="5 tokens, more than max_length = 4"):
        make_supervised_batch([np.array([1, 2])], [np.array([3, 4, 5])], max_length=4)
    with pytest.raises(ValueError, match="needs at least one token of each"):
        make_supervised_batch([np.array([1, 2])], [np.array([], np.int32)], max_length=4)
    with pytest.raises(ValueError, match="needs at least one token of each"):
        make_supervised_batch([np.array([], np.int32)], [np.array([1, 2])], max_length=4)
    with pytest.raises(ValueError, match="at least one row"):
        make_supervised_batch([], [], max_length=4)
