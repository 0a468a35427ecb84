"""`jdistill probe`: what a running teacher is, whether it is healthy, how fast it answers."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from typing import Any

DESCRIPTION = """\
Say what a running teacher is, whether it is healthy, and how fast it answers.

  jdistill probe 127.0.0.1:50051
  jdistill probe teacher:50051 --tokens 65536      a longer measurement
  jdistill probe teacher:50051 --json --tokens 0   for scripts: no measurement

Tokens per second are those of one request of random tokens, after one that warms up: a lower bound, since one client
does not fill a large server. Exit codes: 0 healthy, 1 not reachable or not healthy, 2 the request was wrong.
"""

NUM_PINGS = 5
SEQUENCE_TOKENS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See jdistill.commands."""
    parser.add_argument("endpoint", metavar="HOST:PORT")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens to score for the measurement; 0: none (4096)")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="for all of it (60)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """See jdistill.commands."""
    from jdistill.wire.errors import TeacherError

    if args.tokens < 0:
        raise ValueError(f"--tokens {args.tokens}: expected 0 or more")
    facts: dict[str, Any] = {"endpoint": args.endpoint, "health": "unreachable"}
    try:
        _ask(args, facts)
    except TeacherError as e:
        if args.json:
            print(json.dumps(facts | {"error": str(e)}))
        raise
    if args.json:
        print(json.dumps(facts))
    else:
        _print_table(facts)
    return 0


def _ask(args: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Fills `facts` as far as it gets."""
    import grpc

    from jdistill.client import TeacherClient
    from jdistill.wire.errors import UnavailableError

    with (
        TeacherClient([args.endpoint], deadline_s=args.timeout_s) as client,  # also checks the address
        # Without the client's service config: its health check would keep this channel off a server that loads.
        grpc.insecure_channel(args.endpoint) as channel,
    ):
        status = _health(channel, args.endpoint, args.timeout_s)
        facts["health"] = status
        if status != "SERVING":
            raise UnavailableError(
                f"{args.endpoint} is {status}: it loads its model or is shutting down. Try again in a while; "
                "its log says more"
            )
        facts["round_trip_ms"] = statistics.median(
            _timed(lambda: _health(channel, args.endpoint, args.timeout_s)) for _ in range(NUM_PINGS)
        ) * 1000  # fmt: skip
        info = client.info()
        facts |= dataclasses.asdict(info) | {"state": info.state.name, "model": dataclasses.asdict(info.model)}
        if args.tokens:
            facts["tokens_per_s"] = _tokens_per_s(client, info.model, args.tokens)


def _health(channel: Any, endpoint: str, timeout_s: float) -> str:
    """The name of the standard health service's answer."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from jdistill.wire.codec import SERVICE
    from jdistill.wire.errors import UnavailableError

    try:
        reply = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service=SERVICE), timeout=min(timeout_s, 10.0)
        )
    except grpc.RpcError as e:
        if e.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED):
            raise UnavailableError(
                f"{endpoint} speaks gRPC but is no jdistill teacher (no health of {SERVICE}): is the port right?"
            ) from None
        raise UnavailableError(
            f"cannot reach a teacher at {endpoint} ({e.code().name}: {e.details()}). Is it running "
            "(jdistill teacher ... --port), are host and port right, is a firewall between?"
        ) from None
    return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)


def _timed(function: Any) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def _tokens_per_s(client: Any, model: Any, num_tokens: int) -> float:
    import numpy as np

    from jdistill.client import SequenceToScore

    length = min(SEQUENCE_TOKENS, model.max_sequence_length, max(2, num_tokens))
    rng = np.random.default_rng(0)
    count = max(1, num_tokens // length)

    def score() -> None:
        ids = rng.integers(0, model.vocab_size, (count, length), dtype=np.int32)
        client.score([SequenceToScore(row) for row in ids])

    score()  # the first request of a shape may compile
    return count * length / _timed(score)


def _print_table(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    model = facts["model"]
    rows = {
        "health": facts["health"],
        "engine": f"{facts['engine']} {facts['engine_version']}",
        "jdistill": facts["server_version"],
        "model": model["model"],
        "fingerprint": model["fingerprint"],
        "tokenizer": model["tokenizer_fingerprint"] or "none in the checkpoint",
        "computes in": model["dtype"],
        "vocabulary": f"{model['vocab_size']:,}",
        "longest sequence": f"{model['max_sequence_length']:,} tokens",
        "top-k": f"up to {model['max_top_k']:,}" if model["max_top_k"] else "no",
        "candidates": f"up to {model['max_candidate_count']:,}" if model["max_candidate_count"] else "no",
        "temperature": "any" if model["any_temperature"] else "1 only",
        "largest request": f"{facts['max_request_bytes'] / 2**20:.0f} MiB"
        if facts["max_request_bytes"]
        else "no limit",
        "round trip": f"{facts['round_trip_ms']:.1f} ms",
    }
    if "tokens_per_s" in facts:
        rows["scores"] = f"{facts['tokens_per_s']:,.0f} tokens/s (one request)"
    table = Table(title=facts["endpoint"], show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a fingerprint that is cut cannot be compared
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False).print(table)
