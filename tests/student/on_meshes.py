"""What the tests compute in processes with 8 virtual devices (tests/devices.py)."""

import jax
import numpy as np

from jdistill.student.optimizer import OPTIMIZERS, make_optimizer
from jdistill.student.sharding import make_mesh
from jdistill.student.state import init_state
from jdistill.student.step import make_train_step
from tests.student import adapters
from tests.student.factories import copy, make_params, random_batch, train_config


def step_metrics(mesh_section, **optimizer):
    """Returns the metrics of three steps."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 32}
    config = train_config(mesh=mesh_section or {}, optimizer={"minibatches": 2, **optimizer})
    mesh = make_mesh(config.mesh) if mesh_section else None
    graphdef, params = make_params(mesh, **sizes)
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    step, state, found = make_train_step(graphdef, config, optimizer, mesh), init_state(params, optimizer, mesh), []
    shardings = jax.tree.map(lambda x: x.sharding, state)
    for seed in range(3):
        state, metrics = step(state, random_batch(16, seed=seed, vocab=64))
        found.append({name: float(value) for name, value in sorted(metrics.items())})
    assert shardings == jax.tree.map(lambda x: x.sharding, state)
    return found


def optimizer_bytes():
    """Returns, per optimizer, the bytes of its state's matrices on one of 8 devices and in all."""
    config = train_config(mesh={"data": 1, "fsdp": 4, "tensor": 2})
    mesh = make_mesh(config.mesh)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 32}
    graphdef, params = make_params(mesh, **sizes)
    found = {}
    for name in OPTIMIZERS:
        section = config.optimizer.model_copy(update={"name": name, "moment_dtype": "bfloat16", "b1": None})
        optimizer = make_optimizer(section, 10)
        state = init_state(copy(params), optimizer, mesh)
        leaves = [x for x in jax.tree.leaves(state.opt_state) if x.ndim > 1]
        found[name] = [sum(x.addressable_shards[0].data.nbytes for x in leaves), sum(x.nbytes for x in leaves)]
        if name == "muon":
            step = make_train_step(graphdef, config.model_copy(update={"optimizer": section}), optimizer, mesh)
            _, metrics = step(state, random_batch(16, vocab=64))
            assert metrics["finite"]
    return found


def adapter_metrics(base, data, fsdp, tensor, **optimizer):
    """Returns metrics and the adapters' norm after a step."""
    section = train_config(mesh={"data": data, "fsdp": fsdp, "tensor": tensor}).mesh
    mesh = make_mesh(section, devices=jax.devices()[: data * fsdp * tensor])
    _, after, _, metrics = adapters.one_step(adapters.load(base, mesh=mesh), random_batch(8), mesh, **optimizer)
    norm = float(sum(np.square(x).sum() for x in after.values()))
    return {name: float(value) for name, value in metrics.items()} | {"norm": norm}
