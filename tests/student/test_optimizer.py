"""Optimizers by name, and moments in bfloat16."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jdistill.config import ConfigError
from jdistill.student.optimizer import OPTIMIZERS, in_bfloat16, make_optimizer
from jdistill.student.state import init_state
from jdistill.student.step import make_train_step
from tests.devices import run_on_devices
from tests.student.factories import copy, make_params, random_batch, train_config

RATES = {"adamw": 0.01, "lion": 0.003, "adafactor": 0.01, "muon": 0.01, "sgd": 0.5}


def flat(tree):
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss_and_decays_all_but_the_norms(name):
    config = train_config(
        objective={"kind": "supervised", "reduction": "token_mean"},
        optimizer={"name": name, "learning_rate": RATES[name], "weight_decay": 0.0},
    )
    graphdef, params = make_params()
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    step, state = make_train_step(graphdef, config, optimizer), init_state(copy(params), optimizer)
    losses = []
    for _ in range(12):
        state, metrics = step(state, random_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    # With a gradient near 0 only weight decay changes the parameters.
    section = config.optimizer.model_copy(update={"weight_decay": 0.5})
    optimizer = make_optimizer(section, 10)
    tiny = jax.tree.map(lambda x: jnp.full_like(x, 1e-30), params)
    plain = make_optimizer(config.optimizer, 10)
    updates, _ = optimizer.update(tiny, optimizer.init(params), params)
    without, _ = plain.update(tiny, plain.init(params), params)
    for path, change in flat(jax.tree.map(jnp.subtract, updates, without)).items():
        adam_half = name == "muon" and ("embed" in path or "head" in path)
        if "norm" in path or adam_half:
            np.testing.assert_array_equal(change, 0, err_msg=path)
        else:
            assert np.abs(change).max() > 1e-4, path


def test_muon_updates_are_orthogonal_with_the_size_of_adam_updates():
    config = train_config(optimizer={"name": "muon", "learning_rate": 1.0, "weight_decay": 0.0})
    _, params = make_params()
    optimizer = make_optimizer(config.optimizer, 10)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    grads = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    layers = nnx.to_pure_dict(updates)["layers"]
    for name, num_in in (("query", 1), ("output", 2), ("gate", 1), ("down", 1)):
        for matrix in layers[name]:
            shape = matrix.shape
            singular = np.linalg.svd(matrix.reshape(int(np.prod(shape[:num_in])), -1), compute_uv=False)
            assert 0.5 < singular.min() / singular.max(), name  # five Newton-Schulz steps: within .7 to 1.2
            assert 0.1 < float(jnp.sqrt(jnp.mean(matrix**2))) < 0.3, name


def test_bfloat16_moments_halve_the_memory_and_train_equally_well():
    _, params = make_params()
    keys = jax.random.split(jax.random.key(0), 300)

    def run(optimizer):
        """Noisy gradients towards 1, whose second moment grows by far less than 1/256 per step."""

        def body(carry, key):
            x, state = carry
            grad = x - 1 + 0.1 * jax.random.normal(key, x.shape)
            updates, state = optimizer.update(grad, state, x)
            return (optax.apply_updates(x, updates), state), None

        x = jnp.zeros(200)
        return jax.lax.scan(body, (x, optimizer.init(x)), keys)[0]

    exact = optax.adam(0.01, b2=0.999)
    (expected, expected_state), (found, state) = run(exact), run(in_bfloat16(exact))
    np.testing.assert_allclose(found.mean(), expected.mean(), atol=0.005)
    np.testing.assert_allclose(np.mean(state.inner[0].nu.astype(jnp.float32)), np.mean(expected_state[0].nu), rtol=0.01)
    # With rounding to nearest, the same moments would not change.
    nearest = expected_state[0].nu.astype(jnp.bfloat16)
    assert jnp.all((nearest.astype(jnp.float32) * 0.999).astype(jnp.bfloat16) == nearest)

    def size(moment_dtype):
        section = train_config(optimizer={"moment_dtype": moment_dtype}).optimizer
        return sum(x.nbytes for x in jax.tree.leaves(make_optimizer(section, 10).init(params)))

    assert size("bfloat16") < 0.51 * size("float32")


def test_stochastic_rounding_is_exact_on_average_and_deterministic():
    x = jnp.asarray([1.001, -3.3, 1e-6, 0.0])
    inner = optax.GradientTransformation(lambda p: p, lambda g, s, p=None: (g, x))
    optimizer = in_bfloat16(inner)
    state = optimizer.init(jnp.zeros(4))
    rounded = []
    for _ in range(2000):
        _, state = optimizer.update(x, state)
        rounded.append(state.inner)
    values = np.stack(rounded).astype(np.float64)
    assert all(len(np.unique(column)) == 2 for column in values.T[:3]) and np.all(values[:, 3] == 0)
    np.testing.assert_allclose(values.mean(0), x, rtol=3e-4)
    again = optimizer.update(x, optimizer.init(jnp.zeros(4)))[1].inner
    np.testing.assert_array_equal(again, rounded[0])


def test_wrong_names_and_options_are_named_with_the_remedy():
    for optimizer, message in (
        ({"name": "adam"}, r"optimizer\.name: 'adam' is none of adamw, lion, adafactor, muon, sgd"),
        ({"name": "lion", "eps": 1e-8}, r"optimizer\.eps: lion has no such option \(it has b1, b2\): leave it out"),
        ({"name": "adafactor", "b1": 0.9}, r"optimizer\.b1: adafactor has no such option \(it has none of"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_optimizer(train_config(optimizer=optimizer).optimizer, 10)


def test_moments_are_sharded_like_their_parameters():
    code = "import json; from tests.student import on_meshes; print(json.dumps(on_meshes.optimizer_bytes()))"
    found = json.loads(run_on_devices(8, code).splitlines()[-1])
    for name in ("adamw", "lion", "muon"):
        mine, whole = found[name]
        assert 0 < mine < 0.2 * whole, name  # all but norms' scales are split by 8
