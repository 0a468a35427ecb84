"""The sidecar's log on standard error: text, or one JSON object a line.

JSON holds `time` (ISO 8601, UTC), `level`, `logger`, `message`, `exc_info` where there is a traceback, and the fields
that a record carries beside its text, such as `request_id`. Output of the engine's own loggers is not reformatted.
"""

from __future__ import annotations

import logging
import os
import time


def configure(log_format: str, level: str) -> None:
    """Sets up the root logger; call it once, before gRPC is imported.

    Args:
        log_format: "text" or "json".
        level: "debug", "info", "warning" or "error".
    """
    handler = logging.StreamHandler()
    if log_format == "json":
        from pythonjsonlogger.json import JsonFormatter

        # gRPC's C++ core writes its own lines ("handshake failed") and reads this variable once, when it is loaded.
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
