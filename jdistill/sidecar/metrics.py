"""All Prometheus metrics of the sidecar, with names and units.

They use their own registry rather than prometheus-client's global one: vLLM puts a hundred metrics into that, and two
services in one process (tests) would collide. Nothing is labelled by client or request, so the series stay few.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from wsgiref.simple_server import WSGIServer

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram

from jdistill.wire.types import ServerState

# From one sequence of a tiny model to a batch behind a full queue.
_BUCKETS_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """The metrics of one sidecar, held in `registry` (default: a new one).

    Every method is cheap (microseconds) and may be called from any thread.
    """

    def __init__(self, registry: CollectorRegistry | None = None):
        self.registry = CollectorRegistry() if registry is None else registry
        self._http: tuple[WSGIServer, threading.Thread] | None = None
        of = {"registry": self.registry}
        prometheus_client.ProcessCollector(registry=self.registry)  # memory, CPU time, open files
        self._calls = Counter("jdistill_calls", "Calls that have ended.", ("method", "code"), **of)
        self._call_duration = Histogram(
            "jdistill_call_duration_seconds",
            "Time from a call's arrival to its end.",
            ("method",),
            buckets=_BUCKETS_S,
            **of,
        )
        self._queue_duration = Histogram(
            "jdistill_queue_duration_seconds",
            "Time that a scoring call waited until its first piece reached the engine.",
            buckets=_BUCKETS_S,
            **of,
        )
        self._cancelled_calls = Counter(
            "jdistill_cancelled_calls", "Scoring calls that the client cancelled, or whose client vanished.", **of
        )
        self._sequences = Counter("jdistill_scored_sequences", "Sequences that the engine has scored.", **of)
        self._tokens = Counter(
            "jdistill_scored_tokens", "Tokens of these sequences, including prompt and teacher prefix.", **of
        )
        self._positions = Counter("jdistill_scored_positions", "Scored positions of these sequences.", **of)
        self._sent_bytes = Counter("jdistill_sent_bytes", "Bytes of scores sent, without gRPC's framing.", **of)
        self._engine_errors = Counter("jdistill_engine_errors", "Failures of the engine.", ("reason",), **of)
        self._queued_tokens = Gauge("jdistill_queued_tokens", "Tokens waiting for the engine.", **of)
        self._running_tokens = Gauge("jdistill_running_tokens", "Tokens in the engine.", **of)
        self._open_calls = Gauge("jdistill_open_calls", "Scoring calls that are waiting or running.", **of)
        self._state = Enum(
            "jdistill_state",
            "State of the sidecar.",
            states=[state.name.lower() for state in ServerState],
            **of,
        )

    def serve(self, host: str, port: int) -> int:
        """Serves the metrics at http://host:port/metrics in a thread and returns the port; port 0: any free one.

        Raises:
            OSError: the address cannot be bound.
        """
        assert self._http is None, "the metrics are served already"
        self._http = prometheus_client.start_http_server(port, addr=host, registry=self.registry)
        return self._http[0].server_port

    def close(self) -> None:
        """Stops serving; idempotent."""
        if self._http is not None:
            server, thread = self._http
            self._http = None
            server.shutdown()
            server.server_close()
            thread.join()

    def watch(
        self, *, queued_tokens: Callable[[], int], running_tokens: Callable[[], int], open_calls: Callable[[], int]
    ) -> None:
        """Sets the sources of the gauges; each is read when the metrics are requested."""
        self._queued_tokens.set_function(queued_tokens)
        self._running_tokens.set_function(running_tokens)
        self._open_calls.set_function(open_calls)

    def call_ended(self, method: str, code: str, duration_s: float) -> None:
        """Counts a call of `method` ("ScoreSequences") that ended with gRPC status `code` ("OK")."""
        self._calls.labels(method, code).inc()
        self._call_duration.labels(method).observe(duration_s)

    def call_cancelled(self) -> None:
        """Counts a scoring call that its client cancelled or abandoned."""
        self._cancelled_calls.inc()

    def call_left_queue(self, waited_s: float) -> None:
        """Records how long a call waited until its first piece reached the engine."""
        self._queue_duration.observe(waited_s)

    def sequences_scored(self, num_sequences: int, num_tokens: int, num_scored: int) -> None:
        """Adds what the engine has scored since the last call of this method."""
        self._sequences.inc(num_sequences)
        self._tokens.inc(num_tokens)
        self._positions.inc(num_scored)

    def bytes_sent(self, num_bytes: int) -> None:
        """Adds the bytes of a sent message of scores."""
        self._sent_bytes.inc(num_bytes)

    def engine_failed(self, reason: str) -> None:
        """Counts a failure; `reason` is that of the error tree, or "INTERNAL" for an unexpected exception."""
        self._engine_errors.labels(reason).inc()

    def state_changed(self, state: ServerState) -> None:
        """Records the sidecar's new state."""
        self._state.state(state.name.lower())
