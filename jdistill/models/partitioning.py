"""Shards parameters: one table maps their logical axes to mesh axes."""

from __future__ import annotations

from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdistill.models.decoder import Decoder
from jdistill.models.params import param_specs

# Logical axis (declared beside each parameter in params.param_specs) -> mesh axis. "data" shards no parameter.
MESH_AXES = {
    "layer": None,  # scanned over, so every device needs its shard of every layer
    "width": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    # Not tensor, which already splits each expert's MLP. Experts are gathered at use, like every weight on fsdp.
    "expert": "fsdp",
}


def param_shardings(decoder: Decoder, mesh: Mesh) -> nnx.State:
    """Returns the sharding of every parameter, in the structure of `nnx.state(decoder, nnx.Param)`.

    A dim that its mesh axis does not divide (2 key-value heads over 4 tensor devices) is replicated on that axis.
    """
    specs = param_specs(decoder.config)

    def sharding(path: tuple) -> NamedSharding:
        spec = specs[".".join(map(str, path))]
        axes = []
        for size, logical in zip(spec.shape, spec.axes, strict=True):
            axis = MESH_AXES[logical] if logical is not None else None
            axes.append(axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None)
        return NamedSharding(mesh, PartitionSpec(*axes))

    state = nnx.state(decoder, nnx.Param)
    return nnx.map_state(lambda path, variable: variable.replace(sharding(path)), state)
