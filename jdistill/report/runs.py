"""Reads run directories and groups runs that differ only in their seed."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jdistill.text_files import read_json_object, read_text

# Keys of a run's configuration that do not change what is trained.
NOT_A_DIFFERENCE = ("run_dir", "seed", "teacher", "checkpoint")


@dataclasses.dataclass(frozen=True)
class Run:
    """Contents of a run directory."""

    path: pathlib.Path
    config: Mapping[str, Any]  # config.json; empty if the file is missing
    columns: Mapping[str, Mapping[int, float]]  # metric -> step -> value


def read_run(path: str | pathlib.Path) -> Run:
    """Read metrics.jsonl and config.json of a run, without a last line that is still being written."""
    path = pathlib.Path(path)
    metrics_path = path / "metrics.jsonl"
    try:
        text = read_text(metrics_path)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"no metrics.jsonl in {path}: give the run_dir of a `jdistill train`") from None
    columns: dict[str, dict[int, float]] = {}
    lines = text.split("\n")
    for number, line in enumerate(lines[:-1], 1):  # text after the last newline is an incomplete line
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
    config = read_json_object(config_path) if config_path.exists() else {}
    return Run(path, config, columns)


def group_by_seed(paths: Sequence[str | pathlib.Path]) -> dict[str, list[pathlib.Path]]:
    """Group runs whose configurations differ only in seed and directory; label: their names' common prefix."""
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
