"""Programs in processes with several virtual devices: JAX fixes their number when it starts."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def environment(num):
    """Returns the environment of a process with `num` CPU devices, and the compiler's flags of this one."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def run_on_devices(num, code, *args):
    """Runs Python code in a process with `num` CPU devices and returns its output; fails with its errors.

    pytest's own limit ends it when it hangs.

    Args:
        num: virtual CPU devices.
        code: run from the repository's root, so that it may import `tests`.
        args: sys.argv[1:] of the process.
    """
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=environment(num), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
