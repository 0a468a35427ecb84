"""`jdistill plot`: runs side by side, as a PNG and a self-contained HTML page."""

from __future__ import annotations

import argparse
import os
import pathlib

DESCRIPTION = """\
Draw runs side by side: held-out accuracy, reward and reverse KL against sampled tokens, with the final numbers and what
differs between their configurations. Runs that differ only in their seed are one line, with a band from the smallest to
the largest. Works on runs that are still going.

examples:
  jdistill plot runs/demo/*-seed*
  jdistill plot runs/a runs/b --to picture --title "two learning rates"
  jdistill plot --group "RL only=runs/rl0,runs/rl1" --group "RL + distillation=runs/d0,runs/d1" --teacher-accuracy 0.988

Writes plot.png and plot.html. exit codes: 0 drawn, 2 a run has nothing to draw."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run directories; grouped by all but the seed")
    parser.add_argument("--group", action="append", default=[], metavar="LABEL=RUN,RUN", help="a line and its seeds")
    parser.add_argument("--to", type=pathlib.Path, metavar="DIR", help="default: the directory that holds the runs")
    parser.add_argument("--title", default="Runs of jdistill", help="default: %(default)s")
    parser.add_argument("--note", action="append", default=[], help="a paragraph under the numbers; may be repeated")
    parser.add_argument(
        "--teacher-accuracy", type=float, metavar="SHARE", help="draws the teacher's, sampled, as a line"
    )
    parser.add_argument("--teacher-greedy", type=float, metavar="SHARE", help="the same for greedy decoding")


def run(args: argparse.Namespace) -> int:
    """Draws; prints the table and where the files are."""
    from rich.console import Console

    from jdistill import report

    groups: dict[str, list[pathlib.Path]] = {}
    for text in args.group:
        label, equals, paths = text.rpartition("=")
        members = [pathlib.Path(path) for path in paths.split(",") if path]
        if not equals or not label or not members:
            raise ValueError(f"--group {text!r}: expected LABEL=RUN,RUN")
        if label in groups:
            raise ValueError(f"--group {label!r} is given twice: list all its runs in one, LABEL=RUN,RUN")
        groups[label] = members
    for label, members in report.group_by_seed(args.runs).items():
        if label in groups:
            raise ValueError(f"{members[0]} would be a second group {label!r}: name it with --group LABEL={members[0]}")
        groups[label] = members
    if not groups:
        raise ValueError("nothing to draw: give run directories, e.g. jdistill plot runs/demo/*")
    to = args.to or pathlib.Path(
        os.path.commonpath([path.resolve().parent for runs in groups.values() for path in runs])
    )
    teacher = {"eval/accuracy": args.teacher_accuracy, "eval/accuracy_greedy": args.teacher_greedy}
    teacher = {metric: value for metric, value in teacher.items() if value is not None}
    png, page = to / "plot.png", to / "plot.html"
    summaries = report.draw(groups, png, page, args.title, args.note, teacher=teacher)
    console = Console(highlight=False)
    console.print(report.table(summaries, teacher))
    console.print(f"\nPicture: {png}  Page: {page}", soft_wrap=True)
    return 0
