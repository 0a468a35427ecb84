"""The flags of `jdistill teacher` and its configuration file say the same things."""

import argparse
import pathlib

import pytest

from jdistill import cli
from jdistill.commands import teacher
from jdistill.config import ConfigError, TeacherServerConfig

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def config_of(*argv):
    parser = argparse.ArgumentParser()
    teacher.add_arguments(parser)
    args = parser.parse_args([str(arg) for arg in argv])
    return teacher.config_of(args, teacher.HELP, args.config, args.overrides)


def test_every_field_is_a_flag_with_help():
    assert set(teacher.HELP) == set(TeacherServerConfig.model_fields)


def test_flags_become_the_configuration_with_their_types():
    config = config_of(
        "--engine", "vllm", "--model", "0123", "--port", 0, "--drain-timeout-s", "2.5", "--insecure", "--host", "::1",
        "--max-sequence-length", 77, "--engine-arg", "gpu_memory_utilization=0.9", "--engine-arg", "name=abc",
        "--engine-arg", 'compile={"level": 3}', "--engine-arg", "expression=a=b",
    )  # fmt: skip
    assert config == TeacherServerConfig(
        engine="vllm",
        model="0123",  # a string, though it looks like a number
        port=0,
        drain_timeout_s=2.5,
        insecure=True,
        host="::1",
        max_sequence_length=77,
        engine_args={"gpu_memory_utilization": 0.9, "name": "abc", "compile": {"level": 3}, "expression": "a=b"},
    )


def test_absent_flags_are_the_fields_defaults():
    assert config_of("--engine", "jax", "--model", "m") == TeacherServerConfig(engine="jax", model="m")


def test_a_file_overrides_and_flags_add_up():
    path = CONFIGS / "teacher_vllm.yaml"
    config = config_of(path, "model=other", "engine_args.max_num_seqs=8", "--port", 1234, "--engine-arg", "seed=3")
    assert (config.engine, config.model, config.port, config.tensor_parallel_size) == ("vllm", "other", 1234, 2)
    assert config.engine_args == {"max_num_seqs": 8, "seed": 3}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--engine", "fake"], "--model is missing .*checkpoint directory"),
        (["--model", "m"], "--engine is missing"),
        (["--engine", "fake", "--model", "m", "--port", 70000], "command line: port: .*65535.*70000"),
        (["--engine", "fake", "--model", "m", "--engine-arg", "x"], "--engine-arg x: expected NAME=VALUE"),
        ([CONFIGS / "teacher_vllm.yaml", "prot=3"], "teacher_vllm.yaml: unknown key prot; did you mean port"),
        ([CONFIGS / "teacher_vllm.yaml", "port=3", "--port", 4], "port is given 2 times"),
        (["no_such.yaml"], "no config file no_such.yaml"),
    ],
)
def test_what_cannot_be_meant_is_an_error_that_names_it(argv, message):
    with pytest.raises(ConfigError, match=message):
        config_of(*argv)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--engine", "fale", "--model", "m"], "did you mean fake?"),
        (["engine=fake"], "without one use flags"),
        (["--engine", "fake", "--model", "m", "--host", "0.0.0.0"], "--insecure"),
        (["--engine", "transformers", "--model", "/no/such/checkpoint", "--port", "0"], "/no/such/checkpoint"),
    ],
)
def test_a_start_that_cannot_succeed_is_2_with_one_line(argv, message, capsys):
    if "transformers" in argv:
        pytest.importorskip("torch")
    assert cli.main(["teacher", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
