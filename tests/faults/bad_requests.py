"""Requests that every engine must refuse, each with the field and sequence that the error must name."""

from __future__ import annotations

import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2

from jdistill.wire.v1 import teacher_pb2

VOCAB, MAX_LENGTH = 512, 128  # of the sidecars that these are sent to
GOOD = [5, 6, 7, 8]


def request(*sequences, **fields):
    ids = [i for sequence in sequences for i in sequence]
    fields = {"sequence_lengths": [len(s) for s in sequences], "token_ids": ids} | fields
    return teacher_pb2.ScoreSequencesRequest(**fields)


def spans(*pairs):
    starts, ends = zip(*pairs, strict=True)
    return {"span_counts": [1, len(pairs) - 1], "span_starts": starts, "span_ends": ends}


LONG = np.arange(MAX_LENGTH + 1) % VOCAB
# name: (request, code, field, sequence)
BAD = {
    "too long": (request(GOOD, GOOD, LONG), "INVALID_ARGUMENT", "token_ids", 2),
    "empty": (request(GOOD, []), "INVALID_ARGUMENT", "sequence_lengths", 1),
    "one token": (request(GOOD, [3]), "INVALID_ARGUMENT", "sequence_lengths", 1),
    "out of vocabulary": (request(GOOD, [1, VOCAB, 2]), "INVALID_ARGUMENT", "token_ids", 1),
    "far out of vocabulary": (request([1, 2**31 - 1], GOOD), "INVALID_ARGUMENT", "token_ids", 0),
    "a negative id": (request(GOOD, [1, 2**32 - 1]), "INVALID_ARGUMENT", "token_ids", 1),
    "a span from 0": (request(GOOD, GOOD, **spans((1, 2), (0, 3))), "INVALID_ARGUMENT", "spans", 1),
    "a span beyond the end": (request(GOOD, GOOD, **spans((1, 2), (1, 5))), "INVALID_ARGUMENT", "spans", 1),
    "a span that is empty": (request(GOOD, GOOD, **spans((1, 2), (3, 3))), "INVALID_ARGUMENT", "spans", 1),
    "spans that overlap": (request(GOOD, GOOD, **spans((1, 2), (1, 3), (2, 4))), "INVALID_ARGUMENT", "spans", 1),
    "spans out of order": (request(GOOD, GOOD, **spans((1, 2), (3, 4), (1, 2))), "INVALID_ARGUMENT", "spans", 1),
    "k over the limit": (request(GOOD, top_k=VOCAB + 1), "INVALID_ARGUMENT", "top_k", None),
    "k far over the limit": (request(GOOD, top_k=2**32 - 1), "INVALID_ARGUMENT", "top_k", None),
    "a candidate out of vocabulary": (
        request([5, 6], [7, 8], candidate_count=2, candidate_ids=[1, 2, 3, VOCAB]),
        "INVALID_ARGUMENT",
        "candidate_ids",
        1,
    ),
    "too many candidates": (
        request([5, 6], candidate_count=VOCAB + 1, candidate_ids=np.zeros(VOCAB + 1, int)),
        "INVALID_ARGUMENT",
        "candidate_ids",
        0,
    ),
    "a prefix out of vocabulary": (
        request(GOOD, GOOD, prefix_lengths=[0, 1], prefix_replaced=[0, 1], prefix_token_ids=[VOCAB]),
        "INVALID_ARGUMENT",
        "teacher_prefix",
        1,
    ),
    "too long with its prefix": (
        request(GOOD, LONG[:-1], prefix_lengths=[0, 2], prefix_replaced=[0, 1], prefix_token_ids=[1, 1]),
        "INVALID_ARGUMENT",
        "token_ids",
        1,
    ),
    "temperature 0": (request(GOOD, temperature=0.0), "INVALID_ARGUMENT", "temperature", None),
    "unknown model": (request(GOOD, model="no-such-model"), "NOT_FOUND", "model", None),
}


def assert_refused(error: grpc.RpcError, name: str) -> None:
    """Checks that the call ended as BAD[name] says, in the status details and in the text."""
    _, code, field, sequence = BAD[name]
    assert error.code() is getattr(grpc.StatusCode, code), (name, error)
    details = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"]).details
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert any(detail.Unpack(info) for detail in details if detail.Is(info.DESCRIPTOR)), name
    assert any(detail.Unpack(bad) for detail in details if detail.Is(bad.DESCRIPTOR)), name
    got = (info.metadata["field"], info.metadata.get("sequence"))
    assert got == (field, None if sequence is None else str(sequence)), name
    where = "" if sequence is None else f"sequences[{sequence}]."
    assert [violation.field for violation in bad.field_violations] == [where + field], name
    if sequence is not None:
        assert f"sequence {sequence}" in error.details(), name
