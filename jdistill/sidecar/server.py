"""The sidecar from its first to its last moment: bind, load, serve, drain, end.

The port is bound before the model is loaded, so that a port in use is reported within a second rather than after
minutes; health says NOT_SERVING until calls are answered. SIGTERM or Ctrl-C drains: NOT_SERVING, new calls are refused
with UNAVAILABLE, running calls may finish within `drain_timeout_s`, then exit code 0. A second signal ends the wait. If
the engine dies: exit code 1, for a supervisor to start the sidecar again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import pathlib
import signal
import time

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from jdistill.config import ConfigError, TeacherServerConfig
from jdistill.sidecar.engines import check_engine_name
from jdistill.sidecar.metrics import Metrics
from jdistill.sidecar.port import Port, address
from jdistill.sidecar.process import CLOSE_TIMEOUT_S, exit_within, keep_freed_memory
from jdistill.sidecar.security import BearerTokens, ServerTls, TokenInterceptor, check_exposure, is_loopback
from jdistill.sidecar.service import TeacherService
from jdistill.wire import channel
from jdistill.wire.types import ServerState
from jdistill.wire.v1 import teacher_pb2

logger = logging.getLogger(__name__)

METHODS = {
    service.full_name: frozenset(method.name for method in service.methods)
    for service in teacher_pb2.DESCRIPTOR.services_by_name.values()
}
WATCHED_SERVICES = ("", *METHODS)  # "": the whole server, as asked for by a plain health check


def serve(config: TeacherServerConfig) -> int:
    """Runs a sidecar until SIGTERM, SIGINT or the death of its engine; returns the exit code (0, 0 or 1).

    Must be called in the main thread, which receives the signals.

    Raises:
        ValueError: the configuration, the port or the checkpoint cannot be used; the message says what to do.
    """
    check_engine_name(config.engine)
    check_exposure(config)
    tls = None
    if config.tls_cert is not None and config.tls_key is not None:
        tls = ServerTls(config.tls_cert, config.tls_key, config.tls_client_ca)
    tokens = None if config.token_file is None else BearerTokens(config.token_file)
    if config.port_file is not None and not pathlib.Path(config.port_file).absolute().parent.is_dir():
        raise ConfigError(f"port_file: there is no directory {pathlib.Path(config.port_file).absolute().parent}")
    keep_freed_memory()
    with contextlib.ExitStack() as guards:  # around all of run(), which joins threads at its end
        return asyncio.run(_Sidecar(config, tls, tokens, guards).run())


class _Sidecar:
    def __init__(
        self,
        config: TeacherServerConfig,
        tls: ServerTls | None,
        tokens: BearerTokens | None,
        guards: contextlib.ExitStack,
    ):
        self._config = config
        self._tls = tls
        self._tokens = tokens
        self._guards = guards
        self._name = config.served_name or pathlib.Path(config.model).resolve().name
        self._num_signals = 0
        self._closing = False

    async def run(self) -> int:
        """See `serve`."""
        self._stop, self._hurry, self._lost_port = asyncio.Event(), asyncio.Event(), asyncio.Event()
        metrics = Metrics()
        self._service = TeacherService(self._name, self._config, metrics=metrics, on_state=self._on_state)
        self._lifecycle = self._service.lifecycle
        self._health = health.aio.HealthServicer()
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._interceptors = []
        if self._tokens is not None:
            self._interceptors.append(TokenInterceptor(self._tokens, lambda method: _count_refusal(metrics, method)))
        self._port = Port(self._config.host, self._config.port)
        self._guards.enter_context(contextlib.closing(self._port))
        self._server = self._bind_server()
        port = self._port.number
        self._metrics_port = self._serve_metrics(metrics)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)
        await self._server.start()
        listening = asyncio.ensure_future(self._keep_listening())
        logger.info(
            "listening on %s, loading %s with the %s engine",
            address(self._config.host, port),
            self._config.model,
            self._config.engine,
        )
        return await self._live(port, listening)

    async def _live(self, port: int, listening: asyncio.Future[None]) -> int:
        """Loads, serves, drains and ends; returns the exit code."""
        code = 1
        try:
            if await self._lifecycle.load(self._stop):
                self._announce(port)
                code = await self._serve_until_stopped()
                drain_s = self._config.drain_timeout_s + 3 * CLOSE_TIMEOUT_S
                self._guards.enter_context(exit_within(drain_s, code))
                await self._lifecycle.drain(self._hurry)
            else:
                code = 0  # a signal came first; a load that runs in a thread cannot be stopped
                self._guards.enter_context(exit_within(CLOSE_TIMEOUT_S, code))
        finally:
            self._guards.enter_context(exit_within(3 * CLOSE_TIMEOUT_S, code))
            self._remove_port_files(port)
            self._closing = True
            await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
            await self._lifecycle.close()
            await self._server.stop(grace=0.5)  # health watches never end by themselves
            await listening  # not cancelled: that would cancel the stop itself
            await self._lifecycle.close_engine()
        logger.info("ended")
        return code

    def _bind_server(self) -> grpc.aio.Server:
        """Returns a gRPC server with all services at the port, not yet started."""
        server = grpc.aio.server(options=channel.SERVER_OPTIONS, interceptors=self._interceptors)
        server.add_generic_rpc_handlers(self._service.handlers())
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*METHODS, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        self._port.bind(server, self._tls)
        return server

    async def _keep_listening(self) -> None:
        """Starts another gRPC server whenever one ends by itself; ends the sidecar (code 1) if the port is lost.

        grpc.aio's server ends for good, and leaves the process running, when any caller names a method that is not
        UTF-8: one flipped bit in a request's header is enough. The engine is unharmed, and loading it takes minutes.
        """
        while True:
            try:
                await self._server.wait_for_termination()
                why = "for an unknown reason"
            except Exception as e:
                why = f"{type(e).__name__}: {e}"
            if self._closing:
                return
            logger.error("gRPC's server has ended: %s", why)
            give_up_at = time.monotonic() + CLOSE_TIMEOUT_S
            while not self._closing:
                try:
                    self._server = self._bind_server()
                except ConfigError as e:  # its port is released slightly later
                    if time.monotonic() > give_up_at:
                        logger.error("%s", e)
                        self._lost_port.set()
                        return
                    await asyncio.sleep(0.05)
                else:
                    await self._server.start()
                    logger.info("listening again on %s", address(self._config.host, self._port.number))
                    break

    def _serve_metrics(self, metrics: Metrics) -> int | None:
        """Starts serving metrics if `metrics_port` is set; returns the port."""
        if self._config.metrics_port is None:
            return None
        # Plain HTTP without a token, whatever protects the calls, and it tells how busy this teacher is: loopback
        # only, unless --insecure allows more.
        host = self._config.host if is_loopback(self._config.host) or self._config.insecure else "127.0.0.1"
        place = address(host, self._config.metrics_port)
        try:
            port = metrics.serve(host, self._config.metrics_port)
        except OSError as e:
            in_use = e.errno == errno.EADDRINUSE
            reason = "the port is in use" if in_use else (e.strerror or str(e))
            raise ConfigError(
                f"cannot serve metrics on {place}: {reason}; choose another --metrics-port (0: any free one)"
            ) from None
        logger.info("metrics at http://%s/metrics", address(host, port))
        return port

    def _on_signal(self, number: int) -> None:
        self._num_signals += 1
        logger.info("%s: %s", signal.Signals(number).name, "draining" if self._num_signals == 1 else "leaving now")
        (self._stop if self._num_signals == 1 else self._hurry).set()

    async def _on_state(self, state: ServerState) -> None:
        asleep_but_serving = state is ServerState.SLEEPING and self._config.on_sleep == "wake"
        serving = state is ServerState.SERVING or asleep_but_serving
        status = health_pb2.HealthCheckResponse
        await self._set_health(status.SERVING if serving else status.NOT_SERVING)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in WATCHED_SERVICES:
            await self._health.set(service, status)

    def _announce(self, port: int) -> None:
        engine = self._lifecycle.engine
        assert engine is not None
        info = engine.info
        logger.info(
            "serving %s on %s: %s %s, %s, vocabulary %d, up to %d tokens",
            info.model,
            address(self._config.host, port),
            engine.name,
            engine.version,
            info.dtype,
            info.vocab_size,
            info.max_sequence_length,
        )
        for path, number in self._port_files(port):
            # Renamed into place: a waiting reader never sees half a number.
            temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            temporary.write_text(f"{number}\n")
            os.replace(temporary, path)

    def _port_files(self, port: int) -> list[tuple[pathlib.Path, int]]:
        if self._config.port_file is None:
            return []
        path = pathlib.Path(self._config.port_file)
        # The metrics' file first: a process that waits for the main one finds both.
        metrics = [] if self._metrics_port is None else [(path.with_name(f"{path.name}.metrics"), self._metrics_port)]
        return [*metrics, (path, port)]

    def _remove_port_files(self, port: int) -> None:
        for path, number in self._port_files(port):
            with contextlib.suppress(OSError):
                if path.read_text().strip() == str(number):
                    path.unlink()

    async def _serve_until_stopped(self) -> int:
        lifecycle = self._lifecycle
        ends = [asyncio.ensure_future(event.wait()) for event in (self._stop, lifecycle.dead, self._lost_port)]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in ends:
            task.cancel()
        if lifecycle.dead.is_set():
            logger.error("the engine has died; the sidecar ends so that it can be started again")
        return 1 if lifecycle.dead.is_set() or self._lost_port.is_set() else 0


def _count_refusal(metrics: Metrics, method: str) -> None:
    _, service, name = method.split("/", 2) if method.count("/") == 2 else ("", "", "")
    # The caller chooses the name: unknown ones are counted together, or each would become a time series.
    metrics.call_ended(name if name in METHODS.get(service, ()) else "other", "UNAUTHENTICATED", 0.0)
