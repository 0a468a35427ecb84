"""`jdistill demo`: three ways to train the same student, side by side."""

from __future__ import annotations

import argparse
import pathlib
import re
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jdistill.config import TrainConfig

DESCRIPTION = """\
Watch a JAX student learn 3-digit addition on-policy from a teacher behind gRPC. The teacher is a separate process
(`jdistill teacher`). In each arm the student starts from the same checkpoint and samples the same number of tokens:
  RL only               reward alone (GRPO)
  distillation only     reverse KL to the teacher over the student's own top-k
  RL + distillation     both in one loss

At the end it writes a table, a picture (demo.png) and a self-contained page (demo.html) of held-out accuracy against
sampled tokens.
Run it in a clone of the repository: it reads configs/demo.yaml and examples/addition.

examples:
  jdistill demo
  jdistill demo --teacher vllm --teacher-python .venv-vllm/bin/python
  jdistill demo num_steps=200 eval.every=20 --seeds 0 1 2 --arms all --to runs/figure      # the README's picture"""

# Arm -> overrides of configs/demo.yaml. RL runs at the best rate of its grid (benchmarks/results/tune_addition.md). The
# arms with distillation run at 6e-4: 1e-3 is their best rate by accuracy at temperature 1, but not by greedy accuracy.
ARMS = {
    "RL only": ["objective.distill_loss_weight=0", "objective.rl_loss_weight=1", "optimizer.learning_rate=2e-4"],
    "distillation only": ["objective.rl_loss_weight=0"],
    "RL + distillation": [],
    "RL + distillation, RL's learning rate": ["optimizer.learning_rate=2e-4"],
}
NOTES = (
    "Every arm starts from the same student, takes the same number of steps and was tuned over the same grid of "
    "learning rates (benchmarks/results/tune_addition.md). RL runs at its best one; it collapses at 6e-4, where the "
    "arms with distillation run. The fourth arm of `make figure` has RL's rate: how much of the gap is the rate.",
    "What this does not show: the teacher is nearly perfect here, so RL + distillation has nothing to gain over "
    "distillation alone. A reward adds something where the teacher is wrong, and this task does not test that.",
)
DEFAULT_ARMS = ("RL only", "distillation only", "RL + distillation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "--teacher", default="jax", metavar="ENGINE", help="engine of the sidecar: jax, transformers or vllm"
    )
    parser.add_argument(
        "--teacher-python", metavar="PATH", help="interpreter of the teacher's environment (default: this one)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="run each arm once per seed (default: 0)")
    parser.add_argument(
        "--arms", default="main", choices=["main", "all"], help="all: also run RL + distillation at RL's learning rate"
    )
    parser.add_argument(
        "--to",
        type=pathlib.Path,
        default=pathlib.Path("runs/demo"),
        metavar="DIR",
        help="output directory (default: runs/demo)",
    )
    parser.add_argument("--picture", type=pathlib.Path, metavar="PNG", help="also copy the picture here")
    parser.add_argument("--overwrite", action="store_true", help="delete the runs of an earlier demo in DIR")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="overrides for every arm, e.g. num_steps=30"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the arms one after another with one sidecar; returns the exit code."""
    config_path = pathlib.Path("configs/demo.yaml")
    if not config_path.exists():
        raise FileNotFoundError("no configs/demo.yaml here: run `jdistill demo` in a clone of the repository")
    from rich.console import Console

    from jdistill import config, report
    from jdistill.student.teacher_process import TeacherProcess
    from jdistill.student.train import train

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console = Console(stderr=True, highlight=False, width=120)  # a file has no width; the table needs 120
    began = time.monotonic()
    base, note = _base(config_path, args)
    assert base.teacher is not None and base.teacher.spawn is not None
    spawn = base.teacher.spawn
    groups: dict[str, list[pathlib.Path]] = {}
    run_dirs = _run_dirs(args)
    args.to.mkdir(parents=True, exist_ok=True)
    if note:
        console.print(note)
    console.print(f"starting the teacher: {args.teacher}, {spawn.model} (log: {args.to / 'teacher.log'})")
    with TeacherProcess(spawn, args.to / "teacher.log") as teacher:
        console.print(f"the teacher serves on {teacher.endpoint}, process {teacher.pid}")
        for (arm, seed), run_dir in run_dirs.items():
            overrides = [
                *args.overrides,
                *ARMS[arm],
                f"seed={seed}",
                f"run_dir={run_dir}",
                "teacher.spawn=null",
                f"teacher.endpoints=['{teacher.endpoint}']",
            ]
            label = arm if len(args.seeds) == 1 else f"{arm}, seed {seed}"
            train(config.load(config.TrainConfig, config_path, overrides), overwrite=args.overwrite, label=label)
            groups.setdefault(arm, []).append(run_dir)
    accuracy = _teacher_accuracy(base, spawn.model)
    png, html = args.to / "demo.png", args.to / "demo.html"
    command = ["jdistill demo", f"--teacher {args.teacher}", f"--seeds {' '.join(map(str, args.seeds))}"]
    summaries = report.draw(
        groups,
        png,
        html,
        title="3-digit addition: one student, trained three ways",
        notes=NOTES,
        teacher=accuracy,
        commands=[" ".join([*command, f"--arms {args.arms}", *args.overrides])],
    )
    if args.picture is not None:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        args.picture.write_bytes(png.read_bytes())
    console.print()
    console.print(report.table(summaries, accuracy))
    console.print(f"\n{(time.monotonic() - began) / 60:.1f} minutes\npicture: {png}\npage:    {html}")
    return 0


def _base(path: pathlib.Path, args: argparse.Namespace) -> tuple[TrainConfig, str]:
    """The configuration with the teacher that was asked for, and which GPUs are whose ("": there are none)."""
    from jdistill import config
    from jdistill.student import devices

    base = config.load(config.TrainConfig, path, args.overrides)
    assert base.teacher is not None and base.teacher.spawn is not None
    spawn = base.teacher.spawn.model_copy(update={"engine": args.teacher, "python": args.teacher_python})
    return devices.reserve(base.model_copy(update={"teacher": base.teacher.model_copy(update={"spawn": spawn})}))


def _run_dirs(args: argparse.Namespace) -> dict[tuple[str, int], pathlib.Path]:
    """The directory of each arm and seed, in the order in which they run; an earlier demo's runs are refused."""
    from jdistill.student.run_dir import has_steps

    arms = DEFAULT_ARMS if args.arms == "main" else ARMS
    found = {(arm, seed): args.to / f"{_slug(arm)}-seed{seed}" for seed in args.seeds for arm in arms}
    earlier = [path for path in found.values() if has_steps(path)]
    if earlier and not args.overwrite:
        raise ValueError(f"{earlier[0]} holds a run already: --overwrite deletes it, --to DIR uses another directory")
    return found


def _teacher_accuracy(base: TrainConfig, path: str) -> dict[str, float]:
    """Measures the teacher's own held-out accuracy, the limit of distillation."""
    from flax import nnx

    from jdistill import models, tasks
    from jdistill.rollout.sampler import Sampler
    from jdistill.student.evaluate import held_out_accuracy

    task = tasks.create_task(base.task.name, base.task.options, path)
    graphdef, params = nnx.split(models.load(path, compute_dtype=base.model.compute_dtype), nnx.Param)
    sampler = Sampler(
        graphdef,
        max_prompt_tokens=base.rollout.max_prompt_tokens,
        max_new_tokens=base.rollout.max_new_tokens,
        stop_token_ids=task.stop_token_ids,
        min_new_tokens=base.rollout.min_new_tokens,
        stop_strings=base.rollout.stop_strings,
        decode=task.decode,
        include_stop=base.rollout.include_stop_str_in_output,
    )
    problems = task.eval_problems(base.eval.num_prompts)
    return held_out_accuracy(
        sampler, sampler.prepare(params), task, problems, temperature=base.rollout.temperature, seed=0
    )


def _slug(arm: str) -> str:
    return re.sub("[^a-z0-9]+", "_", arm.lower())
