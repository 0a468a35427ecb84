"""Convert numpy arrays to the wire's messages and back, without Python code per token.

This module knows the fields of requests and responses and checks that their counts agree; `columns` knows the bytes.

Dimension key: B sequences, S tokens, E entries of a reply, N scored positions of a reply, K top-k, C candidates.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import message

from jdistill.wire.columns import CRC_FIELD, MessageColumns
from jdistill.wire.errors import CorruptedError, InvalidRequestError, VerificationError
from jdistill.wire.spans import Columns, decode_prefixes, decode_spans, read_counts
from jdistill.wire.types import ModelInfo, SequenceToScore, ServerInfo, ServerState, TokenScores
from jdistill.wire.v1 import teacher_pb2

SERVICE = "jdistill.wire.v1.TeacherService"
CONTROL_SERVICE = "jdistill.wire.v1.TeacherControlService"
SCORE_METHOD = f"/{SERVICE}/ScoreSequences"
INFO_METHOD = f"/{SERVICE}/GetServerInfo"
WHOLE_REQUEST = "request"  # `field` of an InvalidRequestError about bytes that are not a request
DEFAULT_CHUNK_BYTES = 1 << 20  # larger messages only delay the first result (measured: 1 MB is as fast as 16 MB)

_LITTLE_U4 = np.dtype("<u4")
_LITTLE_I4 = np.dtype("<i4")
_LITTLE_F4 = np.dtype("<f4")
_REQUEST = MessageColumns(teacher_pb2.ScoreSequencesRequest)
_RESPONSE = MessageColumns(teacher_pb2.ScoreSequencesResponse)
SHORT_BYTES = 16 << 10  # see _join


class RequestOptions(NamedTuple):
    """The fields of a request that are not per sequence; meanings and defaults as in the proto."""

    model: str = ""
    expected_fingerprint: str = ""
    temperature: float = 1.0
    top_k: int = 0
    request_id: str = ""
    max_chunk_bytes: int = 0


class ScoredRun(NamedTuple):
    """Scores of a run of one sequence's scored positions, beginning at the `first_target`-th of them."""

    sequence_index: int
    first_target: int
    scores: TokenScores


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ScoreChunk:
    """One response message as arrays, its counts checked; the arrays may be read-only views of the message.

    Args:
        sequence_indexes, first_targets, target_counts, token_crcs: int64 [E].
        logprobs: float32 [N] with N = sum(target_counts).
        top_ids, top_logprobs: int32 and float32 [N, K]; None if K is 0.
        candidate_logprobs: float32 [N, C]; None if C is 0.
    """

    sequence_indexes: np.ndarray
    first_targets: np.ndarray
    target_counts: np.ndarray
    token_crcs: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray | None
    top_logprobs: np.ndarray | None
    candidate_logprobs: np.ndarray | None
    model: str
    fingerprint: str
    tokenizer_fingerprint: str
    temperature: float

    def runs(self) -> Iterator[ScoredRun]:
        """Yields the entries one by one."""
        stops = np.cumsum(self.target_counts)
        for e in range(len(stops)):
            part = slice(int(stops[e] - self.target_counts[e]), int(stops[e]))
            scores = TokenScores(
                logprobs=self.logprobs[part],
                top_ids=None if self.top_ids is None else self.top_ids[part],
                top_logprobs=None if self.top_logprobs is None else self.top_logprobs[part],
                candidate_logprobs=None if self.candidate_logprobs is None else self.candidate_logprobs[part],
                token_crc=int(self.token_crcs[e]),
            )
            yield ScoredRun(int(self.sequence_indexes[e]), int(self.first_targets[e]), scores)


def token_crc(token_ids: np.ndarray) -> int:
    """CRC-32 (zlib's) of the little-endian 4-byte ids, as in `ScoreSequencesResponse.token_crcs`."""
    return zlib.crc32(np.ascontiguousarray(token_ids, _LITTLE_U4 if np.asarray(token_ids).dtype.kind == "u" else "<i4"))


def request_bytes(sequence: SequenceToScore) -> int:
    """About how many bytes this sequence adds to a request (exact for what grows with its length)."""
    candidates = 0 if sequence.candidate_ids is None else sequence.candidate_ids.size
    prefix = 0 if sequence.teacher_prefix is None else len(sequence.teacher_prefix)
    return 4 * (4 + len(sequence.token_ids) + prefix + 2 * len(sequence.spans) + candidates)


def encode_request(
    sequences: Sequence[SequenceToScore],
    *,
    model: str = "",
    expected_fingerprint: str = "",
    temperature: float = 1.0,
    top_k: int = 0,
    request_id: str = "",
    max_chunk_bytes: int = 0,
) -> bytes:
    """Encodes a ScoreSequencesRequest.

    Raises:
        InvalidRequestError: the sequences have different numbers of candidates per position.
    """
    counts_C = {0 if s.candidate_ids is None else s.candidate_ids.shape[1] for s in sequences}
    if len(counts_C) > 1:
        raise InvalidRequestError(
            f"the sequences of one request have different numbers of candidates ({sorted(counts_C)}); "
            "send them in separate requests",
            field="candidate_ids",
        )
    scalars = {
        "model": model,
        "expected_fingerprint": expected_fingerprint,
        "temperature": temperature,
        "top_k": top_k,
        "request_id": request_id,
        "max_chunk_bytes": max_chunk_bytes,
        "candidate_count": counts_C.pop() if counts_C else 0,
    }
    lengths_B = [len(s.token_ids) for s in sequences]
    columns = {
        "sequence_lengths": [_words(lengths_B)],
        "token_ids": _join([s.token_ids for s in sequences], _LITTLE_I4),
    }
    if any(s.spans != ((1, length),) for s, length in zip(sequences, lengths_B, strict=True)):
        spans = [span for s in sequences for span in s.spans]
        columns["span_counts"] = [_words([len(s.spans) for s in sequences])]
        columns["span_starts"] = [_words([start for start, _ in spans])]
        columns["span_ends"] = [_words([stop for _, stop in spans])]
    if scalars["candidate_count"]:
        columns["candidate_ids"] = _join([s.candidate_ids for s in sequences], _LITTLE_I4)
    if any(s.teacher_prefix is not None for s in sequences):
        prefixes = [np.empty(0, _LITTLE_I4) if s.teacher_prefix is None else s.teacher_prefix for s in sequences]
        columns["prefix_lengths"] = [_words([len(prefix) for prefix in prefixes])]
        columns["prefix_replaced"] = [_words([s.num_replaced for s in sequences])]
        columns["prefix_token_ids"] = _join(prefixes, _LITTLE_I4)
    return _REQUEST.encode(scalars, columns)


def decode_request(data: bytes) -> tuple[list[SequenceToScore], RequestOptions]:
    """Decodes a ScoreSequencesRequest into its sequences and options; the arrays are writable copies.

    Checks the structure (counts agree, spans are inside their sequence); `validate` checks the rest against a model.

    Raises:
        CorruptedError: the payload_crc is present and wrong.
        InvalidRequestError: not a ScoreSequencesRequest, or its counts contradict each other.
    """
    scalars, columns = _decode(_REQUEST, data, _not_a_request)
    lengths_B = read_counts(columns, "sequence_lengths")
    token_ids = columns["token_ids"].view("<i4").astype(np.int32)
    if lengths_B.sum() != len(token_ids):
        raise InvalidRequestError(
            f"sequence_lengths add up to {lengths_B.sum()} tokens, token_ids has {len(token_ids)}", field="token_ids"
        )
    prefixes_B, replaced_B = decode_prefixes(columns, lengths_B)
    spans_B = decode_spans(columns, lengths_B, replaced_B)
    num_scored_B = np.array([sum(stop - start for start, stop in spans) for spans in spans_B], np.int64)
    count_C = scalars["candidate_count"]
    candidate_ids = columns["candidate_ids"].view("<i4").astype(np.int32)
    if num_scored_B.sum() * count_C != len(candidate_ids):
        raise InvalidRequestError(
            f"candidate_ids has {len(candidate_ids)} values; {num_scored_B.sum()} scored positions with "
            f"candidate_count = {count_C} need {num_scored_B.sum() * count_C}",
            field="candidate_ids",
        )
    token_stops_B = np.cumsum(lengths_B)
    candidates_PC = candidate_ids.reshape(-1, count_C) if count_C else None
    scored_stops_B = np.cumsum(num_scored_B)
    sequences = [
        SequenceToScore(
            token_ids=token_ids[stop - length : stop],
            spans=spans,
            candidate_ids=None if candidates_PC is None else candidates_PC[scored_stop - num_scored : scored_stop],
            teacher_prefix=prefix,
            num_replaced=num_replaced,
        )
        for stop, length, spans, prefix, num_replaced, scored_stop, num_scored in zip(
            token_stops_B.tolist(),
            lengths_B.tolist(),
            spans_B,
            prefixes_B,
            replaced_B.tolist(),
            scored_stops_B.tolist(),
            num_scored_B.tolist(),
            strict=True,
        )
    ]
    options = RequestOptions(
        model=scalars["model"],
        expected_fingerprint=scalars["expected_fingerprint"],
        temperature=1.0 if scalars["temperature"] is None else scalars["temperature"],
        top_k=scalars["top_k"],
        request_id=scalars["request_id"],
        max_chunk_bytes=scalars["max_chunk_bytes"],
    )
    return sequences, options


def response_bytes(scores: TokenScores) -> int:
    """Size of these scores in a response, up to a few bytes of overhead."""
    return 16 + len(scores.logprobs) * _target_bytes(scores)


def split_scores(scores: TokenScores, max_chunk_bytes: int) -> Iterator[tuple[int, TokenScores]]:
    """Yields (first_target, part) in order, each of at most `max_chunk_bytes` and at least one target.

    `max_chunk_bytes` is the request's; its 0 means DEFAULT_CHUNK_BYTES.
    """
    step = max(1, ((max_chunk_bytes or DEFAULT_CHUNK_BYTES) - 16) // _target_bytes(scores))
    for first in range(0, len(scores.logprobs), step):
        part = slice(first, first + step)
        yield (
            first,
            TokenScores(
                logprobs=scores.logprobs[part],
                top_ids=None if scores.top_ids is None else scores.top_ids[part],
                top_logprobs=None if scores.top_logprobs is None else scores.top_logprobs[part],
                candidate_logprobs=None if scores.candidate_logprobs is None else scores.candidate_logprobs[part],
                token_crc=scores.token_crc,
            ),
        )


def encode_response(
    runs: Sequence[ScoredRun | tuple[int, int, TokenScores]], *, info: ModelInfo, temperature: float
) -> bytes:
    """Encodes one ScoreSequencesResponse with `runs`: (sequence index, first target, scores) each."""
    scalars = {
        "model": info.model,
        "fingerprint": info.fingerprint,
        "tokenizer_fingerprint": info.tokenizer_fingerprint,
        "temperature": temperature,
    }
    columns = {
        "sequence_indexes": [_words([index for index, _, _ in runs])],
        "first_targets": [_words([first for _, first, _ in runs])],
        "target_counts": [_words([len(scores.logprobs) for _, _, scores in runs])],
        "token_crcs": [_words([scores.token_crc for _, _, scores in runs])],
    }
    for name, dtype in (
        ("logprobs", _LITTLE_F4),
        ("top_ids", _LITTLE_I4),
        ("top_logprobs", _LITTLE_F4),
        ("candidate_logprobs", _LITTLE_F4),
    ):
        parts = [getattr(scores, name) for _, _, scores in runs]
        if any(part is not None for part in parts):
            assert all(part is not None for part in parts), f"some runs have {name}, others none"
            columns[name] = _join(parts, dtype)
    return _RESPONSE.encode(scalars, columns)


def decode_response(data: bytes, *, top_k: int, candidate_count: int) -> ScoreChunk:
    """Decodes one ScoreSequencesResponse to a request with this `top_k` and number of candidates.

    Raises:
        CorruptedError: the payload_crc is wrong.
        VerificationError: not a ScoreSequencesResponse, or the number of values contradicts its counts.
    """
    scalars, columns = _decode(_RESPONSE, data, _not_a_response)
    if scalars[CRC_FIELD] is None:
        raise _not_a_response("no payload_crc, which every teacher sends")
    sequence_indexes, first_targets, target_counts, token_crcs = (
        columns[name].astype(np.int64) for name in ("sequence_indexes", "first_targets", "target_counts", "token_crcs")
    )
    num_entries = len(sequence_indexes)
    for name, column in (
        ("first_targets", first_targets),
        ("target_counts", target_counts),
        ("token_crcs", token_crcs),
    ):
        if len(column) != num_entries:
            raise VerificationError(
                f"reply with {num_entries} sequence_indexes but {len(column)} {name}: the server miscounts"
            )
    num_targets = int(target_counts.sum())

    def values(name: str, width: int, dtype: np.dtype) -> np.ndarray:
        got = columns[name]
        if len(got) != num_targets * width:
            raise VerificationError(
                f"reply with {len(got)} {name}, expected {num_targets * width}: {num_targets} scored positions (of "
                f"sequences {_some(sequence_indexes)}) times {width}"
            )
        return got.view(dtype)

    logprobs = values("logprobs", 1, _LITTLE_F4)
    top_ids = values("top_ids", top_k, _LITTLE_I4)
    top_logprobs = values("top_logprobs", top_k, _LITTLE_F4)
    candidate_logprobs = values("candidate_logprobs", candidate_count, _LITTLE_F4)
    return ScoreChunk(
        sequence_indexes=sequence_indexes,
        first_targets=first_targets,
        target_counts=target_counts,
        token_crcs=token_crcs,
        logprobs=logprobs,
        top_ids=top_ids.reshape(num_targets, top_k) if top_k else None,
        top_logprobs=top_logprobs.reshape(num_targets, top_k) if top_k else None,
        candidate_logprobs=candidate_logprobs.reshape(num_targets, candidate_count) if candidate_count else None,
        model=scalars["model"],
        fingerprint=scalars["fingerprint"],
        tokenizer_fingerprint=scalars["tokenizer_fingerprint"],
        temperature=scalars["temperature"],
    )


def encode_server_info(info: ServerInfo) -> bytes:
    """Encodes a GetServerInfoResponse."""
    fields = {f.name: getattr(info, f.name) for f in dataclasses.fields(info)}
    fields["models"] = [teacher_pb2.ModelInfo(**dataclasses.asdict(model)) for model in info.models]
    return teacher_pb2.GetServerInfoResponse(**fields).SerializeToString()


def decode_server_info(data: bytes) -> ServerInfo:
    """Decodes a GetServerInfoResponse; raises VerificationError if the bytes are not one."""
    try:
        reply = teacher_pb2.GetServerInfoResponse.FromString(data)
    except message.DecodeError as e:
        raise VerificationError(
            f"the server's GetServerInfo reply is not of the schema jdistill.wire.v1: {e}"
        ) from None
    fields = {f.name: getattr(reply, f.name) for f in dataclasses.fields(ServerInfo)}
    fields["models"] = tuple(
        ModelInfo(**{f.name: getattr(model, f.name) for f in dataclasses.fields(ModelInfo)}) for model in reply.models
    )
    try:
        fields["state"] = ServerState(reply.state)
    except ValueError:  # from a later version
        raise VerificationError(
            f"the server says that its state is {reply.state}, which this client does not know"
        ) from None
    if not fields["models"] and fields["state"] is not ServerState.LOADING:
        raise VerificationError(f"the server is {fields['state'].name} but names no model")
    return ServerInfo(**fields)


def _not_a_request(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"not a jdistill.wire.v1.ScoreSequencesRequest: {reason}", field=WHOLE_REQUEST)


def _not_a_response(reason: str) -> VerificationError:
    return VerificationError(f"not a jdistill.wire.v1.ScoreSequencesResponse: {reason}")


def _decode(kind: MessageColumns, data: bytes, error: Any) -> tuple[dict[str, Any], Columns]:
    """Decodes a message into scalars and columns, and checks its payload_crc if it has one."""
    try:
        scalars, columns, crc = kind.decode(data)
    except message.DecodeError as e:
        raise error(str(e)) from None
    said = scalars[CRC_FIELD]
    if said is not None and said != crc:
        raise CorruptedError(
            f"a {kind.name} was changed on its way: it says that its CRC-32 is {said:#010x}, it is {crc:#010x}. A bad "
            "cable, or a proxy that rewrites? TLS finds that too"
        )
    return scalars, columns


def _words(numbers: Sequence[int]) -> np.ndarray:
    return np.array(numbers, _LITTLE_U4)


def _join(arrays: Sequence[np.ndarray], dtype: np.dtype) -> list[np.ndarray]:
    """Makes one column. Short arrays are concatenated first: a piece costs a microsecond, a large one only its copy."""
    arrays = [np.asarray(array, dtype) for array in arrays]
    if len(arrays) > 1 and sum([array.nbytes for array in arrays]) < len(arrays) * SHORT_BYTES:
        return [np.concatenate([array.ravel() for array in arrays])]
    return arrays


def _target_bytes(scores: TokenScores) -> int:
    top = 0 if scores.top_ids is None else scores.top_ids.shape[1]
    candidates = 0 if scores.candidate_logprobs is None else scores.candidate_logprobs.shape[1]
    return 4 * (1 + 2 * top + candidates)


def _some(values: np.ndarray) -> str:
    return ", ".join(map(str, values[:5].tolist())) + (", ..." if len(values) > 5 else "")
