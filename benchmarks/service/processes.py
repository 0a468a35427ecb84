"""Start the measured processes, wait for them, and end them however the benchmark ends."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import psutil

START_TIMEOUT_S = 180.0
ROOT = pathlib.Path(__file__).parents[2]  # where `python -m benchmarks.service...` works


class Process:
    """A child in its own session, so that its own children can be ended with it."""

    def __init__(self, command: list[str], log_path: pathlib.Path, *, env: dict[str, str] | None = None, **kwargs: Any):
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self.log_path = log_path
        with log_path.open("ab") as log:
            kwargs = {"stdin": subprocess.DEVNULL, "stdout": log, **kwargs}
            self.popen = subprocess.Popen(
                command, stderr=log, cwd=ROOT, env={**os.environ, **(env or {})}, start_new_session=True, **kwargs
            )

    def wait_until(self, ready: Any) -> None:
        """Returns when `ready()` is true; raises RuntimeError, with the end of the log, if the process ends before."""
        give_up = time.monotonic() + START_TIMEOUT_S
        while not ready():
            if self.popen.poll() is not None or time.monotonic() > give_up:
                tail = "\n".join(self.log_path.read_text(errors="replace").splitlines()[-15:])
                state = "did not answer in time" if self.popen.poll() is None else "has ended"
                raise RuntimeError(f"{' '.join(map(str, self.popen.args))}\n{state}; its log:\n{tail}")
            time.sleep(0.05)

    def cpu_s(self) -> float:
        """CPU seconds of the process, without its children."""
        times = psutil.Process(self.popen.pid).cpu_times()
        return times.user + times.system

    def stop(self) -> None:
        """Sends SIGTERM, then SIGKILL to the whole session."""
        self.popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()


class Sidecar(Process):
    """`benchmarks.service.sidecar` on a free loopback port."""

    def __init__(self, directory: pathlib.Path, name: str, *args: Any):
        self._port_file = directory / f"{name}.port"
        self._port_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.service.sidecar", "--port", 0, "--port-file", self._port_file]
        command += [*args, "--log-level", "warning", "--exit-with-parent", os.getpid()]
        super().__init__([str(word) for word in command], directory / f"{name}.log")

    @property
    def endpoint(self) -> str:
        """The endpoint, host:port."""
        return f"127.0.0.1:{int(self._port_file.read_text())}"

    def in_process(self, **request: Any) -> dict[str, Any]:
        """Lets the sidecar's own process score with its engine; see engines.create_measured_vllm."""
        with socket.socket(socket.AF_UNIX) as door:
            door.connect(str(self._port_file.with_suffix(".door")))
            with door.makefile("rwb") as file:
                file.write(json.dumps(request).encode() + b"\n")
                file.flush()
                return json.loads(file.readline())


@contextlib.contextmanager
def sidecar(directory: pathlib.Path, name: str, *args: Any) -> Iterator[Sidecar]:
    """Starts a sidecar; yields it once it serves."""
    with sidecars(directory, {name: args}) as (only,):
        yield only


@contextlib.contextmanager
def sidecars(directory: pathlib.Path, args_of: dict[str, tuple[Any, ...]]) -> Iterator[list[Sidecar]]:
    """Starts several sidecars at once; yields them once all serve."""
    with contextlib.ExitStack() as stack:
        started = []
        for name, args in args_of.items():
            started.append(Sidecar(directory, name, *args))
            stack.callback(started[-1].stop)
        for process in started:
            process.wait_until(process._port_file.exists)
        yield started


@contextlib.contextmanager
def python(directory: pathlib.Path, name: str, *args: Any) -> Iterator[Process]:
    """`python -m benchmarks.service.NAME ARGS`, which answers lines on stdin with lines of JSON; see `ask`."""
    command = [sys.executable, "-m", f"benchmarks.service.{name}", *map(str, args)]
    log_path = directory / f"{name}.log"
    process = Process(command, log_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    try:
        assert ask(process, None) == "ready", f"{name} did not start; see {log_path}"
        yield process
    finally:
        process.stop()


def ask(process: Process, request: Any) -> Any:
    """Sends a line of JSON (None: nothing) and returns the answer."""
    if request is not None:
        process.popen.stdin.write(json.dumps(request) + "\n")
    line = process.popen.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.log_path} ends:\n" + process.log_path.read_text(errors="replace")[-2000:])
    return json.loads(line)


@contextlib.contextmanager
def vllm_http_server(directory: pathlib.Path, model: pathlib.Path, *, max_length: int) -> Iterator[str]:
    """vLLM's own OpenAI server with the sidecar engine's settings; yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(model), "--served-model-name", "teacher", "--dtype", "float32"]
    command += ["--max-model-len", str(max_length + 1), "--max-num-batched-tokens", "2048", "--enforce-eager"]
    command += ["--no-enable-prefix-caching", "--disable-log-stats", "--disable-uvicorn-access-log"]
    env = {
        # Both cores and as much cache as the sidecar's engine takes for itself.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    process = Process(command, directory / "vllm-http.log", env=env)

    def healthy() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as reply:
                return reply.status == 200
        except OSError:
            return False

    try:
        process.wait_until(healthy)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.stop()
