"""Verification of replies: chunks in any order become whole scores; a refused chunk leaves nothing behind."""

import numpy as np
import pytest

from jdistill.client.verification import Reply
from jdistill.wire import codec
from jdistill.wire.errors import VerificationError
from jdistill.wire.types import ModelInfo, SequenceToScore, TokenScores

INFO = ModelInfo("m", "f", "t", 100, 512, 64, 64, True, "float32")
SEQUENCES = [SequenceToScore(np.arange(length, dtype=np.int32)) for length in (4, 3, 6)]


def scores_of(b, top_k, rng):
    num_scored = SEQUENCES[b].num_scored
    return TokenScores(
        logprobs=-rng.random(num_scored, np.float32),
        top_ids=rng.integers(0, 100, (num_scored, top_k)).astype(np.int32) if top_k else None,
        top_logprobs=-np.sort(rng.random((num_scored, top_k), np.float32)) if top_k else None,
        candidate_logprobs=None,
        token_crc=codec.token_crc(SEQUENCES[b].token_ids),
    )


def reply(top_k):
    crcs = [codec.token_crc(s.token_ids) for s in SEQUENCES]
    return Reply(SEQUENCES, crcs, range(10, 13), endpoint="e", info=INFO, top_k=top_k, temperature=1.0)


def chunk(*runs):
    return codec.encode_response(runs, info=INFO, temperature=1.0)


def pieces(scores, max_bytes):
    return list(codec.split_scores(scores, max_bytes))


@pytest.mark.parametrize("top_k", [0, 1, 3])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("together", [True, False])
def test_chunks_in_any_order_give_each_sequence_its_scores(top_k, order, together):
    rng = np.random.default_rng(0)
    scores = [scores_of(b, top_k, rng) for b in range(3)]
    runs = [(b, first, part) for b in order for first, part in pieces(scores[b], 60 * (1 + top_k) if b else 40)]
    got = reply(top_k)
    for data in [chunk(*runs)] if together else [chunk(run) for run in runs]:
        assert not got.is_whole
        got.add(data)
    assert got.is_whole
    for found, expected in zip(got.finish(), scores, strict=True):
        for name in ("logprobs", "top_ids", "top_logprobs"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_a_chunk_with_one_bad_entry_is_rejected_whole():
    rng = np.random.default_rng(1)
    good, other = scores_of(0, 0, rng), scores_of(1, 0, rng)
    got = reply(0)
    with pytest.raises(VerificationError, match="sequence 11: scores"):
        got.add(chunk((0, 0, good), (1, 1, other)))
    assert got.blamed == 1
    assert got.complete(0) is None
    got.add(chunk((0, 0, good)))
    np.testing.assert_array_equal(got.complete(0).logprobs, good.logprobs)


@pytest.mark.parametrize("value", [np.nan, 1e-7, np.inf])
@pytest.mark.parametrize("place", [(0, 0), (0, 2), (2, 0), (2, 1), (2, 2)])
@pytest.mark.parametrize("top_k", [1, 3])
def test_an_impossible_top_logprob_is_detected_at_any_position(value, place, top_k):
    scores = scores_of(0, top_k, np.random.default_rng(2))
    place = (place[0], min(place[1], top_k - 1))
    scores.top_logprobs[place] = value
    got = reply(top_k)
    with pytest.raises(VerificationError, match=f"sequence 10: top_logprobs has .* at scored position {place[0]};"):
        got.add(chunk((0, 0, scores)))


def test_top_logprobs_may_rise_between_rows_but_not_within_one():
    scores = scores_of(0, 3, np.random.default_rng(3))
    scores.top_logprobs[:] = [[-3, -4, -5], [-1, -2, -9], [0, -1, -1]]
    got = reply(3)
    got.add(chunk((0, 0, scores)))
    assert got.complete(0) is not None
    scores.top_logprobs[1] = [-2, -1, -9]
    with pytest.raises(VerificationError, match="scored position 1 are not in descending order"):
        reply(3).add(chunk((0, 0, scores)))


@pytest.mark.parametrize("token", [-1, 100, -(2**31)])
def test_a_top_id_outside_the_vocabulary_is_detected(token):
    scores = scores_of(2, 3, np.random.default_rng(4))
    scores.top_ids[4, 1] = token
    with pytest.raises(VerificationError, match=rf"sequence 12: top_ids has {token} at scored position 4, outside"):
        reply(3).add(chunk((2, 0, scores)))
