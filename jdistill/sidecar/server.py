"""The sidecar's life: bind, load, serve, drain, end.

The port is bound before the model is loaded (a port in use is known in a second, not after minutes), health says
NOT_SERVING meanwhile, and SERVING once calls are answered. SIGTERM or Ctrl-C: NOT_SERVING, new calls are refused with
UNAVAILABLE, those that run may finish within `drain_timeout_s`, then exit code 0. A second signal ends the waiting. An
engine that dies: exit code 1, for a supervisor to start it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import gc
import logging
import multiprocessing
import os
import pathlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from jdistill.config import ConfigError, TeacherServerConfig
from jdistill.sidecar.engines import check_engine_name, create_engine
from jdistill.sidecar.engines.base import Engine
from jdistill.sidecar.metrics import Metrics
from jdistill.sidecar.security import BearerTokens, ServerTls, TokenInterceptor, check_exposure, is_loopback
from jdistill.sidecar.service import TeacherService
from jdistill.wire import channel
from jdistill.wire.errors import EngineDeadError, UnavailableError
from jdistill.wire.types import ServerState
from jdistill.wire.v1 import teacher_pb2

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0  # for what should take milliseconds: to close the engine, to tell clients that we go
METHODS = {
    service.full_name: frozenset(method.name for method in service.methods)
    for service in teacher_pb2.DESCRIPTOR.services_by_name.values()
}
WATCHED_SERVICES = ("", *METHODS)  # "": the whole server, which is what a plain health check asks for


def serve(config: TeacherServerConfig) -> int:
    """Runs a sidecar until SIGTERM, SIGINT or the death of its engine; returns the exit code (0, 0, 1).

    Must be called in the main thread (signals).

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
    _keep_freed_memory()
    with contextlib.ExitStack() as guards:  # around run() as a whole, which waits for threads at its end
        return asyncio.run(_Sidecar(config, tls, tokens, guards).run())


def exit_with_parent(parent_pid: int | None = None) -> None:
    """From now on this process gets SIGTERM when its parent ends, by SIGKILL too.

    Nothing else would end it: a process that is killed cannot take its children down, and they would keep the GPU. On
    Linux the kernel does it (PR_SET_PDEATHSIG); it means the parent's *thread* that started us, so a parent must start
    sidecars from a thread that lives as long as they shall. Elsewhere a thread looks at the parent's process id.

    Args:
        parent_pid: who the parent should be, if known: it may have died before we came here.
    """
    expected = os.getppid() if parent_pid is None else parent_pid
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(pr_set_pdeathsig, signal.SIGTERM, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    else:
        threading.Thread(target=_watch_parent, args=(expected,), name="parent-watch", daemon=True).start()
    # prctl() speaks of deaths from now on only: one that happened before shows as another parent.
    if os.getppid() != expected:
        os.kill(os.getpid(), signal.SIGTERM)


def _watch_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def exit_soon(code: int) -> None:
    """Ends the process with `code` if the interpreter, which waits for threads at its end, has not done so shortly."""
    timer = threading.Timer(CLOSE_TIMEOUT_S, _exit_now, (CLOSE_TIMEOUT_S, code))
    timer.daemon = True
    timer.start()
    # Else the last thing the interpreter does is to collect the garbage of all that vLLM and PyTorch have imported:
    # 5 to 15 s (measured), in which a supervisor waits to start the next one.
    gc.freeze()


@contextlib.contextmanager
def exit_within(timeout_s: float, code: int) -> Iterator[None]:
    """Ends the process with `code` if the block takes longer: a thread that hangs in a GPU's driver never returns."""
    timer = threading.Timer(timeout_s, _exit_now, (timeout_s, code))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _exit_now(timeout_s: float, code: int) -> None:
    logger.error("not ended after %.0f s: leaving at once", timeout_s)
    # Nobody else will: vLLM's engine process, while it loads, does not notice that we are gone, and keeps the GPU.
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


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
        self._engine: Engine | None = None
        self._num_signals = 0
        self._closing = False

    async def run(self) -> int:
        """See `serve`."""
        loop = asyncio.get_running_loop()
        self._stop, self._hurry, self._lost_port = asyncio.Event(), asyncio.Event(), asyncio.Event()
        metrics = Metrics()
        self._service = TeacherService(self._name, self._config, metrics=metrics, on_state=self._on_state)
        self._health = health.aio.HealthServicer()
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._interceptors = []
        if self._tokens is not None:
            self._interceptors.append(TokenInterceptor(self._tokens, lambda method: _count_refusal(metrics, method)))
        self._server, port = self._bind_server(self._config)
        self._metrics_port = self._serve_metrics(metrics)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        await self._server.start()
        listening = asyncio.ensure_future(self._keep_listening(port))
        logger.info(
            "listening on %s, loading %s with the %s engine",
            _address(self._config.host, port),
            self._config.model,
            self._config.engine,
        )
        code = 1
        try:
            if await self._load():
                self._announce(port)
                code = await self._serve_until_stopped()
                drain_s = self._config.drain_timeout_s + 3 * CLOSE_TIMEOUT_S
                self._guards.enter_context(exit_within(drain_s, code))
                await self._drain()
            else:
                code = 0  # a signal came first; what still loads in a thread cannot be stopped
                self._guards.enter_context(exit_within(CLOSE_TIMEOUT_S, code))
        finally:
            self._guards.enter_context(exit_within(3 * CLOSE_TIMEOUT_S, code))
            self._remove_port_files(port)
            self._closing = True
            await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
            await self._service.close()
            await self._server.stop(grace=0.5)  # health watches never end by themselves
            await listening  # not cancelled: that would cancel the stop itself
            await self._close_engine()
        logger.info("ended")
        return code

    def _bind_server(self, config: TeacherServerConfig) -> tuple[grpc.aio.Server, int]:
        """A gRPC server with all services, not yet started, and its port."""
        server = grpc.aio.server(options=channel.SERVER_OPTIONS, interceptors=self._interceptors)
        server.add_generic_rpc_handlers(self._service.handlers())
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*METHODS, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server, _bind(server, config, self._tls)

    async def _keep_listening(self, port: int) -> None:
        """Starts another gRPC server whenever one ends by itself; ends the sidecar (code 1) if that cannot be.

        grpc.aio's ends for good, and leaves the process behind, when anybody calls a method whose name is not UTF-8:
        one flipped bit of a request's header is enough. The engine knows nothing of it, and loading it takes minutes.
        """
        config = self._config.model_copy(update={"port": port})
        while True:
            try:
                await self._server.wait_for_termination()
                why = "nobody knows why"
            except Exception as e:
                why = f"{type(e).__name__}: {e}"
            if self._closing:
                return
            logger.error("gRPC's server has ended: %s", why)
            give_up_at = time.monotonic() + CLOSE_TIMEOUT_S
            while not self._closing:
                try:
                    self._server, _ = self._bind_server(config)
                except ConfigError as e:  # its port is closed a moment later than it
                    if time.monotonic() > give_up_at:
                        logger.error("%s", e)
                        self._lost_port.set()
                        return
                    await asyncio.sleep(0.05)
                else:
                    await self._server.start()
                    logger.info("listening again on %s", _address(self._config.host, port))
                    break

    def _serve_metrics(self, metrics: Metrics) -> int | None:
        """Begins to serve the metrics, if they are wanted; returns the port."""
        if self._config.metrics_port is None:
            return None
        # Plain HTTP without a token, whatever the calls have, and it tells how busy this teacher is: for this machine
        # only, unless --insecure says that strangers may know.
        host = self._config.host if is_loopback(self._config.host) or self._config.insecure else "127.0.0.1"
        address = _address(host, self._config.metrics_port)
        try:
            port = metrics.serve(host, self._config.metrics_port)
        except OSError as e:
            in_use = e.errno == errno.EADDRINUSE
            reason = "the port is in use" if in_use else (e.strerror or str(e))
            raise ConfigError(
                f"cannot serve metrics on {address}: {reason}; choose another --metrics-port (0: any free one)"
            ) from None
        logger.info("metrics at http://%s/metrics", _address(host, port))
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

    async def _load(self) -> bool:
        """Loads the engine and begins to serve; False if a signal came first."""
        begin = time.monotonic()
        load = asyncio.ensure_future(create_engine(self._config))
        stop = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({load, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not load.done():
            load.cancel()
            await asyncio.wait({load}, timeout=CLOSE_TIMEOUT_S)
            return False
        self._engine = await load
        await self._service.serve(self._engine)
        logger.info("loaded in %.1f s", time.monotonic() - begin)
        return True

    def _announce(self, port: int) -> None:
        assert self._engine is not None
        info = self._engine.info
        logger.info(
            "serving %s on %s: %s %s, %s, vocabulary %d, up to %d tokens",
            info.model,
            _address(self._config.host, port),
            self._engine.name,
            self._engine.version,
            info.dtype,
            info.vocab_size,
            info.max_sequence_length,
        )
        for path, number in self._port_files(port):
            # Renamed into place: who waits for the file never reads half a number.
            temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            temporary.write_text(f"{number}\n")
            os.replace(temporary, path)

    def _port_files(self, port: int) -> list[tuple[pathlib.Path, int]]:
        if self._config.port_file is None:
            return []
        path = pathlib.Path(self._config.port_file)
        # The metrics' first: who waits for the main one finds both.
        metrics = [] if self._metrics_port is None else [(path.with_name(f"{path.name}.metrics"), self._metrics_port)]
        return [*metrics, (path, port)]

    def _remove_port_files(self, port: int) -> None:
        for path, number in self._port_files(port):
            with contextlib.suppress(OSError):
                if path.read_text().strip() == str(number):
                    path.unlink()

    async def _serve_until_stopped(self) -> int:
        ends = [asyncio.ensure_future(event.wait()) for event in (self._stop, self._service.dead, self._lost_port)]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in ends:
            task.cancel()
        if self._service.dead.is_set():
            logger.error("the engine has died; the sidecar ends so that it can be started again")
        return 1 if self._service.dead.is_set() or self._lost_port.is_set() else 0

    async def _drain(self) -> None:
        if not self._service.dead.is_set():
            await self._service.refuse(UnavailableError(f"teacher {self._name!r} is shutting down"))
        if self._service.dead.is_set():
            self._service.fail_running(EngineDeadError(f"the engine of teacher {self._name!r} has died"))
        elif self._service.num_calls:
            timeout_s = self._config.drain_timeout_s
            logger.info("%d calls may finish within %.0f s", self._service.num_calls, timeout_s)
            idle = asyncio.ensure_future(self._service.wait_until_idle())
            hurry = asyncio.ensure_future(self._hurry.wait())
            await asyncio.wait({idle, hurry}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            hurry.cancel()
            idle.cancel()
            if self._service.num_calls:
                logger.warning("%d calls did not finish in time", self._service.num_calls)
                self._service.fail_running(UnavailableError(f"teacher {self._name!r} has shut down before it finished"))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._service.wait_until_idle(), CLOSE_TIMEOUT_S)

    async def _close_engine(self) -> None:
        if self._engine is None:
            return
        try:
            await asyncio.wait_for(self._engine.close(), CLOSE_TIMEOUT_S)
        except TimeoutError:
            logger.error("the engine did not close within %.0f s", CLOSE_TIMEOUT_S)
        except Exception:
            logger.exception("the engine failed to close")


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _count_refusal(metrics: Metrics, method: str) -> None:
    _, service, name = method.split("/", 2) if method.count("/") == 2 else ("", "", "")
    # A stranger chooses the name; ours only, else each would be a time series.
    metrics.call_ended(name if name in METHODS.get(service, ()) else "other", "UNAUTHENTICATED", 0.0)


def _bind(server: grpc.aio.Server, config: TeacherServerConfig, tls: ServerTls | None) -> int:
    """Binds the port and returns it. Raises ConfigError that names host, port, reason and remedy."""
    address = _address(config.host, config.port)
    try:
        # gRPC says only "failed to bind"; a socket of our own says why.
        family, kind, protocol, _, place = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does: no wait after a restart
            probe.bind(place)
            probe.listen()
        return server.add_insecure_port(address) if tls is None else server.add_secure_port(address, tls.credentials)
    except socket.gaierror as e:
        raise ConfigError(f"cannot listen on {address}: host {config.host!r} is not known ({e.strerror})") from None
    except OSError as e:
        if e.errno == errno.EADDRINUSE:
            reason = "the port is in use, by another teacher? Stop it, or choose another --port (0: any free one)"
        elif e.errno == errno.EADDRNOTAVAIL:
            reason = "this machine has no such address; choose another --host"
        elif e.errno == errno.EACCES:
            reason = "not permitted; choose a --port above 1023"
        else:
            reason = e.strerror or str(e)
        raise ConfigError(f"cannot listen on {address}: {reason}") from None
    except RuntimeError as e:  # gRPC's, when somebody took the port since
        raise ConfigError(f"cannot listen on {address}: {e}; choose another --port (0: any free one)") from None


def _keep_freed_memory() -> None:
    """Lets malloc keep what it has got from the kernel: streaming top-64 becomes 2.5 times faster (measured).

    By default glibc returns every freed message of a megabyte to the kernel and pages it in again for the next one.
    """
    if sys.platform != "linux":
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    with contextlib.suppress(AttributeError):  # musl has no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 32 << 20)
        libc.mallopt(m_trim_threshold, 256 << 20)
