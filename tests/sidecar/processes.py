"""Real sidecar processes for tests; used through the fixture `start_sidecar`."""

import dataclasses
import pathlib
import subprocess
import sys
import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE = "jdistill.wire.v1.TeacherService"
NOT_SERVING, SERVING = health_pb2.HealthCheckResponse.NOT_SERVING, health_pb2.HealthCheckResponse.SERVING


def command(*args):
    """Returns the command line of `jdistill ARGS`."""
    return [sys.executable, "-m", "jdistill.cli", *map(str, args)]


@dataclasses.dataclass
class Sidecar:
    """A running `jdistill teacher --engine fake`."""

    process: subprocess.Popen
    port_file: pathlib.Path
    log_path: pathlib.Path
    port: int = 0

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    @property
    def log(self):
        return self.log_path.read_text()

    def wait_for_port(self, timeout_s=120.0):
        give_up = time.monotonic() + timeout_s
        while not self.port_file.exists():
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.log}"
            assert time.monotonic() < give_up, f"did not serve in time: {self.log}"
            time.sleep(0.02)
        self.port = int(self.port_file.read_text())

    def stop(self):
        """Sends SIGTERM and returns the exit code."""
        self.process.terminate()
        return self.process.wait(60)


def launch(directory, *args, wait=True):
    """Starts `jdistill teacher ARGS` with the fake engine on a free port."""
    number = len(list(directory.glob("*.log")))
    port_file, log_path = directory / f"{number}.port", directory / f"{number}.log"
    defaults = ["--engine", "fake", "--model", directory, "--port-file", port_file]
    if "--port" not in args:
        defaults += ["--port", 0]
    with log_path.open("wb") as log:
        process = subprocess.Popen(command("teacher", *defaults, *args), stdout=log, stderr=log)
    sidecar = Sidecar(process, port_file, log_path)
    if wait:
        sidecar.wait_for_port()
    return sidecar


def health(address, service=SERVICE):
    """Returns the status that the standard health service reports."""
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=60, wait_for_ready=True).status
