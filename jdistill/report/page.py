"""Writes the HTML page: picture, final numbers, configuration differences, and commands to reproduce the runs."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jdistill.report.picture import COLORS, DARK_COLORS
from jdistill.report.runs import NOT_A_DIFFERENCE, Run
from jdistill.report.summary import WINDOW, Summary, final_numbers


def page_of(
    runs: Mapping[str, Sequence[Run]],
    summaries: Sequence[Summary],
    svg: str,
    title: str,
    notes: Sequence[str],
    teacher: Mapping[str, float],
    commands: Sequence[str],
) -> str:
    """Return the whole page as text."""
    escape = html.escape
    parts = [f"<h1>{escape(title)}</h1>", f"<figure>{svg}</figure>", "<h2>Final numbers</h2>"]
    header, rows = final_numbers(summaries, teacher)
    colors = {label: f"var(--series{i % len(COLORS)})" for i, label in enumerate(runs)}
    body = []
    for row in rows:
        dot = f'<span class="dot" style="background:{colors[row[0]]}"></span>' if row[0] in colors else ""
        cells = [f"<th>{dot}{escape(row[0])}</th>", *(f"<td>{_cell(cell)}</td>" for cell in row[1:])]
        body.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    parts.append(f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>')
    parts.append(
        "<p class=small>Latest numbers, averaged over the seeds: those of the last evaluation, or the mean of the last "
        f"{WINDOW} steps for metrics of every step. In brackets: smallest and largest over the seeds.</p>"
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
    """Return dotted key -> its value in each group, for keys whose values differ between groups."""
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
