"""The one command: `jdistill teacher | train | plan | score | probe | sample | eval | export | plot | demo`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import jdistill

# One line per command, in the order in which users need them. A command's module is imported only when that command
# runs, so `jdistill probe` works where neither jax nor vLLM is installed.
COMMANDS = {
    "demo": "watch a JAX student learn from a teacher behind gRPC, three ways, in a few minutes",
    "teacher": "serve a model's token log-probabilities over gRPC (vLLM, transformers, JAX)",
    "probe": "show what a running teacher serves, whether it is healthy, and how fast it answers",
    "score": "score token sequences from a JSONL file, with an engine in process or a running teacher",
    "train": "train a student: RL, on-policy distillation, both in one step, or supervised",
    "plan": "estimate the memory of a training run from its configuration alone",
    "eval": "measure a checkpoint's accuracy on a task's held-out problems",
    "sample": "sample completions from a checkpoint",
    "export": "write a run's student as a Hugging Face checkpoint",
    "plot": "draw runs side by side (PNG and a self-contained HTML page)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 success, 1 the work failed, 2 the request was wrong, 130 Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="jdistill",
        description=jdistill.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="`jdistill COMMAND --help` explains a command, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"jdistill {jdistill.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        if name != chosen:
            subparsers.add_parser(name, help=summary, add_help=False)
            continue
        try:
            module = importlib.import_module(f"jdistill.commands.{name}")
            subparser = subparsers.add_parser(
                name,
                help=summary,
                description=module.DESCRIPTION,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
            module.add_arguments(subparser)
        except ModuleNotFoundError as e:
            return _missing(name, e)
        subparser.set_defaults(run=module.run)
    args, rest = parser.parse_known_args(argv)
    # argparse accepts overrides only in one run of words; users also write `train a.yaml k=v --resume k=v`.
    if rest and hasattr(args, "overrides") and all("=" in word and not word.startswith("-") for word in rest):
        args.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from jdistill.wire.errors import TeacherError

    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f"jdistill {args.command}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as e:
        return _missing(args.command, e)
    except (TeacherError, ValueError, FileNotFoundError) as e:  # the user's mistake or the network's: no traceback
        print("\n".join([f"jdistill {args.command}: {e}", *getattr(e, "__notes__", [])]), file=sys.stderr)
        return 2 if isinstance(e, (ValueError, FileNotFoundError)) else 1


EXTRA_OF_MODULE = {
    "pydantic": "cli",
    "ruamel": "cli",
    "rich": "cli",
    "prometheus_client": "server",
    "grpc_reflection": "server",
    "pythonjsonlogger": "server",
    "jax": "student",
    "flax": "student",
    "optax": "student",
    "torch": "transformers",
    "vllm": "vllm",
}


def _missing(command: str, error: ModuleNotFoundError) -> int:
    root = (error.name or "").partition(".")[0]
    if root == "jdistill":
        raise error  # a bug of ours, not a missing package
    extra = EXTRA_OF_MODULE.get(root, "student")
    print(f"jdistill {command}: needs {root}, which is not installed: pip install 'jdistill[{extra}]'", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
