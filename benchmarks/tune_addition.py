"""Runs every arm of the demo over one grid of learning rates, so that each is compared at its own best setting.

    python benchmarks/tune_addition.py [--seeds 0] [--to runs/tune] [--output benchmarks/results/tune_addition.md]

Writes one table of held-out accuracy after the last step, sampled at T=1 and greedy. `jdistill demo` uses the rate that
is best by T=1 accuracy.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import pathlib
import sys

from jdistill import config
from jdistill.commands.demo import ARMS, DEFAULT_ARMS
from jdistill.student import metrics
from jdistill.student.teacher_process import TeacherProcess
from jdistill.student.train import train

GRID = (5e-5, 1e-4, 2e-4, 3e-4, 6e-4, 1e-3, 2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--to", type=pathlib.Path, default=pathlib.Path("runs/tune"))
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/tune_addition.md"))
    parser.add_argument("--grid", type=float, nargs="+", default=GRID)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    base = config.load(config.TrainConfig, "configs/demo.yaml", args.overrides)
    assert base.teacher is not None and base.teacher.spawn is not None
    rows = []
    with TeacherProcess(base.teacher.spawn, args.to / "teacher.log") as teacher:
        for arm in DEFAULT_ARMS:
            for rate in args.grid:
                finals = [final_accuracy(args, teacher.endpoint, arm, rate, seed) for seed in args.seeds]
                sampled, greedy = (sum(values) / len(values) for values in zip(*finals, strict=True))
                rows.append(f"| {arm} | {rate:g} | {sampled:.3f} | {greedy:.3f} |")
                print(rows[-1], flush=True)
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax"))
    header = [
        "# The demo's arms over one grid of learning rates",
        "",
        f"`python {' '.join(sys.argv)}`, {datetime.date.today()}, Python {sys.version.split()[0]}, {versions}, CPU.",
        f"Held-out accuracy after {base.num_steps} steps, mean over seeds {args.seeds}.",
        "",
        "| arm | learning rate | T=1 | greedy |",
        "|---|---|---|---|",
    ]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("\n".join(header + rows) + "\n")


def final_accuracy(args: argparse.Namespace, endpoint: str, arm: str, rate: float, seed: int) -> tuple[float, float]:
    """Return T=1 and greedy accuracy after the last step of a run; a finished run is reused."""
    run_dir = args.to / f"{arm.replace(' ', '_')}-{rate:g}-{seed}"
    overrides = [*args.overrides, *ARMS[arm], f"optimizer.learning_rate={rate!r}", f"seed={seed}", f"run_dir={run_dir}"]
    overrides += ["teacher.spawn=null", f"teacher.endpoints=['{endpoint}']"]
    run = config.load(config.TrainConfig, "configs/demo.yaml", overrides)
    metrics_path = run_dir / "metrics.jsonl"
    if not metrics_path.exists() or metrics.read(metrics_path)[-1]["step"] < run.num_steps:
        train(run, overwrite=True, label=f"{arm} {rate:g}")
    last = metrics.read(metrics_path)[-1]
    return last["eval/accuracy"], last["eval/accuracy_greedy"]


if __name__ == "__main__":
    main()
