"""Starts a teacher sidecar as a child process, restarts it when it dies, and stops it when the run ends."""

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
STOP_TIMEOUT_S = 40.0  # from SIGTERM to SIGKILL; longer than the sidecar's default drain_timeout_s


class TeacherProcess:
    """`jdistill teacher` as a child process on a free loopback port.

    Use it as a context manager: leaving the block, with or without an exception, ends the process. The sidecar also
    exits when the trainer is killed (`--exit-with-parent`). A sidecar that dies during the run is restarted on the same
    port, so the client, which retries until its deadline, continues where it was.

    Args:
        spawn: the sidecar's interpreter, environment and options.
        log_path: file to append the sidecar's output to; its configuration and port file are written beside it.

    Raises:
        ValueError: the interpreter cannot be run.
        UnavailableError: the sidecar exits before it serves, or does not serve within startup_timeout_s.
    """

    def __init__(self, spawn: SpawnSection, log_path: pathlib.Path):
        self._spawn = spawn
        self._log_path = log_path
        self._port_file = log_path.with_suffix(".port")
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self.restarts = 0

    @property
    def endpoint(self) -> str:
        """host:port of the sidecar."""
        return f"127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """Process id of the current sidecar; it changes with a restart."""
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
        """Stops the sidecar with SIGTERM, then with SIGKILL after STOP_TIMEOUT_S; may be called again."""
        if self._owner != os.getpid():
            return  # a forked child that leaves the block: the sidecar is its parent's
        with self._lock:  # waits for a restart in progress, so that the new process is the one we stop
            self._closing.set()
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                logger.warning("the teacher did not exit within %.0f s of SIGTERM: killed it", STOP_TIMEOUT_S)
        self._kill_group()

    def _command(self) -> list[str]:
        """Returns the command line; its configuration is written beside the log, so users can also run it by hand."""
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
                # In a new session: Ctrl-C in the terminal reaches only the trainer, which then stops the sidecar.
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
                    f"set it to the Python of an environment with jdistill and {self._spawn.engine} installed"
                ) from None

    def _wait_until_serving(self) -> None:
        assert self._process is not None
        give_up = time.monotonic() + self._spawn.startup_timeout_s
        while time.monotonic() < give_up:
            if self._closing.is_set():
                return
            code = self._process.poll()
            if code is not None:
                raise UnavailableError(f"the teacher exited with code {code} before it served.\n{self._log_tail()}")
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
        return "\n".join([f"Last lines of {self._log_path}:", *lines[-num_lines:]])

    def _kill_group(self) -> None:
        """Kills the process group: vLLM runs its engine in another process, which outlives a killed sidecar."""
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
                logger.warning("the teacher exited with code %s: restart %d on %s", code, self.restarts, self.endpoint)
                self._kill_group()
                self._start()


def is_serving(endpoint: str, timeout_s: float = 2.0) -> bool:
    """Whether the standard gRPC health service at `endpoint` reports SERVING within `timeout_s`."""
    with grpc.insecure_channel(endpoint) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service="jdistill.wire.v1.TeacherService"), timeout=timeout_s
            )
        except grpc.RpcError:
            return False
    return reply.status == health_pb2.HealthCheckResponse.SERVING
