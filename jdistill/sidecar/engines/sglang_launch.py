"""Becomes SGLang's server: `python -m jdistill.sidecar.engines.sglang_launch PARENT_PID --model-path ...`.

The server is killed when the sidecar ends, even by SIGKILL. SIGTERM would not do: SGLang took 4 to 18 s to end after it
while holding the GPU's memory. Its schedulers ask the kernel for the same, so they end with it.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys


def main() -> None:
    """See the module."""
    parent_pid = int(sys.argv.pop(1))
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent_pid:  # it ended before we asked
            sys.exit(1)
    else:
        from jdistill.sidecar.process import exit_with_parent

        exit_with_parent(parent_pid)
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
