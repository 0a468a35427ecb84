"""Maps the name of an estimator and its placement to the objective that does what the name says, or to a refusal.

A divergence estimator can be right as an advantage and wrong as a loss, or vice versa, because only a loss is
differentiated. With y ~ p (the student), q the teacher and d = log p(y) - log q(y):

    estimator            gradient in the loss                        gradient as minus the advantage
    k1 = d               zero on average: the teacher drops out      KL(p || q), exact
    k2 = d^2 / 2         KL(p || q), exact                           not that of any divergence
    k3 = e^-d - 1 + d    KL(q || p), the forward KL                  KL(p || q) - KL(q || p), vanishes near p = q
    abs(d)               twice the total variation, not a KL         not that of any divergence

tests/losses/test_estimators.py verifies each entry by enumeration.
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
    """A distillation objective: its function, and what a trainer must know to call it.

    `function` takes (logprobs, teacher_logprobs) of the sampled tokens [B, T] or of candidates [B, T, K]. Objectives on
    candidates also take tail=, and topk_jsd takes beta=. sampled_reverse_kl_advantage takes loss_mask and discount=.
    """

    name: str
    placement: Placement  # advantage: added to the policy's advantage, not differentiated; loss: a differentiated term
    needs_candidates: Literal["student_topk", "teacher_topk"] | None  # best choice; None: the sampled token only
    function: Callable[..., Float[Array, "B T"]]


# To add an objective, write its function and add a line here.
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
    reason: str  # names the right choice too


class _Row(NamedTuple):
    """The objective or refusal for a name in each placement, and the placement used when none is given."""

    default: Placement
    advantage: str | _Refused
    loss: str | _Refused


_K1_IN_THE_LOSS = _Refused(
    "the teacher drops out of the gradient of log p - log q, and the remaining E[grad log p] is zero, so it trains "
    "nothing. Use sampled_reverse_kl_advantage (the same number as an advantage), or sampled_reverse_kl (k2) or "
    "straight_through_reverse_kl in the loss."
)
_EVEN_AS_ADVANTAGE = (
    "as an advantage it penalizes a gap of either sign, so a token that the teacher prefers more than the student does "
    "is pushed down too. Use sampled_reverse_kl_advantage (k1)."
)
_K2_AS_ADVANTAGE = _Refused(f"k2 is d^2 / 2: {_EVEN_AS_ADVANTAGE}")
_K3_AS_ADVANTAGE = _Refused(
    "k3 as an advantage has the gradient of KL(student || teacher) - KL(teacher || student), which vanishes as student "
    "and teacher converge. Use sampled_reverse_kl_advantage (k1)."
)
_K3_IN_THE_LOSS = _Refused(
    "k3's value is the reverse KL's but its gradient is the forward KL's, KL(teacher || student). For the forward KL, "
    "use sampled_forward_kl; for the reverse KL, use sampled_reverse_kl (k2), or straight_through_reverse_kl, which "
    "reports k3's value."
)
_FORWARD_AS_ADVANTAGE = _Refused(
    "sampled_forward_kl must be differentiated; its value as an advantage has the gradient of KL(student || teacher) - "
    "KL(teacher || student), which vanishes as student and teacher converge. Put it into the loss."
)
_STRAIGHT_THROUGH_AS_ADVANTAGE = _Refused(
    "a straight-through estimator must be differentiated; as an advantage only its value, k3, would count, and its "
    "effect vanishes as student and teacher converge. Put it into the loss, or use sampled_reverse_kl_advantage (k1)."
)
_ABS_AS_ADVANTAGE = _Refused(f"abs(d): {_EVEN_AS_ADVANTAGE}")
_ABS_IN_THE_LOSS = _Refused(
    "abs(d) has the gradient of twice the total variation, sign(d) regardless of the size of the gap, not that of a "
    "KL. Use sampled_reverse_kl (k2) in the loss."
)
_DISTRIBUTION_AS_ADVANTAGE = _Refused(
    "a divergence over candidates is the same number whichever token was sampled, so its expected gradient as that "
    "token's advantage is zero. Put it into the loss, or use sampled_reverse_kl_advantage."
)
_RENORMALIZED = _Refused(
    "renormalised top-k is blind to the mass outside the candidates; at K = 1 it compares 1 with 1 and is always zero. "
    "Use topk_reverse_kl, topk_forward_kl or topk_jsd, which put all other tokens into one bucket."
)
_WITHOUT_TAIL = _Refused(
    "top-k without a bucket for the other tokens is not a divergence: it can be negative, and mass outside the "
    "candidates is free. Use topk_reverse_kl, topk_forward_kl or topk_jsd (with tail=False if you do want this)."
)

_K1 = _Row("advantage", "sampled_reverse_kl_advantage", _K1_IN_THE_LOSS)
_K2 = _Row("loss", _K2_AS_ADVANTAGE, "sampled_reverse_kl")
_K3 = _Row("loss", _K3_AS_ADVANTAGE, _K3_IN_THE_LOSS)
_STRAIGHT_THROUGH = _Row("loss", _STRAIGHT_THROUGH_AS_ADVANTAGE, "straight_through_reverse_kl")
# These names say which divergence, not which formula, so each placement has its own estimator.
_REVERSE_KL = _Row("advantage", "sampled_reverse_kl_advantage", "sampled_reverse_kl")
_FORWARD_KL = _Row("loss", _FORWARD_AS_ADVANTAGE, "sampled_forward_kl")
_ABS = _Row("loss", _ABS_AS_ADVANTAGE, _ABS_IN_THE_LOSS)

# Our own names, and the names in AReaL, NeMo-RL and slime (k1 to k3, low_var_kl), verl (those, kl, mse, abs,
# forward_kl_topk) and TRL (gkd). verl's "+" replaces the gradient of the value by that of k2.
_NAMES = {
    _K1: "k1 kl sampled_reverse_kl_advantage",
    _K2: "k2 mse",
    _K3: "k3 low_var_kl",
    _STRAIGHT_THROUGH: "straight_through_reverse_kl k1+ k3+ low_var_kl+",
    _REVERSE_KL: "reverse_kl sampled_reverse_kl",
    _FORWARD_KL: "forward_kl sampled_forward_kl",
    _ABS: "abs",
    _Row("loss", _DISTRIBUTION_AS_ADVANTAGE, "topk_reverse_kl"): "topk_reverse_kl",
    _Row("loss", _DISTRIBUTION_AS_ADVANTAGE, "topk_forward_kl"): "topk_forward_kl forward_kl_topk",
    _Row("loss", _DISTRIBUTION_AS_ADVANTAGE, "topk_jsd"): "topk_jsd gkd",
    _Row("loss", _RENORMALIZED, _RENORMALIZED): "topk_renormalized top1_renormalized",
    _Row("loss", _WITHOUT_TAIL, _WITHOUT_TAIL): "topk_without_tail",
}
ALIASES = {alias: row for row, aliases in _NAMES.items() for alias in aliases.split()}


def resolve(estimator: str, placement: str | None = None) -> str:
    """Return the objective that does what the name says in this placement.

    Args:
        estimator: a key of OBJECTIVES or ALIASES; case-insensitive, "-" equals "_".
        placement: "advantage" (added to a policy's advantage, without a gradient) or "loss" (differentiated); None: the
            placement in which the estimator is right. sampled_reverse_kl is then the advantage, which also has an exact
            sequence-level form.

    Returns:
        A key of OBJECTIVES.

    Raises:
        ValueError: the name is unknown, or the gradient in this placement is not what the name says (the message gives
            the reason and the right choice).
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
        raise ValueError(f"unknown estimator {estimator}{hint}; expected one of {', '.join(OBJECTIVES)}")
    only = OBJECTIVES[name].placement
    if placement not in (None, only):
        raise ValueError(f"{estimator} is right only with placement: {only}, got {placement}")
    return name
