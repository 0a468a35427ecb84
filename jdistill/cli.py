"""The one command: `jdistill teacher | train | plan | score | probe | sample | eval | export | plot | demo`."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Sequence

import jdistill
from jdistill import exit_status

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
            return _missing(name, e, wants_help=not {"-h", "--help"}.isdisjoint(argv))
        subparser.set_defaults(run=module.run)
    args, rest = parser.parse_known_args(argv)
    # argparse accepts overrides only in one run of words; users also write `train a.yaml k=v --resume k=v`.
    if rest and hasattr(args, "overrides") and all("=" in word and not word.startswith("-") for word in rest):
        args.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f"jdistill {args.command}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as e:
        return _missing(args.command, e)
    except BrokenPipeError:  # `jdistill sample ... | head`: what the interpreter flushes at its end has no reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as e:
        found = exit_status.of_error(e)
        if found is None:
            raise
        print(f"jdistill {args.command}: {found[0]}", file=sys.stderr)
        return found[1]


# The pip extra with which a command works; an engine's own libraries are named by the engine.
EXTRAS = {"probe": "cli", "score": "cli", "teacher": "vllm"}  # the others: student


def _missing(command: str, error: ModuleNotFoundError, *, wants_help: bool = False) -> int:
    """Says what a command needs; shows its description all the same if that was asked for."""
    root = (error.name or "").partition(".")[0]
    if root == "jdistill":
        raise error  # a bug of ours, not a missing package
    needs = f"needs {root}, which is not installed: pip install 'jdistill[{EXTRAS.get(command, 'student')}]'"
    if command == "teacher":
        needs += ", or, for another engine, [sglang], [http], [transformers] or [student] (jax)"
    if wants_help:
        print(f"usage: jdistill {command} ...\n\n{_description(command)}\n\nTo list the options it {needs}")
        return 0
    print(f"jdistill {command}: {needs}", file=sys.stderr)
    return 1


def _description(command: str) -> str:
    """The command's DESCRIPTION, read from its source: the module cannot be imported."""
    spec = importlib.util.find_spec(f"jdistill.commands.{command}")
    assert spec is not None and spec.origin is not None
    for node in ast.parse(pathlib.Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "DESCRIPTION":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{spec.origin} has no DESCRIPTION")


if __name__ == "__main__":
    sys.exit(main())
