"""`jdistill export`: what a run has trained is what the exported directory holds."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jdistill import checkpoint_files, cli, models
from jdistill.config import LoraSection, TrainConfig
from jdistill.fingerprint import model_fingerprint
from jdistill.student.checkpoint import Checkpoints
from jdistill.student.state import TrainState
from tests.sidecar.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with checkpoints of steps 3 and 7, in which every weight is 3 and 7 more than at the start."""
    path = tmp_path_factory.mktemp("export")
    write_checkpoint(path / "start")
    config = TrainConfig(
        run_dir=str(path / "run"),
        num_steps=7,
        model={"path": str(path / "start")},
        task={"name": "addition"},
        objective={"kind": "supervised"},
    )
    (path / "run").mkdir()
    (path / "run" / "config.json").write_text(config.model_dump_json())
    params = nnx.state(models.load(path / "start"), nnx.Param)
    checkpoints = Checkpoints(path / "run")
    for step in (3, 7):
        moved = jax.tree.map(lambda x, step=step: x + step, params)
        checkpoints.save(step, TrainState(moved, optax.EmptyState(), jax.numpy.asarray(step)), {})
    checkpoints.close()
    return path / "run"


def norms(path):
    return np.asarray(models.load(path).final_norm[...])


def test_the_newest_checkpoint_is_exported_bit_for_bit_with_the_tokenizer(run, tmp_path, capsys):
    assert cli.main(["export", str(run), "--to", str(tmp_path / "out")]) == 0
    assert "step 7 of" in capsys.readouterr().out
    start = run.parent / "start"
    expected, exported = models.load(start), models.load(tmp_path / "out")
    for a, b in zip(*(jax.tree.leaves(nnx.state(d, nnx.Param)) for d in (expected, exported)), strict=True):
        np.testing.assert_array_equal(a + 7, b)
    assert (
        checkpoint_files.tokenizer_fingerprint(tmp_path / "out") == checkpoint_files.tokenizer_fingerprint(start) != ""
    )
    assert checkpoint_files.checkpoint_dtype(tmp_path / "out") == "float32"


def test_an_earlier_step_and_another_dtype_can_be_asked_for(run, tmp_path):
    assert cli.main(["export", str(run), "--to", str(tmp_path / "out"), "--step", "3", "--dtype", "bfloat16"]) == 0
    assert checkpoint_files.checkpoint_dtype(tmp_path / "out") == "bfloat16"
    expected = (norms(run.parent / "start") + 3).astype(jax.numpy.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(norms(tmp_path / "out"), expected)


@pytest.fixture
def lora_run(run, tmp_path):
    """A run whose adapters are the step's number everywhere, times 0.01."""
    config = TrainConfig.model_validate_json((run / "config.json").read_text())
    section = config.model.model_copy(update={"lora": LoraSection(rank=2, alpha=3.0, targets=("query", "down"))})
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "config.json").write_text(config.model_copy(update={"model": section}).model_dump_json())
    adapters = nnx.state(models.load(section.path, lora=models.lora_of(section.lora)), nnx.LoRAParam)
    base = model_fingerprint(section.path, section.compute_dtype)
    checkpoints = Checkpoints(tmp_path / "lora", base=base)
    for step in (3, 7):
        moved = jax.tree.map(lambda x, step=step: jax.numpy.full_like(x, 0.01 * step), adapters)
        checkpoints.save(step, TrainState(moved, optax.EmptyState(), jax.numpy.asarray(step)), {})
    checkpoints.close()
    return tmp_path / "lora"


def test_adapters_are_merged_into_the_weights_or_written_alone(lora_run, run, tmp_path, capsys):
    assert cli.main(["export", str(lora_run), "--to", str(tmp_path / "merged")]) == 0
    start, merged = models.load(run.parent / "start"), models.load(tmp_path / "merged")
    # Two ranks, each 0.07 * 0.07 times alpha / rank.
    for name, delta in (("query", 3.0 / 2 * 2 * 0.07**2), ("down", 3.0 / 2 * 2 * 0.07**2), ("key", 0.0)):
        before, after = (np.asarray(getattr(decoder.layers, name)[...]) for decoder in (start, merged))
        np.testing.assert_allclose(after - before, delta, rtol=1e-4, atol=1e-7)
    argv = ["export", str(lora_run), "--to", str(tmp_path / "adapter"), "--adapter", "--step", "3"]
    assert cli.main(argv) == 0
    assert "step 3 of" in capsys.readouterr().out
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert adapter["target_modules"] == ["q_proj", "down_proj"] and adapter["lora_alpha"] == 3.0
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all((tensor == np.float32(0.03)).all() for tensor in tensors.values())
    # The weights that they stand beside are not in the run: others of the same shapes are refused.
    changed = shutil.copytree(run.parent / "start", tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, changed / "model.safetensors")
    to = ["--to", str(tmp_path / "none")]
    for argv, message in [
        ([str(run), "--adapter"], "was trained without model.lora"),
        ([str(lora_run), "--source", str(changed)], "holds adapters for other weights"),
    ]:
        assert cli.main(["export", *argv, *to]) == 2
        assert message in capsys.readouterr().err


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(run, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    to = ["--to", str(tmp_path / "out")]
    for argv, message in [
        ([str(tmp_path / "taken"), *to], "not the directory of a `jdistill train` run"),
        ([str(run), "--to", str(tmp_path / "taken")], "exists: remove it"),
        ([str(run), *to, "--step", "5"], "no checkpoint of step 5"),
        ([str(run), *to, "--source", str(tmp_path / "gone")], "give its present path with --source"),
    ]:
        assert cli.main(["export", *argv]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
