"""Meshes from the configuration, and the sharding of parameters on them."""

import dataclasses

import jax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jdistill.config import MeshSection
from jdistill.models import Decoder, DecoderConfig, param_shardings
from jdistill.models.mesh import AXES
from jdistill.models.params import param_specs
from jdistill.models.partitioning import MESH_AXES
from jdistill.student import sharding
from tests.devices import run_on_devices

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=1,
    head_dim=4,
    max_position_embeddings=32,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    qk_norm=True,
)


class FakeDevice:
    """The attributes of a device that are read before a mesh is made."""

    platform = "fake"


def test_sizes_that_do_not_fit_the_devices_are_refused_with_the_remedy():
    four = [FakeDevice()] * 4
    for section, message in [
        (MeshSection(data=3), r"data = 3, fsdp = 1, tensor = 1 does not fit 4 fake device\(s\).*set data = -1"),
        (MeshSection(data=-1, tensor=3), r"does not fit 4 fake device\(s\)"),
        (MeshSection(data=-1, tensor=8), r"does not fit 4 fake device\(s\)"),
        (MeshSection(data=-1, fsdp=-1), "at most one of them is -1"),
        (MeshSection(data=1, fsdp=0), "sizes are at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            sharding.make_mesh(section, devices=four)


def test_one_device_makes_a_mesh():
    mesh = sharding.make_mesh(MeshSection(), devices=jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_every_logical_axis_is_in_the_table_and_the_table_names_mesh_axes_only():
    experts = dataclasses.replace(CONFIG, family="qwen3_moe", mlp_bias=False, num_experts=4, num_experts_per_tok=2)
    specs = param_specs(CONFIG) | {f"experts.{name}": spec for name, spec in param_specs(experts).items()}
    used = {axis for spec in specs.values() for axis in spec.axes if axis is not None}
    assert used == set(MESH_AXES)
    assert {axis for axis in MESH_AXES.values() if axis is not None} <= set(AXES)
    for name, spec in specs.items():
        mesh_axes = [MESH_AXES[axis] for axis in spec.axes if axis is not None and MESH_AXES[axis] is not None]
        assert len(set(mesh_axes)) == len(mesh_axes), f"{name} would be sharded twice over one axis"


EIGHT_DEVICES = """
import jax, pytest
from jax.sharding import PartitionSpec as P
from flax import nnx
from jdistill.config import MeshSection
from jdistill.models import Decoder, DecoderConfig, param_shardings
from jdistill.models.mesh import batch_sharding, replicated
from jdistill.student import sharding

for section, expected in [
    (MeshSection(), (8, 1, 1)),
    (MeshSection(data=2, fsdp=-1, tensor=2), (2, 2, 2)),
    (MeshSection(data=1, fsdp=1, tensor=-1), (1, 1, 8)),
    (MeshSection(data=4, fsdp=2, tensor=1), (4, 2, 1)),
]:
    assert tuple(sharding.make_mesh(section).shape.values()) == expected
mesh = sharding.make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
config = DecoderConfig("llama", 64, 16, 24, 2, 4, 1, 4, 32, qkv_bias=True)
decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
shardings = param_shardings(decoder, mesh)
spec = lambda parameter: parameter.get_value().spec
assert spec(shardings["layers"]["query"]) == P(None, "fsdp", "tensor", None)
assert spec(shardings["layers"]["key"]) == P(None, "fsdp", None, None), "one key-value head cannot be split"
assert spec(shardings["layers"]["down"]) == P(None, "tensor", "fsdp")
assert spec(shardings["embed"]) == P("tensor", "fsdp")
assert spec(shardings["final_norm"]) == P(None)
rows = jax.device_put(jax.numpy.zeros((8, 3)), batch_sharding(mesh))
assert rows.sharding.shard_shape(rows.shape) == (2, 3)
one = jax.device_put(jax.numpy.zeros(3), replicated(mesh))
assert one.sharding.is_fully_replicated

from jdistill import models
import numpy as np
sharded, plain = models.random_init(config, 3, mesh=mesh), models.random_init(config, 3)
for a, b in zip(*(jax.tree.leaves(nnx.state(d, nnx.Param)) for d in (sharded, plain)), strict=True):
    np.testing.assert_array_equal(a, b)
assert sharded.layers.gate[...].sharding.spec == P(None, "fsdp", "tensor")
"""


def test_eight_devices_shard_by_the_table_and_start_equal_to_one():
    run_on_devices(8, EIGHT_DEVICES)


def test_dims_of_a_missing_mesh_axis_are_not_sharded():
    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    decoder = nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))
    shardings = param_shardings(decoder, mesh)
    assert shardings["layers"]["gate"].get_value().spec == PartitionSpec(None, None, "tensor")
