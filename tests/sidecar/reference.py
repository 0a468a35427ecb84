"""Logits from bare transformers: one process per test run, which shares nothing with any engine.

Loading PyTorch and transformers takes 8 s of processor time, so the process answers many requests.
"""

from __future__ import annotations

import atexit
import functools
import json
import pathlib
import subprocess
import sys

import numpy as np

PROGRAM = """
import json, sys, traceback
import numpy as np, torch, transformers
transformers.utils.logging.disable_progress_bar()
for line in sys.stdin:
    path, sequences, out = json.loads(line)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            logits = {str(i): model(torch.tensor([ids])).logits[0].numpy() for i, ids in enumerate(sequences)}
        np.savez(out, **logits)
        error = ""
    except Exception:
        error = traceback.format_exc()
    print(json.dumps(error), flush=True)
"""


@functools.cache
def _process() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(_end, process)
    return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def reference_logits(path: pathlib.Path, sequences: list[np.ndarray], out: pathlib.Path) -> list[np.ndarray]:
    """Returns the float32 logits [S, V] of each sequence alone; writes them to `out`, an .npz file."""
    process = _process()
    assert process.stdin is not None and process.stdout is not None
    print(json.dumps([str(path), [ids.tolist() for ids in sequences], str(out)]), file=process.stdin, flush=True)
    answer = process.stdout.readline()
    assert answer, f"the process of bare transformers has ended: {process.wait()}"
    error = json.loads(answer)
    assert not error, error
    with np.load(out) as logits:
        return [logits[str(i)] for i in range(len(sequences))]
