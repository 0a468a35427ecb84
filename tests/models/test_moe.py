"""Mixture of experts: blocks, and values and gradients against a dense mixture over all experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.models import moe
from tests.devices import run_on_devices

D, F = 6, 5


def random_arguments(num_tokens, num_experts, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(2, num_tokens // 2, D), (D, num_experts), (num_experts, D, F), (num_experts, D, F), (num_experts, F, D)]
    return [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]


def dense(x_BSD, router_DE, gate_EDF, up_EDF, down_EFD, num_experts_per_tok, *, norm_topk_prob):
    """Dense mixture in which experts that are not chosen have weight 0."""
    probs_BSE = jax.nn.softmax(x_BSD @ router_DE)
    least_BS1 = jnp.sort(probs_BSE)[..., -num_experts_per_tok, None]
    weights_BSE = jnp.where(probs_BSE >= least_BS1, probs_BSE, 0)
    if norm_topk_prob:
        weights_BSE /= weights_BSE.sum(-1, keepdims=True)
    h_BSEF = jax.nn.silu(jnp.einsum("BSD,EDF->BSEF", x_BSD, gate_EDF)) * jnp.einsum("BSD,EDF->BSEF", x_BSD, up_EDF)
    return jnp.einsum("BSEF,EFD,BSE->BSD", h_BSEF, down_EFD, weights_BSE)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_experts_per_tok", "norm_topk_prob", "skew"),
    [(14, 5, 2, True, 0.0), (14, 5, 2, False, 50.0), (2, 7, 3, True, 0.0)],
    ids=["even", "two experts have all tokens", "fewer pairs than experts"],
)
def test_values_and_gradients_equal_the_dense_mixture(
    num_tokens, num_experts, num_experts_per_tok, norm_topk_prob, skew
):
    x_BSD, router_DE, *weights = random_arguments(num_tokens, num_experts)
    x_BSD = x_BSD.at[..., 0].set(1.0)
    router_DE = router_DE.at[0, :2].add(skew)
    mark_BSD = jnp.asarray(np.random.default_rng(1).standard_normal(x_BSD.shape, np.float32))

    def value_and_gradients(mixture):
        def total(*arguments):
            y_BSD = mixture(*arguments, num_experts_per_tok, norm_topk_prob=norm_topk_prob)
            return jnp.sum(y_BSD * mark_BSD), y_BSD

        return jax.jit(jax.grad(total, argnums=range(5), has_aux=True))(x_BSD, router_DE, *weights)

    ours, expected = (jax.tree.leaves(value_and_gradients(mixture)) for mixture in (moe.mlp, dense))
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert all(np.abs(b).max() > 0.1 for b in expected if skew == 0), "the reference says nothing"


def test_pairs_are_placed_in_blocks_of_their_expert():
    rng = np.random.default_rng(0)
    for num_pairs, num_experts in ((4, 3), (1, 6), (33, 8)):
        for _ in range(4):
            # Also few distinct experts: a group much larger than a block.
            expert_P = rng.integers(0, rng.integers(1, num_experts + 1), num_pairs)
            place_P, expert_N, block = moe._blocks(jnp.asarray(expert_P), num_experts)
            place_P = np.asarray(place_P)
            assert len(set(place_P.tolist())) == num_pairs, "two pairs in one place"
            assert place_P.max() < len(expert_N) * block
            np.testing.assert_array_equal(np.asarray(expert_N)[place_P // block], expert_P)
            assert len(expert_N) <= 2 * min(num_experts, num_pairs)


def test_no_array_of_tokens_by_experts_by_width_exists():
    arguments = random_arguments(32, 32)

    def gradients(*arguments):
        return jax.grad(lambda *a: moe.mlp(*a, 2, norm_topk_prob=True).sum(), argnums=range(5))(*arguments)

    largest = max(
        int(np.prod(variable.aval.shape))
        for equation in jax.make_jaxpr(gradients)(*arguments).eqns
        for variable in equation.outvars
    )
    # Gathered experts: at most twice the number of experts. All tokens by all experts would be 32 * 32 * F.
    assert largest <= 2 * 32 * D * F < 32 * 32 * F


FOUR_DEVICES = """
import dataclasses, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jdistill import models
from jdistill.models import moe
from jdistill.config import MeshSection
from jdistill.models.mesh import batch_sharding
from jdistill.student import sharding
from tests.close import assert_close

assert len(jax.devices()) == 4
mesh = sharding.make_mesh(MeshSection(data=1, fsdp=2, tensor=2))
config = models.DecoderConfig(
    "qwen3_moe", 20, 8, 4, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4, max_position_embeddings=16,
    qk_norm=True, num_experts=6, num_experts_per_tok=2,
)
rng = np.random.default_rng(0)
one = nnx.eval_shape(lambda: models.Decoder(config, rngs=nnx.Rngs(0)))
random = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), nnx.state(one, nnx.Param))
nnx.update(one, jax.tree.map(jnp.asarray, random))
out = pathlib.Path(sys.argv[1])
models.save(one, out / "one")
four = models.load(out / "one", mesh=mesh)
gate_LEDF = four.layers.gate[...]
assert gate_LEDF.sharding.shard_shape(gate_LEDF.shape) == (2, 3, 8, 2), gate_LEDF.sharding
models.save(four, out / "four")
assert (out / "one" / "model.safetensors").read_bytes() == (out / "four" / "model.safetensors").read_bytes()

def gradients(x_BSD, *weights):
    def total(*args):
        y_BSD = moe.mlp(*args, 2, norm_topk_prob=True)
        return jnp.sum(y_BSD * y_BSD), y_BSD
    return jax.grad(total, argnums=range(5), has_aux=True)(x_BSD, *weights)

def arguments(decoder, x_BSD):
    return x_BSD, *(getattr(decoder.layers, name)[...][0] for name in ("router", "gate", "up", "down"))

x_BSD = rng.standard_normal((4, 6, 8), np.float32)
expected = jax.jit(gradients)(*arguments(one, x_BSD))
sharded = arguments(four, jax.device_put(x_BSD, batch_sharding(mesh)))
with jax.set_mesh(mesh):
    compiled = jax.jit(gradients).lower(*sharded).compile()
    ours = compiled(*sharded)
for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    # Relative to each array's largest value (1,360 in the outputs): sums over width and experts are split.
    assert_close(a, b, factor=8)
flops = [c.cost_analysis()["flops"] for c in (compiled, jax.jit(gradients).lower(*arguments(one, x_BSD)).compile())]
assert flops[0] < 0.4 * flops[1], f"each device computes {flops[0]} of {flops[1]}"
"""


def test_four_devices_equal_one_and_share_the_work(tmp_path):
    run_on_devices(4, FOUR_DEVICES, tmp_path)
