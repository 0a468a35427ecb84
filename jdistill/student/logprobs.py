"""Computes log-probs of targets and candidates from hidden states in chunks of targets.

No [tokens, vocabulary] array outlives a chunk. Unscored targets cost nothing: targets are ordered so that the scored
ones come first, and only chunks that contain scored targets are computed.

The backward pass is written by hand. If the loss is a sum over targets (`loss_of_targets`), the gradient of a chunk is
computed while its logits exist, and nothing is computed twice: three matrix products of [C, D] x [D, V] per chunk. In
general (`target_logprobs`) the gradient arrives after all log-probs are known, so the logits are computed again.

Dimension key: B sequences, T targets, D width, V vocabulary, K candidates; N shards of the batch (devices on the mesh's
batch axes), M = B / N * T targets per shard, C targets per chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jdistill.models.mesh import batch_sharding


class TargetLogprobs(NamedTuple):
    """Log-probs and entropies in nats, float32; 0 where a target is not scored."""

    logprobs: Float[Array, "B T"]
    candidate_logprobs: Float[Array, "B T K"] | None
    entropy: Float[Array, "B T"]  # of the whole distribution; a metric without a gradient


def target_logprobs(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    target_ids: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    candidate_ids: Int[Array, "B T K"] | None = None,
    *,
    temperature: float,
    chunk_tokens: int,
    mesh: Mesh | None = None,
    softcap: float | None = None,
) -> TargetLogprobs:
    """Computes log-softmax of hidden @ head / temperature at targets and candidates; differentiable in hidden and head.

    Args:
        hidden: hidden states after the final norm.
        head: the output projection, in the dtype of hidden. Logits are float32 for every dtype.
        target_ids: the sampled tokens.
        loss_mask: true where a target is scored; nothing is computed for the others.
        candidate_ids: further tokens to score at each target.
        temperature: divides the logits.
        chunk_tokens: C, the number of targets per device whose logits exist at once.
        mesh: the batch is split over its batch axes; None: one device.
        softcap: c; logits x become c * tanh(x / c) before the temperature. None: no cap.

    Raises:
        ValueError: the rows cannot be split over the mesh's batch axes.
    """
    plan, arrays = _planned(hidden, target_ids, loss_mask, candidate_ids, temperature, softcap, chunk_tokens, mesh)
    return plan.on_grid(*_chunked(plan, arrays[0], head, *arrays[1:]))


def loss_of_targets(
    loss: Callable[[TargetLogprobs, Any], Float[Array, ""]],
    given: Any,
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    target_ids: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    candidate_ids: Int[Array, "B T K"] | None = None,
    *,
    temperature: float,
    chunk_tokens: int,
    mesh: Mesh | None = None,
    softcap: float | None = None,
) -> tuple[Float[Array, ""], TargetLogprobs]:
    """Computes a loss of the targets' log-probs, differentiable in hidden and head.

    Equal to `loss(target_logprobs(...), given)`, with three quarters of its work.

    Args:
        loss: a sum over targets of a function of `given` and of that target's log-probs and entropy. Its gradient at a
            target is taken while the log-probs of targets in later chunks are still 0.
        given: the other arrays that `loss` reads; they get no gradient.
        hidden, head, target_ids, loss_mask, candidate_ids, temperature, chunk_tokens, mesh, softcap: see
            `target_logprobs`.

    Returns:
        The loss, and the log-probs without a gradient.
    """
    plan, arrays = _planned(hidden, target_ids, loss_mask, candidate_ids, temperature, softcap, chunk_tokens, mesh)
    value, scored = _fused(plan, loss, given, arrays[0], head, *arrays[1:])
    return value, jax.tree.map(jax.lax.stop_gradient, scored)


class _Plan(NamedTuple):
    """Static arguments of one call."""

    temperature: float
    softcap: float | None
    chunk: int  # C
    mesh: Mesh | None  # None: one device holds all rows
    num_rows: int  # B
    has_candidates: bool

    def on_grid(self, logprobs_NMK: Array, entropy_NM: Array) -> TargetLogprobs:
        logprobs_BTK = logprobs_NMK.reshape(self.num_rows, -1, logprobs_NMK.shape[-1])
        return TargetLogprobs(
            logprobs=logprobs_BTK[..., 0],
            candidate_logprobs=logprobs_BTK[..., 1:] if self.has_candidates else None,
            entropy=jax.lax.stop_gradient(entropy_NM.reshape(self.num_rows, -1)),
        )


def _planned(
    hidden, target_ids, loss_mask, candidate_ids, temperature, softcap, chunk_tokens, mesh
) -> tuple[_Plan, tuple[jax.Array, jax.Array, jax.Array]]:
    """Returns the plan, and hidden, ids and mask split into shards: [N, M, ...]."""
    B, T, D = hidden.shape
    num_shards = 1
    if mesh is not None:
        num_shards = mesh.size // mesh.shape.get("tensor", 1)
        if B % num_shards:
            raise ValueError(
                f"{B} rows of a batch cannot be split over {num_shards} devices: make the rows per update a multiple "
                "of mesh.data * mesh.fsdp"
            )
    M = B // num_shards * T
    ids = target_ids[..., None]
    if candidate_ids is not None:
        ids = jnp.concatenate([ids, candidate_ids], axis=-1)
    sharded = mesh if num_shards > 1 else None
    plan = _Plan(temperature, softcap, min(chunk_tokens, M), sharded, B, candidate_ids is not None)
    shapes = (hidden, (M, D)), (ids, (M, ids.shape[-1])), (loss_mask, (M,))
    return plan, tuple(_split_rows(x.reshape(num_shards, *shape), sharded) for x, shape in shapes)


def _split_rows(x, mesh: Mesh | None):
    return x if mesh is None else jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def _whole_width(head_DV, mesh: Mesh | None):
    """Gathers the head over every axis except the vocabulary's: once here instead of once per chunk."""
    if mesh is None:
        return head_DV
    vocab = "tensor" if head_DV.shape[1] % mesh.shape.get("tensor", 1) == 0 and "tensor" in mesh.shape else None
    return jax.lax.with_sharding_constraint(head_DV, NamedSharding(mesh, PartitionSpec(None, vocab)))


class _Order(NamedTuple):
    """Order of targets within each shard, the scored ones first."""

    forth: jax.Array  # [N, M padded to whole chunks], place in order -> target
    back: jax.Array  # [N, M], target -> place in order
    num_chunks: jax.Array  # chunks that contain a scored target, on the shard with the most of them


def _order(mask_NM, chunk: int) -> _Order:
    M = mask_NM.shape[1]
    forth_NM = jnp.argsort(~mask_NM, axis=1, stable=True)
    num_chunks = -(-jnp.max(jnp.sum(mask_NM, axis=1)) // chunk)
    return _Order(jnp.pad(forth_NM, ((0, 0), (0, -M % chunk))), jnp.argsort(forth_NM, axis=1), num_chunks)


def _take(x, index_NM):
    """Takes the rows of x [N, M, ...] at index [N, C] in each shard."""
    return jax.vmap(lambda rows, index: rows[index])(x, index_NM)


def _chunk_of(x, i, chunk: int):
    return jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)


def _logits(hidden_NCD, head_DV, temperature: float, softcap: float | None):
    # The default for float32 on NVIDIA GPUs is TF32, whose mantissa has 10 bits instead of 23.
    logits_NCV = jnp.einsum(
        "NCD,DV->NCV", hidden_NCD, head_DV, precision=_precision(head_DV), preferred_element_type=jnp.float32
    )
    if softcap is not None:
        logits_NCV = softcap * jnp.tanh(logits_NCV / softcap)
    return logits_NCV if temperature == 1 else logits_NCV / temperature


def _precision(x) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


class _Chunk(NamedTuple):
    """Results for C targets, kept while their logits exist."""

    logprobs: jax.Array  # [N, C, K]
    entropy: jax.Array  # [N, C]
    norm: jax.Array  # [N, C], logarithm of the softmax's denominator
    logits: jax.Array  # [N, C, V]
    exp: jax.Array  # [N, C, V], exp(logits - their maximum)
    sum: jax.Array  # [N, C], sum of exp over the vocabulary


def _compute(plan: _Plan, hidden_NCD, head_DV, ids_NCK) -> _Chunk:
    logits_NCV = _logits(hidden_NCD, head_DV, plan.temperature, plan.softcap)
    max_NC1 = jnp.max(logits_NCV, axis=-1, keepdims=True)
    exp_NCV = jnp.exp(logits_NCV - max_NC1)
    sum_NC = jnp.sum(exp_NCV, axis=-1)
    norm_NC = max_NC1[..., 0] + jnp.log(sum_NC)
    # einsum, not sum(exp * logits): on CPUs XLA reduces that product 10 times slower, slower than the projection
    # itself.
    weighted_NC = jnp.einsum("NCV,NCV->NC", exp_NCV, logits_NCV, precision=jax.lax.Precision.HIGHEST)
    logprobs_NCK = jnp.take_along_axis(logits_NCV, ids_NCK, axis=-1) - norm_NC[..., None]
    return _Chunk(logprobs_NCK, norm_NC - weighted_NC / sum_NC, norm_NC, logits_NCV, exp_NCV, sum_NC)


def _gradients(plan: _Plan, grad_NCK, hidden_NCD, head_DV, ids_NCK, logits_NCV, exp_NCV, sum_NC):
    """Returns the gradients of a chunk's hidden states and, per shard, of the head, from those of its log-probs."""
    grad_NCV = -(jnp.sum(grad_NCK, axis=-1) / sum_NC)[..., None] * exp_NCV
    grad_NCV = jax.vmap(jax.vmap(lambda row, ids, grad: row.at[ids].add(grad)))(grad_NCV, ids_NCK, grad_NCK)
    if plan.softcap is not None:  # tanh' = 1 - tanh^2, and tanh is the capped logit over the cap
        grad_NCV *= 1 - jnp.square(logits_NCV * (plan.temperature / plan.softcap))
    grad_NCV = (grad_NCV if plan.temperature == 1 else grad_NCV / plan.temperature).astype(head_DV.dtype)
    einsum = functools.partial(jnp.einsum, precision=_precision(head_DV), preferred_element_type=jnp.float32)
    grad_hidden_NCD = einsum("NCV,DV->NCD", grad_NCV, head_DV).astype(hidden_NCD.dtype)
    return grad_hidden_NCD, einsum("NCD,NCV->NDV", hidden_NCD, grad_NCV)


def _empty_gradients(plan: _Plan, order: _Order, hidden_NMD, head_DV) -> tuple[jax.Array, jax.Array]:
    """Returns zero gradients of the ordered hidden states and, per shard, of the head; shards are summed at the end."""
    hidden = jnp.zeros((*order.forth.shape, hidden_NMD.shape[2]), hidden_NMD.dtype)
    head = jnp.zeros((len(hidden_NMD), *head_DV.shape), jnp.float32)
    return _split_rows(hidden, plan.mesh), _split_rows(head, plan.mesh)


def _real(order: _Order, num_targets: int, i, chunk: int):
    """Returns bool [C], false at the places that pad the last chunk: they repeat target 0, which must count once."""
    return jax.lax.dynamic_slice_in_dim(jnp.arange(order.forth.shape[1]) < num_targets, i * chunk, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(plan: _Plan, hidden_NMD, head_DV, ids_NMK, mask_NM):
    return _forward(plan, hidden_NMD, head_DV, ids_NMK, mask_NM)[0]


def _forward(plan: _Plan, hidden_NMD, head_DV, ids_NMK, mask_NM):
    order = _order(mask_NM, plan.chunk)
    whole_DV = _whole_width(head_DV, plan.mesh)

    def body(i, filled):
        index_NC = _chunk_of(order.forth, i, plan.chunk)
        chunk = _compute(plan, _take(hidden_NMD, index_NC), whole_DV, _take(ids_NMK, index_NC))
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(all_NM, part_NC, i * plan.chunk, axis=1)
            for all_NM, part_NC in zip(filled, chunk[:3], strict=True)
        )

    padded = order.forth.shape
    empty = (jnp.zeros((*padded, ids_NMK.shape[-1])), jnp.zeros(padded), jnp.zeros(padded))
    ordered = jax.lax.fori_loop(0, order.num_chunks, body, tuple(_split_rows(x, plan.mesh) for x in empty))
    logprobs_NMK, entropy_NM, norm_NM = (_take(x, order.back) for x in ordered)
    # The last chunk also holds unscored targets.
    outputs = (jnp.where(mask_NM[..., None], logprobs_NMK, 0), jnp.where(mask_NM, entropy_NM, 0))
    return outputs, (hidden_NMD, head_DV, ids_NMK, mask_NM, norm_NM)


def _backward(plan: _Plan, residuals, cotangents):
    hidden_NMD, head_DV, ids_NMK, mask_NM, norm_NM = residuals
    # The cotangent of entropy is 0: target_logprobs stops it. where(): a caller's loss may read unscored log-probs.
    grad_NMK = jnp.where(mask_NM[..., None], cotangents[0], 0)
    order = _order(mask_NM, plan.chunk)
    whole_DV = _whole_width(head_DV, plan.mesh)
    M = hidden_NMD.shape[1]

    def body(i, carry):
        grad_hidden_NMD, grad_head_NDV = carry
        index_NC = _chunk_of(order.forth, i, plan.chunk)
        hidden_NCD, ids_NCK = _take(hidden_NMD, index_NC), _take(ids_NMK, index_NC)
        grad_NCK = jnp.where(_real(order, M, i, plan.chunk)[:, None], _take(grad_NMK, index_NC), 0)
        logits_NCV = _logits(hidden_NCD, whole_DV, plan.temperature, plan.softcap)
        softmax_NCV = jnp.exp(logits_NCV - _take(norm_NM, index_NC)[..., None])
        grad_hidden_NCD, grad_NDV = _gradients(
            plan, grad_NCK, hidden_NCD, whole_DV, ids_NCK, logits_NCV, softmax_NCV, jnp.ones_like(grad_NCK[..., 0])
        )
        return (
            jax.lax.dynamic_update_slice_in_dim(grad_hidden_NMD, grad_hidden_NCD, i * plan.chunk, axis=1),
            grad_head_NDV + grad_NDV,
        )

    empty = _empty_gradients(plan, order, hidden_NMD, head_DV)
    ordered_NMD, grad_head_NDV = jax.lax.fori_loop(0, order.num_chunks, body, empty)
    return _take(ordered_NMD, order.back), jnp.sum(grad_head_NDV, axis=0).astype(head_DV.dtype), None, None


_chunked.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(plan: _Plan, loss, given, hidden_NMD, head_DV, ids_NMK, mask_NM):
    scored = plan.on_grid(*_forward(plan, hidden_NMD, head_DV, ids_NMK, mask_NM)[0])
    return loss(scored, given), scored


def _fused_forward(plan: _Plan, loss, given, hidden_NMD, head_DV, ids_NMK, mask_NM):
    order = _order(mask_NM, plan.chunk)
    whole_DV = _whole_width(head_DV, plan.mesh)
    N, M = mask_NM.shape

    def of_logprobs(logprobs_NMK, entropy_NM):
        return loss(plan.on_grid(logprobs_NMK, entropy_NM), given)

    def put(all_NM, index_NC, part_NC):
        return jax.vmap(lambda rows, index, part: rows.at[index].set(part))(all_NM, index_NC, part_NC)

    def body(i, carry):
        logprobs_NMK, entropy_NM, grad_hidden_NMD, grad_head_NDV = carry
        index_NC = _chunk_of(order.forth, i, plan.chunk)
        hidden_NCD, ids_NCK = _take(hidden_NMD, index_NC), _take(ids_NMK, index_NC)
        chunk = _compute(plan, hidden_NCD, whole_DV, ids_NCK)
        # The last chunk also holds unscored targets.
        mask_NC = _take(mask_NM, index_NC)
        logprobs_NMK = put(logprobs_NMK, index_NC, jnp.where(mask_NC[..., None], chunk.logprobs, 0))
        entropy_NM = put(entropy_NM, index_NC, jnp.where(mask_NC, chunk.entropy, 0))
        # The gradient covers all targets, although only this chunk's is used: cheap compared with [C, V] logits.
        grad_NMK = jax.grad(of_logprobs)(logprobs_NMK, entropy_NM)
        counts_NC = mask_NC & _real(order, M, i, plan.chunk)
        grad_NCK = jnp.where(counts_NC[..., None], _take(grad_NMK, index_NC), 0)
        grad_hidden_NCD, grad_NDV = _gradients(
            plan, grad_NCK, hidden_NCD, whole_DV, ids_NCK, chunk.logits, chunk.exp, chunk.sum
        )
        grad_hidden_NMD = jax.lax.dynamic_update_slice_in_dim(grad_hidden_NMD, grad_hidden_NCD, i * plan.chunk, axis=1)
        return logprobs_NMK, entropy_NM, grad_hidden_NMD, grad_head_NDV + grad_NDV

    empty = (jnp.zeros(ids_NMK.shape), jnp.zeros((N, M)))
    empty = (*(_split_rows(x, plan.mesh) for x in empty), *_empty_gradients(plan, order, hidden_NMD, head_DV))
    logprobs_NMK, entropy_NM, ordered_NMD, grad_head_NDV = jax.lax.fori_loop(0, order.num_chunks, body, empty)
    scored = plan.on_grid(logprobs_NMK, entropy_NM)
    grads = _take(ordered_NMD, order.back), jnp.sum(grad_head_NDV, axis=0).astype(head_DV.dtype)
    return (loss(scored, given), scored), grads


def _fused_backward(plan: _Plan, loss, grads, cotangents):
    # The cotangents of the log-probs are 0: loss_of_targets stops them.
    grad_hidden_NMD, grad_head_DV = (cotangents[0].astype(grad.dtype) * grad for grad in grads)
    return None, grad_hidden_NMD, grad_head_DV, None, None


_fused.defvjp(_fused_forward, _fused_backward)
