"""The processes of a run, one a host or more: which one this is, and what they have to agree on.

Every function here is called by all processes in the same order. With one process each gives back what it got.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from jdistill.config import ConfigError
from jdistill.wire.errors import TeacherError


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins this process to the others; before anything else is asked of JAX.

    A process that is alone on its host takes all devices that it sees; of several on a host, each takes one.

    Args:
        coordinator: host:port of process 0, any free port; the same for all. All three None: JAX finds them out from
            Slurm, Open MPI, or Kubernetes.
        num_processes: of the run.
        process_id: of this one, from 0.

    Raises:
        ConfigError: there is nothing to find them out from, or the others did not come.
    """
    # Under Slurm and Open MPI, JAX by itself takes one device a process, however many the host has. None is that
    # default (or the user's JAX_LOCAL_DEVICE_IDS), an empty list all that the process sees.
    takes_all = is_alone_on_host(os.environ) and not os.environ.get("JAX_LOCAL_DEVICE_IDS")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, [] if takes_all else None)
    except (ValueError, RuntimeError) as e:
        raise ConfigError(
            f"--distributed: {e}. JAX knows Slurm, Open MPI and Kubernetes by itself; elsewhere give --coordinator "
            "HOST:PORT --num-processes P --process-id I, the same HOST:PORT and P to all"
        ) from None


def is_alone_on_host(environ: Mapping[str, str]) -> bool:
    """Whether Slurm or Open MPI, by what they tell a process, started one process a host."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environ:
        return environ["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
    return "SLURM_STEP_NUM_NODES" in environ and environ.get("SLURM_NTASKS") == environ["SLURM_STEP_NUM_NODES"]


def count() -> int:
    """How many processes there are."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this one writes, and speaks to whoever watches."""
    return jax.process_index() == 0


def own_part(num: int) -> slice:
    """Which of so many things are this process's own; a multiple of the number of processes."""
    each = num // count()
    return slice(jax.process_index() * each, (jax.process_index() + 1) * each)


def gather(rows: np.ndarray) -> np.ndarray:
    """The rows of all processes, one after another."""
    return rows if count() == 1 else np.asarray(multihost_utils.process_allgather(rows, tiled=True))


def total(numbers: np.ndarray) -> np.ndarray:
    """The sum over all processes."""
    return numbers if count() == 1 else np.asarray(multihost_utils.process_allgather(numbers)).sum(axis=0)


def maximum(number: int) -> int:
    """The largest of all processes' numbers."""
    return number if count() == 1 else int(gather(np.array([number], np.int32)).max())


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` returns on the first process (JSON), which alone calls it.

    Raises:
        Exception: what `make` raised; on the others a ConfigError of the same text.
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
    """Ends this process at once, after an error that it alone has met.

    An orderly end would wait for the others, which wait for this one; JAX's coordination service ends them.
    """
    if isinstance(error, TeacherError | ValueError | FileNotFoundError):
        print("\n".join([f"jdistill train: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
    else:
        traceback.print_exception(error)
    print(
        f"jdistill train: process {jax.process_index()} of {count()} ends here; the others follow within two minutes. "
        "Start all again, with --resume if a checkpoint was saved.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2 if isinstance(error, ValueError | FileNotFoundError) else 1)


def meshes(mesh: Mesh) -> tuple[Mesh, Mesh]:
    """Of a mesh over all devices: this process's devices alone, and all with one axis more, "host", in front.

    On either the parameters that lie over fsdp and tensor are whole on each host.

    Raises:
        ConfigError: the tensor axis goes from one host to another.
    """
    tensor = mesh.shape["tensor"]
    groups = mesh.devices.reshape(-1, tensor)
    owner = np.vectorize(lambda device: device.process_index)(groups)
    if (owner != owner[:, :1]).any():
        raise ConfigError(
            f"mesh.tensor = {tensor} goes over hosts of {jax.local_device_count()} devices: make it a divisor of that "
            "number, and let mesh.fsdp go over hosts"
        )
    by_host = np.stack([groups[owner[:, 0] == process] for process in range(count())])[:, None]
    axis_types = (AxisType.Auto,) * 3
    own = Mesh(by_host[jax.process_index()], mesh.axis_names, axis_types=axis_types)
    return own, Mesh(by_host, ("host", *mesh.axis_names), axis_types=(AxisType.Auto, *axis_types))
