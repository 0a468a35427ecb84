"""A forked worker of a trainer takes neither its sidecar nor its signals."""

import signal
import subprocess
import sys

SCRIPT = """
import os, pathlib, signal, sys, time
from jdistill.config import SpawnSection
from jdistill.student import hosts
from jdistill.student.signals import StopSignals
from jdistill.student.teacher_process import TeacherProcess, is_serving

directory = pathlib.Path(sys.argv[1])
spawn = SpawnSection(engine="fake", model=str(directory))
with TeacherProcess(spawn, directory / "teacher.log") as teacher, StopSignals() as stop, stop.held():
    if (leaver := os.fork()) == 0:
        sys.exit(5)  # leaves all blocks
    if (worker := os.fork()) == 0:
        time.sleep(60)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(leaver, 0)[1]))
    os.kill(worker, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
    print(is_serving(teacher.endpoint), teacher.restarts)
"""


def test_forked_workers_end_by_themselves_and_leave_the_sidecar_running(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["5", str(-signal.SIGTERM), "True", "0"], done.stderr
