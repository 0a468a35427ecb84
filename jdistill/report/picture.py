"""Draws curves of groups of runs with matplotlib: a PNG, and an SVG whose colours are CSS variables."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from jdistill.report.runs import Run
from jdistill.report.summary import PANELS, SMALL_PANELS, WINDOW, Curve, Panel, curve_of, samples

# Distinguishable with any colour vision, on white and on black: the colours of Okabe and Ito, and Tol's purple.
COLORS = ("#0072b2", "#009e73", "#d55e00", "#aa3377", "#e69f00", "#56b4e9", "#7a7a7a")
DARK_COLORS = ("#58b4f0", "#2ecb9a", "#ff8b4a", "#e27db8", "#f2b632", "#8ad0f7", "#a8a8a8")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
INK, MUTED, GRID, PAPER = "#1f2329", "#5d6670", "#dfe3e8", "#fefefe"


def pictures(runs: Mapping[str, Sequence[Run]], title: str, teacher: Mapping[str, float]) -> tuple[bytes, str]:
    """Draw the picture; returns it as PNG, and as SVG whose colours are CSS variables."""
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
    curves: dict[str, dict[str, Curve]] = {}
    for panel in PANELS:
        found = {label: curve_of(group, panel.metric, WINDOW if panel.smooth else 1) for label, group in runs.items()}
        if any(curve is not None for curve in found.values()):
            curves[panel.metric] = {label: curve for label, curve in found.items() if curve is not None}
    panels = [panel for panel in PANELS if panel.metric in curves]
    if not panels:
        raise ValueError(f"nothing to draw: the runs have none of {', '.join(panel.metric for panel in PANELS)}")
    large, small = panels[0], panels[1 : 1 + SMALL_PANELS]
    x_label = "sampled tokens" if all(samples(run) for group in runs.values() for run in group) else "steps"
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
    curves: Mapping[str, Curve],
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


def _direct_labels(axes: Any, panel: Panel, curves: Mapping[str, Curve], colors: Mapping[str, str]) -> None:
    """Write each line's name and last value at its right end, moved apart if they would overlap."""
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
    """Move ascending intervals apart, in one pass up and one pass down, within 0 to 1."""
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


def _range(panel: Panel, curve: Curve) -> str:
    low, mean, high = (f"{values[-1]:.2f}" for values in (curve.low, curve.mean, curve.high))
    return mean if low == high else f"{mean}  ({low} to {high})"


def _count(x: float) -> str:
    """12000 -> 12k."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:g}{suffix}"
    return f"{x:g}"


def _with_variables(svg: str) -> str:
    """Return only the <svg> element, with the page's variables for colours and without a fixed size."""
    svg = svg[svg.index("<svg") :]
    names = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"}
    names |= {color: f"--series{i}" for i, color in enumerate(COLORS)}
    svg = re.sub("#[0-9a-f]{6}", lambda match: f"var({names[match[0]]})" if match[0] in names else match[0], svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
