"""A sidecar that the trainer starts, watches, restarts when it dies, and takes down however the run ends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from types import TracebackType

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jdistill.config import EngineSection, SpawnSection
from jdistill.wire.errors import UnavailableError

logger = logging.getLogger(__name__)

RESTART_PAUSES_S = (1.0, 5.0, 15.0, 60.0)  # before restart 1, 2, 3, and every later one
STOP_TIMEOUT_S = 40.0  # more than the sidecar's own drain_timeout_s, after which it is killed


class TeacherProcess:
    """`jdistill teacher` as a child process on a free loopback port.

    Use it as a context manager: leaving the block, by whatever exception, ends the process. A trainer that is killed
    outright takes its sidecar with it too (`--exit-with-parent`). A sidecar that dies in between is restarted on the
    same port, so that the client, which keeps retrying until its deadline, goes on where it was.
    """

    def __init__(self, spawn: SpawnSection, log_path: pathlib.Path):
        self._spawn = spawn
        self._log_path = log_path
        self._port_file = log_path.with_suffix(".port")
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self.restarts = 0

    @property
    def endpoint(self) -> str:
        """host:port of the sidecar."""
        return f"127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """Process id of the sidecar that runs now."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> TeacherProcess:
        try:
            self._start()
            self._wait_until_serving()
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._watch, name="teacher-watch", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """SIGTERM, then SIGKILL if it has not ended in time; idempotent."""
        with self._lock:  # a restart in progress ends first, so that its process is the one that we stop
            self._closing.set()
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                logger.warning("teacher did not end within %.0f s of SIGTERM: killed", STOP_TIMEOUT_S)
        self._kill_group()

    def _command(self) -> list[str]:
        """The command line; what to serve is in a file beside the log, from which it can be started by hand too."""
        fields = {name: getattr(self._spawn, name) for name in EngineSection.model_fields}
        config_path = self._log_path.with_suffix(".yaml")  # JSON, which is YAML
        config_path.write_text(json.dumps(fields, indent=2) + "\n")
        command = [self._spawn.python or sys.executable, "-m", "jdistill.cli", "teacher", str(config_path)]
        command += [f"port={self._port}", f"port_file={json.dumps(str(self._port_file))}"]
        return [*command, "--exit-with-parent", str(os.getpid())]

    def _start(self) -> None:
        self._port_file.unlink(missing_ok=True)
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        command = self._command()
        with self._log_path.open("ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            try:
                # A session of its own: Ctrl-C in the terminal reaches the trainer alone, which ends the sidecar.
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **self._spawn.env},
                    start_new_session=True,
                )
            except OSError as e:
                raise ValueError(
                    f"teacher.spawn.python = {command[0]!r} cannot be run ({e}); "
                    f"give the interpreter of an environment with jdistill and {self._spawn.engine} installed"
                ) from None

    def _wait_until_serving(self) -> None:
        assert self._process is not None
        give_up = time.monotonic() + self._spawn.startup_timeout_s
        while time.monotonic() < give_up:
            if self._closing.is_set():
                return
            code = self._process.poll()
            if code is not None:
                raise UnavailableError(f"the teacher ended with exit code {code} before it served.\n{self._log_tail()}")
            if self._port_file.exists():
                self._port = int(self._port_file.read_text())
                if is_serving(self.endpoint):
                    return
            time.sleep(0.1)
        raise UnavailableError(
            "the teacher did not serve within teacher.spawn.startup_timeout_s = "
            f"{self._spawn.startup_timeout_s:.0f} s.\n{self._log_tail()}"
        )

    def _log_tail(self, num_lines: int = 15) -> str:
        lines = self._log_path.read_text(errors="replace").splitlines()
        return "\n".join([f"The end of {self._log_path}:", *lines[-num_lines:]])

    def _kill_group(self) -> None:
        """Ends what is left: vLLM's engine is a process of its own, which a sidecar that is killed leaves behind."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _watch(self) -> None:
        while not self._closing.is_set():
            assert self._process is not None
            try:
                code = self._process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                continue
            pause_s = RESTART_PAUSES_S[min(self.restarts, len(RESTART_PAUSES_S) - 1)]
            if self._closing.wait(pause_s):
                return
            with self._lock:
                if self._closing.is_set():
                    return
                self.restarts += 1
                logger.warning(
                    "the teacher ended with exit code %s: restart %d on %s", code, self.restarts, self.endpoint
                )
                self._kill_group()
                self._start()


def is_serving(endpoint: str, timeout_s: float = 2.0) -> bool:
    """Whether the standard health service at `endpoint` says SERVING."""
    with grpc.insecure_channel(endpoint) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service="jdistill.wire.v1.TeacherService"), timeout=timeout_s
            )
        except grpc.RpcError:
            return False
    return reply.status == health_pb2.HealthCheckResponse.SERVING
