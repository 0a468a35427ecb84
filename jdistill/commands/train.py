"""`jdistill train`: runs one YAML configuration."""

from __future__ import annotations

import argparse
import sys

from jdistill.config import TrainConfig, describe, load

DESCRIPTION = """\
Train a student with the configuration in a YAML file: reinforcement learning, on-policy distillation from a teacher
behind gRPC, both in one step, or supervised. Any key can be overridden on the command line; an unknown key is an error.

examples:
  jdistill train configs/demo.yaml
  jdistill train configs/demo.yaml objective.distill_loss_weight=0 optimizer.learning_rate=1e-4 run_dir=runs/rl_only
  jdistill train configs/demo.yaml teacher.endpoints='[gpu7:50051, gpu8:50051]' teacher.spawn=null
  jdistill train configs/demo.yaml --resume
  srun jdistill train configs/demo.yaml --distributed

The run directory holds metrics.jsonl (one line per step, the same for the same seed), timings.jsonl, config.json,
teacher.log and checkpoints/. A run can be resumed elsewhere (other devices, mesh, hosts, teachers' addresses) or for
longer; changes.jsonl records it. A start that fails leaves no run behind.

`jdistill plot RUN...` draws runs, `jdistill export RUN --to DIR` writes the student as a Hugging Face checkpoint.

exit codes: 0 done, 1 the teacher or the numbers failed (state saved), 2 the configuration was wrong, 130 Ctrl-C and
143 SIGTERM (state saved)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.epilog = describe.help_text(TrainConfig)
    parser.add_argument("config", help="YAML file (see configs/)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides; values are YAML")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue from the newest checkpoint, bit for bit")
    again.add_argument(
        "--overwrite", action="store_true", help="delete an earlier run in run_dir, once this one begins"
    )
    several = parser.add_argument_group("several hosts", "the same command on each; see docs/multi_host.md")
    several.add_argument(
        "--distributed",
        action="store_true",
        help="this is one of several processes; Slurm, Open MPI and Kubernetes set the three options below",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, with any free port")
    several.add_argument("--num-processes", type=int, metavar="P", help="number of processes")
    several.add_argument("--process-id", type=int, metavar="I", help="index of this process, from 0")


def run(args: argparse.Namespace) -> int:
    """Trains; see DESCRIPTION for the exit codes."""
    parsed = load(TrainConfig, args.config, args.overrides)  # before jax is imported: a typo is reported at once
    from jdistill.student import hosts
    from jdistill.student.signals import Stopped
    from jdistill.student.train import TrainingError, train

    given = (args.coordinator, args.num_processes, args.process_id)
    if args.distributed or any(one is not None for one in given):
        hosts.initialize(*given)
    try:
        train(parsed, resume=args.resume, overwrite=args.overwrite)
    except (Stopped, TrainingError) as e:
        print("\n".join([f"jdistill train: {e}", *getattr(e, "__notes__", [])]), file=sys.stderr)
        return e.exit_code if isinstance(e, Stopped) else 1
    return 0
