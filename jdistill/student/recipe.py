"""What a run's objective amounts to: every decision that its configuration leaves open, made once.

`make_recipe` combines the configuration with what the teacher can do. The rollout, the requests to the teacher, the
batch, the loss, the training step and `jdistill plan` read the recipe; numbers (weights, clips, discounts) stay in the
configuration.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jdistill.config import ConfigError, ObjectiveSection, TrainConfig
from jdistill.losses import advantages, estimators, policy_gradient
from jdistill.student import effect, optimizer

logger = logging.getLogger(__name__)

AUTO_CANDIDATES, AUTO_SAMPLED = "topk_reverse_kl", "sampled_reverse_kl_advantage"


@dataclasses.dataclass(frozen=True)
class TeacherCapabilities:
    """What one teacher can return beside the log-probs of the sampled tokens."""

    engine: str  # for messages, e.g. "vllm 0.32.0"
    max_top_k: int  # its own most likely tokens at each position
    max_candidate_count: int  # tokens of the student's choice at each position
    vocab_size: int | None = None  # rows of its output; None: as many as the student's


# Assumed where no teacher has been asked, as by `jdistill plan`: it scores whatever the objective prefers.
ANY_TEACHER = TeacherCapabilities("any engine", sys.maxsize, sys.maxsize)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The resolved objective of one run."""

    on_policy: bool  # False: supervised
    num_rows: int  # sequences that one step trains on, over all processes
    temperature: float  # of the log-probs in the loss: that of sampling, or 1 for supervised training

    # The terms of the loss; None or False: not part of it.
    policy: policy_gradient.Policy | None  # present for a reward, and for a distillation that is an advantage
    policy_options: Mapping[str, float]  # keyword arguments of policy.function; omitted ones keep its defaults
    distillation: estimators.Objective | None
    distill_options: Mapping[str, Any]  # keyword arguments of distillation.function
    distill_entropy_weight: float  # 0: the same weight for every token
    reference: estimators.Objective | None
    has_rl: bool  # the reward is part of the policy's advantage
    has_critic: bool  # advantages come from a value head, whose loss is a term too
    group_advantage: Callable[..., Any] | None  # rewards [P, G] -> advantages; None: no reward, or a critic

    # What rollout and teacher provide. At most one of the two counts is above 0; both 0: the sampled tokens alone.
    num_candidates: int  # K most likely tokens that the student reports and the teacher scores
    teacher_top_k: int  # K most likely tokens that the teacher reports
    # Token ids below this number mean the same token to student and teachers; None: the vocabularies have one size.
    # Where they differ, the ids beyond are padding, or tokens that one side lacks: a candidate with such an id counts
    # into the bucket of all other tokens, and no such id is sent to a teacher or used as an index.
    num_shared_ids: int | None
    has_segments: bool  # a teacher with another tokenizer scores segments of text
    batch_fields: tuple[str, ...]  # fields that a TrainBatch must have, beside tokens and loss_mask

    # How a step computes it.
    recomputes_proximal: bool  # log-probs of the proximal policy are computed before the first of several updates
    adds_over_targets: bool  # see `_adds_over_targets`
    takes_parts: bool  # the parts of the one update may arrive, and be computed, one after another

    @property
    def candidates_per_target(self) -> int:
        """K of the batch's candidate fields; 0: it has none."""
        return self.num_candidates or self.teacher_top_k


def make_recipe(
    config: TrainConfig, *, vocab_size: int | None = None, teachers: Sequence[TeacherCapabilities] = (ANY_TEACHER,)
) -> Recipe:
    """Resolves the objective of a run.

    Args:
        config: configuration of the run.
        vocab_size: size of the student's vocabulary, which bounds the number of candidates; None: not bounded.
        teachers: capabilities of each teacher; every one of them must be able to score what is asked for.

    Raises:
        ConfigError: the objective's gradient is not what its name says (see `check`), or a teacher cannot score the
            number of candidates that objective.distillation needs. With `auto` that is a warning, and the distillation
            uses the sampled tokens alone.
    """
    check(config)
    objective = config.objective
    term, num_candidates, top_k = _distillation(config, vocab_size, teachers)
    has_critic = objective.has_rl and objective.advantage == "gae"
    policy = None
    if objective.has_rl or (term is not None and term.placement == "advantage"):
        policy = policy_gradient.POLICIES[objective.policy]
    has_segments = term is not None and _has_other_tokenizer(config)
    rollout, updates = config.rollout, config.optimizer
    on_policy = objective.kind == "on_policy"
    return Recipe(
        on_policy=on_policy,
        num_rows=rollout.num_prompts * rollout.num_completions if on_policy else updates.batch_size,
        temperature=rollout.temperature if on_policy else 1.0,
        policy=policy,
        policy_options={} if policy is None else _given(objective, policy.options),
        distillation=term,
        distill_options=_distill_options(objective, term),
        distill_entropy_weight=0.0 if term is None else objective.distill_entropy_weight,
        reference=_reference(objective),
        has_rl=objective.has_rl,
        has_critic=has_critic,
        group_advantage=advantages.ADVANTAGES[objective.advantage] if objective.has_rl and not has_critic else None,
        num_candidates=num_candidates,
        teacher_top_k=top_k,
        num_shared_ids=None if term is None or has_segments else _num_shared_ids(vocab_size, teachers),
        has_segments=has_segments,
        batch_fields=_batch_fields(objective, term, has_critic=has_critic, has_segments=has_segments),
        recomputes_proximal=on_policy and objective.proximal == "recomputed" and updates.minibatches > 1,
        adds_over_targets=_adds_over_targets(objective, policy, term, has_segments=has_segments),
        takes_parts=updates.accumulate > 1 and updates.minibatches == 1 and not has_critic,
    )


def check(config: TrainConfig) -> None:
    """Refuses an objective whose gradient is not what its name says, before anything is loaded. Raises ConfigError."""
    objective, teacher = config.objective, config.teacher
    term = _named_distillation(objective)  # None: there is none, or `auto`
    _reference(objective)
    optimizer.check(config.optimizer)
    effect.check(config, term)
    if objective.has_distillation and _has_other_tokenizer(config) and term is not None and term.name != AUTO_SAMPLED:
        raise ConfigError(
            "teacher.tokenizer: a teacher with another tokenizer scores spans of text, not the student's tokens, so "
            f"objective.distillation must be sampled_reverse_kl, got {objective.distillation}"
        )
    is_over_candidates = term is not None and term.needs_candidates is not None
    if objective.has_distillation and config.rollout.is_truncated and not is_over_candidates:
        raise ConfigError(
            "rollout.top_k, top_p, min_p: tokens sampled from a truncated distribution do not estimate its divergence "
            "from the teacher: leave them out, or set objective.distillation: topk_reverse_kl, which compares more "
            "than the sampled token"
        )
    may_be_advantage = objective.has_distillation and (term is None or term.placement == "advantage")
    if config.rollout.ahead and (objective.has_rl or may_be_advantage) and objective.behavior is None:
        raise ConfigError(
            "rollout.ahead: each batch is sampled by the policy of one update ago, and without a correction the ratio "
            "would be clipped around that policy: set objective.proximal: recomputed and objective.behavior: "
            "{action: clamp}"
        )
    if config.optimizer.accumulate > 1 and (key := _whole_update_key(objective)) is not None:
        raise ConfigError(
            f"optimizer.accumulate: objective.{key} is relative to all tokens of an update, and accumulation never "
            "has all of them at once: leave one of the two out (optimizer.packing and model.remat save memory too)"
        )
    several = None if teacher is None else teacher.several
    unknown = sorted(set(objective.teacher_weights) - set(several or ()))
    if unknown:
        raise ConfigError(f"objective.teacher_weights: {unknown[0]} is none of teacher.several")


def notes(config: TrainConfig) -> list[str]:
    """Returns what a user should know of a configuration that is right; see `effect.notes`."""
    return effect.notes(config, _named_distillation(config.objective))


# ---- the terms ----


def _named_distillation(objective: ObjectiveSection) -> estimators.Objective | None:
    """The distillation term by its own name or an alias; None: there is none, or it is `auto`."""
    if not objective.has_distillation or objective.distillation == "auto":
        return None
    return _resolve("distillation", objective.distillation, objective.distill_placement)


def _distillation(
    config: TrainConfig, vocab_size: int | None, teachers: Sequence[TeacherCapabilities]
) -> tuple[estimators.Objective | None, int, int]:
    """The distillation term, the number of the student's candidates, and the teacher's top-k."""
    objective = config.objective
    if not objective.has_distillation:
        return None, 0, 0
    term, sampled = _named_distillation(objective), estimators.OBJECTIVES[AUTO_SAMPLED]
    is_auto = term is None
    if term is None:
        term = sampled if _has_other_tokenizer(config) else estimators.OBJECTIVES[AUTO_CANDIDATES]
    if term.needs_candidates is None:
        return term, 0, 0
    by_teacher = (objective.distill_candidates or term.needs_candidates.removesuffix("_topk")) == "teacher"
    wanted = objective.distill_top_k if vocab_size is None else min(objective.distill_top_k, vocab_size)
    for teacher in teachers:
        most = teacher.max_top_k if by_teacher else teacher.max_candidate_count
        if most >= wanted:
            continue
        what = f"returns the {most} most likely tokens" if by_teacher else f"scores {most} candidates per token"
        if is_auto:
            logger.warning(
                "%s %s, not %d: distilling from the sampled tokens alone; to distil from candidates, lower "
                "objective.distill_top_k or use another engine",
                teacher.engine,
                what,
                wanted,
            )
            return sampled, 0, 0
        raise ConfigError(
            f"objective.distillation: {objective.distillation} needs {wanted} tokens at each position, but "
            f"{teacher.engine} {what}: lower objective.distill_top_k, use another engine, or set "
            "objective.distillation: sampled_reverse_kl"
        )
    return (term, 0, wanted) if by_teacher else (term, wanted, 0)


def _num_shared_ids(vocab_size: int | None, teachers: Sequence[TeacherCapabilities]) -> int | None:
    """Recipe.num_shared_ids of a student and teachers with one tokenizer."""
    if vocab_size is None:
        return None
    sizes = {vocab_size, *(teacher.vocab_size or vocab_size for teacher in teachers)}
    return min(sizes) if len(sizes) > 1 else None


def _reference(objective: ObjectiveSection) -> estimators.Objective | None:
    """The term that keeps the student near a frozen model; None: there is none. Raises ConfigError."""
    if objective.kind != "on_policy" or objective.reference is None:
        return None
    term = _resolve("reference.estimator", objective.reference.estimator, "loss")
    if term.needs_candidates is not None:
        raise ConfigError(
            f"objective.reference.estimator: {term.name} needs candidates, which a reference does not score: use an "
            "estimator on the sampled token"
        )
    return term


def _resolve(key: str, name: str, placement: str | None) -> estimators.Objective:
    try:
        return estimators.OBJECTIVES[estimators.resolve(name, placement)]
    except ValueError as e:
        raise ConfigError(f"objective.{key}: {e}") from None


def _distill_options(objective: ObjectiveSection, term: estimators.Objective | None) -> dict[str, Any]:
    """Keyword arguments of the distillation term's function."""
    if term is None:
        return {}
    if term.needs_candidates is not None:
        beta = {"beta": objective.distill_beta} if term.name == "topk_jsd" else {}
        return {"tail": objective.distill_tail} | beta
    return {"discount": objective.distill_discount} if term.placement == "advantage" else {}


def _given(objective: ObjectiveSection, names: Sequence[str]) -> dict[str, float]:
    """The options that are set; the function's own default stands in for the others."""
    return {name: number for name in names if (number := getattr(objective, name)) is not None}


# ---- what they need ----


def _has_other_tokenizer(config: TrainConfig) -> bool:
    return config.teacher is not None and config.teacher.tokenizer is not None


def _batch_fields(
    objective: ObjectiveSection, term: estimators.Objective | None, *, has_critic: bool, has_segments: bool
) -> tuple[str, ...]:
    """The fields of a TrainBatch that the loss reads."""
    fields = ["sampler_logprobs"] if objective.kind == "on_policy" else []
    if objective.has_rl:
        fields.append("token_rewards" if has_critic else "advantages")
    if term is not None:
        candidates = ["candidate_ids", "teacher_candidate_logprobs"]
        fields += ["teacher_logprobs"] if term.needs_candidates is None else candidates
    if has_segments:
        fields.append("teacher_segments")
    return tuple(fields)


def _whole_update_key(objective: ObjectiveSection) -> str | None:
    """The key whose effect on a token is relative to all tokens of its update, so that they must be together."""
    if objective.behavior is not None and objective.behavior.action == "mask":
        return "behavior.action: mask"  # the loss is a mean over the tokens that are kept
    if objective.distill_entropy_weight:
        return "distill_entropy_weight"  # the weights have mean 1
    return None


def _adds_over_targets(
    objective: ObjectiveSection,
    policy: policy_gradient.Policy | None,
    term: estimators.Objective | None,
    *,
    has_segments: bool,
) -> bool:
    """Whether the loss is a sum over targets, each a function of that target's own log-probs and constants.

    Then its gradient at some targets is known before the others are scored; see `logprobs.loss_of_targets`. Constants
    are the contents of the batch and counts of its mask. The value head's loss is a separate sum.
    """
    behavior = objective.behavior
    if policy is not None and policy.by_sequence:
        return False
    if policy is not None and behavior is not None and (behavior.level != "token" or behavior.action == "mask"):
        return False
    if term is not None and term.placement == "advantage" and (objective.distill_discount or has_segments):
        return False  # a token's advantage includes later tokens, or the rest of its segment
    return term is None or not objective.distill_entropy_weight
