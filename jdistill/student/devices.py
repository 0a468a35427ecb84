"""Which GPUs the student takes: not those of a sidecar that the trainer starts.

JAX takes three quarters of the memory of every GPU that it sees, when it is first asked for its devices; so this comes
before. Indexes are those of the CUDA driver, the same for trainer and sidecar.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import pkgutil
import subprocess
import sys
from collections.abc import Mapping, Sequence

import jax

from jdistill.config import ConfigError, SpawnSection, TrainConfig

logger = logging.getLogger(__name__)

CUDA, ROCM = "CUDA_VISIBLE_DEVICES", ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
SHARING = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR")
_TIMEOUT_S = 60.0  # the first process after a boot initialises the driver

# In a process that ends: the driver reads CUDA_VISIBLE_DEVICES once, when it is first called.
_LIST_CUDA = """
import ctypes, uuid
cuda, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
assert cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
for index in range(count.value):
    data = (ctypes.c_char * 16)()
    assert cuda.cuDeviceGetUuid(data, index) == 0
    print("GPU-" + str(uuid.UUID(bytes=bytes(data))))
"""


@dataclasses.dataclass(frozen=True)
class Split:
    """The entries of the variable that hides devices, for each side; the same ones if they share."""

    teacher: tuple[str, ...]
    student: tuple[str, ...]


def reserve(config: TrainConfig) -> tuple[TrainConfig, str]:
    """Hides the GPUs of teacher.spawn from this process, which must not have asked JAX for its devices yet.

    Returns:
        The configuration, in which teacher.spawn.env hides the student's GPUs from the sidecar, and a message ("" if
        there is nothing to say).

    Raises:
        ConfigError: no GPU would be left for the student, or the sidecar has fewer than it needs.
    """
    spawn = _spawned(config)
    if spawn is None or num_gpus(spawn) == 0:
        return config, ""
    _check_number(spawn)
    if not student_takes_gpus():
        return config, ""
    name = next((name for name in (CUDA, *ROCM) if name in spawn.env), ROCM[0] if list_amd() else CUDA)
    own, gpus = os.environ.get(name), list_nvidia() if name == CUDA else [str(index) for index in range(list_amd())]
    ours = tuple(visible(own, gpus))
    if not ours:
        return config, ""  # there is no GPU, or the student is to take none
    found = split(spawn, name, own, gpus)
    if found.student == found.teacher:
        return config, f"teacher and student share the GPUs {', '.join(found.teacher)}"
    if found.student != ours:
        asked = os.environ.get("JAX_CUDA_VISIBLE_DEVICES", "all") != "all"
        if asked or backend_is_up():
            why = "JAX_CUDA_VISIBLE_DEVICES counts them too" if asked else "JAX has taken its devices already"
            raise ConfigError(
                f"teacher.spawn takes the GPUs {', '.join(found.teacher)}, and {why}: start this process with "
                f"{name}={','.join(found.student)} and without JAX_CUDA_VISIBLE_DEVICES"
            )
        os.environ[name] = ",".join(found.student)
    assert config.teacher is not None
    spawn = spawn.model_copy(update={"env": {**spawn.env, name: ",".join(found.teacher)}})
    config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"spawn": spawn})})
    return config, f"GPUs {', '.join(found.teacher)} for the teacher, {', '.join(found.student)} for the student"


def split(spawn: SpawnSection, name: str, own: str | None, gpus: Sequence[str]) -> Split:
    """Splits the GPUs between the sidecar and the student.

    Args:
        spawn: of the sidecar; without the variable in `env` it gets the first GPUs that the student sees.
        name: the variable.
        own: its value for this process; None: not set.
        gpus: UUIDs in the driver's order.

    Raises:
        ConfigError: nothing would be left for the student, or the sidecar is given a GPU that does not exist.
    """
    ours, needed = visible(own, gpus), num_gpus(spawn)
    given = spawn.env.get(name)
    theirs = ours[:needed] if given is None else visible(given, gpus)
    if given is not None and len(theirs) < len(visible(given, ())):
        raise ConfigError(f"teacher.spawn.env.{name} = {given!r}, but this machine has {len(gpus)} GPU(s)")
    if any(entry.startswith("MIG-") for entry in theirs) and not all(entry.startswith("MIG-") for entry in ours):
        raise ConfigError(
            f"teacher.spawn.env.{name} names MIG devices ({', '.join(theirs)}), and JAX would take the first one that "
            f"it finds: set {name} for the student too, to other MIG devices (nvidia-smi -L lists them)"
        )
    taken = [identity(entry, gpus) for entry in theirs]
    left = [entry for entry in ours if identity(entry, gpus) not in taken]
    if left:
        return Split(tuple(theirs), tuple(left))
    if any(variable in os.environ for variable in SHARING) or (given is None and not _reserves(spawn)):
        return Split(tuple(ours), tuple(ours))
    raise ConfigError(
        f"teacher.spawn takes the GPUs {', '.join(theirs)}, and none is left for the student: set "
        f"teacher.spawn.env.{name} to some of them, or teacher.offload: true (teacher and student take turns), or "
        f"divide their memory: teacher.spawn.memory_fraction for the teacher, {SHARING[0]} for the student"
    )


def num_left(config: TrainConfig, num_devices: int) -> int:
    """Number of devices that the student gets of `num_devices` on a machine, as `reserve` would split them."""
    spawn = _spawned(config)
    if spawn is None or num_gpus(spawn) == 0:
        return num_devices
    _check_number(spawn)
    if (named := _named(spawn)) is not None:
        return num_devices - sum(not entry.isdecimal() or int(entry) < num_devices for entry in named)
    if num_devices > num_gpus(spawn):
        return num_devices - num_gpus(spawn)
    return 0 if _reserves(spawn) else num_devices


def _spawned(config: TrainConfig) -> SpawnSection | None:
    """The sidecar that the run starts on other GPUs than the student's; with offload they take turns on the same."""
    teacher = config.teacher
    return None if teacher is None or teacher.offload or not config.objective.has_distillation else teacher.spawn


def num_gpus(spawn: SpawnSection) -> int:
    """Number of GPUs that a sidecar takes if there are GPUs."""
    if spawn.engine in ("vllm", "sglang"):
        return spawn.tensor_parallel_size * spawn.pipeline_parallel_size * spawn.data_parallel_size
    if spawn.engine == "transformers":
        return int(not str(spawn.engine_args.get("device", "auto")).startswith("cpu"))
    return spawn.tensor_parallel_size if spawn.engine == "jax" else 0


def _named(spawn: SpawnSection) -> list[str] | None:
    """GPUs that the configuration gives to the sidecar; None if it names none."""
    values = [spawn.env[name] for name in (CUDA, *ROCM) if name in spawn.env]
    return visible(values[0], ()) if values else None


def _check_number(spawn: SpawnSection) -> None:
    """Raises ConfigError if the sidecar is given fewer GPUs than its sizes ask for."""
    named, needed = _named(spawn), num_gpus(spawn)
    if named is not None and _reserves(spawn) and 0 < len(named) < needed:
        raise ConfigError(
            f"teacher.spawn.env gives the sidecar {len(named)} GPU(s), but tensor_parallel_size * "
            f"pipeline_parallel_size * data_parallel_size = {needed}: name as many, or lower the sizes"
        )


def visible(value: str | None, gpus: Sequence[str]) -> list[str]:
    """Entries of a variable such as CUDA_VISIBLE_DEVICES; None: all of `gpus`, by index.

    As in the driver, the first entry that is none (-1, or an index that does not exist) hides all that follow.
    """
    if value is None:
        return [str(index) for index in range(len(gpus))]
    entries = []
    for entry in (part.strip() for part in value.split(",")):
        is_index = entry.isdecimal()
        if not (is_index or entry.startswith(("GPU-", "MIG-"))) or (is_index and gpus and int(entry) >= len(gpus)):
            break
        entries.append(entry)
    return entries


def identity(entry: str, gpus: Sequence[str]) -> str:
    """The UUID of an entry where it is known; else the entry itself."""
    if entry.isdecimal():
        return gpus[int(entry)] if int(entry) < len(gpus) else entry
    return next((uuid for uuid in gpus if uuid.startswith(entry)), entry)  # the driver takes abbreviations too


def _reserves(spawn: SpawnSection) -> bool:
    """Whether the engine takes nearly all memory of its GPUs at once."""
    return spawn.engine in ("vllm", "sglang")


def student_takes_gpus() -> bool:
    """Whether JAX would use GPUs if there are any; decided without asking for its devices."""
    platforms = jax.config.jax_platforms or ""
    if platforms:
        return any(name in platforms for name in ("cuda", "rocm", "gpu"))
    try:
        import jax_plugins
    except ImportError:
        return False
    return any(name.startswith(("xla_cuda", "xla_rocm")) for _, name, _ in pkgutil.iter_modules(jax_plugins.__path__))


def backend_is_up() -> bool:
    """Whether JAX has its devices already."""
    from jax._src import xla_bridge  # no public function says so without starting it

    return xla_bridge.backends_are_initialized()


def list_nvidia() -> list[str]:
    """UUIDs of NVIDIA's GPUs in the driver's order; [] if there is no driver."""
    environ: Mapping[str, str] = {name: value for name, value in os.environ.items() if name != CUDA}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LIST_CUDA], capture_output=True, text=True, timeout=_TIMEOUT_S, env=environ
        )
    except subprocess.TimeoutExpired:
        logger.warning("the CUDA driver did not list its GPUs within %.0f s", _TIMEOUT_S)
        return []
    return done.stdout.split() if done.returncode == 0 else []


def list_amd(topology: pathlib.Path = pathlib.Path("/sys/class/kfd/kfd/topology/nodes")) -> int:
    """Number of AMD's GPUs, according to the kernel."""
    return sum(path.read_text().strip() not in ("", "0") for path in topology.glob("*/gpu_id"))
