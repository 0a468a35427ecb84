"""The byte-level reader and writer against protobuf's class, for any bytes."""

import zlib

import numpy as np
import pytest
from google.protobuf import message
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill.wire.columns import MessageColumns
from jdistill.wire.v1 import teacher_pb2

RESPONSE = MessageColumns(teacher_pb2.ScoreSequencesResponse)
REQUEST = MessageColumns(teacher_pb2.ScoreSequencesRequest)
WHOLE_RESPONSE = teacher_pb2.ScoreSequencesResponse(
    sequence_indexes=[0, 70_000],
    first_targets=[0, 5],
    target_counts=[200, 1],
    token_crcs=[2**32 - 1, 1],
    logprobs=np.linspace(-9, 0, 201),
    top_ids=range(3),
    model="täglich",
    fingerprint="f" * 200,
    temperature=-0.0,
    payload_crc=7,
).SerializeToString()
WHOLE_REQUEST = teacher_pb2.ScoreSequencesRequest(
    model="m",
    temperature=0.0,
    top_k=2**32 - 1,
    sequence_lengths=[3],
    token_ids=[1, 2, 3],
    candidate_count=300,
    candidate_ids=range(300),
    prefix_lengths=[1],
    prefix_token_ids=[9],
).SerializeToString()


def as_protobuf_reads(kind, data):
    """Reads scalars and columns (as bytes) with protobuf's class; None if the bytes are not a message."""
    try:
        whole = kind.FromString(data)
    except message.DecodeError:
        return None
    found = {}
    for field in whole.DESCRIPTOR.fields:
        value = getattr(whole, field.name)
        if isinstance(value, str):
            found[field.name] = value
        elif hasattr(value, "append"):
            dtype = "<f4" if field.type == field.TYPE_FLOAT else "<u4"
            with np.errstate(invalid="ignore"):  # a signalling NaN
                found[field.name] = np.array(list(value), dtype)
        else:
            found[field.name] = value if not field.has_presence or whole.HasField(field.name) else None
    return found


def check_read_alike(columns, kind, data):
    expected = as_protobuf_reads(kind, data)
    if expected is None:
        with pytest.raises(message.DecodeError):
            columns.decode(data)
        return
    got = columns.decode(data)
    assert got.scalars.keys() | got.columns.keys() == expected.keys()
    for name, value in got.columns.items():
        np.testing.assert_array_equal(value.view(expected[name].dtype), expected[name], err_msg=name)
    for name, value in got.scalars.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)  # NaN is NaN


@pytest.mark.parametrize("data", [WHOLE_RESPONSE, WHOLE_RESPONSE * 2, b"", WHOLE_RESPONSE[:300]])
def test_complete_truncated_and_repeated_responses_are_read_as_protobuf_reads_them(data):
    check_read_alike(RESPONSE, teacher_pb2.ScoreSequencesResponse, data)


@settings(max_examples=500)
@given(st.data())
def test_damaged_messages_are_read_as_protobuf_reads_them(data):
    columns, kind, whole = data.draw(
        st.sampled_from(
            [
                (RESPONSE, teacher_pb2.ScoreSequencesResponse, WHOLE_RESPONSE),
                (REQUEST, teacher_pb2.ScoreSequencesRequest, WHOLE_REQUEST),
            ]
        )
    )
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.one_of(st.integers(0, 60), st.integers(0, len(damaged))).map(lambda p: p % len(damaged)))
        change = data.draw(st.sampled_from(["overwrite", "insert", "delete", "cut"]))
        if change == "overwrite":
            damaged[place] = data.draw(st.integers(0, 255))
        elif change == "insert":
            damaged[place:place] = data.draw(st.binary(min_size=1, max_size=8))
        elif change == "delete":
            del damaged[place]
        elif place:
            del damaged[place:]
        if not damaged:
            break
    check_read_alike(columns, kind, bytes(damaged))


@given(st.binary(max_size=40))
def test_any_bytes_are_read_as_protobuf_reads_them(data):
    check_read_alike(RESPONSE, teacher_pb2.ScoreSequencesResponse, data)
    check_read_alike(REQUEST, teacher_pb2.ScoreSequencesRequest, data)


def test_a_split_column_is_read_as_one():
    pieces = [np.array([1, 2], np.int32), np.array([[3, 4], [5, 6]], np.int32)[:, ::-1], np.empty(0, np.int32)]
    whole = [np.array([1, 2, 4, 3, 6, 5], np.uint32)]
    assert RESPONSE.encode({"model": "m"}, {"top_ids": pieces}) == RESPONSE.encode({"model": "m"}, {"top_ids": whole})


@pytest.mark.parametrize("text", ["\0", "\0\0\0\0"])
def test_an_empty_string_is_not_an_absent_one(text):
    assert RESPONSE.decode(RESPONSE.encode({"model": text}, {})).scalars["model"] == text


def test_the_written_crc_is_the_crc_that_is_read():
    data = RESPONSE.encode({"model": "m", "temperature": 1.5}, {"logprobs": [np.array([-1.0, -2.0], np.float32)]})
    got = RESPONSE.decode(data)
    assert got.scalars["payload_crc"] == got.crc
    assert got.crc == zlib.crc32(
        bytes(4 * 4)  # four empty columns
        + b"\x08\0\0\0"
        + np.array([-1, -2], "<f4").tobytes()
        + bytes(4 * 3)
        + b"\x01\0\0\0m"
        + bytes(4 * 2)
        + b"\x04\0\0\0"
        + np.array([1.5], "<f4").tobytes()
    )
