"""Runs side by side: held-out accuracy against sampled tokens, as a PNG and as one self-contained HTML page.

A group is an arm of a comparison: one label, one run for each seed. Its line is the mean over the runs, its band their
smallest and largest value.
"""

from __future__ import annotations

import dataclasses
import html
import io
import json
import math
import pathlib
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Groups = Mapping[str, Sequence[str | pathlib.Path]]


@dataclasses.dataclass(frozen=True)
class Panel:
    """One metric, drawn."""

    metric: str  # a name in metrics.jsonl
    title: str
    unit: str  # under the title
    is_share: bool  # from 0 to 1
    smooth: bool  # one noisy value a step, rather than an evaluation now and then


# In the order in which they are drawn; the first one that the runs have is the large one.
PANELS = (
    Panel(
        "eval/accuracy",
        "Held-out accuracy, sampled",
        "share of problems never trained on, one sample each",
        True,
        False,
    ),
    Panel("eval/accuracy_greedy", "Held-out accuracy, greedy", "share of problems never trained on", True, False),
    Panel("reward", "Reward in training", "mean of {window} steps", True, True),
    Panel("reverse_kl", "Reverse KL to the teacher", "nats a token, mean of {window} steps", False, True),
    Panel("loss", "Loss", "mean of {window} steps", False, True),
)
SMALL_PANELS = 3
WINDOW = 9  # steps that a noisy metric is averaged over

# Distinguishable with any colour vision, and on white and on black: Okabe and Ito's, and Tol's purple.
COLORS = ("#0072b2", "#009e73", "#d55e00", "#aa3377", "#e69f00", "#56b4e9", "#7a7a7a")
DARK_COLORS = ("#58b4f0", "#2ecb9a", "#ff8b4a", "#e27db8", "#f2b632", "#8ad0f7", "#a8a8a8")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
INK, MUTED, GRID, PAPER = "#1f2329", "#5d6670", "#dfe3e8", "#fefefe"


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run directory says."""

    path: pathlib.Path
    config: Mapping[str, Any]  # config.json; empty where there is none
    columns: Mapping[str, Mapping[int, float]]  # metric -> step -> value


@dataclasses.dataclass(frozen=True)
class Summary:
    """The last values of one group: metric -> (mean, smallest, largest) over its runs."""

    label: str
    num_runs: int
    sampled_tokens: float | None  # mean over the runs; None: not trained on-policy
    final: Mapping[str, tuple[float, float, float]]


@dataclasses.dataclass(frozen=True)
class _Curve:
    """A metric of a group, at the steps that all its runs have. Arrays [number of points]."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


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
    """Draws groups of runs, and writes the page with the picture, the final numbers and what was run.

    Args:
        groups: label -> its runs' directories, one for each seed. The order is that of the colours.
        out_png, out_html: files to write; their directories are made.
        title: of the picture and the page.
        notes: what a reader must know, a paragraph each; on the page only.
        teacher: metric -> the teacher's own value, drawn as a dashed line, e.g. {"eval/accuracy": 0.988}.
        commands: how to make all of this again, for the page.

    Returns:
        The final numbers, a Summary for each group.

    Raises:
        FileNotFoundError: a run without metrics.jsonl.
        ValueError: nothing to draw, or a broken file (names file and line).
    """
    if not groups or not all(groups.values()):
        raise ValueError("nothing to draw: every group needs at least one run directory")
    runs = {label: [read_run(path) for path in paths] for label, paths in groups.items()}
    summaries = [_summary(label, members) for label, members in runs.items()]
    out_png, out_html = pathlib.Path(out_png), pathlib.Path(out_html)
    png, svg = _pictures(runs, title, teacher or {})
    page = _page(runs, summaries, svg, title, notes, teacher or {}, commands)
    for path, content in ((out_png, png), (out_html, page.encode())):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return summaries


def table(summaries: Sequence[Summary], teacher: Mapping[str, float] | None = None) -> Any:
    """The final numbers as a `rich.table.Table` for the terminal."""
    from rich.table import Table

    header, rows = _table(summaries, teacher or {})
    result = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(header):
        result.add_column(name, justify="right" if i else "left", no_wrap=i == 0)
    for row in rows:
        result.add_row(*row)
    return result


def read_run(path: str | pathlib.Path) -> Run:
    """Reads metrics.jsonl and config.json of a run; a last line that is still being written is left out."""
    path = pathlib.Path(path)
    metrics_path = path / "metrics.jsonl"
    try:
        text = metrics_path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"no metrics.jsonl in {path}: give the run_dir of a `jdistill train`") from None
    columns: dict[str, dict[int, float]] = {}
    lines = text.split("\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is not a whole line
        try:
            values = json.loads(line)
            step = int(values["step"])
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(
                f"{metrics_path} line {number}: expected a JSON object with a step, got {line[:80]!r}"
            ) from e
        for name, value in values.items():
            if isinstance(value, (int, float)) and name != "step":
                columns.setdefault(name, {})[step] = float(value)
    if not columns:
        raise ValueError(f"{metrics_path} holds no finished step yet")
    config_path = path / "config.json"
    config = json.loads(config_path.read_text()) if config_path.exists() else {}
    return Run(path, config, columns)


def group_by_seed(paths: Sequence[str | pathlib.Path]) -> dict[str, list[pathlib.Path]]:
    """Groups runs whose configurations differ only in seed and place; a group is called what its runs' names share."""
    groups: dict[str, list[pathlib.Path]] = {}
    for path in map(pathlib.Path, paths):
        config = read_run(path).config
        key = json.dumps({k: v for k, v in config.items() if k not in NOT_A_DIFFERENCE}, sort_keys=True)
        groups.setdefault(key if config else str(path), []).append(path)
    labelled: dict[str, list[pathlib.Path]] = {}
    for members in groups.values():
        names = [path.resolve().name for path in members]
        label = names[0]
        if len(members) > 1:
            shared = next(
                i for i in range(len(label) + 1) if len({name[: i + 1] for name in names}) > 1 or i == len(label)
            )
            label = re.sub(r"[-_. ]*(seed)?[-_. ]*$", "", label[:shared]) or label
        if label in labelled:
            label = str(members[0])
        labelled[label] = members
    return labelled


# Keys of a run's configuration that say where and how often rather than what.
NOT_A_DIFFERENCE = ("run_dir", "seed", "teacher", "checkpoint")


def _curve(runs: Sequence[Run], metric: str, window: int = 1) -> _Curve | None:
    """The metric at the steps that every run of the group has; None where there are none."""
    columns = [run.columns.get(metric, {}) for run in runs]
    steps = sorted(set.intersection(*(set(column) for column in columns)))
    steps = [step for step in steps if all(math.isfinite(column[step]) for column in columns)]
    if not steps:
        return None
    values = np.array([[column[step] for step in steps] for column in columns])
    x = np.array([_x(runs, step) for step in steps])
    window = min(window, len(steps))
    if window > 1:  # only whole windows, each at its middle: no invented values at the ends
        kernel = np.ones(window) / window
        values = np.array([np.convolve(row, kernel, mode="valid") for row in values])
        x = np.convolve(x, kernel, mode="valid")
    return _Curve(x, values.mean(axis=0), values.min(axis=0), values.max(axis=0))


def _x(runs: Sequence[Run], step: int) -> float:
    """Sampled tokens at a step, the mean over the runs; the step itself for runs that do not sample."""
    counts = [run.columns["sampled_tokens"].get(step) for run in runs if _samples(run)]
    known = [count for count in counts if count is not None]
    return float(np.mean(known)) if len(known) == len(runs) else float(step)


def _samples(run: Run) -> bool:
    return max(run.columns.get("sampled_tokens", {0: 0.0}).values()) > 0


def _summary(label: str, runs: Sequence[Run]) -> Summary:
    final = {}
    for panel in PANELS:
        curve = _curve(runs, panel.metric, WINDOW if panel.smooth else 1)
        if curve is not None:
            final[panel.metric] = (float(curve.mean[-1]), float(curve.low[-1]), float(curve.high[-1]))
    tokens = None
    if all(map(_samples, runs)):
        tokens = float(np.mean([max(run.columns["sampled_tokens"].values()) for run in runs]))
    return Summary(label, len(runs), tokens, final)


def _pictures(runs: Mapping[str, Sequence[Run]], title: str, teacher: Mapping[str, float]) -> tuple[bytes, str]:
    """The picture as PNG, and as SVG whose colours are CSS variables."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "text.color": INK,
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "ytick.major.size": 0,
        "svg.fonttype": "none",  # text stays text: it can be searched, and it takes the page's font
        "svg.hashsalt": "jdistill",  # the same runs give the same bytes
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11.0, 5.8))
        _draw(figure, runs, title, teacher)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=180, facecolor="#ffffff", metadata={"Software": None})
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return png.getvalue(), _with_variables(svg.getvalue())


def _draw(figure: Any, runs: Mapping[str, Sequence[Run]], title: str, teacher: Mapping[str, float]) -> None:
    curves: dict[str, dict[str, _Curve]] = {}
    for panel in PANELS:
        found = {label: _curve(group, panel.metric, WINDOW if panel.smooth else 1) for label, group in runs.items()}
        if any(curve is not None for curve in found.values()):
            curves[panel.metric] = {label: curve for label, curve in found.items() if curve is not None}
    panels = [panel for panel in PANELS if panel.metric in curves]
    if not panels:
        raise ValueError(f"nothing to draw: the runs have none of {', '.join(panel.metric for panel in PANELS)}")
    large, small = panels[0], panels[1 : 1 + SMALL_PANELS]
    x_label = "sampled tokens" if all(_samples(run) for group in runs.values() for run in group) else "steps"
    colors = {label: COLORS[i % len(COLORS)] for i, label in enumerate(runs)}
    markers = {label: MARKERS[i % len(MARKERS)] for i, label in enumerate(runs)}

    figure.text(0.018, 0.955, title, fontsize=14, fontweight="bold", va="center")
    num_seeds = {len(group) for group in runs.values()}
    spread = "One seed each: the picture shows no spread."
    if max(num_seeds) > 1:
        counts = " to ".join(str(n) for n in sorted({min(num_seeds), max(num_seeds)}))
        spread = f"Line: mean of {counts} seeds. Band: smallest to largest."
    figure.text(0.018, 0.908, spread, color=MUTED, va="center")

    right = max(float(curve.x.max()) for panel in panels for curve in curves[panel.metric].values()) or 1.0
    width = 0.44 if small else 0.72
    axes = figure.add_axes((0.062, 0.108, width, 0.69))
    _panel(axes, large, curves[large.metric], colors, markers, teacher, right, scale=1.0)
    axes.set_xlabel(x_label)
    _direct_labels(axes, large, curves[large.metric], colors)
    height, gap = 0.69, 0.115
    each = (height - gap * (len(small) - 1)) / max(len(small), 1)
    for i, panel in enumerate(small):
        bottom = 0.108 + (len(small) - 1 - i) * (each + gap)
        axes = figure.add_axes((0.735, bottom, 0.25, each))
        _panel(axes, panel, curves[panel.metric], colors, markers, teacher, right, scale=0.7)
        if i == len(small) - 1:
            axes.set_xlabel(x_label)
        else:
            axes.tick_params(labelbottom=False)


def _panel(
    axes: Any,
    panel: Panel,
    curves: Mapping[str, _Curve],
    colors: Mapping[str, str],
    markers: Mapping[str, str],
    teacher: Mapping[str, float],
    right: float,
    scale: float,
) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    big = scale == 1.0
    unit = panel.unit.format(window=WINDOW)
    above = {"xy": (0, 1), "xycoords": "axes fraction", "textcoords": "offset points", "va": "bottom"}
    axes.annotate(panel.title, xytext=(0, 21 if big else 16), fontsize=11 if big else 9.5, fontweight="bold", **above)
    axes.annotate(unit, xytext=(0, 6 if big else 4), fontsize=9.5 if big else 8.5, color=MUTED, **above)
    for label, curve in curves.items():
        if (curve.high > curve.low).any():
            axes.fill_between(curve.x, curve.low, curve.high, color=colors[label], alpha=0.18, linewidth=0)
        marker = {} if panel.smooth else {"marker": markers[label], "markersize": 5.5 * scale}
        axes.plot(
            curve.x,
            curve.mean,
            color=colors[label],
            linewidth=2.2 * scale,
            solid_capstyle="round",
            markeredgecolor=PAPER,
            markeredgewidth=0.8 * scale,
            **marker,
        )
    top = max(float(curve.high.max()) for curve in curves.values())
    bottom = min(float(curve.low.min()) for curve in curves.values())
    if panel.metric in teacher:
        top = max(top, teacher[panel.metric])
        axes.axhline(teacher[panel.metric], color=MUTED, linewidth=1.2 * scale, dashes=(4, 3))
        if big:
            text = f"teacher {teacher[panel.metric]:.3f}"
            axes.annotate(text, (0.012, teacher[panel.metric]), xycoords=("axes fraction", "data"), xytext=(0, -4),
                          textcoords="offset points", color=MUTED, va="top", fontsize=9)  # fmt: skip
    if panel.is_share:
        bottom, top = 0.0, 1.0 if top > 0.5 else top * 1.15
    margin = 0.03 * (top - min(bottom, 0.0)) or 1.0
    axes.set_ylim(min(bottom, 0.0) - margin, top + margin)
    axes.set_xlim(-0.015 * right, right * 1.02)
    axes.yaxis.set_major_locator(MaxNLocator(5 if big else 3, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(6 if big else 4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _count(x)))
    axes.grid(axis="x", visible=False)


def _direct_labels(axes: Any, panel: Panel, curves: Mapping[str, _Curve], colors: Mapping[str, str]) -> None:
    """Each line's name and last value at its right end, moved apart where they would overlap."""
    ends = sorted((float(curve.mean[-1]), label) for label, curve in curves.items())
    low, high = axes.get_ylim()
    box = axes.get_position()
    points = box.height * axes.figure.get_figheight() * 72  # the axes' height
    width = box.width * axes.figure.get_figwidth() * 72
    texts, heights = [], []
    for _, label in ends:
        lines = textwrap.wrap(label, 22)
        texts.append("\n".join(lines))
        heights.append((len(lines) * 13.5 + 13.5 + 7) / points)
    centers = _apart([(value - low) / (high - low) for value, _ in ends], heights)
    for (value, label), text, center, height in zip(ends, texts, centers, heights, strict=True):
        at = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
        # The name and, under it in ink, the value; both start at the top of their box.
        top = center + height / 2
        axes.annotate(text, (1.0, top), xytext=(14, -3), va="top", color=colors[label], fontweight="bold",
                      linespacing=1.15, fontsize=10, **at)  # fmt: skip
        axes.annotate(_range(panel, curves[label]), (1.0, top), xytext=(14, -4 - 13.5 * (text.count("\n") + 1)),
                      va="top", color=INK, fontsize=9.5, **at)  # fmt: skip
        x = (float(curves[label].x[-1]) - axes.get_xlim()[0]) / (axes.get_xlim()[1] - axes.get_xlim()[0])
        axes.annotate("", (x, (value - low) / (high - low)), xytext=(1.0 + 10 / width, center),
                      xycoords="axes fraction", textcoords="axes fraction", annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": colors[label], "linewidth": 0.8,
                                  "shrinkA": 0, "shrinkB": 4})  # fmt: skip


def _apart(centers: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Moves ascending intervals apart as little as one pass up and one pass down can, and keeps them within 0 to 1."""
    placed = list(centers)
    floor = 0.0
    for i, height in enumerate(heights):
        placed[i] = max(placed[i], floor + height / 2)
        floor = placed[i] + height / 2
    ceiling = max(1.0, sum(heights))
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling - heights[i] / 2)
        ceiling = placed[i] - heights[i] / 2
    return placed


def _range(panel: Panel, curve: _Curve) -> str:
    low, mean, high = (f"{values[-1]:.2f}" for values in (curve.low, curve.mean, curve.high))
    return mean if low == high else f"{mean}  ({low} to {high})"


def _count(x: float) -> str:
    """12000 -> 12k."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:g}{suffix}"
    return f"{x:g}"


def _with_variables(svg: str) -> str:
    """Only the <svg> element, its fixed colours replaced by the page's variables, its size by the page's width."""
    svg = svg[svg.index("<svg") :]
    names = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"}
    names |= {color: f"--series{i}" for i, color in enumerate(COLORS)}
    svg = re.sub("#[0-9a-f]{6}", lambda match: f"var({names[match[0]]})" if match[0] in names else match[0], svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)


HEADERS = {
    "eval/accuracy": "held-out, sampled",
    "eval/accuracy_greedy": "held-out, greedy",
    "reward": "reward",
    "reverse_kl": "reverse KL (nats)",
    "loss": "loss",
}


def _table(summaries: Sequence[Summary], teacher: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """Header and rows; a dash where a group does not have the metric."""
    metrics = [panel.metric for panel in PANELS if any(panel.metric in summary.final for summary in summaries)]
    metrics = metrics[: 1 + SMALL_PANELS]  # those that are drawn
    header = ["", "seeds", "sampled tokens", *(HEADERS[metric] for metric in metrics)]
    rows = []
    if any(metric in teacher for metric in metrics):
        rows.append(["teacher", "", "", *(f"{teacher[m]:.3f}" if m in teacher else "-" for m in metrics)])
    for summary in summaries:
        row = [summary.label, str(summary.num_runs)]
        row.append("-" if summary.sampled_tokens is None else f"{summary.sampled_tokens:,.0f}")
        for metric in metrics:
            mean, low, high = summary.final.get(metric, (math.nan, math.nan, math.nan))
            spread = f" ({low:.3f}-{high:.3f})" if high > low else ""
            row.append("-" if math.isnan(mean) else f"{mean:.3f}{spread}")
        rows.append(row)
    return header, rows


def _page(
    runs: Mapping[str, Sequence[Run]],
    summaries: Sequence[Summary],
    svg: str,
    title: str,
    notes: Sequence[str],
    teacher: Mapping[str, float],
    commands: Sequence[str],
) -> str:
    escape = html.escape
    parts = [f"<h1>{escape(title)}</h1>", f"<figure>{svg}</figure>", "<h2>Final numbers</h2>"]
    header, rows = _table(summaries, teacher)
    colors = {label: f"var(--series{i % len(COLORS)})" for i, label in enumerate(runs)}
    body = []
    for row in rows:
        dot = f'<span class="dot" style="background:{colors[row[0]]}"></span>' if row[0] in colors else ""
        cells = [f"<th>{dot}{escape(row[0])}</th>", *(f"<td>{_cell(cell)}</td>" for cell in row[1:])]
        body.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    parts.append(f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>')
    parts.append(
        "<p class=small>Each number is the last one: of the last evaluation, and of the last "
        f"{WINDOW} steps for what is measured every step. In brackets the smallest and largest over the seeds.</p>"
    )
    parts += [f"<p>{escape(note)}</p>" for note in notes]
    differences = _differences(runs)
    if differences:
        parts.append("<h2>What differs between the arms</h2>")
        head = "".join(f"<th>{escape(name)}</th>" for name in ["", *runs])
        body = [
            f"<tr><th><code>{escape(key)}</code></th>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
            for key, values in differences.items()
        ]
        parts.append(f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>')
    parts.append("<h2>To make this again</h2>")
    again = list(commands)
    if not again:
        again = [f"jdistill train {run.path}/config.json run_dir=NEW" for group in runs.values() for run in group]
        again.append("jdistill plot RUN...")
    parts.append(f"<pre>{escape(chr(10).join(again))}</pre>")
    for label, group in runs.items():
        config = json.dumps(group[0].config, indent=2)
        summary = f"{escape(label)}: the configuration of {escape(str(group[0].path))}"
        parts.append(f"<details><summary>{summary}</summary><pre>{escape(config)}</pre></details>")
    light = " ".join(f"--series{i}:{color};" for i, color in enumerate(COLORS))
    dark = " ".join(f"--series{i}:{color};" for i, color in enumerate(DARK_COLORS))
    return PAGE.format(title=escape(title), light=light, dark=dark, body="\n".join(parts))


def _cell(text: str) -> str:
    value, bracket, spread = html.escape(text).partition(" (")
    return f"{value} <span class=spread>({spread}</span>" if bracket else value


def _differences(runs: Mapping[str, Sequence[Run]]) -> dict[str, list[str]]:
    """Dotted key -> its value in each group, for the keys that are not the same in all of them."""
    flat = [
        _flatten({k: v for k, v in group[0].config.items() if k not in NOT_A_DIFFERENCE}) for group in runs.values()
    ]
    keys = list(dict.fromkeys(key for config in flat for key in config))
    rows = {key: [config.get(key, "-") for config in flat] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    result: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            result |= _flatten(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = json.dumps(value)
    return result


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --ink:#1f2329; --muted:#5d6670; --grid:#dfe3e8; --paper:#fefefe; --code:#f3f5f7; {light} }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink:#e6e9ec; --muted:#9aa4ae; --grid:#343b43; --paper:#14171a; --code:#1d2226; {dark} }}
}}
* {{ box-sizing: border-box }}
body {{ margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }}
h1 {{ font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem }}
h2 {{ font-size: 1.1rem; margin: 2.2rem 0 .6rem }}
figure {{ margin: 0; overflow-x: auto }}
figure svg {{ display: block; width: 100%; min-width: 44rem; height: auto }}
svg text {{ font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif !important }}
.scroll {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .94rem }}
th, td {{ padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap }}
th:first-child {{ text-align: left }}
tr:first-child th {{ color: var(--muted); font-weight: 500 }}
.dot {{ display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em }}
.spread, .small {{ color: var(--muted); font-size: .86em }}
pre {{ background: var(--code); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; font-size: .86rem }}
details {{ margin: .4rem 0 }}
summary {{ cursor: pointer; color: var(--muted) }}
</style>
<body>
{body}
</body>
</html>
"""
