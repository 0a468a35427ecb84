"""Distillation from a teacher's log-probs on the student's own samples.

The student p is trained towards the teacher q by the reverse KL, KL(p || q) = E_p[log p - log q]. There are two ways
here, and a third that is not offered:

- `sampled_reverse_kl_advantage` needs the teacher's log-prob of the sampled token only. It is an advantage: it goes
  through a policy loss and is never differentiated itself.
- `topk_reverse_kl` needs the teacher's log-probs of the student's K most likely tokens. It is a loss, differentiated.
- log p - log q as a loss term ("k1 in the loss") is not offered: the teacher drops out of its gradient, and what is
  left is E_p[grad log p] = 0. It would train nothing, at any weight (tests/losses/test_enumeration.py shows both).

Dimension key: B sequences, T targets, K candidates of each target.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jdistill.losses.masked import fill


def sampled_reverse_kl_advantage(
    logprobs: Float[Array, "B T"],
    teacher_logprobs: Float[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    *,
    discount: float = 0.0,
) -> Float[Array, "B T"]:
    """Minus the estimated reverse KL to the teacher, as an advantage of each sampled token.

    Token t earns r_t = teacher_logprobs - logprobs. Its advantage is r_t plus the discounted r of the scored tokens
    after it. The discount counts scored tokens: a hole in the mask (a tool's output, a user's turn) neither earns nor
    discounts.

    Args:
        logprobs: of the sampled tokens under the student, in nats; no gradient flows through them.
        teacher_logprobs: of the same tokens under the teacher, in nats.
        loss_mask: true where a target is scored; what stands elsewhere is not read.
        discount: 0 sees only the token itself (myopic: the gradient is that of the KL at each position with the
            positions' distribution held fixed); 1 is the whole return-to-go, whose expected policy gradient is minus
            the exact gradient of the sequence's reverse KL, at the price of more variance.

    Returns:
        Advantages in nats, 0 where the mask is false.

    Reference:
        Lu, "On-Policy Distillation", Thinking Machines Lab, 2025; Schulman, "Approximating KL Divergence", 2020 (k1).
    """
    reward_BT = fill(teacher_logprobs, loss_mask) - fill(logprobs, loss_mask)
    decay_BT = jnp.where(loss_mask, jnp.asarray(discount, reward_BT.dtype), 1)

    # y_t = r_t + d_t * y_{t+1} as a scan over affine maps: log2(T) steps instead of T.
    def compose(later, earlier):
        decay_later, reward_later = later
        decay_earlier, reward_earlier = earlier
        return decay_earlier * decay_later, reward_earlier + decay_earlier * reward_later

    _, return_BT = jax.lax.associative_scan(compose, (decay_BT, reward_BT), reverse=True, axis=1)
    return jax.lax.stop_gradient(fill(return_BT, loss_mask))


def topk_reverse_kl(logprobs: Float[Array, "B T K"], teacher_logprobs: Float[Array, "B T K"]) -> Float[Array, "B T"]:
    """KL(student || teacher) over the student's own top-k and one bucket for all other tokens.

    sum_k p_k (log p_k - log q_k) + p_rest (log p_rest - log q_rest), with p_rest = 1 - sum_k p_k and q_rest likewise.
    Merging the other tokens into one bucket can only lower a KL: 0 <= this <= the full KL, and it is the full KL where
    the candidates are the whole vocabulary. Without the bucket the student could lower the loss by moving mass out of
    the candidates to anywhere.

    Args:
        logprobs: log-probs under the parameters being trained, in nats, of the tokens that were the student's top-k
            when the sequence was sampled. The tokens of one target must differ from each other (a sampler's top-k
            does): a repeated one would count its mass twice.
        teacher_logprobs: of the same tokens under the teacher, in nats; no gradient flows through them.

    Returns:
        KL per token in nats, to be reduced by `masked`. Fill unscored targets of both arguments first (`masked.fill`).
        A candidate that the teacher rules out (-inf) and the student does not makes it infinite, which it is.
    """
    teacher_logprobs = jax.lax.stop_gradient(teacher_logprobs)
    p_BTK = jnp.exp(logprobs)
    # where() before the product: exp(-inf) * -inf is NaN, its limit is 0. Inside too, for the gradient.
    seen_BTK = p_BTK > 0
    gap_BTK = jnp.where(seen_BTK, logprobs, 0) - jnp.where(seen_BTK, teacher_logprobs, 0)
    p_rest_BT, log_p_rest_BT = _rest(logprobs)
    _, log_q_rest_BT = _rest(teacher_logprobs)
    return jnp.sum(p_BTK * gap_BTK, axis=-1) + p_rest_BT * (log_p_rest_BT - log_q_rest_BT)


def _rest(logprobs: Float[Array, "B T K"]) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """The probability of all other tokens, 1 - sum_k p_k, and its logarithm."""
    # log-probs and their sum are rounded to a few eps, so a smaller rest than this is noise (and may come out below 0).
    # Its logarithm is held there, on both sides: where both rests are empty their difference is 0, and so are its
    # value and its gradient.
    floor = 16 * jnp.finfo(logprobs.dtype).eps
    rest_BT = jnp.maximum(1 - jnp.sum(jnp.exp(logprobs), axis=-1), 0)
    return rest_BT, jnp.log(jnp.maximum(rest_BT, floor))
