"""Forks a process that has a TeacherClient, in every usual way; prints how each child ended, as JSON.

Run as `fork_cases.py ENDPOINT SLOW_ENDPOINT`: of a teacher, and of one that takes its time.
"""

import concurrent.futures
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import time

import numpy as np

from jdistill.client import SequenceToScore, TeacherClient

ENDPOINT, SLOW_ENDPOINT = sys.argv[1:]
SEQUENCE = SequenceToScore(np.arange(5, dtype=np.int32), ((1, 5),))
LIMIT_S = 30.0
REFUSED, WORKED = 3, 4
NAMES = {REFUSED: "refused", WORKED: "worked"}

clients = {}  # of the parent
futures = []


def new_client():
    with TeacherClient([ENDPOINT], deadline_s=20) as client:
        client.score([SEQUENCE])


def delete():
    clients.clear()
    futures.clear()
    gc.collect()


def enter():
    with clients["fast"]:
        pass


USES = {
    "nothing": lambda: None,
    "score": lambda: clients["fast"].score([SEQUENCE]),
    "submit": lambda: clients["fast"].submit(SEQUENCE).result(),
    "info": lambda: clients["fast"].info(),
    "sleep": lambda: clients["fast"].sleep(),
    "close": lambda: clients["fast"].close(),
    "with": enter,
    "delete": delete,
    "result of the parent's": lambda: futures[0].result(),
    "wait for the parent's": lambda: next(concurrent.futures.as_completed(futures, timeout=20)).result(),
    "new client": new_client,
    "new client, never closed": lambda: TeacherClient([ENDPOINT]).score([SEQUENCE]),
}


def outcome(use):
    """Exit code of a child that does this."""
    try:
        USES[use]()
    except RuntimeError as e:
        return REFUSED if "was forked from process" in str(e) and '"spawn"' in str(e) else 1
    return WORKED


def ended(pid):
    """Waits for a child, at most LIMIT_S."""
    give_up = time.monotonic() + LIMIT_S
    while time.monotonic() < give_up:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return NAMES.get(code := os.waitstatus_to_exitcode(status), code)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "hangs"


def fork(use, leave):
    """Ends the child with sys.exit, which runs atexit functions and destructors, or with os._exit."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = outcome(use)
        finally:
            leave(code)
    return ended(pid)


def process(use):
    child = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(outcome(use)))
    child.start()
    return ended(child.pid)


def pool(use):
    with multiprocessing.get_context("fork").Pool(2) as workers:
        return [NAMES[code] for code in workers.map_async(outcome, [use] * 4).get(LIMIT_S)]


def executor(use):
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as workers:
        return [NAMES[code] for code in workers.map(outcome, [use] * 4, timeout=LIMIT_S)]


def command(use):
    subprocess.run([sys.executable, "-c", ""], preexec_fn=lambda: outcome(use), timeout=LIMIT_S, check=True)
    return "worked"


def main():
    found = {"before the first client": fork("new client", sys.exit)}
    clients["fast"], clients["slow"] = TeacherClient([ENDPOINT]), TeacherClient([SLOW_ENDPOINT])
    clients["fast"].info(), clients["slow"].info()
    for use in USES:
        for way, leave in (("fork", sys.exit), ("fork, _exit", os._exit)):
            for future in futures:
                future.cancel()
            futures[:] = [clients["slow"].submit(SEQUENCE)]  # under way
            found[f"{way}: {use}"] = fork(use, leave)
    for way in (process, pool, executor, command):
        for use in ("nothing", "score", "new client"):
            found[f"{way.__name__}: {use}"] = way(use)
    scores = [future.result(LIMIT_S).logprobs.tolist() for future in futures]
    assert scores == [clients["fast"].score([SEQUENCE])[0].logprobs.tolist()] * len(scores)
    for client in clients.values():
        client.close()
    found["closed client"] = fork("nothing", sys.exit)
    found["new client after all are closed"] = fork("new client", sys.exit)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
