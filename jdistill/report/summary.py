"""Curves and final numbers of a group of runs: mean, smallest and largest value over its seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jdistill.report.runs import Run


@dataclasses.dataclass(frozen=True)
class Panel:
    """How one metric is drawn."""

    metric: str  # a name in metrics.jsonl
    title: str
    unit: str  # under the title
    is_share: bool  # from 0 to 1
    smooth: bool  # true for a noisy value per step, false for evaluations


# In drawing order; the first panel that the runs have is the large one.
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
WINDOW = 9  # steps over which a noisy metric is averaged


HEADERS = {
    "eval/accuracy": "held-out, sampled",
    "eval/accuracy_greedy": "held-out, greedy",
    "reward": "reward",
    "reverse_kl": "reverse KL (nats)",
    "loss": "loss",
}


@dataclasses.dataclass(frozen=True)
class Summary:
    """Final numbers of one group."""

    label: str
    num_runs: int
    sampled_tokens: float | None  # mean over the runs; None: not trained on-policy
    final: Mapping[str, tuple[float, float, float]]  # metric -> (mean, smallest, largest) over the runs


@dataclasses.dataclass(frozen=True)
class Curve:
    """One metric of a group at the steps that all its runs have; arrays of shape [number of points]."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def curve_of(runs: Sequence[Run], metric: str, window: int = 1) -> Curve | None:
    """Return the metric at the steps that every run of the group has, or None if there is no such step."""
    columns = [run.columns.get(metric, {}) for run in runs]
    steps = sorted(set.intersection(*(set(column) for column in columns)))
    steps = [step for step in steps if all(math.isfinite(column[step]) for column in columns)]
    if not steps:
        return None
    values = np.array([[column[step] for step in steps] for column in columns])
    x = np.array([_x(runs, step) for step in steps])
    window = min(window, len(steps))
    if window > 1:  # whole windows only, each at its middle, so that no value at the ends is invented
        kernel = np.ones(window) / window
        values = np.array([np.convolve(row, kernel, mode="valid") for row in values])
        x = np.convolve(x, kernel, mode="valid")
    return Curve(x, values.mean(axis=0), values.min(axis=0), values.max(axis=0))


def _x(runs: Sequence[Run], step: int) -> float:
    """Return the mean number of sampled tokens at a step, or the step itself for runs that do not sample."""
    counts = [run.columns["sampled_tokens"].get(step) for run in runs if samples(run)]
    known = [count for count in counts if count is not None]
    return float(np.mean(known)) if len(known) == len(runs) else float(step)


def samples(run: Run) -> bool:
    """Whether the run sampled any token."""
    return max(run.columns.get("sampled_tokens", {0: 0.0}).values()) > 0


def summarize(label: str, runs: Sequence[Run]) -> Summary:
    """Return the final numbers of a group."""
    final = {}
    for panel in PANELS:
        curve = curve_of(runs, panel.metric, WINDOW if panel.smooth else 1)
        if curve is not None:
            final[panel.metric] = (float(curve.mean[-1]), float(curve.low[-1]), float(curve.high[-1]))
    tokens = None
    if all(map(samples, runs)):
        tokens = float(np.mean([max(run.columns["sampled_tokens"].values()) for run in runs]))
    return Summary(label, len(runs), tokens, final)


def final_numbers(summaries: Sequence[Summary], teacher: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the final numbers; a dash marks a metric that a group does not have."""
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


def table(summaries: Sequence[Summary], teacher: Mapping[str, float] | None = None) -> Any:
    """Return the final numbers as a `rich.table.Table` for the terminal."""
    from rich.table import Table

    header, rows = final_numbers(summaries, teacher or {})
    result = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(header):
        result.add_column(name, justify="right" if i else "left", no_wrap=i == 0)
    for row in rows:
        result.add_row(*row)
    return result
