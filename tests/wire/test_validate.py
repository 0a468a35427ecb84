"""Requests that a model cannot score are refused, by field, before an engine sees them."""

import dataclasses

import numpy as np
import pytest

from jdistill.wire.errors import InvalidRequestError, UnsupportedError
from jdistill.wire.types import ModelInfo, SequenceToScore
from jdistill.wire.validate import validate_request

INFO = ModelInfo("m", "f", "t", vocab_size=10, max_sequence_length=6, max_top_k=4, max_candidate_count=3,
                 any_temperature=True, dtype="float32")  # fmt: skip


def tokens(*ids):
    return np.array(ids, np.int32)


GOOD = SequenceToScore(tokens(0, 9, 3, 4, 5, 6), ((1, 2), (3, 6)), np.zeros((4, 3), np.int32))


def test_a_request_at_every_limit_is_accepted():
    validate_request([GOOD, SequenceToScore(tokens(0, 9))], info=INFO, top_k=4, temperature=0.3)


@pytest.mark.parametrize(
    ("sequence", "field", "message"),
    [
        (
            SequenceToScore(tokens(0, 10, 3)),
            "token_ids",
            r"has 10 at 1: outside the vocabulary of teacher 'm', \[0, 10\)",
        ),
        (SequenceToScore(tokens(0, 1, -1)), "token_ids", "has -1 at 2"),
        (SequenceToScore(np.array([0, 2**40])), "token_ids", "has 1099511627776 at 1"),
        (SequenceToScore(tokens(5)), "token_ids", "has 1 token; at least 2"),
        (SequenceToScore(tokens()), "token_ids", "has 0 tokens; at least 2"),
        (SequenceToScore(tokens(*range(7))), "token_ids", "has 7 tokens, teacher 'm' takes at most 6"),
        (SequenceToScore(np.array([0.0, 1.0])), "token_ids", "float64"),
        (SequenceToScore(np.zeros((2, 2), np.int32)), "token_ids", r"shape \(2, 2\)"),
        (SequenceToScore(tokens(1, 2, 3), ((0, 2),)), "spans", r"span \[0, 2\)"),
        (SequenceToScore(tokens(1, 2, 3), ((1, 4),)), "spans", r"span \[1, 4\)"),
        (SequenceToScore(tokens(1, 2, 3), ((2, 2),)), "spans", r"span \[2, 2\)"),
        (SequenceToScore(tokens(1, 2, 3), ((2, 3), (1, 2))), "spans", r"span \[1, 2\)"),
        (
            SequenceToScore(tokens(1, 2, 3), (), np.zeros((1, 1), np.int32)),
            "candidate_ids",
            "1 rows, its spans score 2",
        ),
        (SequenceToScore(tokens(1, 2), (), np.zeros((1, 4), np.int32)), "candidate_ids", "4 candidates a position"),
        (SequenceToScore(tokens(1, 2), (), np.zeros((1, 0), np.int32)), "candidate_ids", "no columns"),
        (SequenceToScore(tokens(1, 2), (), np.array([[3, 10]])), "candidate_ids", "has 10 at 0, 1"),
        (SequenceToScore(tokens(1, 2), (), tokens(1)), "candidate_ids", "2 dimensions"),
    ],
)
def test_a_bad_sequence_is_refused_with_its_index_and_field(sequence, field, message):
    with pytest.raises(InvalidRequestError, match=message) as caught:
        validate_request([GOOD, sequence], info=INFO)
    assert (caught.value.field, caught.value.sequence) == (field, 1)
    assert "sequence 1" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"top_k": 5}, "top_k"),
        ({"top_k": -1}, "top_k"),
        *(({"temperature": t}, "temperature") for t in (0, -1, 1e-4, np.nan, np.inf)),
    ],
)
def test_a_bad_option_is_refused(options, field):
    with pytest.raises(InvalidRequestError, match=field) as caught:
        validate_request([GOOD], info=INFO, **options)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"max_top_k": 0}, {"top_k": 1}, "cannot return its top-k"),
        ({"max_candidate_count": 0}, {}, "cannot score candidates"),
        ({"any_temperature": False}, {"temperature": 0.7}, "scores at temperature 1 only"),
    ],
)
def test_features_that_the_engine_lacks_are_unsupported_with_a_remedy(change, options, message):
    with pytest.raises(UnsupportedError, match=message):
        validate_request([GOOD], info=dataclasses.replace(INFO, **change), **options)


@pytest.mark.parametrize(
    ("prefix", "num_replaced", "spans", "words"),
    [
        (None, 2, (), "no teacher_prefix to put there"),
        ([1, 99], 2, (), "teacher_prefix of sequence 0 has 99"),
        ([1, 2], 4, ((3, 4),), "num_replaced of sequence 0 is 4, expected 0 to 3"),
        ([1, 2], -1, (), "num_replaced of sequence 0 is -1"),
        ([1, 2], 3, ((2, 4),), r"span \[2, 4\)"),
        ([], 2, (), "teacher_prefix of sequence 0 is empty"),
        ([1] * 7, 0, (), "with its teacher_prefix has 11 tokens"),
    ],
)
def test_an_invalid_prefix_is_refused(prefix, num_replaced, spans, words):
    info = dataclasses.replace(INFO, vocab_size=16, max_sequence_length=10)
    ids = np.arange(4, dtype=np.int32)
    array = None if prefix is None else np.array(prefix, np.int32)
    with pytest.raises(InvalidRequestError, match=words):
        validate_request([SequenceToScore(ids, spans, None, "", array, num_replaced)], info=info)
    good = SequenceToScore(ids, ((3, 4),), None, "", np.array([1, 2], np.int32), 2)
    validate_request([good], info=info)
