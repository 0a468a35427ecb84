"""gRPC options on which client and server must agree (keepalive, message sizes), and the service config."""

from __future__ import annotations

import importlib.resources

# A dead peer (pulled cable, stopped machine) is detected within KEEPALIVE_TIME_S + KEEPALIVE_TIMEOUT_S. Measured:
# unless ping_timeout is set too, it takes a minute whatever the other two say; so both sides set all three.
KEEPALIVE_TIME_S = 20
KEEPALIVE_TIMEOUT_S = 20
MAX_MESSAGE_BYTES = 256 << 20  # gRPC's default of 4 MiB is less than one 8,193-token sequence with top-64

_KEEPALIVE = (
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_S * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
    ("grpc.http2.max_pings_without_data", 0),  # 0: no limit; a long prefill sends no data for minutes
)
_SIZES = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_KEEPALIVE,
    *_SIZES,
    # By default a server allows one ping in 5 minutes and answers keepalive with GOAWAY "too many pings".
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),  # a second teacher on the same port must fail, not share it silently
)


def service_config() -> str:
    """Reads service_config.json: retry policy and health checking as data, for gRPC clients in any language."""
    return importlib.resources.files("jdistill.wire").joinpath("service_config.json").read_text()


def client_options() -> tuple[tuple[str, int | str], ...]:
    """Channel options of TeacherClient."""
    return (
        *_KEEPALIVE,
        *_SIZES,
        ("grpc.service_config", service_config()),
        # TeacherClient retries by itself, on another replica; gRPC's retries would hide that this one is down.
        ("grpc.enable_retries", 0),
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),  # gRPC's default ignores a restarted teacher for up to two minutes
        # Otherwise two clients in one process share a connection and its backoff.
        ("grpc.use_local_subchannel_pool", 1),
    )
