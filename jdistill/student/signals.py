"""SIGINT and SIGTERM as an exception, at a moment when the run can be saved."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from jdistill.student import hosts


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived, and the state is saved. `exit_code` is what shells expect for the signal."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class StopSignals:
    """Turns SIGINT and SIGTERM into Stopped, but never between an update and its line in the metrics file."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._held = False
        self._pending: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python forbids handlers in other threads
            for signum in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(signum) is signal.SIG_IGN:
                    continue  # a background job of a shell: Ctrl-C is meant for another process
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._pid != os.getpid():  # a forked worker: it has no run to save, and must end when its pool ends it
            self.__exit__()
            os.kill(os.getpid(), signum)
        elif self._held or hosts.count() > 1:  # several processes all stop after the same step
            self._pending = signum
        else:
            raise Stopped(signum)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Delays a signal that arrives in this block to the end of the block."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if signum := hosts.maximum(self._pending or 0):
            raise Stopped(signum)
