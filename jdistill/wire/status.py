"""TeacherError <-> gRPC status: code, message, and google.rpc.Status details.

Details: always ErrorInfo (domain "jdistill", reason = the error's upper-case word, metadata field and sequence),
BadRequest for a wrong request, RetryInfo where a retry makes sense. Clients in any language read these; no client
parses the message.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import grpc
from google.protobuf import message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from jdistill.wire import errors

DOMAIN = "jdistill"
DETAILS_KEY = "grpc-status-details-bin"
MAX_MESSAGE_CHARS = 1000
# gRPC refuses some header blocks above 8 KiB and all above 16 KiB; the whole status is then lost. The message is sent
# twice, percent-encoded and in the details; the remaining bytes are for the other details.
MAX_MESSAGE_BYTES = 6000

# Most specific first; errors of no listed type are INTERNAL.
_CODES: tuple[tuple[type[errors.TeacherError], grpc.StatusCode], ...] = (
    (errors.ModelNotFoundError, grpc.StatusCode.NOT_FOUND),
    (errors.InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.UnsupportedError, grpc.StatusCode.UNIMPLEMENTED),
    (errors.UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED),
    (errors.FingerprintMismatchError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (errors.DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.VerificationError, grpc.StatusCode.DATA_LOSS),
)
_BY_REASON = {
    error.reason: error
    for error in (
        errors.TeacherError,
        errors.InvalidRequestError,
        errors.ModelNotFoundError,
        errors.UnsupportedError,
        errors.UnauthenticatedError,
        errors.FingerprintMismatchError,
        errors.UnavailableError,
        errors.OverloadedError,
        errors.CorruptedError,
        errors.DeadlineError,
        errors.VerificationError,
        errors.EngineDeadError,
    )
}
# A connection that broke in mid-stream may be reported as INTERNAL or UNKNOWN, depending on which hop noticed.
_BROKEN_STREAM = re.compile("RST_STREAM|Stream removed|Socket closed|GOAWAY|Connection reset", re.IGNORECASE)
# For statuses without ErrorInfo, from a proxy or from gRPC itself.
_BY_CODE = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: errors.InvalidRequestError,
    grpc.StatusCode.UNIMPLEMENTED: errors.UnsupportedError,
    grpc.StatusCode.UNAUTHENTICATED: errors.UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: errors.UnauthenticatedError,
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
    grpc.StatusCode.CANCELLED: errors.UnavailableError,  # sent by gRPC: over 1,000 pending calls, a GOAWAY
    grpc.StatusCode.ABORTED: errors.UnavailableError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.OverloadedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineError,
    grpc.StatusCode.DATA_LOSS: errors.VerificationError,
}


def code_of(error: BaseException) -> grpc.StatusCode:
    """Returns the status code of an error; INTERNAL unless it is a TeacherError in the table."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def to_status(error: BaseException) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """Returns (code, message, trailing metadata) to end a call: `await context.abort(*to_status(error))`.

    Args:
        error: a TeacherError; anything else becomes INTERNAL, and only its type is revealed. RetryInfo carries the
            `retry_after_s` of an UnavailableError or a subclass of it (default 0.5).
    """
    code = code_of(error)
    if isinstance(error, errors.TeacherError):
        text, reason = str(error), error.reason
    else:
        text, reason = f"the teacher failed with {type(error).__name__}; see its log", "INTERNAL"
    text = _cut(text)
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)
    status = status_pb2.Status(code=code_pb2.Code.Value(code.name), message=text)
    if isinstance(error, errors.InvalidRequestError):
        if error.field is not None:
            info.metadata["field"] = error.field
        if error.sequence is not None:
            info.metadata["sequence"] = str(error.sequence)
        path = error.field or "request"
        if error.sequence is not None:
            path = f"sequences[{error.sequence}].{path}"
        violation = error_details_pb2.BadRequest.FieldViolation(field=path, description=text[:200])
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, errors.UnavailableError):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(1000 * (0.5 if error.retry_after_s is None else error.retry_after_s)))
        status.details.add().Pack(retry)
    status.details.add().Pack(info)
    return code, text, ((DETAILS_KEY, status.SerializeToString()),)


def _cut(text: str) -> str:
    text = text.encode(errors="replace").decode()  # a lone surrogate, from a file name, is not UTF-8
    sizes = (len(quote(char)) + len(char.encode()) for char in text[:MAX_MESSAGE_CHARS])
    num_chars = sum(total <= MAX_MESSAGE_BYTES for total in itertools.accumulate(sizes))
    return text if num_chars == len(text) else text[: max(num_chars - 4, 0)] + " ..."


def from_rpc_error(error: Any, endpoint: str) -> errors.TeacherError:
    """Converts a failed call (AioRpcError, or RpcError and Call) to a TeacherError; its text starts with `endpoint`."""
    code, details = error.code(), error.details() or ""
    reason, metadata = _error_info(error)
    kind = _BY_REASON.get(reason) if reason is not None else None
    if reason == "INTERNAL":
        kind = errors.TeacherError
    elif kind is None:
        kind = errors.UnavailableError if _BROKEN_STREAM.search(details) else _BY_CODE.get(code, errors.TeacherError)
        details = f"{code.name}: {details}"
    if kind is errors.OverloadedError and reason is None and "larger than max" in details:
        # gRPC's own limit on one message: a retry would fail in the same way.
        return errors.InvalidRequestError(
            f"{endpoint}: {details}; raise the limit of the proxy or server in between, or lower batch_tokens"
        )
    if kind is errors.UnsupportedError and reason is None:
        details += " (is this a jdistill teacher, of this version?)"
    text = f"{endpoint}: {details}"
    if kind is errors.InvalidRequestError:
        sequence = metadata.get("sequence", "")
        return errors.InvalidRequestError(
            text, field=metadata.get("field"), sequence=int(sequence) if sequence.isdecimal() else None
        )
    return kind(text)


def retry_delay_s(error: Any) -> float | None:
    """Returns the RetryInfo delay of a failed call in seconds; None if it has none."""
    for retry in _details(error, error_details_pb2.RetryInfo):
        return retry.retry_delay.ToMilliseconds() / 1000
    return None


def _error_info(error: Any) -> tuple[str | None, dict[str, str]]:
    for info in _details(error, error_details_pb2.ErrorInfo):
        if info.domain == DOMAIN:
            return info.reason, dict(info.metadata)
    return None, {}


def _details(error: Any, kind: type[message.Message]) -> Iterator[Any]:
    """Yields the details of that kind; stops where a proxy or the network has corrupted them."""
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            with contextlib.suppress(message.DecodeError):  # the code alone must suffice
                for detail in status_pb2.Status.FromString(value).details:
                    found = kind()
                    if detail.Unpack(found):
                        yield found
