"""Real inference servers in separate processes, for the engines in front of them."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(
    command: list[str], *, port: int, log_path: pathlib.Path, health: str, timeout_s: float = 200, **env: str
) -> Iterator[str]:
    """Starts `command`, waits until GET `health` answers 200, yields the URL and finally kills the process group."""
    url = f"http://127.0.0.1:{port}"
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **env}, start_new_session=True)
    try:
        give_up = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(OSError):
                with urllib.request.urlopen(url + health, timeout=2) as reply:
                    if reply.status == 200:
                        break
            assert process.poll() is None, log_path.read_text()[-3000:]
            assert time.monotonic() < give_up, log_path.read_text()[-3000:]
            time.sleep(0.2)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
