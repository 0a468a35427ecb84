"""The run directory: belongs to one run and one process at a time, and records what its run is.

A start takes the directory when everything that can fail early has succeeded: a typo, or a teacher that cannot be
reached, neither leaves a run behind nor deletes one with `--overwrite`.

    config.json      the configuration, once the run has begun
    contents.json    fingerprints of the directories that define the run, which may move
    place.json       where it runs: devices, processes, the teachers' fingerprints
    changes.jsonl    one line per resume that changed something: step, time, old and new values
    run.lock         held by the process that runs
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from jdistill.config import ConfigError, TrainConfig, parse
from jdistill.student import changes, hosts, metrics
from jdistill.student.checkpoint import DIRECTORY as CHECKPOINTS

CONFIG, CONTENTS, PLACE = "config.json", "contents.json", "place.json"
CHANGES, LOCK = "changes.jsonl", "run.lock"
METRICS = ("metrics.jsonl", "timings.jsonl")
TEACHER = ("teacher.log", "teacher.yaml", "teacher.port")  # written before the run begins


class RunDirectory:
    """The directory of a run that is being started. With several processes, the first one does the work.

    Args:
        config: configuration of the run.
        resume: continue the run in the directory, if there is one.
        overwrite: delete the run in the directory, once the new one begins.

    Raises:
        ConfigError: the directory holds a run, or one that is defined otherwise, or no run of ours to overwrite.
    """

    def __init__(self, config: TrainConfig, *, resume: bool, overwrite: bool):
        self.path = pathlib.Path(config.run_dir)
        self._config = config
        self._overwrite = overwrite
        hosts.from_first(lambda: self._check(resume=resume))
        self.resumes = bool(hosts.from_first(lambda: resume and has_steps(self.path)))
        self._began = False

    def _check(self, *, resume: bool) -> None:
        if self._overwrite:
            known = {CONFIG, CONTENTS, PLACE, CHANGES, LOCK, CHECKPOINTS, *METRICS, *TEACHER}
            there = {one.name for one in self.path.iterdir()} if self.path.is_dir() else set()
            if not there <= known and CONFIG not in there:
                raise ConfigError(f"{self.path} holds no run of jdistill: it is not overwritten; delete it yourself")
        elif has_steps(self.path) and not resume:
            raise ConfigError(
                f"{self.path} holds a run already: --resume continues it, --overwrite starts over, run_dir=... uses "
                "another directory"
            )
        elif resume and has_steps(self.path):
            self._changes()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the directory, and keeps other processes out of it; removes it again if nothing was put into it.

        Raises:
            ConfigError: another process is using it.
        """
        file: list[IO[str]] = []
        hosts.from_first(lambda: file.append(_lock(self.path)))
        try:
            yield
        finally:
            for one in file:
                (self.path / LOCK).unlink(missing_ok=True)
                one.close()
                if not self._began:
                    with contextlib.suppress(OSError):  # not empty: the log of the teacher, say
                        self.path.rmdir()

    def begin(self, place: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """Takes the directory for a new run; deletes what an earlier one left there."""
        hosts.from_first(lambda: self._begin(place, say))
        self._began = True

    def _begin(self, place: Mapping[str, Any], say: Callable[[str], None]) -> None:
        if (self.path / CONFIG).exists() and not has_steps(self.path):
            say(f"an earlier start in {self.path} made no step: starting over")
        for one in list(self.path.iterdir()):
            ours = one.name in (CONFIG, CONTENTS, PLACE, CHANGES, CHECKPOINTS, *METRICS)
            if ours or (self._overwrite and one.name not in (LOCK, *TEACHER)):
                shutil.rmtree(one) if one.is_dir() and not one.is_symlink() else one.unlink()
        _replace(self.path / CONTENTS, json.dumps(changes.contents(self._config), indent=2))
        self._write(place)

    def resume_at(self, step: int, place: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """Records what the run continues with, if that has changed since.

        Args:
            step: steps done.
            place: where the run is now; see `begin`.
            say: shows a message to the user.

        Raises:
            ConfigError: the run is longer than num_steps already.
        """
        hosts.from_first(lambda: self._resume_at(step, place, say))
        self._began = True

    def _resume_at(self, step: int, place: Mapping[str, Any], say: Callable[[str], None]) -> None:
        if step > self._config.num_steps:
            raise ConfigError(f"num_steps = {self._config.num_steps}, but the run in {self.path} is at step {step}")
        changed = {change.key: [change.old, change.new] for change in self._changes()}
        before = _read_json(self.path / PLACE) if (self.path / PLACE).exists() else place
        moved = {key: [before.get(key), value] for key, value in place.items() if before.get(key) != value}
        if changed or moved:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            line = json.dumps({"step": step, "time": now, "changed": changed, "place": moved})
            with (self.path / CHANGES).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            what = ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in (changed | moved).items())
            say(f"resumed at step {step} with changes: {what}")
        for note in changes.notes(self._config, changed | moved, step):
            say(note)
        self._write(place)

    def _changes(self) -> list[changes.Change]:
        source = self.path / CONFIG
        contents = _read_json(self.path / CONTENTS) if (self.path / CONTENTS).exists() else {}
        return changes.between(parse(TrainConfig, _read_json(source), source=str(source)), self._config, contents)

    def _write(self, place: Mapping[str, Any]) -> None:
        _replace(self.path / PLACE, json.dumps(dict(place), indent=2))
        _replace(self.path / CONFIG, self._config.model_dump_json(indent=2))


def has_steps(path: pathlib.Path) -> bool:
    """Whether a directory holds a run: one that made a step, not only a start that failed or was killed."""
    if not (path / CONFIG).is_file():
        return False
    if (path / CHECKPOINTS).is_dir() and any(one.name.isdigit() for one in (path / CHECKPOINTS).iterdir()):
        return True
    return (path / METRICS[0]).is_file() and any(line["step"] > 0 for line in metrics.read(path / METRICS[0]))


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ConfigError(f"{path} is damaged ({e}): restore it, or use another run_dir") from None


def _replace(path: pathlib.Path, text: str) -> None:
    """Writes a file at once, in case this process is killed."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _lock(path: pathlib.Path) -> IO[str]:
    path.mkdir(parents=True, exist_ok=True)
    while True:
        file = (path / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise ConfigError(f"{path} is in use by {owner}: wait for it or stop it, or use another run_dir") from None
        except OSError:  # a file system without locks: two runs in one directory are not noticed
            pass
        # The process that held the lock may have deleted the file between open and flock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path / LOCK)):
                break
        file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
