"""The processes of a run, one or more per host: which one this is, and what they must agree on.

Unless it says otherwise, every function here is called by all processes in the same order. With a single process each
returns its argument.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from jdistill import exit_status
from jdistill.config import ConfigError, TrainConfig
from jdistill.wire.endpoint import parse_endpoint


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins this process to the others; must be the first call to JAX.

    A process that is alone on its host takes all devices that it sees; of several on one host, each takes one.

    Args:
        coordinator: host:port of process 0, any free port, the same for all processes. If all three arguments are
            None, JAX reads them from Slurm, Open MPI or Kubernetes.
        num_processes: number of processes of the run.
        process_id: number of this process, from 0.

    Raises:
        ValueError: the coordinator's address is malformed.
        ConfigError: nothing to read the arguments from, or the other processes did not join.
    """
    if coordinator is not None and not parse_endpoint(coordinator, "--coordinator").host:
        raise ConfigError(f"--coordinator {coordinator!r}: expected HOST:PORT of process 0, not a Unix socket")
    # Under Slurm and Open MPI, JAX takes one device per process, however many the host has. None stands for that
    # default (or the user's JAX_LOCAL_DEVICE_IDS), an empty list for all devices that the process sees.
    takes_all = is_alone_on_host(os.environ) and not os.environ.get("JAX_LOCAL_DEVICE_IDS")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, [] if takes_all else None)
    except (ValueError, RuntimeError) as e:
        raise ConfigError(
            f"--distributed: {e}. JAX detects Slurm, Open MPI and Kubernetes; elsewhere give --coordinator HOST:PORT "
            "--num-processes P --process-id I, with the same HOST:PORT and P for all processes"
        ) from None


def is_alone_on_host(environ: Mapping[str, str]) -> bool:
    """Whether Slurm or Open MPI started one process per host, according to their environment variables."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environ:
        return environ["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
    return "SLURM_STEP_NUM_NODES" in environ and environ.get("SLURM_NTASKS") == environ["SLURM_STEP_NUM_NODES"]


def count() -> int:
    """Returns the number of processes. Any process may call this alone."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this process writes the files and shows the progress. Any process may call this alone."""
    return jax.process_index() == 0


def own_part(num: int) -> slice:
    """Returns the slice of `num` items owned by this process; `num` is a multiple of the number of processes."""
    each = num // count()
    return slice(jax.process_index() * each, (jax.process_index() + 1) * each)


def gather(rows: np.ndarray) -> np.ndarray:
    """Concatenates the rows of all processes, in the order of the processes."""
    return rows if count() == 1 else np.asarray(multihost_utils.process_allgather(rows, tiled=True))


def total(numbers: np.ndarray) -> np.ndarray:
    """Sums over all processes."""
    return numbers if count() == 1 else np.asarray(multihost_utils.process_allgather(numbers)).sum(axis=0)


def maximum(number: int) -> int:
    """Returns the largest number of all processes."""
    return number if count() == 1 else int(gather(np.array([number], np.int32)).max())


def from_first(make: Callable[[], Any]) -> Any:
    """Calls `make` on the first process alone and returns its result (JSON) on all.

    Raises:
        Exception: what `make` raised; on the other processes a ConfigError with the same text.
    """
    if count() == 1:
        return make()
    made, error = {}, None
    if is_first():
        try:
            made = {"value": make()}
        except Exception as e:
            made, error = {"error": str(e)}, e
    data = np.frombuffer(json.dumps(made).encode(), np.uint8)
    buffer = np.zeros(maximum(len(data)), np.uint8)
    if is_first():
        buffer[: len(data)] = data
    data = np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes().rstrip(b"\0")
    made = json.loads(data)
    if "error" in made:
        raise error or ConfigError(made["error"])
    return made["value"]


def leave(error: BaseException) -> NoReturn:
    """Ends this process at once, after an error that only it has met.

    An orderly exit would wait for the other processes, which wait for this one; JAX's coordination service ends them.
    """
    found = exit_status.of_error(error)
    if found is not None:
        print(f"jdistill train: {found[0]}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    print(
        f"jdistill train: process {jax.process_index()} of {count()} ends here; the others follow within two minutes. "
        "Start all of them again, with --resume if a checkpoint was saved.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1 if found is None else found[1])


def check_split(config: TrainConfig) -> None:
    """Checks that a run can be split over the processes. Raises ConfigError."""
    num = count()
    if num == 1:
        return
    on_policy = config.objective.kind == "on_policy"
    key = "rollout.num_prompts" if on_policy else "optimizer.batch_size"
    size = config.rollout.num_prompts if on_policy else config.optimizer.batch_size
    if size % num:
        raise ConfigError(f"{key} = {size} does not split over {num} processes: each samples its own prompts")
    if config.rollout.ahead:
        raise ConfigError(f"rollout.ahead: 1 needs a single process, and there are {num}: leave it out")
    teacher = config.teacher
    if teacher is not None and teacher.offload:
        raise ConfigError(
            f"teacher.offload needs a single process, and there are {num}: give the teacher separate devices"
        )
    if teacher is not None and teacher.spawn is not None:
        names = {name.tobytes() for name in gather(_host_name()[None])}
        if len(names) > 1:
            raise ConfigError(
                f"teacher.spawn: the sidecar listens on loopback, and the processes are on {len(names)} hosts: start "
                "it with `jdistill teacher`, and give teacher.endpoints"
            )


def _host_name() -> np.ndarray:
    return np.frombuffer(hashlib.sha256(socket.gethostname().encode()).digest()[:8], np.uint8)


def meshes(mesh: Mesh) -> tuple[Mesh, Mesh]:
    """Splits a mesh over all devices into hosts.

    Parameters that are sharded over fsdp and tensor are whole on each host, on either of the returned meshes.

    Returns:
        The mesh of this process's devices alone, and the mesh of all devices with one more axis, "host", in front.

    Raises:
        ConfigError: the tensor axis spans hosts.
    """
    tensor = mesh.shape["tensor"]
    groups = mesh.devices.reshape(-1, tensor)
    owner = np.vectorize(lambda device: device.process_index)(groups)
    if (owner != owner[:, :1]).any():
        raise ConfigError(
            f"mesh.tensor = {tensor} spans hosts of {jax.local_device_count()} devices: make it a divisor of that "
            "number, and let mesh.fsdp span hosts"
        )
    by_host = np.stack([groups[owner[:, 0] == process] for process in range(count())])[:, None]
    axis_types = (AxisType.Auto,) * 3
    own = Mesh(by_host[jax.process_index()], mesh.axis_names, axis_types=axis_types)
    return own, Mesh(by_host, ("host", *mesh.axis_names), axis_types=(AxisType.Auto, *axis_types))
