"""A directory holds one run, taken when the run begins; a resumed run may run elsewhere, and is the same run."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from jdistill.config import ConfigError, TrainConfig, describe, parse
from jdistill.config.loading import section_type
from jdistill.student import changes
from jdistill.student.run_dir import RunDirectory, has_steps

ROOT = pathlib.Path(__file__).parents[2]
PLACE = {"devices": 1, "processes": 1, "teachers": {"": "f"}}


def train_config(path, **keys):
    data = {"run_dir": str(path), "num_steps": 4, "model": {"path": "unused"}, "task": {"name": "unused"}}
    for key, value in keys.items():
        *parents, leaf = key.split("__")
        node = data
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return parse(TrainConfig, data)


def start(config, *, resume=False, overwrite=False, steps=0, place=PLACE):
    """What `train` does with the directory, for a run that ends after `steps`; returns what it said."""
    said = []
    directory = RunDirectory(config, resume=resume, overwrite=overwrite)
    with directory.locked():
        if directory.resumes:
            directory.resume_at(steps, place, said.append)
        else:
            directory.begin(place, said.append)
        if steps:
            lines = [json.dumps({"step": step}) + "\n" for step in range(steps + 1)]
            (directory.path / "metrics.jsonl").write_text("".join(lines))
    return said


# ---- the table ----


def test_every_key_is_free_or_defines_the_run():
    weights = ("rl_loss_weight", "distill_loss_weight", "weight")  # compared as a whole, number or schedule
    for path, section in describe.sections(TrainConfig):
        if path.rpartition(".")[2] in weights or path == "teacher.spawn":
            continue
        keys = [
            name
            for name, field in section.model_fields.items()
            # A section that is always there has an entry of its own.
            if section_type(field.annotation) is None or type(None) in field.annotation.__args__ or name in weights
        ] if path else ["run_dir", "seed", "num_steps", "teacher"]  # fmt: skip
        free, defines = changes.FREE.get(path, ()), changes.DEFINES.get(path, ())
        assert sorted([*free, *defines]) == sorted(keys), path or "top level"
    assert {*changes.FREE, *changes.DEFINES} <= {path for path, _ in describe.sections(TrainConfig)}


def test_what_defines_the_run_is_refused_with_both_values(tmp_path):
    old = train_config(tmp_path, optimizer__learning_rate=1e-4, mesh__fsdp=4, seed=1)
    new = train_config(tmp_path, optimizer__learning_rate=2e-4, mesh__fsdp=2, objective__reference={"path": "x"})
    with pytest.raises(ConfigError) as caught:
        changes.between(old, new, {})
    *_, first, second, third = str(caught.value).splitlines()
    assert first == "  seed: was 1, is 0"
    assert second.startswith("  objective.reference: was None, is {'path': 'x'")
    assert third == "  optimizer.learning_rate: was 0.0001, is 0.0002"
    assert "mesh" not in str(caught.value)


def test_what_defines_nothing_may_change(tmp_path):
    spawned = {"engine": "jax", "model": "one", "dtype": "float32"}
    old = train_config(tmp_path, objective__distill_loss_weight=1.0, teacher__spawn=spawned)
    keys = {"mesh__fsdp": 2, "mesh__data": 1, "checkpoint__every": 3, "eval__every": 1, "optimizer__packing": True}
    keys |= {"teacher__endpoints": ["elsewhere:1"], "teacher__deadline_s": 5.0, "num_steps": 9, "model__remat": "none"}
    new = train_config("moved", objective__distill_loss_weight=1.0, **keys)
    found = {change.key: change.new for change in changes.between(old, new, {})}
    expected = {key.replace("__", "."): value for key, value in keys.items()}
    assert found == expected | {"run_dir": "moved", "teacher.spawn": None}
    for key in ("privileged", "tokenizer"):
        value = True if key == "privileged" else "x"
        keys = {"teacher__spawn": spawned, f"teacher__{key}": value}
        other = train_config(tmp_path, objective__distill_loss_weight=1.0, **keys)
        with pytest.raises(ConfigError, match=f"teacher.{key}: was"):
            changes.between(old, other, {})


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, None),
        ({"objective__rl_loss_weight": {"kind": "kdrl", "begin": 1.0, "end": 0.0, "decrement": 0.1}}, None),
        ({"objective__rl_loss_weight": {"kind": "linear", "begin": 1.0, "end": 0.0, "num_steps": 3}}, None),
        ({"objective__rl_loss_weight": {"kind": "linear", "begin": 1.0, "end": 0.0}}, "objective.rl_loss_weight"),
        ({"optimizer__schedule": "cosine"}, "optimizer.schedule: cosine"),
    ],
)
def test_a_new_length_is_noted_where_something_depends_on_it(tmp_path, keys, says):
    start(train_config(tmp_path, **keys), steps=2)
    said = start(train_config(tmp_path, **(keys | {"num_steps": 8})), resume=True, steps=2)
    assert said[0] == "resumed at step 2 with changes: num_steps: 4 -> 8"
    assert len(said) == (1 if says is None else 2) and (says is None or f"and {says} end with the run" in said[1])


def test_what_another_length_or_number_of_processes_does_is_said(tmp_path):
    keys = {"rollout__ahead": 1, "objective__dynamic_sampling": 2, "num_steps": 2}
    start(train_config(tmp_path, **keys), steps=2)
    said = start(
        train_config(tmp_path, **keys | {"num_steps": 3}), resume=True, steps=2, place=PLACE | {"processes": 2}
    )
    assert ["rollout.ahead sampled nothing ahead" in said[1], "dynamic_sampling looks for groups" in said[2]] == [
        True
    ] * 2
    assert len(said) == 3
    assert (
        len(start(train_config(tmp_path, **keys | {"num_steps": 4}), resume=True, steps=2)) == 2
    )  # back to one process


# ---- the directory ----


def test_changes_are_recorded_with_step_and_time(tmp_path):
    start(train_config(tmp_path), steps=2)
    assert start(train_config(tmp_path), resume=True, steps=2) == []
    assert not (tmp_path / "changes.jsonl").exists()
    moved = {"devices": 2, "processes": 1, "teachers": {"": "g"}}
    start(train_config(tmp_path, mesh__fsdp=2, mesh__data=1), resume=True, steps=3, place=moved)
    (line,) = map(json.loads, (tmp_path / "changes.jsonl").read_text().splitlines())
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "step": 3,
        "changed": {"mesh.data": [-1, 1], "mesh.fsdp": [1, 2]},
        "place": {"devices": [1, 2], "teachers": [{"": "f"}, {"": "g"}]},
    }
    assert json.loads((tmp_path / "config.json").read_text())["mesh"]["fsdp"] == 2
    with pytest.raises(ConfigError, match=r"num_steps = 2, but the run in .* is at step 3"):
        start(train_config(tmp_path, num_steps=2), resume=True, steps=3)


@pytest.mark.parametrize("key", ["model.path", "objective.reference.path", "teacher.tokenizer"])
def test_a_directory_that_defines_the_run_may_move_but_not_change(tmp_path, key):
    student, run_dir = ROOT / "examples/addition/student", tmp_path / "run"

    def config(path):
        keys = {"model__path": str(student), "objective__distill_loss_weight": 1.0}
        keys |= {"objective__reference": {"path": str(student)}, "teacher__endpoints": ["unused:1"]}
        keys |= {"teacher__tokenizer": str(student)}
        if key == "objective.reference.path":
            keys["objective__reference"] = {"path": str(path)}
        else:
            keys[key.replace(".", "__")] = str(path)
        return train_config(run_dir, **keys)

    start(config(student), steps=2)
    moved = shutil.copytree(student, tmp_path / "moved")
    said = start(config(moved), resume=True, steps=2)
    assert said == [f"resumed at step 2 with changes: {key}: {student} -> {moved}"]
    other = shutil.copytree(ROOT / "examples/addition/teacher", tmp_path / "other")  # other weights
    (other / "tokenizer_config.json").write_text("{}")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"1": tokenizer["model"]["vocab"]["2"], "2": tokenizer["model"]["vocab"]["1"]}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    for path in (other, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=rf"{key}: was '.*moved', is '{path}'"):
            start(config(path), resume=True, steps=2)


def test_a_run_is_neither_mixed_nor_lost(tmp_path):
    start(train_config(tmp_path), steps=1)
    with pytest.raises(ConfigError, match="holds a run already: --resume continues it, --overwrite starts over"):
        start(train_config(tmp_path))
    with pytest.raises(ConfigError, match="seed: was 0, is 1"):
        start(train_config(tmp_path, seed=1), resume=True)
    (tmp_path / "notes").mkdir()
    # A start with --overwrite that fails before the run begins.
    with RunDirectory(train_config(tmp_path), resume=False, overwrite=True).locked():
        pass
    assert has_steps(tmp_path)
    start(train_config(tmp_path), overwrite=True)
    assert not has_steps(tmp_path) and not (tmp_path / "notes").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="holds no run of jdistill: it is not overwritten"):
        start(train_config(other), overwrite=True)


def test_a_start_that_fails_or_is_killed_leaves_no_run(tmp_path):
    path = tmp_path / "run"
    with RunDirectory(train_config(path), resume=False, overwrite=False).locked():
        assert path.is_dir()
    assert not path.exists()
    with RunDirectory(train_config(path), resume=False, overwrite=False).locked():
        (path / "teacher.log").write_text("why it failed")
    assert [one.name for one in path.iterdir()] == ["teacher.log"]
    start(train_config(path), overwrite=True)  # not refused as somebody else's files
    assert (path / "teacher.log").read_text() == "why it failed"
    # Killed after it began: evaluated before the first step, and one line is half written.
    (path / "metrics.jsonl").write_text('{"step": 0, "eval/accuracy": 0.1}\n{"step": 1, "lo')
    (path / "checkpoints").mkdir()
    for resume in (False, True):
        said = start(train_config(path, seed=7), resume=resume)
        assert said == [f"an earlier start in {path} made no step: starting over"]
        assert sorted(one.name for one in path.iterdir()) == [
            "config.json",
            "contents.json",
            "place.json",
            "teacher.log",
        ]
    (path / "checkpoints" / "3").mkdir(parents=True)
    assert has_steps(path)


def test_two_processes_cannot_use_one_directory(tmp_path):
    code = (
        "import sys; from jdistill import config; from jdistill.student.run_dir import RunDirectory\n"
        "given = {'num_steps': 4, 'model': {'path': 'unused'}, 'task': {'name': 'unused'}, 'run_dir': sys.argv[1]}\n"
        "made = config.parse(config.TrainConfig, given)\n"
        "with RunDirectory(made, resume=False, overwrite=False).locked():\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        for keys in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ConfigError, match=rf"is in use by process {holder.pid} on .*: wait for it or stop it"):
                start(train_config(tmp_path), **keys)
    finally:
        holder.kill()  # a lock ends with its process, however that ends
        holder.communicate()
    start(train_config(tmp_path))
    assert not (tmp_path / "run.lock").exists()


def test_a_damaged_configuration_is_named(tmp_path):
    start(train_config(tmp_path), steps=1)
    (tmp_path / "config.json").write_text('{"run_dir": ')
    with pytest.raises(ConfigError, match=r"config\.json is damaged .*: restore it, or use another run_dir"):
        start(train_config(tmp_path), resume=True)
