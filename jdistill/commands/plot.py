"""`jdistill plot`: runs side by side, as a PNG and a self-contained HTML page."""

from __future__ import annotations

import argparse
import os
import pathlib

DESCRIPTION = """\
Draw runs side by side: held-out accuracy, reward and reverse KL against sampled tokens, with final numbers and
configuration differences. Runs that differ only in their seed form one line, with a band from the smallest to the
largest value. Unfinished runs can be drawn too.

examples:
  jdistill plot runs/demo/*-seed*
  jdistill plot runs/a runs/b --to picture --title "two learning rates"
  jdistill plot --group "RL only=runs/rl0,runs/rl1" --group "RL + distillation=runs/d0,runs/d1" --teacher-accuracy 0.988

Writes plot.png and plot.html. exit codes: 0 drawn, 2 a run has nothing to draw."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="run directories; runs that differ only in their seed form a group"
    )
    parser.add_argument(
        "--group",
        action="append",
        default=[],
        metavar="LABEL=RUN,RUN",
        help="a label and the runs of its seeds; may be repeated",
    )
    parser.add_argument(
        "--to", type=pathlib.Path, metavar="DIR", help="output directory (default: the common parent of the runs)"
    )
    parser.add_argument(
        "--title", default="Runs of jdistill", help="title of the picture and the page (default: %(default)s)"
    )
    parser.add_argument(
        "--note", action="append", default=[], help="paragraph below the final numbers; may be repeated"
    )
    parser.add_argument(
        "--teacher-accuracy",
        type=float,
        metavar="SHARE",
        help="teacher's held-out accuracy, sampled; drawn as a dashed line",
    )
    parser.add_argument("--teacher-greedy", type=float, metavar="SHARE", help="teacher's held-out accuracy, greedy")


def run(args: argparse.Namespace) -> int:
    """Draw the runs; print the final numbers and the paths of the files."""
    from rich.console import Console

    from jdistill import report

    groups: dict[str, list[pathlib.Path]] = {}
    for text in args.group:
        label, equals, paths = text.rpartition("=")
        members = [pathlib.Path(path) for path in paths.split(",") if path]
        if not equals or not label or not members:
            raise ValueError(f"--group {text!r}: expected LABEL=RUN,RUN")
        if label in groups:
            raise ValueError(f"--group {label!r} is given twice: list all of its runs in one --group LABEL=RUN,RUN")
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
