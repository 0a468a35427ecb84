"""Processes under Slurm find each other from Slurm's variables, and each takes its own devices."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from jdistill.student import hosts

SHOW = (
    "import jax; from jdistill.student import hosts; hosts.initialize(); "
    "print(hosts.count(), jax.process_index(), jax.config.values['jax_cuda_visible_devices'])"
)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize(
    ("num_nodes", "own", "devices"),
    [
        (2, {}, ["all", "all"]),  # one process per host
        (1, {}, ["0", "1"]),  # both on one host
        (2, {"JAX_LOCAL_DEVICE_IDS": "2,3"}, ["2,3", "2,3"]),
    ],
)
def test_each_process_takes_the_right_devices_under_slurm(
    num_nodes: int, own: dict[str, str], devices: list[str]
) -> None:
    slurm = {
        "SLURM_JOB_ID": "1234",
        "SLURM_STEP_NODELIST": "localhost",  # JAX takes the first host's name from it
        "SLURM_STEP_NUM_NODES": str(num_nodes),
        "SLURM_NTASKS": "2",
        # The port that JAX derives from Slurm's job id may be in use on this machine.
        "JAX_COORDINATOR_PORT": str(free_port()),
        "JAX_PLATFORMS": "cpu",
    }
    processes = []
    for process in range(2):
        ids = {"SLURM_PROCID": str(process), "SLURM_LOCALID": str(process if num_nodes == 1 else 0)}
        env = os.environ | slurm | ids | own
        processes.append(subprocess.Popen([sys.executable, "-c", SHOW], env=env, stdout=subprocess.PIPE, text=True))
    try:
        printed = [process.communicate(timeout=60)[0].split() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert printed == [["2", str(process), devices[process]] for process in range(2)]


@pytest.mark.parametrize("coordinator", ["localhost", "http://localhost:1234", "::1:1234", "unix:/tmp/socket"])
def test_a_malformed_address_of_the_coordinator_is_refused_before_jax_waits_for_it(coordinator):
    with pytest.raises(ValueError, match=f"--coordinator '{coordinator}'.*(?i:host:port)"):
        hosts.initialize(coordinator, 2, 0)
