"""Which estimator may stand where: every name that people use -> the function that does what the name says, or why not.

An estimator of a divergence may be right as an advantage and wrong as a loss, or the reverse, since one is not
differentiated and the other is. With y ~ p (the student), q the teacher and d = log p(y) - log q(y):

    estimator               in the loss, differentiated              as (minus) the advantage
    k1 = d                  expected gradient zero: no teacher       gradient of KL(p || q), exactly
    k2 = d^2 / 2            gradient of KL(p || q), exactly          no divergence's gradient
    k3 = e^-d - 1 + d       gradient of KL(q || p): forward          KL(p || q) - KL(q || p): vanishes near p = q
    abs(d)                  twice the total variation's: no KL       no divergence's gradient

tests/losses/test_estimators.py shows each by enumeration.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxtyping import Array, Float

from jdistill.losses import distillation

Placement = Literal["advantage", "loss"]


@dataclass(frozen=True)
class Objective:
    """A distillation objective, as a trainer has to know it.

    sampled_reverse_kl_advantage is called with (logprobs, teacher_logprobs, loss_mask, discount=), other objectives of
    the sampled token with (logprobs, teacher_logprobs), those of candidates with those of [B, T, K] and tail=, and
    topk_jsd with beta= too.
    """

    name: str
    placement: Placement  # advantage: into a policy's advantage, not differentiated; loss: a differentiated term
    needs_candidates: Literal["student_topk", "teacher_topk"] | None  # whose fit best; None: the sampled token only
    function: Callable[..., Float[Array, "B T"]]


# Adding an objective is its function and a line here.
OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("sampled_reverse_kl_advantage", "advantage", None, distillation.sampled_reverse_kl_advantage),
        Objective("sampled_reverse_kl", "loss", None, distillation.sampled_reverse_kl),
        Objective("straight_through_reverse_kl", "loss", None, distillation.straight_through_reverse_kl),
        Objective("sampled_forward_kl", "loss", None, distillation.sampled_forward_kl),
        Objective("topk_reverse_kl", "loss", "student_topk", distillation.topk_reverse_kl),
        Objective("topk_forward_kl", "loss", "teacher_topk", distillation.topk_forward_kl),
        Objective("topk_jsd", "loss", "student_topk", distillation.topk_jsd),
    )
}


class _Refused(NamedTuple):
    reason: str  # and the right choice


class _Row(NamedTuple):
    """What a name becomes in each placement, and where it stands if nobody says."""

    default: Placement
    advantage: str | _Refused
    loss: str | _Refused


_K1_IN_THE_LOSS = _Refused(
    "the teacher drops out of the gradient of log p - log q, and what is left, E[grad log p], is zero on average: it "
    "trains nothing. Use sampled_reverse_kl_advantage (the same number as an advantage), or sampled_reverse_kl (k2) or "
    "straight_through_reverse_kl in the loss."
)
_EVEN_AS_ADVANTAGE = (
    "as an advantage it punishes a gap of either sign, so a token that the teacher likes better than the student does "
    "is pushed down too. Use sampled_reverse_kl_advantage (k1)."
)
_K2_AS_ADVANTAGE = _Refused(f"k2 is d^2 / 2: {_EVEN_AS_ADVANTAGE}")
_K3_AS_ADVANTAGE = _Refused(
    "k3 as an advantage has the gradient of KL(student || teacher) - KL(teacher || student), which vanishes as the two "
    "come close. Use sampled_reverse_kl_advantage (k1)."
)
_K3_IN_THE_LOSS = _Refused(
    "k3's value is the reverse KL's but its gradient is the forward KL's, KL(teacher || student). If that is what you "
    "want, use sampled_forward_kl; for the reverse KL sampled_reverse_kl (k2), or straight_through_reverse_kl, which "
    "shows k3's value."
)
_FORWARD_AS_ADVANTAGE = _Refused(
    "sampled_forward_kl is right only where it is differentiated; its value as an advantage has the gradient of "
    "KL(student || teacher) - KL(teacher || student), which vanishes as the two come close. Put it into the loss."
)
_STRAIGHT_THROUGH_AS_ADVANTAGE = _Refused(
    "a straight-through estimator carries its gradient in the loss; as an advantage only its value, k3, would count, "
    "whose effect vanishes as student and teacher come close. Put it into the loss, or use "
    "sampled_reverse_kl_advantage (k1)."
)
_ABS_AS_ADVANTAGE = _Refused(f"abs(d): {_EVEN_AS_ADVANTAGE}")
_ABS_IN_THE_LOSS = _Refused(
    "the gradient of abs(d) is that of twice the total variation, sign(d) whatever the size of the gap, and no KL's. "
    "Use sampled_reverse_kl (k2) in the loss."
)
_DISTRIBUTION_AS_ADVANTAGE = _Refused(
    "a divergence over candidates is the same number whichever token was sampled, so as that token's advantage its "
    "expected gradient is zero. Put it into the loss, or use sampled_reverse_kl_advantage."
)
_RENORMALIZED = _Refused(
    "renormalised top-k is blind to the mass outside the candidates, and at K = 1 it compares 1 with 1: zero, always. "
    "Use topk_reverse_kl, topk_forward_kl or topk_jsd, which keep the other tokens in one bucket."
)
_WITHOUT_TAIL = _Refused(
    "top-k without the other tokens' bucket is no divergence: it may be negative, and mass outside the candidates is "
    "free. Use topk_reverse_kl, topk_forward_kl or topk_jsd; tail=False is theirs, if you do want it."
)

_K1 = _Row("advantage", "sampled_reverse_kl_advantage", _K1_IN_THE_LOSS)
_K2 = _Row("loss", _K2_AS_ADVANTAGE, "sampled_reverse_kl")
_K3 = _Row("loss", _K3_AS_ADVANTAGE, _K3_IN_THE_LOSS)
_STRAIGHT_THROUGH = _Row("loss", _STRAIGHT_THROUGH_AS_ADVANTAGE, "straight_through_reverse_kl")
# The divergence is named and not the formula: each placement has its own.
_REVERSE_KL = _Row("advantage", "sampled_reverse_kl_advantage", "sampled_reverse_kl")
_FORWARD_KL = _Row("loss", _FORWARD_AS_ADVANTAGE, "sampled_forward_kl")
_ABS = _Row("loss", _ABS_AS_ADVANTAGE, _ABS_IN_THE_LOSS)

_NAMES = {
    _K1: "k1 kl kl_k1 k1_kl reverse_kl_k1 log_ratio kl_penalty sampled_reverse_kl_advantage",
    _K2: "k2 mse kl_k2 k2_kl reverse_kl_k2 squared_log_ratio",
    _K3: "k3 low_var_kl kl_k3 k3_kl reverse_kl_k3 low_variance_kl unbiased_kl schulman_kl",
    # "+" is how they are called where the value's gradient is replaced by k2's.
    _STRAIGHT_THROUGH: "straight_through_reverse_kl straight_through straight_through_k3 k1+ kl+ k3+ low_var_kl+",
    _REVERSE_KL: "reverse_kl sampled_reverse_kl on_policy_distillation",
    _FORWARD_KL: "forward_kl sampled_forward_kl forward_kl_k3",
    _ABS: "abs abs_kl absolute l1",
    _Row("loss", _DISTRIBUTION_AS_ADVANTAGE, "topk_reverse_kl"): "topk_reverse_kl reverse_kl_topk",
    _Row("loss", _DISTRIBUTION_AS_ADVANTAGE, "topk_forward_kl"): "topk_forward_kl forward_kl_topk",
    _Row("loss", _DISTRIBUTION_AS_ADVANTAGE, "topk_jsd"): "topk_jsd jsd_topk jsd generalized_jsd gkd",
    _Row("loss", _RENORMALIZED, _RENORMALIZED): (
        "topk_renormalized renormalized_topk renormalized_topk_reverse_kl renormalized_topk_forward_kl "
        "top1_renormalized renormalized_top1 top1"
    ),
    _Row("loss", _WITHOUT_TAIL, _WITHOUT_TAIL): (
        "topk_without_tail topk_no_tail topk_reverse_kl_without_tail topk_forward_kl_without_tail truncated_topk "
        "topk_truncated"
    ),
}
ALIASES = {alias: row for row, aliases in _NAMES.items() for alias in aliases.split()}


def resolve(estimator: str, placement: str | None = None) -> str:
    """The objective that does, in this placement, what the name says.

    Args:
        estimator: a name of OBJECTIVES or an alias; case, "-" and "_" do not matter.
        placement: "advantage" (added to a policy's advantage without a gradient) or "loss" (differentiated); None:
            wherever it is right. `sampled_reverse_kl` is then the advantage, the form with the exact sequence-level
            version.

    Returns:
        A key of OBJECTIVES.

    Raises:
        ValueError: the pair's gradient is not what its name says (the text says why, and what to take), or there is no
            such name.
    """
    if placement not in (None, "advantage", "loss"):
        raise ValueError(f'placement must be "advantage" or "loss", got "{placement}"')
    name = estimator.strip().lower().replace("-", "_")
    if name in ALIASES:
        row = ALIASES[name]
        placement = placement or row.default
        found = row.advantage if placement == "advantage" else row.loss
        if isinstance(found, _Refused):
            where = "as an advantage" if placement == "advantage" else "in the loss"
            raise ValueError(f"{estimator} {where} is refused: {found.reason}")
        return found
    if name not in OBJECTIVES:
        near = difflib.get_close_matches(name, [*OBJECTIVES, *ALIASES], n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{estimator} is no estimator that is known here{hint}; there are {', '.join(OBJECTIVES)}")
    only = OBJECTIVES[name].placement
    if placement not in (None, only):
        raise ValueError(f"{estimator} is right only as placement: {only}, got {placement}")
    return name
