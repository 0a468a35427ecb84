"""A child of fork() works or gets an error that says what to do; it never hangs, not even at its end."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.sidecar.processes import launch

CASES = pathlib.Path(__file__).with_name("fork_cases.py")
LEAVE_ALONE = ("nothing", "close", "with", "delete", "closed client")


@pytest.fixture
def endpoints(tmp_path):
    """A teacher, and one that takes its time."""
    sidecars = [launch(tmp_path), launch(tmp_path, "--engine-arg", "delay_s=3")]
    yield [sidecar.address for sidecar in sidecars]
    for sidecar in sidecars:
        sidecar.stop()


def run(*args, **variables):
    env = {name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"} | variables
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, env=env, timeout=300)


def test_children_work_or_are_refused_and_never_hang(endpoints):
    done = run(CASES, *endpoints)
    assert done.returncode == 0, done.stderr
    for case, ended in json.loads(done.stdout).items():
        use = case.partition(": ")[2] or case
        works = use in (*LEAVE_ALONE, "before the first client") or case.startswith("command")
        expected = "worked" if works else "refused"
        assert ended in (expected, [expected] * 4), case


def test_grpcs_own_fork_handlers_are_off_unless_they_were_asked_for():
    show = "import os, jdistill; print(jdistill.GRPC_HANDLES_FORK, os.environ['GRPC_ENABLE_FORK_SUPPORT'])"
    assert run("-c", show).stdout == "False 0\n"
    assert run("-c", f"import grpc; {show}").stdout == "True 0\n"  # too late for this process
    assert run("-c", show, GRPC_ENABLE_FORK_SUPPORT="1").stdout == "True 1\n"


def test_a_fork_with_grpcs_own_handlers_is_warned_of(endpoints):
    fork = (
        "import grpc, os; from jdistill.client import TeacherClient\n"
        f"with TeacherClient(['{endpoints[0]}']) as client:\n client.info()\n (pid := os.fork()) or os._exit(0)\n"
    )
    assert "set GRPC_ENABLE_FORK_SUPPORT=0, or import jdistill before grpc" in run("-c", fork).stderr
