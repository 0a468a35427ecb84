"""The codec against plain protobuf, byte for byte, and against encodings that only other implementations write."""

import dataclasses
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill.wire import codec
from jdistill.wire.errors import CorruptedError, InvalidRequestError, VerificationError
from jdistill.wire.types import ModelInfo, SequenceToScore, ServerInfo, ServerState, TokenScores
from jdistill.wire.v1 import teacher_pb2

INFO = ModelInfo("m", "fp", "tok", 1000, 512, 64, 64, True, "float32")
UINT32 = st.integers(0, 2**31 - 1)


@st.composite
def spans(draw, length):
    """Any ascending, disjoint, non-empty spans inside [1, length)."""
    mask = np.array(draw(st.lists(st.booleans(), min_size=length - 1, max_size=length - 1)))
    if not mask.any():
        mask[draw(st.integers(0, length - 2))] = True
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return tuple((int(start) + 1, int(stop) + 1) for start, stop in edges.reshape(-1, 2))


@st.composite
def requests(draw):
    count = draw(st.sampled_from([0, 0, 1, 3]))
    sequences = []
    for _ in range(draw(st.integers(0, 5))):
        length = draw(st.integers(2, 12))
        tokens = np.array(draw(st.lists(UINT32, min_size=length, max_size=length)), np.int32)
        sequence = SequenceToScore(tokens, draw(st.one_of(st.just(()), spans(length))))
        if count:
            ids = draw(st.lists(UINT32, min_size=sequence.num_scored * count, max_size=sequence.num_scored * count))
            sequence = SequenceToScore(tokens, sequence.spans, np.array(ids, np.int32).reshape(-1, count))
        if draw(st.booleans()):
            prefix = np.array(draw(st.lists(UINT32, min_size=1, max_size=6)), np.int32)
            sequence = dataclasses.replace(
                sequence, teacher_prefix=prefix, num_replaced=draw(st.integers(0, sequence.spans[0][0]))
            )
        sequences.append(sequence)
    options = codec.RequestOptions(
        model=draw(st.text(max_size=5)),
        expected_fingerprint=draw(st.text(max_size=5)),
        temperature=float(np.float32(draw(st.floats(0.1, 4.0)))),
        top_k=draw(st.integers(0, 64)),
        request_id=draw(st.text(max_size=5)),
        max_chunk_bytes=draw(st.integers(0, 2**32 - 1)),
    )
    return sequences, options


def by_number(message):
    return sorted(message.DESCRIPTOR.fields, key=lambda field: field.number)


def with_crc(message):
    """Sets the message's payload_crc, computed value by value as the proto's comment defines it."""
    covered = b""
    for field in by_number(message)[:-1]:
        value = getattr(message, field.name)
        letter = "f" if field.type == field.TYPE_FLOAT else "I"
        if field.has_presence and not message.HasField(field.name):
            data = b""
        elif isinstance(value, str):
            data = value.encode("utf-8")
        else:
            values = [value] if isinstance(value, int | float) else value
            data = b"".join(struct.pack("<" + letter, one) for one in values)
        covered += struct.pack("<I", len(data)) + data
    assert by_number(message)[-1].name == "payload_crc"
    message.payload_crc = zlib.crc32(covered)
    return message


def plain_request(sequences, options):
    """Encodes the request as a program without our codec would."""
    message = teacher_pb2.ScoreSequencesRequest(**options._asdict())
    whole = all(s.spans == ((1, len(s.token_ids)),) for s in sequences)
    for s in sequences:
        message.sequence_lengths.append(len(s.token_ids))
        message.token_ids.extend(s.token_ids.tolist())
        if not whole:
            message.span_counts.append(len(s.spans))
            message.span_starts.extend(start for start, _ in s.spans)
            message.span_ends.extend(stop for _, stop in s.spans)
        if s.candidate_ids is not None:
            message.candidate_count = s.candidate_ids.shape[1]
            message.candidate_ids.extend(s.candidate_ids.ravel().tolist())
        if any(other.teacher_prefix is not None for other in sequences):
            prefix = [] if s.teacher_prefix is None else s.teacher_prefix.tolist()
            message.prefix_lengths.append(len(prefix))
            message.prefix_replaced.append(s.num_replaced)
            message.prefix_token_ids.extend(prefix)
    return with_crc(message)


def assert_same_sequences(got, expected):
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_array_equal(g.token_ids, e.token_ids)
        assert g.spans == e.spans
        assert (g.candidate_ids is None) == (e.candidate_ids is None)
        if e.candidate_ids is not None:
            np.testing.assert_array_equal(g.candidate_ids, e.candidate_ids)
        assert (g.teacher_prefix is None) == (e.teacher_prefix is None)
        if e.teacher_prefix is not None:
            np.testing.assert_array_equal(g.teacher_prefix, e.teacher_prefix)
        assert g.num_replaced == e.num_replaced


@settings(max_examples=200, deadline=None)
@given(requests())
def test_a_request_has_the_bytes_of_plain_protobuf_and_round_trips(request):
    sequences, options = request
    data = codec.encode_request(sequences, **options._asdict())
    assert data == plain_request(sequences, options).SerializeToString()
    got, got_options = codec.decode_request(data)
    assert got_options == options
    assert_same_sequences(got, sequences)
    assert all(s.token_ids.flags.writeable for s in got)


FLOATS = ("logprobs", "top_logprobs", "candidate_logprobs")


@st.composite
def runs(draw):
    top_k, count = draw(st.sampled_from([0, 0, 1, 5])), draw(st.sampled_from([0, 0, 2]))
    # Any 32 bits, NaN payloads included: the codec does not interpret numbers.
    bits = st.binary(min_size=4, max_size=4)

    def column(shape, dtype):
        size = int(np.prod(shape))
        return np.frombuffer(b"".join(draw(st.lists(bits, min_size=size, max_size=size))), dtype).reshape(shape)

    entries = []
    for _ in range(draw(st.integers(0, 4))):
        n = draw(st.integers(0, 5))
        scores = TokenScores(
            logprobs=column((n,), "<f4"),
            top_ids=column((n, top_k), "<i4") if top_k else None,
            top_logprobs=column((n, top_k), "<f4") if top_k else None,
            candidate_logprobs=column((n, count), "<f4") if count else None,
            token_crc=draw(st.integers(0, 2**32 - 1)),
        )
        entries.append(codec.ScoredRun(draw(UINT32), draw(UINT32), scores))
    return top_k, count, entries


@settings(max_examples=200, deadline=None)
@given(runs())
def test_a_response_has_the_bytes_of_plain_protobuf_and_round_trips(case):
    top_k, count, entries = case
    data = codec.encode_response(entries, info=INFO, temperature=0.5)
    plain = teacher_pb2.ScoreSequencesResponse.FromString(data)
    floats = [getattr(s, name) for _, _, s in entries for name in FLOATS if getattr(s, name) is not None]
    finite = all(np.isfinite(column).all() for column in floats)
    if finite:  # some protobuf runtimes change a NaN's payload
        assert plain.SerializeToString() == data
        assert with_crc(teacher_pb2.ScoreSequencesResponse.FromString(data)).payload_crc == plain.payload_crc
    assert (plain.model, plain.fingerprint, plain.tokenizer_fingerprint, plain.temperature) == ("m", "fp", "tok", 0.5)
    assert list(plain.sequence_indexes) == [index for index, _, _ in entries]
    assert list(plain.first_targets) == [first for _, first, _ in entries]
    assert list(plain.target_counts) == [len(scores.logprobs) for _, _, scores in entries]
    assert list(plain.token_crcs) == [scores.token_crc for _, _, scores in entries]
    for name in FLOATS if finite else ():
        columns = [getattr(scores, name) for _, _, scores in entries if getattr(scores, name) is not None]
        np.testing.assert_array_equal(list(getattr(plain, name)), np.concatenate([[], *map(np.ravel, columns)]))
    chunk = codec.decode_response(data, top_k=top_k, candidate_count=count)
    assert (chunk.model, chunk.fingerprint, chunk.tokenizer_fingerprint, chunk.temperature) == ("m", "fp", "tok", 0.5)
    for got, expected in zip(chunk.runs(), entries, strict=True):
        assert got[:2] == expected[:2]
        assert got.scores.token_crc == expected.scores.token_crc
        for name in ("logprobs", "top_ids", "top_logprobs", "candidate_logprobs"):
            g, e = getattr(got.scores, name), getattr(expected.scores, name)
            assert (g is None) == (e is None)
            if e is not None:
                assert g.shape == e.shape and g.dtype == e.dtype and g.tobytes() == e.tobytes()


def packed(field, values):
    data = struct.pack(f"<{len(values)}I", *values)
    return bytes([field << 3 | 2, len(data)]) + data


def unpacked(field, values):
    return b"".join(bytes([field << 3 | 5]) + struct.pack("<I", value) for value in values)


@pytest.mark.parametrize(
    "token_ids",
    [
        packed(8, [7, 3]) + packed(8, [9]) + packed(8, []),
        unpacked(8, [7, 3, 9]),
        packed(8, [7]) + unpacked(8, [3]) + packed(8, [9]),
    ],
    ids=["split", "unpacked", "mixed"],
)
def test_split_and_unpacked_encodings_are_read_as_plain_protobuf_reads_them(token_ids):
    data = packed(7, [3]) + token_ids
    assert list(teacher_pb2.ScoreSequencesRequest.FromString(data).token_ids) == [7, 3, 9]
    (sequence,), _ = codec.decode_request(data)
    assert sequence.token_ids.tolist() == [7, 3, 9]


def test_a_field_of_a_newer_schema_is_ignored():
    newer = bytes([0x95, 0x06]) + b"\1\2\3\4"  # field 98, fixed32
    (sequence,), _ = codec.decode_request(packed(7, [2]) + packed(8, [1, 2]) + newer)
    assert sequence.token_ids.tolist() == [1, 2]


def test_unset_temperature_means_one():
    assert codec.decode_request(b"")[1].temperature == 1.0
    assert (
        codec.decode_request(teacher_pb2.ScoreSequencesRequest(temperature=0).SerializeToString())[1].temperature == 0
    )


REQUEST = {"sequence_lengths": [3, 2], "token_ids": [1, 2, 3, 4, 5]}
SPANS = {**REQUEST, "span_counts": [1, 1], "span_starts": [1, 1], "span_ends": [3, 2]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**REQUEST, "token_ids": [1, 2, 3, 4]}, "add up to 5 tokens, token_ids has 4"),
        ({"sequence_lengths": [2**32 - 1, 2**32 - 1, 2, 5], "token_ids": [1] * 5}, "add up to 8589934597 tokens"),
        ({**REQUEST, "sequence_lengths": [4, 1]}, "sequence 1 has 1 tokens; at least 2"),
        ({**REQUEST, "span_starts": [1]}, "without span_counts"),
        ({**SPANS, "span_counts": [2]}, "span_counts has 1 values for 2 sequences"),
        ({**SPANS, "span_starts": [1]}, "span_starts has 1 values, span_counts add up to 2"),
        ({**SPANS, "span_counts": [2, 0]}, "sequence 1 has no span"),
        ({**SPANS, "span_starts": [0, 1]}, r"span \[0, 3\) of sequence 0"),
        ({**SPANS, "span_starts": [1, 2]}, r"span \[2, 2\) of sequence 1"),
        ({**SPANS, "span_ends": [4, 2]}, r"span \[1, 4\) of sequence 0 \(3 tokens\)"),
        (
            {**SPANS, "span_counts": [2, 1], "span_starts": [1, 1, 1], "span_ends": [2, 3, 2]},
            r"span \[1, 3\) of sequence 0",
        ),
        (
            {**REQUEST, "candidate_ids": [1, 2]},
            "candidate_ids has 2 values; 3 scored positions with candidate_count = 0",
        ),
        ({**REQUEST, "candidate_count": 2, "candidate_ids": [1] * 5}, "need 6"),
    ],
)
def test_a_request_whose_counts_disagree_is_refused(fields, message):
    with pytest.raises(InvalidRequestError, match=message):
        codec.decode_request(teacher_pb2.ScoreSequencesRequest(**fields).SerializeToString())


@pytest.mark.parametrize("data", [b"\xff\xff\xff", bytes([8 << 3 | 2, 3]) + b"abc"])
def test_bytes_that_are_not_a_message_are_refused(data):
    with pytest.raises(InvalidRequestError, match=r"not a jdistill\.wire\.v1.ScoreSequencesRequest"):
        codec.decode_request(data)
    with pytest.raises(VerificationError, match=r"not a jdistill\.wire\.v1.ScoreSequencesResponse"):
        codec.decode_response(data.replace(b"\x42", b"\x2a"), top_k=0, candidate_count=0)


RESPONSE = {
    "sequence_indexes": [0, 1],
    "first_targets": [0, 0],
    "target_counts": [2, 1],
    "token_crcs": [1, 2],
    "logprobs": [-1.0, -2.0, -3.0],
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**RESPONSE, "token_crcs": [1]}, "2 sequence_indexes but 1 token_crcs"),
        ({**RESPONSE, "first_targets": []}, "2 sequence_indexes but 0 first_targets"),
        ({**RESPONSE, "logprobs": [-1.0, -2.0]}, "2 logprobs, expected 3"),
        ({**RESPONSE, "target_counts": [2**32 - 1, 4]}, "3 logprobs, expected 4294967299"),
        ({**RESPONSE, "top_ids": [1]}, "1 top_ids, expected 0"),
        ({**RESPONSE, "candidate_logprobs": [-1.0] * 3}, "3 candidate_logprobs, expected 0"),
    ],
)
def test_a_response_whose_counts_disagree_is_refused(fields, message):
    data = with_crc(teacher_pb2.ScoreSequencesResponse(**fields)).SerializeToString()
    with pytest.raises(VerificationError, match=message):
        codec.decode_response(data, top_k=0, candidate_count=0)


def test_a_response_without_payload_crc_is_refused_and_a_request_without_one_is_read():
    data = teacher_pb2.ScoreSequencesResponse(**RESPONSE).SerializeToString()
    with pytest.raises(VerificationError, match="no payload_crc"):
        codec.decode_response(data, top_k=0, candidate_count=0)
    got, _ = codec.decode_request(teacher_pb2.ScoreSequencesRequest(**REQUEST).SerializeToString())
    assert [s.token_ids.tolist() for s in got] == [[1, 2, 3], [4, 5]]


def full_request():
    """A ServerInfo whose fields are all set."""
    sequences = [
        SequenceToScore(
            np.arange(40, 46, dtype=np.int32),
            ((2, 3), (4, 6)),
            np.arange(6, dtype=np.int32).reshape(3, 2),
            teacher_prefix=np.array([7, 8], np.int32),
            num_replaced=1,
        )
    ]
    options = codec.RequestOptions("m", "fp", 0.5, 3, "r", 1 << 20)
    return codec.encode_request(sequences, **options._asdict())


def full_response():
    rng = np.random.default_rng(0)
    scores = TokenScores(
        logprobs=-rng.random(3, np.float32),
        top_ids=rng.integers(0, 9, (3, 2), np.int32),
        top_logprobs=-rng.random((3, 2), np.float32),
        candidate_logprobs=-rng.random((3, 2), np.float32),
        token_crc=5,
    )
    return codec.encode_response([(0, 0, scores), (1, 4, scores)], info=INFO, temperature=0.5)


@pytest.mark.parametrize("kind", ["request", "response"])
def test_every_flipped_bit_of_a_message_is_detected(kind):
    data = full_request() if kind == "request" else full_response()
    seen_as = {"same": 0, "corrupted": 0, "other": 0}
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            if kind == "request":
                got = codec.decode_request(bytes(flipped))
                assert codec.encode_request(got[0], **got[1]._asdict()) == data
            else:
                chunk = codec.decode_response(bytes(flipped), top_k=2, candidate_count=2)
                runs = [tuple(run) for run in chunk.runs()]
                assert codec.encode_response(runs, info=INFO, temperature=chunk.temperature) == data
            seen_as["same"] += 1  # the flip made an unknown field of payload_crc, and changed nothing else
        except CorruptedError as e:
            assert "was changed on its way" in str(e)
            seen_as["corrupted"] += 1
        except (InvalidRequestError, VerificationError):  # no message any more, or one without payload_crc
            seen_as["other"] += 1
    assert seen_as["corrupted"] > 0.8 * 8 * len(data), seen_as
    assert seen_as["same"] <= (16 if kind == "request" else 0), seen_as


def test_sequences_with_different_numbers_of_candidates_do_not_share_a_request():
    tokens = np.array([1, 2], np.int32)
    with pytest.raises(InvalidRequestError, match=r"different numbers of candidates \(\[0, 2\]\)"):
        codec.encode_request([SequenceToScore(tokens), SequenceToScore(tokens, (), np.array([[3, 4]]))])


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 200), st.sampled_from([0, 1, 3]))
def test_split_scores_keep_order_and_stay_within_the_size(num_scored, max_bytes, top_k):
    rng = np.random.default_rng(0)
    scores = TokenScores(
        logprobs=rng.normal(size=num_scored).astype(np.float32),
        top_ids=rng.integers(0, 9, (num_scored, top_k), np.int32) if top_k else None,
        top_logprobs=rng.normal(size=(num_scored, top_k)).astype(np.float32) if top_k else None,
        candidate_logprobs=None,
        token_crc=5,
    )
    parts = list(codec.split_scores(scores, max_bytes))
    place = 0
    for first, part in parts:
        assert first == place
        place += len(part.logprobs)
        assert len(part.logprobs) == 1 or codec.response_bytes(part) <= max_bytes
        np.testing.assert_array_equal(part.logprobs, scores.logprobs[first:place])
        if top_k:
            np.testing.assert_array_equal(part.top_ids, scores.top_ids[first:place])
    assert place == num_scored


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, ">i4", ">i8"])
def test_token_crc_covers_little_endian_words_for_any_array_layout(dtype):
    ids = [1, 70000, 2**31 - 1, 0]
    expected = zlib.crc32(b"".join(struct.pack("<I", i) for i in ids))
    assert codec.token_crc(np.array(ids, dtype)) == expected
    assert codec.token_crc(np.repeat(np.array(ids, dtype), 2)[::2]) == expected  # not contiguous


def test_server_info_round_trips():
    info = ServerInfo("1", "abc", "fake", "2", (INFO,), 2**40)
    assert codec.decode_server_info(codec.encode_server_info(info)) == info
    adapter = dataclasses.replace(INFO, model="lora", base_model="m")
    info = dataclasses.replace(info, models=(INFO, adapter), state=ServerState.SLEEPING, can_sleep=True)
    assert codec.decode_server_info(codec.encode_server_info(info)) == info
    with pytest.raises(VerificationError, match="GetServerInfo"):
        codec.decode_server_info(b"\xff\xff")


def test_only_a_loading_server_may_list_no_models():
    loading = ServerInfo("1", "abc", "", "", (), 0, ServerState.LOADING)
    assert codec.decode_server_info(codec.encode_server_info(loading)) == loading
    for state in (ServerState.SERVING, ServerState.DRAINING):
        with pytest.raises(VerificationError, match="names no model"):
            codec.decode_server_info(codec.encode_server_info(dataclasses.replace(loading, state=state)))
    with pytest.raises(VerificationError, match="state is 77"):
        codec.decode_server_info(teacher_pb2.GetServerInfoResponse(state=77).SerializeToString())  # type: ignore[arg-type]


def test_a_teacher_prefix_replaces_the_prompt_and_the_same_tokens_are_scored():
    tokens = np.array([1, 2, 3, 10, 11, 12], np.int32)
    prefix = np.array([7, 8, 9, 9, 9], np.int32)
    sequence = SequenceToScore(tokens, ((3, 4), (5, 6)), teacher_prefix=prefix, num_replaced=3)
    seen = sequence.as_scored()
    assert seen.token_ids.tolist() == [7, 8, 9, 9, 9, 10, 11, 12] and seen.spans == ((5, 6), (7, 8))
    assert seen.token_ids[seen.scored_positions()].tolist() == tokens[sequence.scored_positions()].tolist()
    assert SequenceToScore(tokens, teacher_prefix=prefix, num_replaced=3).as_scored().spans == ((5, 8),)
    shorter = SequenceToScore(tokens, teacher_prefix=prefix[:1], num_replaced=3).as_scored()
    assert shorter.token_ids.tolist() == [7, 10, 11, 12] and shorter.spans == ((1, 4),)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prefix_lengths": [2]}, "prefix_lengths has 1 values for 2"),
        ({"prefix_replaced": [0]}, "prefix_replaced has 1 values for 2"),
        ({"prefix_token_ids": [5]}, "prefix_lengths add up to 2"),
        ({"prefix_replaced": [0, 3]}, "prefix_replaced of sequence 1 is 3 of its 3 tokens"),
    ],
)
def test_invalid_prefixes_are_refused(change, words):
    fields = {"prefix_lengths": [2, 0], "prefix_replaced": [1, 0], "prefix_token_ids": [5, 6]} | change
    request = teacher_pb2.ScoreSequencesRequest(sequence_lengths=[3, 3], token_ids=range(6), **fields)
    with pytest.raises(InvalidRequestError, match=words):
        codec.decode_request(request.SerializeToString())
