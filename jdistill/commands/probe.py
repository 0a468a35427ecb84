"""`jdistill probe`: show what a running teacher serves, its health and its speed."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import time
from typing import Any

DESCRIPTION = """\
Show what a running teacher serves, whether it is healthy, and how fast it answers. Works in every state.

  jdistill probe 127.0.0.1:50051
  jdistill probe teacher:50051 --tls-ca ca.pem --token-file token
  jdistill probe teacher:50051 --tokens 65536 --top-k 64   a longer measurement, and another one with top-k
  jdistill probe teacher:50051 --json --tokens 0           for scripts: no measurement

Tokens per second are measured with one request of random tokens, after a warm-up: a lower bound, because one client
does not saturate a large server. A sleeping teacher is left asleep and not measured, unless --wake is given (it stays
awake then). Exit codes: 0 healthy (so is a sleeping teacher that a score wakes), 1 not reachable or not healthy, 2 the
request was wrong.
"""

NUM_PINGS = 5
SEQUENCE_TOKENS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See jdistill.commands."""
    parser.add_argument("endpoint", metavar="HOST:PORT")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens to score for the measurement; 0: none (4096)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="measure once more, with the teacher's top-k")
    parser.add_argument("--wake", action="store_true", help="wake a teacher that sleeps, and measure it")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="for all of it (60)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    add_credentials_arguments(parser)


def add_credentials_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags by which a command authenticates to a teacher; see `client_credentials`."""
    group = parser.add_argument_group("credentials")
    group.add_argument(
        "--tls-ca", metavar="FILE", help="PEM file: the authority of the teacher's certificate; without it: plain text"
    )
    group.add_argument("--tls-cert", metavar="FILE", help="PEM file: our certificate, if the teacher wants one (mTLS)")
    group.add_argument("--tls-key", metavar="FILE", help="PEM file: its private key")
    group.add_argument("--token-file", metavar="FILE", help="file with the bearer token, read again if it is refused")


def client_credentials(args: argparse.Namespace) -> dict[str, Any]:
    """Returns `credentials` and `token` for TeacherClient; raises ValueError if a file cannot be used."""
    # Silences gRPC's own lines about failed handshakes, which the error reports; read once, when gRPC is loaded.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from jdistill.wire.credentials import channel_credentials, read_token

    token = None
    if args.token_file is not None:
        read_token(args.token_file)  # an unusable file is an error of the request

        def token() -> str:
            return read_token(args.token_file)

    return {"credentials": channel_credentials(ca=args.tls_ca, cert=args.tls_cert, key=args.tls_key), "token": token}


def run(args: argparse.Namespace) -> int:
    """See jdistill.commands."""
    if args.tokens < 0:
        raise ValueError(f"--tokens {args.tokens}: expected 0 or more")
    if args.top_k < 0:
        raise ValueError(f"--top-k {args.top_k}: expected 0 or more")
    credentials = client_credentials(args)
    from jdistill.wire.errors import TeacherError, UnavailableError

    facts: dict[str, Any] = {"endpoint": args.endpoint, "health": "unreachable"}
    error: TeacherError | None = None
    try:
        _ask(args, credentials, facts)
    except TeacherError as e:
        error = e
    if error is None and facts["health"] != "SERVING":
        error = UnavailableError(f"{args.endpoint} is {facts['health']}: {_why_not_serving(facts)}")
    if args.json:
        print(json.dumps(facts if error is None else facts | {"error": str(error)}))
    elif "state" in facts:
        _print_table(facts)
    if error is not None:
        raise error
    return 0


def _why_not_serving(facts: dict[str, Any]) -> str:
    if facts["state"] == "LOADING":
        return "it loads its model. Try again in a while; its log says more"
    if facts["state"] == "SLEEPING":
        return "it sleeps, and a score does not wake it (--on-sleep refuse): call Wake, or give --wake"
    if facts["state"] == "DRAINING":
        return "it is shutting down: calls that run may finish, then it ends"
    return "Try again in a while; its log says more"


def _ask(args: argparse.Namespace, credentials: dict[str, Any], facts: dict[str, Any]) -> None:
    """Fills `facts` as far as the teacher answers."""
    import grpc

    from jdistill.client import TeacherClient
    from jdistill.wire.channel import MAX_MESSAGE_BYTES
    from jdistill.wire.endpoint import parse_endpoint
    from jdistill.wire.types import ServerState

    give_up = time.monotonic() + args.timeout_s
    options = (("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.enable_http_proxy", 0))
    tls = credentials["credentials"]
    with contextlib.ExitStack() as stack:
        # Opened first: it also checks the address.
        client = stack.enter_context(TeacherClient([args.endpoint], deadline_s=args.timeout_s, **credentials))
        # Without the client's service config, whose health check would not let this channel use a loading server.
        target = parse_endpoint(args.endpoint).target
        channel = grpc.insecure_channel(target, options) if tls is None else grpc.secure_channel(target, tls, options)
        stack.enter_context(channel)

        def look() -> Any:
            info = _info(channel, args.endpoint, credentials, give_up - time.monotonic())
            models = [dataclasses.asdict(model) for model in info.models]
            facts.update(dataclasses.asdict(info) | {"state": info.state.name, "models": models})
            facts["model"] = models[0] if models else None
            facts["health"] = _health(channel, args.endpoint, tls is not None, give_up - time.monotonic())
            return info

        facts["health"] = _health(channel, args.endpoint, tls is not None, args.timeout_s)
        facts["round_trip_ms"] = 1000 * statistics.median(
            _timed(lambda: _health(channel, args.endpoint, tls is not None, args.timeout_s)) for _ in range(NUM_PINGS)
        )
        if args.tls_ca is not None:
            facts["certificate"] = _certificate(args)
        info = look()
        if info.state is ServerState.SLEEPING and args.wake:
            client.wake()
            info = look()
        if info.state is ServerState.SERVING:
            client.info()  # is it one server?
        if args.tokens and info.state is ServerState.SERVING:
            facts["tokens_per_s"] = _tokens_per_s(client, info.model, args.tokens, 0)
            if args.top_k:
                speed = _tokens_per_s(client, info.model, args.tokens, args.top_k)
                facts |= {"top_k": args.top_k, "top_k_tokens_per_s": speed}


def _certificate(args: argparse.Namespace) -> dict[str, str] | None:
    from jdistill.wire.credentials import server_certificate

    try:
        return dataclasses.asdict(
            server_certificate(args.endpoint, ca=args.tls_ca, cert=args.tls_cert, key=args.tls_key)
        )
    except (OSError, ValueError):  # gRPC has just accepted it, which is what counts
        return None


def _info(channel: Any, endpoint: str, credentials: dict[str, Any], timeout_s: float) -> Any:
    """GetServerInfo, which is answered in every state."""
    import grpc

    from jdistill.wire import codec, status

    token = credentials["token"]
    metadata = () if token is None else (("authorization", f"Bearer {token()}"),)
    try:
        reply = channel.unary_unary(codec.INFO_METHOD)(b"", timeout=max(0.1, min(timeout_s, 10.0)), metadata=metadata)
    except grpc.RpcError as e:
        raise status.from_rpc_error(e, endpoint) from None
    return codec.decode_server_info(reply)


def _health(channel: Any, endpoint: str, tls: bool, timeout_s: float) -> str:
    """Returns the status name reported by the standard health service."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from jdistill.wire.codec import SERVICE
    from jdistill.wire.credentials import handshake_remedy, why_closed
    from jdistill.wire.errors import UnavailableError

    try:
        reply = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service=SERVICE), timeout=max(0.1, min(timeout_s, 10.0))
        )
    except grpc.RpcError as e:
        if e.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED):
            raise UnavailableError(
                f"{endpoint} speaks gRPC but is no jdistill teacher (no health of {SERVICE}): is the port right?"
            ) from None
        remedy = handshake_remedy(e.details() or "") or why_closed(endpoint, tls=tls)
        remedy = (
            remedy or "is it running (jdistill teacher ... --port), are host and port right, is a firewall between?"
        )
        raise UnavailableError(
            f"cannot reach a teacher at {endpoint}: {remedy} ({e.code().name}: {e.details()})"
        ) from None
    return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)


def _timed(function: Any) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def _tokens_per_s(client: Any, model: Any, num_tokens: int, top_k: int) -> float:
    import numpy as np

    from jdistill.client import SequenceToScore

    length = min(SEQUENCE_TOKENS, model.max_sequence_length, max(2, num_tokens))
    rng = np.random.default_rng(0)
    count = max(1, num_tokens // length)

    def score() -> None:
        ids = rng.integers(0, model.vocab_size, (count, length), dtype=np.int32)
        client.score([SequenceToScore(row) for row in ids], top_k=top_k)

    score()  # the first request of a shape may compile
    return count * length / _timed(score)


def _print_table(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = {
        "health": facts["health"],
        "state": facts["state"] + (", woken by a score" if _wakes(facts) else ""),
        "engine": f"{facts['engine']} {facts['engine_version']}".strip(),
        "jdistill": facts["server_version"],
    }
    if certificate := facts.get("certificate"):
        rows["certificate"] = f"{certificate['subject']}, until {certificate['expires']}"
    model = facts["model"]
    if model is not None:
        rows |= {
            "model": model["model"],
            "fingerprint": model["fingerprint"],
            "tokenizer": model["tokenizer_fingerprint"] or "none in the checkpoint",
            "computes in": model["dtype"],
            "vocabulary": f"{model['vocab_size']:,}",
            "longest sequence": f"{model['max_sequence_length']:,} tokens",
            "top-k": f"up to {model['max_top_k']:,}" if model["max_top_k"] else "no",
            "candidates": f"up to {model['max_candidate_count']:,}" if model["max_candidate_count"] else "no",
            "temperature": "any" if model["any_temperature"] else "1 only",
        }
        for adapter in facts["models"][1:]:
            rows[f"adapter {adapter['model']}"] = adapter["fingerprint"]
    size, queue = facts["max_request_bytes"], facts["max_queued_tokens"]
    rows |= {
        "largest request": f"{size / 2**20:.0f} MiB" if size else "no limit",
        "queue": f"{queue:,} tokens" if queue else "no limit",
        "can sleep": "yes" if facts["can_sleep"] else "no",
        "round trip": f"{facts['round_trip_ms']:.1f} ms",
    }
    if "tokens_per_s" in facts:
        rows["scores"] = f"{facts['tokens_per_s']:,.0f} tokens/s (one request)"
    elif facts["state"] == "SLEEPING":
        rows["scores"] = "not measured: it sleeps (--wake)"
    if "top_k" in facts:
        rows[f"with top-{facts['top_k']}"] = f"{facts['top_k_tokens_per_s']:,.0f} tokens/s"
    table = Table(title=facts["endpoint"], show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a fingerprint that is cut cannot be compared
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False).print(table)


def _wakes(facts: dict[str, Any]) -> bool:
    return facts["state"] == "SLEEPING" and facts["wake_on_score"]
