"""The run directory: refuses to mix two runs in it, and records the configuration of its run."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

from jdistill.config import ConfigError, TrainConfig

# Keys of a run's configuration that may differ when it is resumed: none of them changes a number.
MAY_CHANGE_ON_RESUME = ("teacher", "checkpoint")


def prepare(config: TrainConfig, *, resume: bool, overwrite: bool) -> None:
    """Makes config.run_dir and writes config.json to it.

    Args:
        config: configuration of the run.
        resume: accept a run in the directory, if it has the same configuration.
        overwrite: delete a run in the directory.

    Raises:
        ConfigError: the directory holds a run, or a run with another configuration, or no run of ours to overwrite.
    """
    run_dir = pathlib.Path(config.run_dir)
    stored_path = run_dir / "config.json"
    if overwrite and run_dir.exists():
        if any(run_dir.iterdir()) and not stored_path.exists():
            raise ConfigError(f"{run_dir} holds no run of jdistill: it is not overwritten; delete it yourself")
        shutil.rmtree(run_dir)
    if stored_path.exists():
        if not resume:
            raise ConfigError(
                f"{run_dir} holds a run already: --resume continues it, --overwrite starts over, run_dir=... uses "
                "another directory"
            )
        _check_same(json.loads(stored_path.read_text()), config, run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    stored_path.write_text(config.model_dump_json(indent=2))


def _check_same(stored: dict[str, Any], config: TrainConfig, run_dir: pathlib.Path) -> None:
    now = config.model_dump(mode="json")
    different = [
        f"{key}: was {stored.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(set(stored) | set(now))
        if key not in MAY_CHANGE_ON_RESUME and stored.get(key) != now.get(key)
    ]
    if different:
        raise ConfigError(
            f"{run_dir} was made with another configuration, so the resumed run would not be the same run. "
            "Restore the old values, or use another run_dir.\n  " + "\n  ".join(different)
        )
