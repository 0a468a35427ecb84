"""Mixture of experts: each token passes only through the MLPs of the K experts that the router ranks highest.

The (token, expert) pairs are sorted by expert and padded to blocks that belong to one expert each, so three batched
matrix products compute everything. `jax.lax.ragged_dot` would be shorter, but on CPUs XLA computes it as one dense
product over all experts, with a copy of the tokens for each.

Dimension key: B sequences, S tokens, T = B * S, D width, E experts, K experts per token, P = T * K pairs, F width of an
expert's MLP; N blocks of b places, X = N * b >= P.

Reference:
    Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", 2022, for the blocks.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int


def route(
    x_TD: Float[Array, "T D"], router_DE: Float[Array, "D E"], num_experts_per_tok: int, *, norm_topk_prob: bool
) -> tuple[Float[Array, "T K"], Int[Array, "T K"]]:
    """Chooses each token's experts: the K largest of the softmax over all experts.

    Args:
        x_TD: after the norm, in compute dtype.
        router_DE: in the same dtype.
        num_experts_per_tok: K.
        norm_topk_prob: whether to divide the K weights by their sum.

    Returns:
        float32 weights, and the indices of the experts.
    """
    logits_TE = jnp.einsum("TD,DE->TE", x_TD, router_DE, preferred_element_type=jnp.float32)
    weights_TK, experts_TK = jax.lax.top_k(jax.nn.softmax(logits_TE, axis=-1), num_experts_per_tok)
    if norm_topk_prob:
        weights_TK /= jnp.sum(weights_TK, axis=-1, keepdims=True)
    return weights_TK, experts_TK


def mlp(
    x_BSD: Float[Array, "B S D"],
    router_DE: Float[Array, "D E"],
    gate_EDF: Float[Array, "E D F"],
    up_EDF: Float[Array, "E D F"],
    down_EFD: Float[Array, "E F D"],
    num_experts_per_tok: int,
    *,
    norm_topk_prob: bool,
) -> Float[Array, "B S D"]:
    """Computes down(silu(gate(x)) * up(x)) for each token's experts, and sum them with the router's weights.

    All arguments have one dtype. On a mesh (`jax.set_mesh`) each device sorts the tokens of its own rows.
    """
    mixture = functools.partial(_mlp, num_experts_per_tok=num_experts_per_tok, norm_topk_prob=norm_topk_prob)
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in mesh.axis_names if axis != "tensor")
    num_shards = math.prod(mesh.shape[axis] for axis in axes)
    if num_shards > 1 and x_BSD.shape[0] % num_shards == 0:
        # Sorting all tokens at once would make every device compute all of them. XLA still splits the tensor axis.
        rows, everywhere = PartitionSpec(axes), PartitionSpec()
        # check_vma=False: transposing shard_map sums the experts' gradients over devices.
        mixture = jax.shard_map(
            mixture, in_specs=(rows, *(everywhere,) * 4), out_specs=rows, axis_names=set(axes), check_vma=False
        )
    return mixture(x_BSD, router_DE, gate_EDF, up_EDF, down_EFD)


def _mlp(x_BSD, router_DE, gate_EDF, up_EDF, down_EFD, *, num_experts_per_tok: int, norm_topk_prob: bool):
    x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
    T, K, E = x_TD.shape[0], num_experts_per_tok, router_DE.shape[1]
    weights_TK, experts_TK = route(x_TD, router_DE, K, norm_topk_prob=norm_topk_prob)
    place_P, expert_N, block = _blocks(experts_TK.reshape(-1), E)
    # Token T, one past the last, marks an empty place: it reads zeros.
    token_X = jnp.full(expert_N.shape[0] * block, T, jnp.int32).at[place_P].set(jnp.arange(T * K, dtype=jnp.int32) // K)
    x_NbD = jnp.take(x_TD, token_X, axis=0, mode="fill", fill_value=0).reshape(-1, block, x_TD.shape[1])
    h_NbF = jax.nn.silu(_project(x_NbD, gate_EDF, expert_N)) * _project(x_NbD, up_EDF, expert_N)
    y_XD = _project(h_NbF, down_EFD, expert_N).reshape(-1, x_TD.shape[1])
    y_TKD = y_XD[place_P].reshape(T, K, -1)
    y_TD = jnp.einsum("TKD,TK->TD", y_TKD, weights_TK, preferred_element_type=jnp.float32)
    return y_TD.astype(x_BSD.dtype).reshape(x_BSD.shape)


def _blocks(expert_P: Int[Array, "P"], num_experts: int) -> tuple[Int[Array, "P"], Int[Array, "N"], int]:
    """Returns the place of each pair, the expert of each block, and the size of a block.

    Example: experts (2, 0, 2, 2) of 3 -> blocks of 2 for experts (0, 2, 2), places (2, 0, 3, 4); places 1 and 5 stay
    empty.
    """
    (P,) = expert_P.shape
    # The average number of pairs per expert. So there are at most twice as many blocks as experts (or pairs, if fewer),
    # and neither the padded tokens nor the experts' weights, which are gathered per block, more than double.
    block = -(-P // num_experts)
    N = (P + min(num_experts, P) * (block - 1)) // block
    counts_E = jnp.zeros(num_experts, jnp.int32).at[expert_P].add(1)
    last_block_E = jnp.cumsum(-(-counts_E // block))
    first_place_E = block * (last_block_E - -(-counts_E // block))
    order_P = jnp.argsort(expert_P, stable=True)
    sorted_P = expert_P[order_P]
    rank_P = jnp.arange(P, dtype=jnp.int32) - (jnp.cumsum(counts_E) - counts_E)[sorted_P]  # within its expert
    place_P = jnp.zeros(P, jnp.int32).at[order_P].set(first_place_E[sorted_P] + rank_P)
    # Blocks after the last one in use are computed too, on zeros, with the last expert.
    expert_N = jnp.minimum(jnp.searchsorted(last_block_E, jnp.arange(N), side="right"), num_experts - 1)
    return place_P, expert_N, block


@jax.custom_vjp
def _project(x_NbD, w_EDF, expert_N):
    """Multiplies each block by the matrix of its expert."""
    return jnp.einsum("NbD,NDF->NbF", x_NbD, w_EDF[expert_N])


def _project_forward(x_NbD, w_EDF, expert_N):
    return _project(x_NbD, w_EDF, expert_N), (x_NbD, w_EDF, expert_N)


def _project_backward(residuals, grad_NbF):
    # Written by hand because autodiff would keep the gathered matrices: up to two copies of every layer's experts.
    x_NbD, w_EDF, expert_N = residuals
    grad_x_NbD = jnp.einsum("NbF,NDF->NbD", grad_NbF, w_EDF[expert_N])
    grad_NDF = jnp.einsum("NbD,NbF->NDF", x_NbD, grad_NbF, preferred_element_type=jnp.float32)
    grad_EDF = jax.ops.segment_sum(grad_NDF, expert_N, num_segments=w_EDF.shape[0], indices_are_sorted=True)
    return grad_x_NbD, grad_EDF.astype(w_EDF.dtype), None


_project.defvjp(_project_forward, _project_backward)
