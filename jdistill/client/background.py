"""The background thread with the asyncio loop that all clients of a process share (gRPC's poller expects one loop)."""

from __future__ import annotations

import asyncio
import atexit
import threading
import weakref
from typing import Protocol


class Closable(Protocol):
    """A client that is closed at exit if it still exists."""

    def close(self) -> None:
        """Closes the client; idempotent."""


_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_thread: threading.Thread | None = None
open_clients: weakref.WeakSet[Closable] = weakref.WeakSet()


def get_loop() -> asyncio.AbstractEventLoop:
    """Returns the running loop; starts its thread at the first call."""
    global _loop, _thread
    with _lock:
        if _loop is None or _thread is None or not _thread.is_alive():  # not alive: after a fork
            _loop = asyncio.SelectorEventLoop()  # its clock is time.monotonic, like the jobs' deadlines
            _thread = threading.Thread(target=_loop.run_forever, name="jdistill-client", daemon=True)
            _thread.start()
            atexit.register(_close_all, _loop, _thread)
        return _loop


def is_current_thread() -> bool:
    """Whether the caller runs in the background thread, where blocking on the loop would deadlock."""
    return threading.current_thread() is _thread


def _close_all(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Closes everything at exit: gRPC must not be torn down under a running loop."""
    for client in list(open_clients):
        client.close()
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=5)
    if not thread.is_alive():
        loop.close()
