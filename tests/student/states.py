"""Training states whose numbers are all different, for the tests of checkpoints."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jdistill import models
from jdistill.student.state import TrainState, init_state


@functools.cache
def graph_and_params(num_layers):
    """Copies to host arrays, so that no test shares buffers with another."""
    config = models.DecoderConfig(
        family="qwen3", vocab_size=16, hidden_size=8, intermediate_size=8, num_layers=num_layers, num_heads=2,
        num_kv_heads=2, head_dim=4, max_position_embeddings=32, qk_norm=True,
    )  # fmt: skip
    graphdef, params = nnx.split(models.random_init(config, 0), nnx.Param)
    return graphdef, jax.tree.map(np.asarray, params)


def make_decoder(seed, num_layers=2):
    graphdef, params = graph_and_params(num_layers)
    rng = np.random.default_rng(seed)
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params))


OPTIMIZER = optax.adamw(1e-3)


def make_state(seed, num_layers=2):
    """A state whose numbers are all different."""
    params = nnx.split(make_decoder(seed, num_layers), nnx.Param)[1]
    state = init_state(params, OPTIMIZER)
    rng = np.random.default_rng(seed)
    opt_state = jax.tree.map(
        lambda x: jnp.asarray(
            rng.integers(1, 99, x.shape) if x.dtype == jnp.int32 else rng.normal(size=x.shape), x.dtype
        ),
        state.opt_state,
    )
    return TrainState(params, opt_state, jnp.asarray(seed, jnp.int32))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
