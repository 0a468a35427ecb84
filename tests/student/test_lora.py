"""Training adapters: gradients equal the merged weights' by the chain rule, and frozen weights cost nothing extra."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdistill import models
from jdistill.models.config import LORA_TARGETS
from jdistill.student.optimizer import make_optimizer
from jdistill.student.state import init_state
from jdistill.student.step import make_train_step
from tests.devices import run_on_devices
from tests.student.adapters import LORA, load, one_step
from tests.student.factories import V, decoder_config, random_batch, train_config


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "model"
    models.save(models.random_init(decoder_config(), 3), path)
    return path


@pytest.mark.parametrize("optimizer", [{}, {"accumulate": 2, "packing": True}])
def test_the_gradient_is_that_of_the_merged_weights_by_the_chain_rule(base, optimizer):
    decoder, batch = load(base), random_batch(8)
    merged = models.merge_lora(load(base))
    whole_before, whole_after, _, expected = one_step(merged, batch)
    before, after, frozen, metrics = one_step(decoder, batch, **optimizer)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-4)
    assert set(before) == {name + suffix for name in LORA_TARGETS for suffix in ("_lora_a", "_lora_b")}
    for name in LORA_TARGETS:
        grad_LIO = whole_before[name] - whole_after[name]
        a, b = before[f"{name}_lora_a"], before[f"{name}_lora_b"]
        a_LIr, b_LrO = a.reshape(2, -1, LORA.rank), b.reshape(2, LORA.rank, -1)
        grad_LIO = LORA.scale * grad_LIO.reshape(2, a_LIr.shape[1], b_LrO.shape[2])
        for suffix, x, grad in [
            ("_lora_a", a, grad_LIO @ b_LrO.swapaxes(1, 2)),
            ("_lora_b", b, a_LIr.swapaxes(1, 2) @ grad_LIO),
        ]:
            got = (x - after[name + suffix]).reshape(grad.shape)
            assert np.abs(grad).max() > 1e-4, "no gradient: this shows nothing"
            np.testing.assert_allclose(got, grad, rtol=1e-3, atol=1e-5, err_msg=name + suffix)
    unchanged = nnx.state(models.load(base), nnx.Param)
    for x, y in zip(jax.tree.leaves(frozen), jax.tree.leaves(unchanged), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_reference_is_the_model_without_adapters(base):
    objective = {"reference": {"path": "unused", "weight": 0.5}}
    reference = nnx.state(models.load(base), nnx.Param)
    fresh = load(base, scale=0.0)
    frozen = nnx.split(fresh, nnx.LoRAParam, ...)[2]
    *_, begins = one_step(fresh, random_batch(), objective=objective, reference=frozen)
    assert begins["reference_kl"] == 0
    *_, apart = one_step(load(base), random_batch(), objective=objective, reference=reference)
    *_, merged = one_step(models.merge_lora(load(base)), random_batch(), objective=objective, reference=reference)
    assert apart["reference_kl"] > 0.001
    np.testing.assert_allclose(apart["reference_kl"], merged["reference_kl"], rtol=1e-3)


def test_frozen_weights_are_stored_once_in_compute_dtype_and_get_no_gradient(base, tmp_path):
    decoder = load(base, compute_dtype="bfloat16", param_dtype="bfloat16")
    config = train_config()
    _, params, frozen = nnx.split(decoder, nnx.LoRAParam, ...)
    maker = make_optimizer(config.optimizer, config.num_steps)
    state = init_state(params, maker)
    assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * sum(x.size for x in jax.tree.leaves(params))

    def flops(decoder):
        graphdef, params, frozen = nnx.split(decoder, models.trained_kind(decoder.config), ...)
        step = make_train_step(graphdef, config, maker, base=frozen)
        lowered = jax.jit(step.program.step).lower(init_state(params, maker), random_batch(16, 64), step.frozen)
        return lowered.compile().cost_analysis()["flops"]

    # Large enough that the adapters are small in comparison.
    larger = decoder_config(hidden_size=64, intermediate_size=192, vocab_size=2048)
    models.save(models.random_init(larger, 3), tmp_path / "larger")
    assert flops(load(tmp_path / "larger")) < 0.85 * flops(models.load(tmp_path / "larger", remat="layer"))


def test_eight_devices_train_the_same_adapters_as_one(base):
    code = (
        "import json; from tests.student import on_meshes;"
        f"runs = [((1, 1, 1), {{}}), ((2, 2, 2), {{}}), ((1, 4, 2), {{'accumulate': 2}})];"
        f"print(json.dumps([on_meshes.adapter_metrics({str(base)!r}, *mesh, **optimizer) for mesh, optimizer in runs]))"
    )
    one, *meshes = json.loads(run_on_devices(8, code).splitlines()[-1])
    assert V == 19 and one["grad_norm"] > 0.01
    for other in meshes:
        for name, value in one.items():
            np.testing.assert_allclose(other[name], value, rtol=2e-3, atol=1e-5, err_msg=name)
