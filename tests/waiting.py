"""Waits for a state instead of a time."""

import time


def wait_until(condition, timeout_s=60.0, *, what="it", process=None):
    """Waits until `condition()` is true and returns its value; the limit is far above what a busy machine needs.

    Args:
        condition: called without arguments, about 100 times a second.
        timeout_s: seconds before the test fails.
        what: names the event in the failure's message.
        process: a Popen object with stderr piped that brings the event about; fails at once, with its stderr, if it
            ends. None: no such process.
    """
    give_up = time.monotonic() + timeout_s
    while not (value := condition()):
        assert process is None or process.poll() is None, f"ended with {process.returncode}: {process.stderr.read()}"
        assert time.monotonic() < give_up, f"{what} did not happen within {timeout_s:g} s"
        time.sleep(0.01)
    return value
