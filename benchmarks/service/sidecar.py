"""The complete `jdistill teacher`, with the benchmark's engines in its table."""

from __future__ import annotations

import sys

from jdistill import cli
from jdistill.sidecar import engines

if __name__ == "__main__":
    engines.ENGINES |= {
        "ready": "benchmarks.service.engines:ReadyEngine",
        "waiting": "benchmarks.service.engines:WaitingEngine",
        "measured-vllm": "benchmarks.service.engines:MeasuredVllm",
    }
    sys.exit(cli.main(["teacher", *sys.argv[1:]]))
