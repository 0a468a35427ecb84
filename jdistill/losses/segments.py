"""Distillation from a teacher with another tokenizer, which scores segments: runs of the student's tokens.

A segment is a piece of text that both tokenizers split into whole tokens; its log-prob under either model is the sum
over that model's tokens. `segment_ids` numbers the segment of each target from 0 in order, -1 where the tokenisations
do not align. `teacher_logprobs` holds a segment's log-prob at one of its targets (by convention the last), 0 at others.

The loss compares the student's probability of the tokens it sampled with the teacher's probability of the teacher's
tokens for the same text. Neither sum includes other tokenisations of that text.

Dimension key: B sequences, T targets.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jdistill.losses.masked import decayed_suffix_sum, fill


def segment_sums(
    values: Float[Array, "B T"], segment_ids: Int[Array, "B T"], loss_mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Sum `values` over each target's segment; 0 where the mask is false or the segment is -1."""
    usable_BT = loss_mask & (segment_ids >= 0)
    num_targets = values.shape[1]
    ids_BT = jnp.where(usable_BT, segment_ids, num_targets)  # the last slot collects unusable targets

    def one(values_T, ids_T):
        return jax.ops.segment_sum(values_T, ids_T, num_segments=num_targets + 1)[ids_T]

    return fill(jax.vmap(one)(fill(values, usable_BT), ids_BT), usable_BT)


def sampled_reverse_kl_advantage(
    logprobs: Float[Array, "B T"],
    teacher_logprobs: Float[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    *,
    discount: float = 0.0,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Estimate minus the reverse KL over segments, as an advantage of each sampled token.

    Segment s earns r_s = (teacher's log-prob of s) - (student's log-prob of s). Each of its tokens gets all of r_s,
    because the teacher does not score parts of a segment, plus the discounted r of later segments. With one token per
    segment this equals `distillation.sampled_reverse_kl_advantage`.

    Args:
        logprobs: sampled tokens under the student, in nats; no gradient flows through them.
        teacher_logprobs: segments under the teacher, in nats, laid out as described in the module's docstring.
        segment_ids: int32, -1 where unusable. The mask contains all of a segment's targets or none.
        loss_mask: true where a target is scored.
        discount: factor per later segment; 0 uses only the token's own segment, 1 has the exact gradient of minus the
            KL over segments.

    Returns:
        Advantages in nats, 0 at unusable targets; and the mask of usable targets.
    """
    usable_BT = loss_mask & (segment_ids >= 0)
    gap_BT = fill(teacher_logprobs, usable_BT) - fill(logprobs, usable_BT)
    # The reward and the discount of a segment apply at its last target, so all of its targets have the same return.
    ids_BT = jnp.where(usable_BT, segment_ids, -1)
    later_BT = jnp.pad(ids_BT[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    is_last_BT = usable_BT & (ids_BT != later_BT)
    reward_BT = jnp.where(is_last_BT, segment_sums(gap_BT, segment_ids, loss_mask), 0)
    decay_BT = jnp.where(is_last_BT, jnp.asarray(discount, reward_BT.dtype), 1)
    return jax.lax.stop_gradient(fill(decayed_suffix_sum(reward_BT, decay_BT), usable_BT)), usable_BT
