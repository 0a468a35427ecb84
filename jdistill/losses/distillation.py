"""Distillation from a teacher's log-probs on the student's own samples.

p is the student, q the teacher, y the sampled token, d = log p(y) - log q(y). Everything is per position: its gradient
is that of the divergence at each position, with the positions' distribution held fixed (myopic). Only the return-to-go
of `sampled_reverse_kl_advantage` also sees how a token changes the positions after it.

From the sampled token alone, which is cheap and noisy:

    sampled_reverse_kl_advantage    -d, an advantage      gradient of KL(p || q)
    sampled_reverse_kl              d^2 / 2               gradient of KL(p || q), another value
    straight_through_reverse_kl     e^-d - 1 + d          gradient and, on average, value of KL(p || q)
    sampled_forward_kl              e^-d - 1 + d          gradient of KL(q || p), value of KL(p || q)

From K candidates of each position and one bucket for all other tokens, so exact for what is seen (`DISTRIBUTION`):
`topk_reverse_kl`, `topk_forward_kl`, `topk_jsd`.

d itself as a loss ("k1 in the loss") is not here: the teacher drops out of its gradient, and what is left is
E_p[grad log p] = 0. It would train nothing, at any weight. `estimators` has the whole table of what goes where;
tests/losses/test_enumeration.py and test_estimators.py show all of it.

Dimension key: B sequences, T targets, K candidates of each target.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jdistill.losses.masked import decayed_suffix_sum, fill

# Of d in the loss. exp(20) = 4.9e8 is still finite after a product with a weight and a sum over tokens. On-policy, a
# token with d < -20 has a probability below exp(-20) = 2e-9.
_MAX_GAP = 20.0
# Of a candidate. Float32 ends near exp(-103): what is less likely than exp(-100) counts as that.
_MIN_LOGPROB = -100.0


# ---- the sampled token ----


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
        teacher_logprobs: of the same tokens under the teacher, in nats. Finite where the mask is true: nothing is
            clipped here (`weights.clip_per_token` does).
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
    return jax.lax.stop_gradient(fill(decayed_suffix_sum(reward_BT, decay_BT), loss_mask))


def sampled_reverse_kl(logprobs: Float[Array, "B T"], teacher_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """d^2 / 2 (k2), differentiated: its gradient d * grad log p is on-policy exactly that of the reverse KL.

    Its value is not: E_p[d^2 / 2] is KL(p || q) plus E_p[d^3] / 6 and smaller terms. For samples of another policy,
    multiply by the ratio p / sampler without its gradient.

    Args:
        logprobs: of the sampled tokens under the parameters being trained, in nats.
        teacher_logprobs: of the same tokens under the teacher, in nats; no gradient flows through them.

    Returns:
        Loss per token, to be reduced by `masked`. A gap beyond 20 nats, an infinite one too, counts as 20 in value and
        gradient. So a token that the teacher all but rules out is still pushed down, by 20 instead of d: the expected
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
    """The value of e^-d - 1 + d (k3) with the gradient of d^2 / 2 (k2): on-policy, both are the reverse KL's.

    The value is never negative. For samples of another policy, multiply by the ratio p / sampler without its gradient.

    Args:
        logprobs: of the sampled tokens under the parameters being trained, in nats.
        teacher_logprobs: of the same tokens under the teacher, in nats; no gradient flows through them.

    Returns:
        Loss per token, to be reduced by `masked`. Gaps beyond 20 nats count as 20, as in `sampled_reverse_kl`; on
        average the value then lacks up to the mass that q has on tokens more than e^20 times as likely under q.

    Reference:
        Schulman, "Approximating KL Divergence", 2020; Shah et al., arXiv 2512.21852.
    """
    gap_BT = _gap(logprobs, teacher_logprobs)
    return _with_slope(_k3(gap_BT), gap_BT, logprobs)


def sampled_forward_kl(logprobs: Float[Array, "B T"], teacher_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """e^-d - 1 + d (k3), differentiated: its gradient (1 - e^-d) * grad log p is on-policy that of the FORWARD KL.

    E_p[e^-d grad log p] = E_q[grad log p], which is minus the gradient of KL(q || p). Its value, on average, is
    KL(p || q) all the same: what goes down is not what is displayed. e^-d = q / p is an importance weight, so the
    variance is large where the teacher likes what the student rarely samples.

    Args:
        logprobs: of the sampled tokens under the parameters being trained, in nats.
        teacher_logprobs: of the same tokens under the teacher, in nats; no gradient flows through them.

    Returns:
        Loss per token, to be reduced by `masked`. Gaps beyond 20 nats count as 20, so e^-d is at most 4.9e8: the
        expected gradient lacks what q has on tokens more than e^20 times as likely under q, q(y) - e^20 p(y) each.

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
    """`value` whose derivative with respect to logprobs is `slope`; none to anything else.

    Written out and not left to clip(), whose derivative is 0 outside: the worst tokens would teach nothing.
    """
    value_BT, slope_BT = jax.lax.stop_gradient((value_BT, slope_BT))
    # where() before the difference: -inf - -inf is NaN.
    logprobs = jnp.where(jnp.isfinite(logprobs), logprobs, 0)
    return value_BT + slope_BT * (logprobs - jax.lax.stop_gradient(logprobs))


# ---- distributions ----
#
# Below p and q are over K candidates and, with tail=True, one bucket for all other tokens: p_rest = 1 - sum_k p_k.
# Merging tokens can only lower these divergences, so 0 <= each <= its value over the whole vocabulary, and what the
# bucket hides is (chain rule)
#
#     full reverse KL - topk_reverse_kl = p_rest * KL(p given rest || q given rest)
#     full forward KL - topk_forward_kl = q_rest * KL(q given rest || p given rest)
#
# in value; the gradient is that of the merged divergence, exactly.


def topk_reverse_kl(
    logprobs: Float[Array, "B T K"], teacher_logprobs: Float[Array, "B T K"], *, tail: bool = True
) -> Float[Array, "B T"]:
    """KL(student || teacher) over K candidates and one bucket for all other tokens.

    sum_k p_k (log p_k - log q_k) + p_rest (log p_rest - log q_rest), with p_rest = 1 - sum_k p_k and q_rest likewise.
    0 <= this <= the full KL, and it is the full KL where the candidates are the whole vocabulary.

    Args:
        logprobs: log-probs of the candidates under the parameters being trained, in nats; of the whole vocabulary's
            softmax, not renormalised. The tokens of one target must differ from each other (a top-k's do): a repeated
            one would count its mass twice. A padded candidate holds -inf, here and below, and adds nothing.
        teacher_logprobs: of the same tokens under the teacher, in nats; no gradient flows through them.
        tail: False leaves the bucket out and renormalises nothing: a sum over the candidates that is no divergence.
            It does not see mass outside the candidates, it may be negative (as low as -sum_k q_k / e, at p = q / e),
            and the student can lower it by moving mass out of the candidates to anywhere.

    Returns:
        KL per token in nats, to be reduced by `masked`. Fill unscored targets of both arguments first (`masked.fill`).
        The true KL is infinite where the teacher rules out (-inf) what the student does not. Here a teacher's log-prob
        counts as -100 at least, and its rest as 16 eps (2e-6 in float32): finite, and still a strong push away.
    """
    teacher_logprobs = jnp.maximum(jax.lax.stop_gradient(teacher_logprobs), _MIN_LOGPROB)
    p_BTK = jnp.exp(logprobs)
    # where() before the product: exp(-inf) * -inf is NaN, its limit is 0. Inside too, for the gradient.
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
    """KL(teacher || student) over K candidates and one bucket for all other tokens.

    sum_k q_k (log q_k - log p_k) + q_rest (log q_rest - log p_rest). 0 <= this <= the full KL, and it is the full KL
    where the candidates are the whole vocabulary. The teacher's own top-k leave the least in the bucket.

    Args:
        logprobs: as in `topk_reverse_kl`.
        teacher_logprobs: of the same tokens under the teacher, in nats; no gradient flows through them. -inf, which a
            teacher's narrower top-k may hold, adds nothing: q log q -> 0.
        tail: False leaves the bucket out and renormalises nothing: the cross-entropy with q_k as it is, less the
            candidates' entropy. It may be negative, and it is lowest at p_k = q_k / sum_k q_k: the student is taught
            that what the teacher does outside the candidates never happens.

    Returns:
        KL per token in nats, to be reduced by `masked`. Fill unscored targets of both arguments first (`masked.fill`).
        It would be infinite where the student rules out what the teacher does not. Here a student's log-prob counts as
        -100 at least, in value (its gradient is -q_k as anywhere, 0 at -inf), and its rest as 16 eps (2e-6 in
        float32): a student that is surer than this has a smaller gradient towards the bucket than the true one. A
        teacher's rest below that counts as 0. p_rest is a difference, known to 1e-7 / p_rest of itself in float32, and
        the bucket's gradient to no more.
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
    # A rest of rounding only is none: its gradient would be divided by an equally empty p_rest.
    q_rest_BT = jnp.where(q_rest_BT > _noise(q_rest_BT.dtype), q_rest_BT, 0)
    return kl_BT + q_rest_BT * (log_q_rest_BT - log_p_rest_BT)


def topk_jsd(
    logprobs: Float[Array, "B T K"], teacher_logprobs: Float[Array, "B T K"], *, beta: float, tail: bool = True
) -> Float[Array, "B T"]:
    """Generalised Jensen-Shannon divergence over K candidates and one bucket for all other tokens.

    beta KL(q || m) + (1 - beta) KL(p || m), with m = beta q + (1 - beta) p, q the teacher: GKD's convention. At 1/2 it
    is the symmetric one. It behaves like the forward KL at small beta and like the reverse KL at large beta, but
    shrinks: topk_jsd / beta -> KL(q || p) as beta -> 0, topk_jsd / (1 - beta) -> KL(p || q) as beta -> 1, and it is 0
    at both ends: raise the term's weight accordingly. 0 <= this <= the divergence over the whole vocabulary, and at
    most the entropy of a coin of bias beta (log 2 at 1/2), however far the two are apart.

    Args:
        logprobs: as in `topk_reverse_kl`.
        teacher_logprobs: of the same tokens under the teacher, in nats; no gradient flows through them. -inf is fine:
            nothing here is ever infinite.
        beta: the teacher's weight in the mixture, between 0 and 1.
        tail: False leaves the bucket out and renormalises nothing. What is left is never negative, is 0 only where
            p_k = q_k at all candidates, and does not see how the two differ outside of them.

    Returns:
        Divergence per token in nats, to be reduced by `masked`. Fill unscored targets of both arguments first
        (`masked.fill`).

    Raises:
        ValueError: beta not strictly between 0 and 1.

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
    # log(the larger of p and q / m), from which the other's follows; exactly 0 where p = q, and nothing overflows.
    larger = -jnp.log1p(jnp.where(gap > 0, 1 - beta, beta) * jnp.expm1(-jnp.abs(gap)))
    q_to_m, p_to_m = larger + jnp.minimum(gap, 0), larger - jnp.maximum(gap, 0)
    # The derivative with respect to p is (1 - beta) log(p / m); the parts by way of log p and log m cancel.
    return beta * q * q_to_m + (1 - beta) * p * p_to_m


def _rest(logprobs: Float[Array, "B T K"]) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """The probability of all other tokens, 1 - sum_k p_k, and its logarithm.

    log-probs and their sum are rounded to a few eps, so a rest below `_noise` is noise (and may come out below 0). Its
    logarithm is held there, on both sides: where both rests are empty, as with the whole vocabulary, their difference
    is 0 and so is its share of value and gradient.
    """
    rest_BT = 1 - jnp.sum(jnp.exp(logprobs), axis=-1)
    return _hold(rest_BT, 0.0), jnp.log(_hold(rest_BT, _noise(rest_BT.dtype)))


def _noise(dtype) -> float:
    return 16 * float(jnp.finfo(dtype).eps)


def _hold(x: Float[Array, "*dims"], low: float) -> Float[Array, "*dims"]:
    """max(x, low) with the gradient of x, so that a student that has gone too far can come back; 0 at -inf."""
    x = jnp.where(jnp.isfinite(x), x, low)
    return jax.lax.stop_gradient(jnp.maximum(x, low)) + (x - jax.lax.stop_gradient(x))
