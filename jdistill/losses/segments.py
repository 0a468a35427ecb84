"""Distillation from a teacher with another tokenizer, whose log-probs are of segments: runs of the student's tokens.

A segment is the same text in the student's tokens and in the teacher's, and has a log-prob from each: the sum over its
tokens. `segment_ids` gives each target its segment, numbered from 0 in order, and -1 where the two tokenisations do not
meet; `teacher_logprobs` holds a segment's log-prob at one of its targets (the last, by convention) and 0 at its others.

What is compared is the student's probability of the tokens that it sampled with the teacher's probability of the
teacher's own tokens of that text. A text has other tokenisations too, which neither sum includes.

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
    """At each target the sum of `values` over its segment; 0 where the mask is false or the segment -1."""
    usable_BT = loss_mask & (segment_ids >= 0)
    num_targets = values.shape[1]
    ids_BT = jnp.where(usable_BT, segment_ids, num_targets)  # the last place takes what is not used

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
    """Minus the estimated reverse KL over segments, as an advantage of each sampled token.

    Segment s earns r_s = (teacher's log-prob of it) - (student's). Each of its tokens gets all of r_s, since the
    teacher says nothing of a part of it, plus the discounted r of the segments after it. At one token a segment this is
    `distillation.sampled_reverse_kl_advantage`.

    Args:
        logprobs: of the sampled tokens under the student, in nats; no gradient flows through them.
        teacher_logprobs: of the segments under the teacher, in nats; see above.
        segment_ids: int32, -1 where not usable. All of a segment's targets are in the mask, or none.
        loss_mask: true where a target is scored.
        discount: of a segment; 0 sees only the token's own, 1 has the exact gradient of minus the KL over segments.

    Returns:
        Advantages in nats, 0 where not usable; and where they are usable.
    """
    usable_BT = loss_mask & (segment_ids >= 0)
    gap_BT = fill(teacher_logprobs, usable_BT) - fill(logprobs, usable_BT)
    # A segment's whole gap is earned at its last target, where the discount falls due too. So all of its targets have
    # the same return.
    ids_BT = jnp.where(usable_BT, segment_ids, -1)
    later_BT = jnp.pad(ids_BT[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    is_last_BT = usable_BT & (ids_BT != later_BT)
    reward_BT = jnp.where(is_last_BT, segment_sums(gap_BT, segment_ids, loss_mask), 0)
    decay_BT = jnp.where(is_last_BT, jnp.asarray(discount, reward_BT.dtype), 1)
    return jax.lax.stop_gradient(fill(decayed_suffix_sum(reward_BT, decay_BT), usable_BT)), usable_BT
