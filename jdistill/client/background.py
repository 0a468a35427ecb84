"""The background thread with the asyncio loop that all clients of a process share (gRPC's poller expects one loop).

A child made by fork() has neither this thread nor gRPC's, but all of their objects and locks: whatever waits for them,
even gRPC's destructors, waits for good. So in the child the clients of its parent refuse to work and nothing of theirs
is ever freed, and a new client would hang too, so it is refused: gRPC works in a child only if its parent had not used
it. (Closing all clients before the fork is not enough: gRPC ends its threads later. 2 of 40 children hung.)
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import logging
import os
import threading
import weakref
from typing import Protocol

import jdistill
from jdistill.client.jobs import ScoreFuture

logger = logging.getLogger("jdistill.client")


class Closable(Protocol):
    """A client that is closed at exit if it still exists."""

    def close(self) -> None:
        """Closes the client; idempotent."""


_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_thread: threading.Thread | None = None
_polls_at_fork = False
_forked_from: int | None = None  # id of the process from which this one was forked, if gRPC was used there
open_clients: weakref.WeakSet[Closable] = weakref.WeakSet()
submitted: weakref.WeakSet[ScoreFuture] = weakref.WeakSet()  # futures that callers hold


def get_loop() -> asyncio.AbstractEventLoop:
    """Returns the running loop; starts its thread at the first call. Raises RuntimeError as `check_process`."""
    global _loop, _thread
    if _forked_from is not None:
        raise _forked_error()
    with _lock:
        if _loop is None or _thread is None:
            _loop = asyncio.SelectorEventLoop()  # its clock is time.monotonic, like the jobs' deadlines
            _thread = threading.Thread(target=_loop.run_forever, name="jdistill-client", daemon=True)
            _thread.start()
            atexit.register(_close_all, _loop, _thread)
        return _loop


def is_current_thread() -> bool:
    """Whether the caller runs in the background thread, where blocking on the loop would deadlock."""
    return threading.current_thread() is _thread


def check_process(pid: int) -> None:
    """Raises RuntimeError if this process is a fork of `pid`, in which the client was created."""
    if pid != os.getpid():
        raise _forked_error()


def _grpc_polls() -> bool:
    """Whether gRPC's asyncio API is in use, by a TeacherClient or anything else."""
    return any(thread.name.endswith("(_poll_wrapper)") for thread in threading.enumerate())


def _forked_error() -> RuntimeError:
    return RuntimeError(
        f"process {os.getpid()} was forked from process {_forked_from} after a TeacherClient was created there, and "
        "gRPC does not survive fork(): fork before the first TeacherClient and create one in each process, or start "
        'processes with multiprocessing.get_context("spawn") or "forkserver"'
    )


def _before_fork() -> None:
    global _polls_at_fork
    _polls_at_fork = _grpc_polls()
    if _polls_at_fork and jdistill.GRPC_HANDLES_FORK:
        logger.warning(
            "fork() while a TeacherClient is open, with gRPC's own handling of fork(), which may crash the child: set "
            "GRPC_ENABLE_FORK_SUPPORT=0, or import jdistill before grpc"
        )


def _after_fork() -> None:
    """Detaches a child from the loop, the clients and the futures of its parent."""
    global _lock, _loop, _thread, _forked_from
    _lock = threading.Lock()  # another thread may have held the old one
    if _loop is not None or _polls_at_fork:
        _forked_from = os.getppid()
    if _loop is None:
        return
    atexit.unregister(_close_all)
    for kept in (_loop, *asyncio.all_tasks(_loop), *open_clients):
        # Never freed: gRPC's destructors would wait for its threads, and closing the loop would take the parent's
        # sockets out of the epoll that both processes share.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
    _loop = _thread = None
    open_clients.clear()
    for future in list(submitted):
        future.abandon(_forked_error())
    submitted.clear()


os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


def _close_all(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Closes everything at exit: gRPC must not be torn down under a running loop."""
    for client in list(open_clients):
        client.close()
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=5)
    if not thread.is_alive():
        loop.close()
