"""Replies that TeacherClient must reject: each names what differed, and another replica answers instead."""

import dataclasses

import numpy as np
import pytest

from jdistill.client import SequenceToScore
from jdistill.wire import codec, errors, status
from tests.client.factories import check, sequences


def rewrite(change, which=0):
    """A fault that changes the scores of the `which`-th chunk: change(scores) -> scores, or a list of runs."""

    def fault(teacher, context, chunks):
        for i, data in enumerate(chunks):
            if i != which:
                yield data
                continue
            top_k, count = teacher.options[-1].top_k, 0
            (run,) = codec.decode_response(data, top_k=top_k, candidate_count=count).runs()
            changed = change(run.scores)
            runs = changed if isinstance(changed, list) else [run._replace(scores=changed)]
            yield teacher.encode([codec.ScoredRun(run.sequence_index, *r) if len(r) == 2 else r for r in runs])

    return fault


def put(name, value, place=-1):
    def change(scores):
        values = getattr(scores, name).copy()
        values[place] = value
        return dataclasses.replace(scores, **{name: values})

    return change


def truncate(scores):
    return dataclasses.replace(
        scores, logprobs=scores.logprobs[:-1], top_ids=scores.top_ids[:-1], top_logprobs=scores.top_logprobs[:-1]
    )


def other_crc(scores):
    return dataclasses.replace(scores, token_crc=scores.token_crc ^ 1)


def drop(teacher, context, chunks):
    next(chunks)
    yield from chunks


def twice(teacher, context, chunks):
    for data in chunks:
        yield data
        yield data


def of_no_one(teacher, context, chunks):
    (run,) = codec.decode_response(next(chunks), top_k=2, candidate_count=0).runs()
    yield teacher.encode([run._replace(sequence_index=2)])


def hot(teacher, context, chunks):
    (run,) = codec.decode_response(next(chunks), top_k=2, candidate_count=0).runs()
    yield teacher.encode([run], temperature=2.0)


def garbage(teacher, context, chunks):
    next(chunks)
    yield b"\xff\xff\xff\xff"


def without_top_k(teacher, context, chunks):
    (run,) = codec.decode_response(next(chunks), top_k=2, candidate_count=0).runs()
    yield teacher.encode([run._replace(scores=dataclasses.replace(run.scores, top_ids=None, top_logprobs=None))])


BAD_REPLIES = {
    "other ids": (rewrite(other_crc), "sequence 1: the teacher scored other token ids than were sent"),
    "one score too few": (rewrite(truncate), "sequence 1: the stream ended after 3 of 4 scores: truncated"),
    "a sequence missing": (drop, "sequence 1: the stream ended after 0 of 4 scores"),
    "a sequence twice": (twice, r"sequence 1: scores \[0, 4\) came after 4 of 4"),
    "NaN": (rewrite(put("logprobs", np.nan)), "sequence 1: logprobs has nan at scored position 3"),
    "positive": (rewrite(put("logprobs", 1e-6, 1)), "sequence 1: logprobs has .* at scored position 1"),
    "NaN in top-k": (
        rewrite(put("top_logprobs", np.nan, (2, 1))),
        "sequence 1: top_logprobs has nan at scored position 2",
    ),
    "top id outside": (rewrite(put("top_ids", 97, (0, 0))), r"sequence 1: top_ids has 97 .* outside \[0, 97\)"),
    "top id negative": (rewrite(put("top_ids", -1, (0, 1))), r"sequence 1: top_ids has -1"),
    "top-k not sorted": (rewrite(put("top_logprobs", -1e6, (1, 0))), "sequence 1: top_logprobs at scored position 1"),
    "no top-k": (without_top_k, "0 top_ids, expected 8"),
    "an index outside": (of_no_one, "scores of sequence 2 of a request that has 2"),
    "another temperature": (hot, "scored at temperature 2, asked for 1"),
    "no message": (garbage, "not a jdistill"),
}


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_a_bad_reply_is_an_error_that_names_the_difference(start_teacher, connect, name):
    fault, message = BAD_REPLIES[name]
    teacher = start_teacher()
    teacher.always = fault
    asked = [SequenceToScore(np.arange(5)), SequenceToScore(np.arange(5) + 20)]
    with pytest.raises(errors.VerificationError, match=f"{teacher.endpoint}: .*{message}"):
        connect(teacher).score(asked, top_k=2)


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_after_a_bad_reply_another_replica_answers(start_teacher, connect, name):
    fault, _ = BAD_REPLIES[name]
    bad, good = start_teacher(), start_teacher()
    bad.always = fault
    asked = [SequenceToScore(np.arange(5) + i) for i in range(4)]
    check(good, asked, connect(bad, good).score(asked, top_k=2), top_k=2)
    assert bad.requests  # it was asked, and not believed


def test_pieces_of_a_sequence_out_of_order_are_refused(start_teacher, connect):
    teacher = start_teacher()
    teacher.chunk_bytes = 16 + 4 * 2

    def swapped(teacher, context, chunks):
        first, second = next(chunks), next(chunks)
        yield second
        yield first

    teacher.always = swapped
    with pytest.raises(errors.VerificationError, match=r"sequence 0: scores \[2, 4\) came after 0 of 4"):
        connect(teacher).score([SequenceToScore(np.arange(5))])


def test_an_engine_error_that_the_service_reports_is_treated_as_a_bad_reply(start_teacher, connect):
    bad, good = start_teacher(), start_teacher()

    def found(teacher, context, chunks):
        code, text, trailing = status.to_status(errors.VerificationError("engine gave NaN"))
        context.set_trailing_metadata(trailing)
        context.abort(code, text)
        yield

    bad.always = found
    asked = sequences(6)
    check(good, asked, connect(bad, good).score(asked))
