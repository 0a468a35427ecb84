"""Distillation from a teacher's log-probs on the student's own samples.

p is the student, q the teacher, y the sampled token, d = log p(y) - log q(y). All terms are per position: the gradient
is that of the divergence at each position, with the distribution of prefixes held fixed (myopic). Only the return-to-go
of `sampled_reverse_kl_advantage` accounts for the effect of a token on later positions.

From the sampled token alone, cheap and noisy:

    sampled_reverse_kl_advantage    -d, an advantage      gradient of KL(p || q)
    sampled_reverse_kl              d^2 / 2               gradient of KL(p || q), but not its value
    straight_through_reverse_kl     e^-d - 1 + d          gradient and, on average, value of KL(p || q)
    sampled_forward_kl              e^-d - 1 + d          gradient of KL(q || p), value of KL(p || q)

From K candidates per position and one bucket for all other tokens, exact for the merged distribution (`DISTRIBUTION`):
`topk_reverse_kl`, `topk_forward_kl`, `topk_jsd`.

d itself as a loss ("k1 in the loss") is missing on purpose: the teacher drops out of its gradient, and the remaining
E_p[grad log p] is 0, so it would train nothing at any weight. `estimators` says which estimator goes where;
tests/losses/test_enumeration.py and test_estimators.py verify all of this.

Dimension key: B sequences, T targets, K candidates of each target.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jdistill.losses.masked import decayed_suffix_sum, fill

# Bound of |d| in the loss. exp(20) = 4.9e8 is still finite after a product with a weight and a sum over tokens.
# On-policy, a token with d < -20 has a probability below exp(-20) = 2e-9.
_MAX_GAP = 20.0
# Lower bound of a candidate's log-prob: float32 underflows near exp(-103).
_MIN_LOGPROB = -100.0


# ---- the sampled token ----


def sampled_reverse_kl_advantage(
    logprobs: Float[Array, "B T"],
    teacher_logprobs: Float[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    *,
    discount: float = 0.0,
) -> Float[Array, "B T"]:
    """Estimate minus the reverse KL to the teacher, as an advantage of each sampled token.

    Token t earns r_t = teacher_logprobs - logprobs. Its advantage is r_t plus the discounted r of later scored tokens.
    The discount counts scored tokens: a hole in the mask (a tool's output, a user's turn) neither earns nor discounts.

    Args:
        logprobs: sampled tokens under the student, in nats; no gradient flows through them.
        teacher_logprobs: the same tokens under the teacher, in nats. Must be finite where the mask is true: they are
            not clipped here (see `weights.clip_per_token`).
        loss_mask: true where a target is scored; values elsewhere are not read.
        discount: 0 uses only the token itself (myopic: the gradient is that of the KL at each position, with the
            distribution of prefixes held fixed); 1 is the full return-to-go, whose expected policy gradient is minus
            the exact gradient of the sequence's reverse KL, at the price of more variance.

    Returns:
        Advantages in nats, 0 where the mask is false.

    Reference:
        Lu, "On-Policy Distillation", Thinking Machines Lab, 2025; Schulman, "Approximating KL Divergence", 2020 (k1).
    """
    reward_BT = fill(teacher_logprobs, loss_mask) - fill(logprobs, loss_mask)
    decay_BT = jnp.where(loss_mask, jnp.asarray(discount, reward_BT.dtype), 1)
    return jax.lax.stop_gradient(fill(decayed_suffix_sum(reward_BT, decay_BT), loss_mask))


def sampled_reverse_kl(logprobs: Float[Array, "B T"], teacher_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Compute d^2 / 2 (k2), whose on-policy expected gradient, E_p[d * grad log p], is exactly that of the reverse KL.

    The value is biased: E_p[d^2 / 2] is KL(p || q) plus E_p[d^3] / 6 and smaller terms. For samples of another policy,
    multiply by the ratio p / sampler without its gradient.

    Args:
        logprobs: sampled tokens under the parameters being trained, in nats.
        teacher_logprobs: the same tokens under the teacher, in nats; no gradient flows through them.

    Returns:
        Loss per token, to be reduced by `masked`. A gap beyond 20 nats (also an infinite one) counts as 20 in value and
        gradient, so a token that the teacher nearly rules out is still pushed down, by 20 instead of d. The expected
        gradient lacks E_p[(abs(d) - 20)+ sign(d) grad log p].

    Reference:
        Schulman, "Approximating KL Divergence", 2020 (k2); Xu et al. (KDRL), arXiv 2506.02208; Shah et al.,
        arXiv 2512.21852.
    """
    gap_BT = _gap(logprobs, teacher_logprobs)
    return _with_slope(jnp.square(gap_BT) / 2, gap_BT, logprobs)


def straight_through_reverse_kl(
    logprobs: Float[Array, "B T"], teacher_logprobs: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """Combine the value of e^-d - 1 + d (k3) with the gradient of d^2 / 2 (k2): on-policy, both are the reverse KL's.

    The value is never negative. For samples of another policy, multiply by the ratio p / sampler without its gradient.

    Args:
        logprobs: sampled tokens under the parameters being trained, in nats.
        teacher_logprobs: the same tokens under the teacher, in nats; no gradient flows through them.

    Returns:
        Loss per token, to be reduced by `masked`. Gaps beyond 20 nats count as 20, as in `sampled_reverse_kl`; on
        average the value then lacks at most the mass of q on tokens more than e^20 times as likely under q.

    Reference:
        Schulman, "Approximating KL Divergence", 2020; Shah et al., arXiv 2512.21852.
    """
    gap_BT = _gap(logprobs, teacher_logprobs)
    return _with_slope(_k3(gap_BT), gap_BT, logprobs)


def sampled_forward_kl(logprobs: Float[Array, "B T"], teacher_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Compute e^-d - 1 + d (k3), whose on-policy gradient, (1 - e^-d) * grad log p, is that of the FORWARD KL.

    E_p[e^-d grad log p] = E_q[grad log p] is minus the gradient of KL(q || p). The value, however, is KL(p || q) on
    average, so the displayed number is not the one being minimized. e^-d = q / p is an importance weight: the variance
    is large where the teacher prefers tokens that the student rarely samples.

    Args:
        logprobs: sampled tokens under the parameters being trained, in nats.
        teacher_logprobs: the same tokens under the teacher, in nats; no gradient flows through them.

    Returns:
        Loss per token, to be reduced by `masked`. Gaps beyond 20 nats count as 20, so e^-d is at most 4.9e8. The
        expected gradient lacks a mass of q(y) - e^20 p(y) for each token more than e^20 times as likely under q.

    Reference:
        Schulman, "Approximating KL Divergence", 2020 (k3); Shah et al., arXiv 2512.21852.
    """
    gap_BT = _gap(logprobs, teacher_logprobs)
    return _with_slope(_k3(gap_BT), -jnp.expm1(-gap_BT), logprobs)


def _gap(logprobs: Float[Array, "B T"], teacher_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    return jnp.clip(logprobs - teacher_logprobs, -_MAX_GAP, _MAX_GAP)


def _k3(gap_BT: Float[Array, "B T"]) -> Float[Array, "B T"]:
    return jnp.expm1(-gap_BT) + gap_BT


def _with_slope(
    value_BT: Float[Array, "B T"], slope_BT: Float[Array, "B T"], logprobs: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """Return `value` with derivative `slope` with respect to logprobs, and no other derivative.

    Autodiff through clip() would give 0 outside the bounds, so the worst tokens would teach nothing.
    """
    value_BT, slope_BT = jax.lax.stop_gradient((value_BT, slope_BT))
    # where() before the difference: -inf - -inf is NaN.
    logprobs = jnp.where(jnp.isfinite(logprobs), logprobs, 0)
    return value_BT + slope_BT * (logprobs - jax.lax.stop_gradient(logprobs))


# ---- distributions ----
#
# Below, p and q are over K candidates and, with tail=True, one bucket for all other tokens: p_rest = 1 - sum_k p_k.
# Merging tokens can only lower these divergences, so 0 <= each <= its value over the whole vocabulary. By the chain
# rule, the bucket hides
#
#     full reverse KL - topk_reverse_kl = p_rest * KL(p given rest || q given rest)
#     full forward KL - topk_forward_kl = q_rest * KL(q given rest || p given rest)
#
# of the value; the gradient is exactly that of the merged divergence.


def topk_reverse_kl(
    logprobs: Float[Array, "B T K"], teacher_logprobs: Float[Array, "B T K"], *, tail: bool = True
) -> Float[Array, "B T"]:
    """Compute KL(student || teacher) over K candidates and one bucket for all other tokens.

    sum_k p_k (log p_k - log q_k) + p_rest (log p_rest - log q_rest), with p_rest = 1 - sum_k p_k and q_rest likewise.
    The value lies between 0 and the full KL, and equals the full KL if the candidates are the whole vocabulary.

    Args:
        logprobs: candidates under the parameters being trained, in nats, normalised over the whole vocabulary. The
            tokens of one target must be distinct (those of a top-k are): a repeated token would count its mass twice. A
            padded candidate holds -inf in both arguments and adds nothing.
        teacher_logprobs: the same tokens under the teacher, in nats; no gradient flows through them.
        tail: False omits the bucket without renormalising, which leaves a sum over the candidates that is not a
            divergence. It ignores mass outside the candidates, can be negative (down to -sum_k q_k / e, at p = q / e),
            and the student can lower it by moving mass out of the candidates.

    Returns:
        KL per token in nats, to be reduced by `masked`. Fill unscored targets of both arguments first (`masked.fill`).
        The true KL is infinite where the teacher rules out (-inf) a token that the student does not. Here a teacher's
        log-prob counts as at least -100, and its rest as at least 16 eps (2e-6 in float32): finite, but still a strong
        push away.
    """
    teacher_logprobs = jnp.maximum(jax.lax.stop_gradient(teacher_logprobs), _MIN_LOGPROB)
    p_BTK = jnp.exp(logprobs)
    # where() before the product: exp(-inf) * -inf is NaN, its limit is 0. Also inside, for the gradient.
    seen_BTK = p_BTK > 0
    gap_BTK = jnp.where(seen_BTK, logprobs, 0) - jnp.where(seen_BTK, teacher_logprobs, 0)
    if not tail:
        return jnp.sum(p_BTK * gap_BTK, axis=-1)
    # The derivative of sum p log(p / q) is sum (dp) log(p / q) + sum dp, and the second sum is that of the constant 1:
    # left out, by holding the gaps, it leaves no rounding behind, nor a quotient by an empty rest.
    p_rest_BT, log_p_rest_BT = _rest(logprobs)
    _, log_q_rest_BT = _rest(teacher_logprobs)
    gap_BTK, gap_rest_BT = jax.lax.stop_gradient((gap_BTK, log_p_rest_BT - log_q_rest_BT))
    return jnp.sum(p_BTK * gap_BTK, axis=-1) + p_rest_BT * gap_rest_BT


def topk_forward_kl(
    logprobs: Float[Array, "B T K"], teacher_logprobs: Float[Array, "B T K"], *, tail: bool = True
) -> Float[Array, "B T"]:
    """Compute KL(teacher || student) over K candidates and one bucket for all other tokens.

    sum_k q_k (log q_k - log p_k) + q_rest (log q_rest - log p_rest). The value lies between 0 and the full KL,
    and equals the full KL if the candidates are the whole vocabulary. The teacher's own top-k leaves the least mass in
    the bucket.

    Args:
        logprobs: as in `topk_reverse_kl`.
        teacher_logprobs: the same tokens under the teacher, in nats; no gradient flows through them. -inf, which pads a
            teacher's narrower top-k, adds nothing: q log q -> 0.
        tail: False omits the bucket without renormalising: the cross-entropy with q_k minus the candidates' entropy. It
            can be negative, and its minimum is at p_k = q_k / sum_k q_k, which teaches the student that tokens outside
            the candidates never occur.

    Returns:
        KL per token in nats, to be reduced by `masked`. Fill unscored targets of both arguments first (`masked.fill`).
        The true KL is infinite where the student rules out a token that the teacher does not. Here a student's log-prob
        counts as at least -100 in value (the gradient is -q_k as everywhere, 0 at -inf), and its rest as at least 16
        eps (2e-6 in float32), so below that the gradient towards the bucket is smaller than the true one. A teacher's
        rest below 16 eps counts as 0. p_rest is a difference, so in float32 it and the bucket's gradient have a
        relative error of 1e-7 / p_rest.
    """
    teacher_logprobs = jax.lax.stop_gradient(teacher_logprobs)
    q_BTK = jnp.exp(teacher_logprobs)
    seen_BTK = q_BTK > 0
    log_p_BTK = _hold(jnp.where(seen_BTK, logprobs, 0), _MIN_LOGPROB)
    kl_BT = jnp.sum(q_BTK * (jnp.where(seen_BTK, teacher_logprobs, 0) - log_p_BTK), axis=-1)
    if not tail:
        return kl_BT
    _, log_p_rest_BT = _rest(logprobs)
    q_rest_BT, log_q_rest_BT = _rest(teacher_logprobs)
    # A rest of pure rounding error counts as 0: its gradient would be divided by an equally empty p_rest.
    q_rest_BT = jnp.where(q_rest_BT > _noise(q_rest_BT.dtype), q_rest_BT, 0)
    return kl_BT + q_rest_BT * (log_q_rest_BT - log_p_rest_BT)


def topk_jsd(
    logprobs: Float[Array, "B T K"], teacher_logprobs: Float[Array, "B T K"], *, beta: float, tail: bool = True
) -> Float[Array, "B T"]:
    """Compute the generalised Jensen-Shannon divergence over K candidates and one bucket for all other tokens.

    beta KL(q || m) + (1 - beta) KL(p || m), with m = beta q + (1 - beta) p and q the teacher (GKD's convention),
    symmetric at beta = 1/2. It behaves like the forward KL at small beta and like the reverse KL at large beta, but
    shrinks: topk_jsd / beta -> KL(q || p) as beta -> 0, topk_jsd / (1 - beta) -> KL(p || q) as beta -> 1, and it is 0
    at both ends, so raise the term's weight accordingly. The value lies between 0 and the divergence over the whole
    vocabulary, and never exceeds the entropy of a coin of bias beta (log 2 at 1/2).

    Args:
        logprobs: as in `topk_reverse_kl`.
        teacher_logprobs: the same tokens under the teacher, in nats; no gradient flows through them. -inf is allowed:
            the result is always finite.
        beta: the teacher's weight in the mixture, between 0 and 1.
        tail: False omits the bucket without renormalising. The sum is never negative, is 0 only where p_k = q_k at all
            candidates, and ignores differences outside the candidates.

    Returns:
        Divergence per token in nats, to be reduced by `masked`. Fill unscored targets of both arguments first
        (`masked.fill`).

    Raises:
        ValueError: beta is not strictly between 0 and 1.

    Reference:
        Agarwal et al. (GKD), arXiv 2306.13649, section 2.
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"beta must lie strictly between 0 and 1, got {beta}: at both ends the divergence is 0 for any student; "
            "its limits are topk_forward_kl (beta -> 0) and topk_reverse_kl (beta -> 1)"
        )
    teacher_logprobs = jax.lax.stop_gradient(teacher_logprobs)
    p_BTK, q_BTK = jnp.exp(logprobs), jnp.exp(teacher_logprobs)
    jsd_BT = jnp.sum(_jsd_terms(p_BTK, logprobs, q_BTK, teacher_logprobs, beta), axis=-1)
    if tail:
        jsd_BT += _jsd_terms(*_rest(logprobs), *_rest(teacher_logprobs), beta)
    return jsd_BT


DISTRIBUTION = {
    "topk_reverse_kl": topk_reverse_kl,
    "topk_forward_kl": topk_forward_kl,
    "topk_jsd": topk_jsd,
}


def _jsd_terms(
    p: Float[Array, "*dims"], log_p: Float[Array, "*dims"], q: Float[Array, "*dims"], log_q: Float[Array, "*dims"], beta
) -> Float[Array, "*dims"]:
    log_p, log_q = (jnp.maximum(jax.lax.stop_gradient(x), _MIN_LOGPROB) for x in (log_p, log_q))
    gap = log_q - log_p
    # log(max(p, q) / m), from which the other log ratio follows; exactly 0 where p = q, and cannot overflow.
    larger = -jnp.log1p(jnp.where(gap > 0, 1 - beta, beta) * jnp.expm1(-jnp.abs(gap)))
    q_to_m, p_to_m = larger + jnp.minimum(gap, 0), larger - jnp.maximum(gap, 0)
    # The derivative with respect to p is (1 - beta) log(p / m); the terms through log p and log m cancel.
    return beta * q * q_to_m + (1 - beta) * p * p_to_m


def _rest(logprobs: Float[Array, "B T K"]) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Return the probability of all other tokens, 1 - sum_k p_k, and its logarithm.

    Log-probs and their sum are rounded to a few eps, so a rest below `_noise` is noise (and may be negative). The
    logarithm has this lower bound for student and teacher: if both rests are empty, as with the whole vocabulary, their
    difference is 0 and adds nothing to value and gradient.
    """
    rest_BT = 1 - jnp.sum(jnp.exp(logprobs), axis=-1)
    return _hold(rest_BT, 0.0), jnp.log(_hold(rest_BT, _noise(rest_BT.dtype)))


def _noise(dtype) -> float:
    return 16 * float(jnp.finfo(dtype).eps)


def _hold(x: Float[Array, "*dims"], low: float) -> Float[Array, "*dims"]:
    """Return max(x, low) with the gradient of x (0 at -inf), so that a student below the bound can recover."""
    x = jnp.where(jnp.isfinite(x), x, low)
    return jax.lax.stop_gradient(jnp.maximum(x, low)) + (x - jax.lax.stop_gradient(x))
