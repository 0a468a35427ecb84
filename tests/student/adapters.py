"""Decoders with adapters, and a step that trains them."""

import jax
import numpy as np
from flax import nnx

from jdistill import models
from jdistill.models.config import LORA_TARGETS
from jdistill.student.optimizer import make_optimizer
from jdistill.student.state import init_state
from jdistill.student.step import make_train_step
from tests.student.factories import train_config

LORA = models.Lora(rank=2, alpha=6.0, targets=LORA_TARGETS)
SGD = {"name": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "clip_norm": 1e9}


def load(path, scale=0.2, mesh=None, **kwargs):
    """A decoder whose adapters are not at their start, so that both factors have a gradient."""
    decoder = models.load(path, lora=LORA, remat="layer", mesh=mesh, **kwargs)
    rng = np.random.default_rng(0)
    state = nnx.state(decoder, nnx.LoRAParam)
    moved = jax.tree.map(lambda x: jax.device_put(rng.normal(0, scale, x.shape).astype(np.float32), x.sharding), state)
    if scale:
        nnx.update(decoder, moved)
    return decoder


def one_step(decoder, batch, mesh=None, reference=None, objective=None, **optimizer):
    """Runs a step; returns the trained parameters before and after, the frozen ones, and metrics."""
    config = train_config(optimizer=SGD | optimizer, objective=objective or {})
    graphdef, params, frozen = nnx.split(decoder, models.trained_kind(decoder.config), ...)
    maker = make_optimizer(config.optimizer, config.num_steps)
    before = jax.tree.map(np.array, nnx.to_pure_dict(params)["layers"])
    step = make_train_step(graphdef, config, maker, mesh, base=frozen, reference=reference)
    state, metrics = step(init_state(params, maker, mesh), batch)
    after = jax.tree.map(np.array, nnx.to_pure_dict(state.params)["layers"])
    return before, after, frozen, metrics
