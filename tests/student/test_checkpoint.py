"""Checkpoints are restored bit for bit, are complete or absent, and can move to another mesh."""

import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdistill.student.checkpoint import Checkpoints, restore_params
from jdistill.student.state import TrainState
from tests.devices import run_on_devices
from tests.student.states import assert_same, make_decoder, make_state


def test_restored_state_equals_the_saved_one_bit_for_bit(tmp_path):
    saved = {step: make_state(step) for step in (3, 5)}
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, state in saved.items():
        checkpoints.save(step, state, {"step": step, "sampled_tokens": 10 * step})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest_step() == 5
    state, extra = checkpoints.restore(make_state(0))
    assert_same(state, saved[5])
    assert extra == {"step": 5, "sampled_tokens": 50}
    state, extra = checkpoints.restore(make_state(0), step=3)
    assert_same(state, saved[3])
    checkpoints.close()


def test_only_the_newest_checkpoints_are_kept_and_the_state_may_be_donated_after_save(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    state = make_state(1)
    expected = jax.tree.map(np.asarray, state)
    bump = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s), donate_argnums=0)
    for step in range(4):
        checkpoints.save(step, state, {})
        state = bump(state)
    restored, _ = checkpoints.restore(make_state(2))
    assert_same(restored, jax.tree.map(lambda x: jnp.asarray(8 * x), expected))
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_restore_params_loads_only_the_parameters_into_a_decoder(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    saved = make_state(4)
    checkpoints.save(4, saved, {})
    checkpoints.close()
    decoder = make_decoder(0)
    assert restore_params(tmp_path, decoder) == 4
    assert_same(nnx.state(decoder, nnx.Param), saved.params)


def test_missing_or_mismatched_checkpoints_are_errors_with_the_reason(tmp_path):
    with pytest.raises(FileNotFoundError, match="not the directory of a run"):
        restore_params(tmp_path, make_decoder(0))
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step() is None
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*there: none.*checkpoint\.every"):
        checkpoints.restore(make_state(0))
    checkpoints.save(2, make_state(2), {})
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7 in .*\[2\]"):
        checkpoints.restore(make_state(0), step=7)
    with pytest.raises(
        ValueError, match=r"is of another model or optimizer.*layers\.down: saved \[2, 8, 8\], wanted \[3, 8, 8\]"
    ):
        checkpoints.restore(make_state(0, num_layers=3))
    with pytest.raises(
        ValueError, match=r"is of another model or optimizer.*layers\.down: saved \[2, 8, 8\], wanted \[3, 8, 8\]"
    ):
        restore_params(tmp_path, make_decoder(0, num_layers=3))
    checkpoints.close()


def test_a_partially_written_checkpoint_is_never_restored(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    saved = make_state(1)
    checkpoints.save(1, saved, {"step": 1})
    checkpoints.close()
    directory = tmp_path / "checkpoints"
    # A process killed while writing leaves a temporary directory with some of the files.
    shutil.copytree(directory / "1" / "params", directory / "2.orbax-checkpoint-tmp-1" / "params")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step() == 1
    state, _ = checkpoints.restore(make_state(0))
    assert_same(state, saved)
    checkpoints.save(2, make_state(2), {"step": 2})
    checkpoints.close()
    assert Checkpoints(tmp_path).restore(make_state(0))[1] == {"step": 2}


SAVE_FOREVER = """
import sys, itertools, jax.numpy as jnp, optax
from flax import nnx
from jdistill.student.checkpoint import Checkpoints
from jdistill.student.state import TrainState
checkpoints = Checkpoints(sys.argv[1], keep=2)
for step in itertools.count(1):
    params = nnx.State({"w": nnx.Param(jnp.full((512, 1024), float(step)))})
    checkpoints.save(step, TrainState(params, (), jnp.asarray(step)), {"step": step})
    print(step, flush=True)
"""


def test_sigkill_while_saving_leaves_a_complete_checkpoint(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(4):
            assert child.stdout.readline(), "the saving process ended"
        time.sleep(0.03)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    checkpoints = Checkpoints(tmp_path, keep=2)
    template = TrainState(nnx.State({"w": nnx.Param(jnp.zeros((512, 1024)))}), (), jnp.asarray(0))
    state, extra = checkpoints.restore(template)
    assert extra["step"] == int(state.step) >= 2
    np.testing.assert_array_equal(state.params["w"][...], extra["step"])
    checkpoints.close()


ON_ANOTHER_MESH = """
import sys, jax, numpy as np
from flax import nnx
from jdistill.config import MeshSection
from jdistill.models import param_shardings
from jdistill.student.checkpoint import Checkpoints
from jdistill.student.sharding import make_mesh
from jdistill.student.state import init_state
from tests.student.states import OPTIMIZER, assert_same, make_decoder
def sharded(seed, section):
    decoder = make_decoder(seed)
    mesh = make_mesh(section)
    graphdef, params = nnx.split(decoder, nnx.Param)
    params = jax.device_put(params, param_shardings(decoder, mesh))
    return init_state(params, OPTIMIZER, mesh)
checkpoints = Checkpoints(sys.argv[1])
saved = sharded(1, MeshSection(data=1, fsdp=2, tensor=2))
checkpoints.save(1, saved, {})
template = sharded(2, MeshSection(data=1, fsdp=4, tensor=1))
restored, _ = checkpoints.restore(template)
assert_same(jax.tree.map(np.asarray, restored), jax.tree.map(np.asarray, saved))
for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(template), strict=True):
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)
assert any(not x.is_fully_replicated for x in jax.tree.leaves(restored.opt_state))
checkpoints.close()
print("same")
"""


def test_a_checkpoint_of_one_mesh_is_restored_onto_another(tmp_path):
    assert run_on_devices(4, ON_ANOTHER_MESH, tmp_path).endswith("same\n")
