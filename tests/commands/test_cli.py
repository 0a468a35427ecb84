"""The `jdistill` command where only a part of its dependencies is installed, and where files cannot be used."""

import errno
import os
import subprocess
import sys

import pytest

from jdistill import cli, exit_status
from jdistill.commands import plot

CLIENT = ["numpy", "google", "grpc"]
CLI = [*CLIENT, "pydantic", "pydantic_core", "annotated_types", "ruamel", "rich"]
SERVER = [*CLI, "grpc_reflection", "prometheus_client", "pythonjsonlogger", "transformers", "tokenizers", "safetensors"]
ABSENT = ["aiohttp", "flax", "jax", "matplotlib", "optax", "orbax", "torch", "vllm"]

# As if only these packages were installed: importing one of the others raises ModuleNotFoundError.
ONLY = """
import sys
for name in {absent}:
    sys.modules[name] = None
from jdistill import cli
for command in cli.COMMANDS:
    for argv in ([command, "--help"], [command, *{arguments}.get(command, [])]):
        try:
            code = cli.main(argv)
        except SystemExit as e:
            code = e.code
        print(f"\\n{{argv[-1] == '--help'}} {{command}}: {{code}}", flush=True)
"""
ARGUMENTS = {
    "demo": [],
    "teacher": ["--engine", "transformers", "--model", "nowhere"],
    "probe": ["127.0.0.1:1", "--timeout-s", "1"],
    "score": ["--teacher", "127.0.0.1:1", "--input", "in.jsonl", "--output", "out.jsonl"],
    "train": ["configs/demo.yaml"],
    "plan": ["configs/demo.yaml"],
    "eval": ["--model", "examples/addition/student", "--task", "addition"],
    "sample": ["--model", "examples/addition/student", "--prompt", "1"],
    "export": ["runs/none", "--to", "nowhere"],
    "plot": ["runs/none"],
}


@pytest.mark.parametrize("installed", [CLIENT, CLI, SERVER], ids=["client", "cli", "server"])
def test_help_always_works_and_a_command_names_the_extra_that_it_needs(installed):
    absent = [name for name in (*SERVER, *ABSENT) if name not in installed]
    code = ONLY.format(absent=absent, arguments=ARGUMENTS)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stderr  # a command that raises anything ends the loop
    assert "Traceback" not in found.stderr
    for command in cli.COMMANDS:
        assert f"True {command}: 0\n" in found.stdout and f"usage: jdistill {command}" in found.stdout
        assert f"False {command}: 0\n" not in found.stdout
    needs = {line.split()[1].rstrip(":"): line for line in found.stderr.splitlines() if "pip install" in line}
    student = {"train", "plan", "eval", "sample"}
    assert all("pip install 'jdistill[student]'" in needs[command] for command in student)
    if installed == CLIENT:
        assert "'jdistill[vllm]'" in needs["teacher"] and "'jdistill[cli]'" in needs["score"]
    if installed == SERVER:
        assert "pip install 'jdistill[transformers]'" in found.stderr  # the engine that was asked for


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), 2, "/data/x: Permission denied"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), 2, "a: Is a directory"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), 2, "a/b: Not a directory"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "writing: No space left on device; free some space"),
        (FileNotFoundError("no such run"), 2, "no such run"),
        (BlockingIOError(errno.EAGAIN, "again"), None, ""),
        (KeyError("a bug"), None, ""),
    ],
)
def test_what_is_wrong_with_a_file_is_a_message_and_a_bug_is_a_traceback(error, code, text, monkeypatch, capsys):
    found = exit_status.of_error(error)
    assert (found is None) == (code is None)

    def run(args):
        raise error

    monkeypatch.setattr(plot, "run", run)
    if code is None:
        with pytest.raises(type(error)):
            cli.main(["plot", "runs/none"])
        return
    assert cli.main(["plot", "runs/none"]) == code
    assert text in capsys.readouterr().err


def test_a_full_disk_is_named_by_a_real_one():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError) as full, open("/dev/full", "w") as file:
        file.write("x" * 100_000)
    assert exit_status.of_error(full.value)[1] == 1


def test_a_reader_that_leaves_ends_the_command_quietly():
    code = "from jdistill import cli; from jdistill.commands import plot\n"
    code += "plot.run = lambda args: [print('x' * 1000) for _ in range(1000)]\ncli.sys.exit(cli.main(['plot', 'r']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        command.stdout.readline()
        command.stdout.close()
        assert command.stderr.read() == b"" and command.wait(60) == 141
