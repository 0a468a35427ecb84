"""Hidden states -> log-probs of targets and candidates, in chunks: no [tokens, vocabulary] array outlives a chunk.

Unscored targets cost nothing: the scored ones are brought together first, and only chunks that hold any are computed.
The backward pass is written out: it recomputes a chunk's logits from the normaliser that the forward pass kept, and
turns them into gradients of the hidden states and the head at once.

Dimension key: B sequences, T targets, D width, V vocabulary, K candidates; N shards of the batch (devices on the mesh's
batch axes), M = B / N * T targets of a shard, C targets of a chunk.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jdistill.student.sharding import batch_sharding


class TargetLogprobs(NamedTuple):
    """In nats, float32; 0 where a target is not scored."""

    logprobs: Float[Array, "B T"]
    candidate_logprobs: Float[Array, "B T K"] | None
    entropy: Float[Array, "B T"]  # of the whole distribution; a metric, it has no gradient


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
    """Log-softmax of hidden @ head / temperature at the targets and the candidates; differentiable in hidden and head.

    Args:
        hidden: after the final norm.
        head: the output projection, of the same dtype. Logits are float32 whatever it is.
        target_ids: the tokens that were sampled.
        loss_mask: which of them are scored; nothing is computed for the others.
        candidate_ids: more tokens to score at each target.
        temperature: of the softmax.
        chunk_tokens: C, targets of one device whose logits exist at once.
        mesh: the batch is split over its batch axes; None: one device.
        softcap: c, where the model's logits x are c * tanh(x / c), before the temperature. None: they are x.
    """
    B, T, D = hidden.shape
    num_shards = 1
    if mesh is not None:
        num_shards = mesh.size // mesh.shape.get("tensor", 1)
        if B % num_shards:
            raise ValueError(
                f"{B} rows of a batch cannot be split over {num_shards} devices: make the rows of an update a multiple "
                "of mesh.data * mesh.fsdp"
            )
    M = B // num_shards * T
    if candidate_ids is None:
        ids = target_ids[..., None]
    else:
        ids = jnp.concatenate([target_ids[..., None], candidate_ids], axis=-1)
    sharded = mesh if num_shards > 1 else None
    logprobs_NMK, entropy_NM = _chunked(
        temperature,
        softcap,
        min(chunk_tokens, M),
        sharded,
        _split_rows(hidden.reshape(num_shards, M, D), sharded),
        head,
        _split_rows(ids.reshape(num_shards, M, -1), sharded),
        _split_rows(loss_mask.reshape(num_shards, M), sharded),
    )
    logprobs_BTK = logprobs_NMK.reshape(B, T, -1)
    return TargetLogprobs(
        logprobs=logprobs_BTK[..., 0],
        candidate_logprobs=None if candidate_ids is None else logprobs_BTK[..., 1:],
        entropy=jax.lax.stop_gradient(entropy_NM.reshape(B, T)),
    )


def _split_rows(x, mesh: Mesh | None):
    return x if mesh is None else jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def _whole_width(head_DV, mesh: Mesh | None):
    """The head gathered over every axis but the vocabulary's, once, not once for each chunk."""
    if mesh is None:
        return head_DV
    vocab = "tensor" if head_DV.shape[1] % mesh.shape.get("tensor", 1) == 0 and "tensor" in mesh.shape else None
    return jax.lax.with_sharding_constraint(head_DV, NamedSharding(mesh, PartitionSpec(None, vocab)))


class _Order(NamedTuple):
    """Scored targets first."""

    forth: jax.Array  # [N, M padded to whole chunks], place in order -> target
    back: jax.Array  # [N, M], target -> place in order
    num_chunks: jax.Array  # that hold a scored target, on the shard with the most of them


def _order(mask_NM, chunk: int) -> _Order:
    M = mask_NM.shape[1]
    forth_NM = jnp.argsort(~mask_NM, axis=1, stable=True)
    num_chunks = -(-jnp.max(jnp.sum(mask_NM, axis=1)) // chunk)
    return _Order(jnp.pad(forth_NM, ((0, 0), (0, -M % chunk))), jnp.argsort(forth_NM, axis=1), num_chunks)


def _take(x, index_NM):
    """Rows of x [N, M, ...] at index [N, C], shard by shard."""
    return jax.vmap(lambda rows, index: rows[index])(x, index_NM)


def _chunk_of(x, i, chunk: int):
    return jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)


def _logits(hidden_NCD, head_DV, temperature: float, softcap: float | None):
    # On NVIDIA GPUs the default for float32 is TF32, whose 10-bit mantissa is not what float32 promises.
    logits_NCV = jnp.einsum(
        "NCD,DV->NCV", hidden_NCD, head_DV, precision=_precision(head_DV), preferred_element_type=jnp.float32
    )
    if softcap is not None:
        logits_NCV = softcap * jnp.tanh(logits_NCV / softcap)
    return logits_NCV if temperature == 1 else logits_NCV / temperature


def _precision(x) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _chunked(
    temperature: float, softcap: float | None, chunk: int, mesh: Mesh | None, hidden_NMD, head_DV, ids_NMK, mask_NM
):
    return _forward(temperature, softcap, chunk, mesh, hidden_NMD, head_DV, ids_NMK, mask_NM)[0]


def _forward(
    temperature: float, softcap: float | None, chunk: int, mesh: Mesh | None, hidden_NMD, head_DV, ids_NMK, mask_NM
):
    order = _order(mask_NM, chunk)
    whole_DV = _whole_width(head_DV, mesh)

    def body(i, filled):
        index_NC = _chunk_of(order.forth, i, chunk)
        logits_NCV = _logits(_take(hidden_NMD, index_NC), whole_DV, temperature, softcap)
        max_NC1 = jnp.max(logits_NCV, axis=-1, keepdims=True)
        exp_NCV = jnp.exp(logits_NCV - max_NC1)
        sum_NC = jnp.sum(exp_NCV, axis=-1)
        norm_NC = max_NC1[..., 0] + jnp.log(sum_NC)
        # einsum, not sum(exp * logits): XLA's CPU reduction of that product takes 10 times as long, longer than the
        # projection itself.
        weighted_NC = jnp.einsum("NCV,NCV->NC", exp_NCV, logits_NCV, precision=jax.lax.Precision.HIGHEST)
        entropy_NC = norm_NC - weighted_NC / sum_NC
        logprobs_NCK = jnp.take_along_axis(logits_NCV, _take(ids_NMK, index_NC), axis=-1) - norm_NC[..., None]
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(all_NM, part_NC, i * chunk, axis=1)
            for all_NM, part_NC in zip(filled, (logprobs_NCK, entropy_NC, norm_NC), strict=True)
        )

    padded = order.forth.shape
    empty = (jnp.zeros((*padded, ids_NMK.shape[-1])), jnp.zeros(padded), jnp.zeros(padded))
    ordered = jax.lax.fori_loop(0, order.num_chunks, body, tuple(_split_rows(x, mesh) for x in empty))
    logprobs_NMK, entropy_NM, norm_NM = (_take(x, order.back) for x in ordered)
    # The last chunk also holds unscored targets.
    outputs = (jnp.where(mask_NM[..., None], logprobs_NMK, 0), jnp.where(mask_NM, entropy_NM, 0))
    return outputs, (hidden_NMD, head_DV, ids_NMK, mask_NM, norm_NM)


def _backward(temperature: float, softcap: float | None, chunk: int, mesh: Mesh | None, residuals, cotangents):
    hidden_NMD, head_DV, ids_NMK, mask_NM, norm_NM = residuals
    # entropy's cotangent is 0: target_logprobs stops it. where(): the others' are 0 too, unless a caller reads them.
    grad_NMK = jnp.where(mask_NM[..., None], cotangents[0], 0)
    order = _order(mask_NM, chunk)
    whole_DV = _whole_width(head_DV, mesh)
    N, M, D = hidden_NMD.shape
    # The places that fill up the last chunk repeat target 0, which counts once.
    real_M = jnp.arange(order.forth.shape[1]) < M

    def body(i, carry):
        grad_hidden_NMD, grad_head_NDV = carry
        index_NC = _chunk_of(order.forth, i, chunk)
        hidden_NCD = _take(hidden_NMD, index_NC)
        real_C = jax.lax.dynamic_slice_in_dim(real_M, i * chunk, chunk)
        grad_NCK = jnp.where(real_C[:, None], _take(grad_NMK, index_NC), 0)
        logits_NCV = _logits(hidden_NCD, whole_DV, temperature, softcap)
        softmax_NCV = jnp.exp(logits_NCV - _take(norm_NM, index_NC)[..., None])
        grad_NCV = -jnp.sum(grad_NCK, axis=-1, keepdims=True) * softmax_NCV
        grad_NCV = jax.vmap(jax.vmap(lambda row, ids, grad: row.at[ids].add(grad)))(
            grad_NCV, _take(ids_NMK, index_NC), grad_NCK
        )
        if softcap is not None:  # tanh' = 1 - tanh^2, and tanh is the capped logit over the cap
            grad_NCV *= 1 - jnp.square(logits_NCV * (temperature / softcap))
        grad_NCV = (grad_NCV if temperature == 1 else grad_NCV / temperature).astype(head_DV.dtype)
        einsum = functools.partial(jnp.einsum, precision=_precision(head_DV), preferred_element_type=jnp.float32)
        grad_hidden_NCD = einsum("NCV,DV->NCD", grad_NCV, whole_DV).astype(hidden_NMD.dtype)
        return (
            jax.lax.dynamic_update_slice_in_dim(grad_hidden_NMD, grad_hidden_NCD, i * chunk, axis=1),
            # Each shard sums its own chunks; they are added up over devices once, at the end.
            grad_head_NDV + einsum("NCD,NCV->NDV", hidden_NCD, grad_NCV),
        )

    empty = (
        jnp.zeros((*order.forth.shape, D), hidden_NMD.dtype),
        jnp.zeros((N, *head_DV.shape), jnp.float32),
    )
    ordered_NMD, grad_head_NDV = jax.lax.fori_loop(
        0, order.num_chunks, body, tuple(_split_rows(x, mesh) for x in empty)
    )
    return _take(ordered_NMD, order.back), jnp.sum(grad_head_NDV, axis=0).astype(head_DV.dtype), None, None


_chunked.defvjp(_forward, _backward)
