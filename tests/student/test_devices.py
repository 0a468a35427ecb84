"""Which GPUs are the student's and which the sidecar's, by environment and lists; no GPU is used."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from jdistill.config import ConfigError, SpawnSection, TrainConfig, load
from jdistill.student import devices, sharding
from jdistill.student.devices import CUDA, Split, num_left, reserve, split, visible

EIGHT = [f"GPU-{index}a11f73e-0000-0000-0000-000000000000" for index in range(8)]
GSM8K = "configs/gsm8k_qwen3_0.6b_from_14b.yaml"


def spawn(value=None, engine="vllm", name=CUDA, **changes):
    return SpawnSection(engine=engine, model="m", env={} if value is None else {name: value}, **changes)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in (*devices.SHARING, CUDA, *devices.ROCM, "JAX_CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("value", "entries"),
    [
        (None, list("01234567")),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("3", ["3"]),
        (" 2, 3 ", ["2", "3"]),
        ("0,8,1", ["0"]),  # as in the driver: what comes after one that does not exist is hidden
        ("0,-1,1", ["0"]),
        ("GPU-1a11,MIG-7", ["GPU-1a11", "MIG-7"]),
    ],
)
def test_entries_of_a_variable_are_those_that_the_driver_takes(value, entries):
    assert visible(value, EIGHT) == entries


@pytest.mark.parametrize(
    ("section", "own", "teacher", "student"),
    [
        (spawn("0,1", tensor_parallel_size=2), None, "0,1", "2,3,4,5,6,7"),  # the README's command
        (spawn("0,1", tensor_parallel_size=2), "2,3,4,5", "0,1", "2,3,4,5"),
        (spawn("0,1", tensor_parallel_size=2), "0,1,2,3", "0,1", "2,3"),
        (spawn("6,7", tensor_parallel_size=2), None, "6,7", "0,1,2,3,4,5"),
        (spawn("7,0", tensor_parallel_size=2), "5,6,7", "7,0", "5,6"),
        (spawn(tensor_parallel_size=2), None, "0,1", "2,3,4,5,6,7"),
        (spawn(tensor_parallel_size=2, data_parallel_size=2), "4,5,6,7,0", "4,5,6,7", "0"),
        (spawn(engine="sglang", pipeline_parallel_size=3), None, "0,1,2", "3,4,5,6,7"),
        (spawn(engine="transformers"), None, "0", "1,2,3,4,5,6,7"),
        (spawn(engine="jax"), "5,6", "5", "6"),
        (spawn("GPU-1a11f73e"), None, "GPU-1a11f73e", "0,2,3,4,5,6,7"),  # an abbreviated UUID and indexes
        (spawn("2"), ",".join(EIGHT[1:4]), "2", f"{EIGHT[1]},{EIGHT[3]}"),
        (spawn("MIG-a"), "MIG-a,MIG-b", "MIG-a", "MIG-b"),
        (spawn("0", name="HIP_VISIBLE_DEVICES"), "0,1", "0", "1"),
        (spawn(engine="jax"), "3", "3", "3"),  # one GPU: small engines share it
    ],
)
def test_the_student_keeps_off_the_sidecars_gpus(section, own, teacher, student):
    name = next(iter(section.env), CUDA)
    assert split(section, name, own, EIGHT) == Split(tuple(teacher.split(",")), tuple(student.split(",")))


@pytest.mark.parametrize(
    ("section", "own", "message"),
    [
        (spawn("0"), "0", "none is left for the student"),
        (spawn(",".join("01234567"), tensor_parallel_size=8), None, "none is left for the student"),
        (spawn(tensor_parallel_size=2), "0,1", "none is left for the student"),
        (spawn("0,8"), None, r"this machine has 8 GPU\(s\)"),
        (spawn("MIG-a"), None, "would take the first one"),
        (spawn("MIG-a"), "0", "would take the first one"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_remedy(section, own, message):
    with pytest.raises(ConfigError, match=message):
        split(section, CUDA, own, EIGHT)


def test_a_gpu_whose_memory_is_divided_is_shared(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.4")
    assert split(spawn("0"), CUDA, "0", EIGHT) == Split(("0",), ("0",))


@pytest.fixture
def fake_gpus(monkeypatch):
    """A machine with eight fake GPUs that JAX would take."""
    monkeypatch.setattr(devices, "list_nvidia", lambda: EIGHT)
    monkeypatch.setattr(devices, "student_takes_gpus", lambda: True)
    monkeypatch.setattr(devices, "backend_is_up", lambda: False)


def test_reserve_sets_both_environments(fake_gpus):
    config, message = reserve(load(TrainConfig, GSM8K))
    assert os.environ[CUDA] == "4,5,6,7" and config.teacher.spawn.env[CUDA] == "0,1,2,3"
    assert message == "GPUs 0, 1, 2, 3 for the teacher, 4, 5, 6, 7 for the student"
    assert reserve(config)[1] == message and os.environ[CUDA] == "4,5,6,7"  # of a second run in this process


@pytest.mark.parametrize(
    "overrides",
    [
        ["teacher.offload=true"],  # they take turns
        ["teacher.spawn=null", "teacher.endpoints=['gpu7:50051']"],
        ["objective.distill_loss_weight=0"],
        ["teacher.spawn.engine=vllm-http", "teacher.spawn.urls=['http://127.0.0.1:8000']"],
    ],
)
def test_reserve_leaves_the_environment_alone_where_nothing_is_taken(overrides, fake_gpus):
    config = load(TrainConfig, GSM8K, overrides)
    assert reserve(config) == (config, "") and CUDA not in os.environ


def test_reserve_refuses_what_is_too_late(fake_gpus, monkeypatch):
    config = load(TrainConfig, GSM8K)
    monkeypatch.setattr(devices, "backend_is_up", lambda: True)
    with pytest.raises(ConfigError, match=r"JAX has taken its devices already: start this process with CUDA.*=4,5,6,7"):
        reserve(config)
    monkeypatch.setenv(CUDA, "6,7")  # disjoint from the sidecar's
    assert reserve(config)[1]
    monkeypatch.delenv(CUDA)
    monkeypatch.setattr(devices, "backend_is_up", lambda: False)
    monkeypatch.setenv("JAX_CUDA_VISIBLE_DEVICES", "4,5")  # would become 4 and 5 of what is left
    with pytest.raises(ConfigError, match="JAX_CUDA_VISIBLE_DEVICES counts them too"):
        reserve(config)
    with pytest.raises(ConfigError, match=r"gives the sidecar 4 GPU\(s\), but .* = 8"):
        reserve(load(TrainConfig, GSM8K, ["teacher.spawn.data_parallel_size=2"]))


def test_a_student_on_cpus_takes_no_gpu():
    show = "from jdistill.student import devices; print(devices.student_takes_gpus())"
    for platforms, expected in (("cpu", "False"), ("cuda,cpu", "True")):
        done = subprocess.run(
            [sys.executable, "-c", show], env=os.environ | {"JAX_PLATFORMS": platforms}, capture_output=True, text=True
        )
        assert done.stdout.strip() == expected, done.stderr


def test_nothing_before_reserve_asks_jax_for_its_devices(tmp_path):
    """`train` and `plan`, up to the call that comes next."""
    code = (
        "import sys; from jdistill import cli; from jdistill.student import devices\n"
        "def show(config): print(devices.backend_is_up()); sys.exit()\n"
        "devices.reserve = show; cli.main(sys.argv[1:])"
    )
    for command in ("train", "plan"):
        argv = [sys.executable, "-c", code, command, "configs/demo.yaml", f"run_dir={tmp_path}"]
        assert subprocess.run(argv, capture_output=True, text=True).stdout.strip() == "False"


def test_amds_gpus_are_counted_from_the_kernels_files(tmp_path):
    for node, gpu_id in enumerate(["0\n", "4711\n", "4712\n"]):  # node 0 is the processor
        (tmp_path / str(node)).mkdir()
        (tmp_path / str(node) / "gpu_id").write_text(gpu_id)
    assert devices.list_amd(tmp_path) == 2 and devices.list_amd(tmp_path / "none") == 0


def test_the_drivers_list_has_a_uuid_for_each_device():
    found = devices.list_nvidia()
    assert len(found) == len(list(pathlib.Path("/dev").glob("nvidia[0-9]*")))
    assert all(re.fullmatch("GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", uuid) for uuid in found)


@pytest.mark.parametrize(
    ("overrides", "num_devices", "left"),
    [
        ([], 8, 4),
        ([], 4, 0),
        (["teacher.spawn.env={}"], 8, 4),
        (["teacher.spawn.env={}"], 4, 0),
        (["teacher.spawn.env.CUDA_VISIBLE_DEVICES='8,9,10,11'"], 8, 8),
        (["teacher.offload=true"], 8, 8),
        (["teacher.spawn.env={}", "teacher.spawn.engine=jax", "teacher.spawn.tensor_parallel_size=1"], 1, 1),
    ],
)
def test_plan_counts_as_train_does(overrides, num_devices, left):
    assert num_left(load(TrainConfig, GSM8K, overrides), num_devices) == left


def test_six_devices_are_refused_with_the_numbers_that_work():
    config = load(TrainConfig, GSM8K)
    with pytest.raises(ConfigError, match=r"256 rows, which do not split over .* = 6 devices") as refused:
        sharding.check_rows(config, sharding.mesh_sizes(config.mesh, 6))
    assert "Set rollout.num_prompts to 126 or 129, or use 1, 2 or 4 device(s)" in str(refused.value)
    for num_prompts in (126, 129):
        changed = load(TrainConfig, GSM8K, [f"rollout.num_prompts={num_prompts}"])
        sharding.check_rows(changed, sharding.mesh_sizes(config.mesh, 6))
    for num_devices in (1, 2, 4):
        sharding.check_rows(config, sharding.mesh_sizes(config.mesh, num_devices))
