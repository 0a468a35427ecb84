"""The sidecar's port, kept for as long as the process lives: gRPC's server may end and be replaced in between."""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
from collections.abc import Iterator

import grpc

from jdistill.config import ConfigError
from jdistill.sidecar.security import ServerTls


def address(host: str, port: int) -> str:
    """Returns host and port as gRPC and URLs write them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Port:
    """A port at which one gRPC server after another listens; close() gives it up.

    On Linux a socket that is bound and never listens keeps the port. Without it, the system may hand the port to any
    process that asks for a free one before the next server listens, and callers were told this number.
    """

    def __init__(self, host: str, number: int) -> None:
        """Takes the port (0: a free one); raises ConfigError with host, port, reason and remedy."""
        self._host, self.number = host, number
        self._kept: socket.socket | None = None
        if sys.platform == "linux":  # elsewhere nothing can listen at a port that another socket has bound
            with self._explained():
                self._kept = self._bound_socket()
            self.number = self._kept.getsockname()[1]

    def bind(self, server: grpc.aio.Server, tls: ServerTls | None) -> None:
        """Binds a gRPC server, not yet started, to the port; raises ConfigError as the constructor does."""
        with self._explained():
            # gRPC says only "failed to bind"; a plain socket gives the reason.
            with self._bound_socket() as probe:
                probe.listen()
            place = address(self._host, self.number)
            bound = server.add_insecure_port(place) if tls is None else server.add_secure_port(place, tls.credentials)
        self.number = bound

    def close(self) -> None:
        """Gives the port up."""
        if self._kept is not None:
            self._kept.close()

    def _bound_socket(self) -> socket.socket:
        family, kind, protocol, _, place = socket.getaddrinfo(
            self._host, self.number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            # As gRPC does: no wait after a restart, and on Linux one of several sockets so bound may listen.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(place)
        except OSError:
            bound.close()
            raise
        return bound

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        where = address(self._host, self.number)
        try:
            yield
        except socket.gaierror as e:
            raise ConfigError(f"cannot listen on {where}: host {self._host!r} is not known ({e.strerror})") from None
        except OSError as e:
            if e.errno == errno.EADDRINUSE:
                reason = "the port is in use, by another teacher? Stop it, or choose another --port (0: any free one)"
            elif e.errno == errno.EADDRNOTAVAIL:
                reason = "this machine has no such address; choose another --host"
            elif e.errno == errno.EACCES:
                reason = "not permitted; choose a --port above 1023"
            else:
                reason = e.strerror or str(e)
            raise ConfigError(f"cannot listen on {where}: {reason}") from None
        except RuntimeError as e:  # gRPC's, if the port was taken in between
            raise ConfigError(f"cannot listen on {where}: {e}; choose another --port (0: any free one)") from None
