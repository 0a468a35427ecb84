"""Pictures and HTML pages that compare runs.

A group is one arm of a comparison: a label and one run per seed. Its line is the mean over the runs, its band the range
from the smallest to the largest value.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

from jdistill.report.page import page_of
from jdistill.report.picture import pictures
from jdistill.report.runs import Run, group_by_seed, read_run
from jdistill.report.summary import Summary, summarize, table

__all__ = ["Run", "Summary", "draw", "group_by_seed", "read_run", "table"]

Groups = Mapping[str, Sequence[str | pathlib.Path]]


def draw(
    groups: Groups,
    out_png: str | pathlib.Path,
    out_html: str | pathlib.Path,
    title: str,
    notes: Sequence[str] = (),
    *,
    teacher: Mapping[str, float] | None = None,
    commands: Sequence[str] = (),
) -> list[Summary]:
    """Draw groups of runs; write the picture, and an HTML page with picture, final numbers and configurations.

    Args:
        groups: label -> run directories, one per seed; colours follow this order.
        out_png, out_html: files to write; their directories are created.
        title: title of the picture and the page.
        notes: paragraphs below the final numbers.
        teacher: metric -> the teacher's own value, drawn as a dashed line, e.g. {"eval/accuracy": 0.988}.
        commands: shell commands that reproduce the comparison, for the page.

    Returns:
        The final numbers, one Summary per group.

    Raises:
        FileNotFoundError: a run without metrics.jsonl.
        ValueError: nothing to draw, or a broken file (names file and line).
    """
    if not groups or not all(groups.values()):
        raise ValueError("nothing to draw: every group needs at least one run directory")
    runs = {label: [read_run(path) for path in paths] for label, paths in groups.items()}
    summaries = [summarize(label, members) for label, members in runs.items()]
    out_png, out_html = pathlib.Path(out_png), pathlib.Path(out_html)
    png, svg = pictures(runs, title, teacher or {})
    page = page_of(runs, summaries, svg, title, notes, teacher or {}, commands)
    for path, content in ((out_png, png), (out_html, page.encode())):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return summaries
