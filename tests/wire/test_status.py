"""Errors become a gRPC status and the same error again, through a real call."""

import concurrent.futures

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from jdistill.wire import errors, status


@pytest.fixture(scope="module")
def fail_with():
    """fail_with(error) -> the RpcError of a call that the server ended with it."""
    current = []

    def handler(_, context):
        code, text, trailing = current[-1] if isinstance(current[-1], tuple) else status.to_status(current[-1])
        context.set_trailing_metadata(trailing)
        context.abort(code, text)

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    handlers = {"M": grpc.unary_unary_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("s", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")

    def call(error):
        current.append(error)
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/s/M")(b"", timeout=10)
        return caught.value

    yield call
    channel.close()
    server.stop(None).wait()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidRequestError("ids", field="token_ids", sequence=3), grpc.StatusCode.INVALID_ARGUMENT),
        (errors.InvalidRequestError("top"), grpc.StatusCode.INVALID_ARGUMENT),
        (errors.UnsupportedError("no"), grpc.StatusCode.UNIMPLEMENTED),
        (errors.FingerprintMismatchError("other"), grpc.StatusCode.FAILED_PRECONDITION),
        (errors.UnavailableError("loading"), grpc.StatusCode.UNAVAILABLE),
        (errors.EngineDeadError("dead"), grpc.StatusCode.UNAVAILABLE),
        (errors.OverloadedError("full"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.DeadlineError("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (errors.VerificationError("NaN"), grpc.StatusCode.DATA_LOSS),
        (errors.TeacherError("what"), grpc.StatusCode.INTERNAL),
    ],
)
def test_every_error_round_trips_through_its_status(fail_with, error, code):
    rpc_error = fail_with(error)
    assert rpc_error.code() == code
    got = status.from_rpc_error(rpc_error, "host:1")
    assert type(got) is type(error)
    assert str(got) == f"host:1: {error}"
    if isinstance(error, errors.InvalidRequestError):
        assert (got.field, got.sequence) == (error.field, error.sequence)
    assert status.retry_delay_s(rpc_error) == (0.5 if isinstance(error, errors.UnavailableError) else None)


def test_the_details_are_those_that_every_grpc_library_reads(fail_with):
    rpc_error = fail_with(errors.InvalidRequestError("ids", field="token_ids", sequence=3))
    bad, info = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
    details = rpc_status.from_call(rpc_error).details
    assert details[0].Unpack(bad) and details[1].Unpack(info)
    assert bad.field_violations[0].field == "sequences[3].token_ids"
    assert (info.domain, info.reason) == ("jdistill", "INVALID_REQUEST")


def test_any_other_exception_sends_its_type_but_not_its_text(fail_with):
    got = status.from_rpc_error(fail_with(KeyError("secret")), "host:1")
    assert type(got) is errors.TeacherError
    assert "KeyError" in str(got) and "secret" not in str(got)


@pytest.mark.parametrize("char", ["a", "%", "ü", "\n", "漢", "🙂", "\udce4"])
def test_a_long_message_of_any_characters_always_arrives(fail_with, char):
    readable = char.encode(errors="replace").decode()
    error = errors.InvalidRequestError(char * 50_000, field="candidate_token_ids", sequence=4095)
    for _ in range(20):  # gRPC refuses what is between its two limits now and then only
        got = status.from_rpc_error(fail_with(error), "h")
        assert type(got) is errors.InvalidRequestError and str(got).startswith(f"h: {readable * 100}")
        assert (got.field, got.sequence) == ("candidate_token_ids", 4095)


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, "x", errors.UnavailableError),
        (grpc.StatusCode.CANCELLED, "x", errors.UnavailableError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "x", errors.OverloadedError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (9 vs. 4)", errors.InvalidRequestError),
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2", errors.UnavailableError),
        (grpc.StatusCode.UNKNOWN, "Stream removed", errors.UnavailableError),
        (grpc.StatusCode.UNKNOWN, "Exception calling application", errors.TeacherError),
        (grpc.StatusCode.UNIMPLEMENTED, "Method not found!", errors.UnsupportedError),
    ],
)
def test_a_status_without_our_details_is_mapped_by_its_code(fail_with, code, text, kind):
    rpc_error = fail_with((code, text, ()))
    got = status.from_rpc_error(rpc_error, "host:1")
    assert type(got) is kind
    assert f"{code.name}: {text}" in str(got)


def garbled_detail():
    message = status_pb2.Status(code=14, message="x")
    message.details.add(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\n\xff")
    return message.SerializeToString()


@pytest.mark.parametrize("details", [b"\xff\xff\xff", garbled_detail()], ids=["status", "detail"])
def test_unreadable_details_are_ignored_and_the_code_counts(fail_with, details):
    rpc_error = fail_with((grpc.StatusCode.UNAVAILABLE, "x", ((status.DETAILS_KEY, details),)))
    assert type(status.from_rpc_error(rpc_error, "h")) is errors.UnavailableError
    assert status.retry_delay_s(rpc_error) is None


@pytest.mark.parametrize("sequence", ["x", "-1", "1.5", ""])
def test_a_sequence_detail_that_is_not_an_index_is_ignored(fail_with, sequence):
    message = status_pb2.Status(code=3, message="x")
    info = error_details_pb2.ErrorInfo(reason="INVALID_REQUEST", domain="jdistill", metadata={"sequence": sequence})
    message.details.add().Pack(info)
    rpc_error = fail_with((grpc.StatusCode.INVALID_ARGUMENT, "x", ((status.DETAILS_KEY, message.SerializeToString()),)))
    assert status.from_rpc_error(rpc_error, "h").sequence is None
