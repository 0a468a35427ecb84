"""The sidecar's log on standard error: text for people, or one JSON object a line for machines.

JSON holds `time` (ISO 8601, UTC), `level`, `logger`, `message`, `exc_info` where there is a traceback, and the fields
that a line has beside its text, such as `request_id`. What an engine prints on its own account stays as it prints it.
"""

from __future__ import annotations

import logging
import os
import time


def configure(log_format: str, level: str) -> None:
    """Sets up the root logger; to be called once, before gRPC is imported.

    Args:
        log_format: "text" or "json".
        level: "debug", "info", "warning" or "error".
    """
    handler = logging.StreamHandler()
    if log_format == "json":
        from pythonjsonlogger.json import JsonFormatter

        # gRPC's C++ core writes lines of its own ("handshake failed"), and reads this once, when it is loaded.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        names = {"levelname": "level", "name": "logger"}
        handler.setFormatter(
            JsonFormatter("{levelname}{name}{message}", style="{", rename_fields=names, timestamp="time")
        )
    else:
        formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%Y-%m-%dT%H:%M:%SZ")
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(True)
