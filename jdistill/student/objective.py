"""What the configuration's objective means for a batch: which terms, what each needs, and the loss itself.

One loss joins reward and teacher:

    rl_loss_weight * policy + distill_loss_weight * distillation + reference.weight * reference + value_loss_weight * V

A distillation that is an advantage (the sampled reverse KL) joins the reward's advantage, after the groups were
normalised and before the clip, so that one ratio clips both; any other is a term of its own.

Dimension key: B sequences, T targets, K candidates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from jdistill.config import ConfigError, ObjectiveSection, ScheduleSection, TrainConfig
from jdistill.losses import (
    distillation,
    estimators,
    masked,
    off_policy,
    policy_gradient,
    segments,
    supervised,
    value,
    weights,
)
from jdistill.student.batch import TrainBatch

AUTO_CANDIDATES, AUTO_SAMPLED = "topk_reverse_kl", "sampled_reverse_kl_advantage"


class Scored(NamedTuple):
    """Of the parameters being trained, on the target grid; float32 nats, 0 where a target is not scored."""

    logprobs: Float[Array, "B T"]
    candidate_logprobs: Float[Array, "B T K"] | None
    entropy: Float[Array, "B T"]  # without a gradient
    values: Float[Array, "B T"] | None = None  # of the value head, before the target's token is chosen


# ---- what is asked ----


def distillation_of(objective: ObjectiveSection) -> estimators.Objective | None:
    """The distillation term, by its own name or an alias; None: there is none, or `auto` leaves it to the teacher.

    Raises:
        ConfigError: what the name and the placement together compute is not what the name says.
    """
    if not objective.has_distillation or objective.distillation == "auto":
        return None
    return _resolve("distillation", objective.distillation, objective.distill_placement)


def reference_of(objective: ObjectiveSection) -> estimators.Objective | None:
    """The term that holds the student near a frozen model; None: there is none. Raises ConfigError."""
    if objective.kind != "on_policy" or objective.reference is None:
        return None
    term = _resolve("reference.estimator", objective.reference.estimator, "loss")
    if term.needs_candidates is not None:
        raise ConfigError(f"objective.reference.estimator: {term.name} needs candidates; take one of a sampled token")
    return term


def _resolve(key: str, name: str, placement: str | None) -> estimators.Objective:
    try:
        return estimators.OBJECTIVES[estimators.resolve(name, placement)]
    except ValueError as e:
        raise ConfigError(f"objective.{key}: {e}") from None


def check(config: TrainConfig) -> None:
    """Refuses, before anything is loaded, an objective whose gradient is not what its name says. Raises ConfigError."""
    objective = config.objective
    term = distillation_of(objective)
    reference_of(objective)
    teacher = config.teacher
    has_teacher = objective.kind == "on_policy" and objective.has_distillation and teacher is not None
    if has_teacher and teacher.tokenizer is not None and term is not None and term.name != AUTO_SAMPLED:
        raise ConfigError(
            "teacher.tokenizer: a teacher with another tokenizer scores spans of text, not the student's tokens, so "
            f"objective.distillation must be sampled_reverse_kl, got {objective.distillation}"
        )
    of_distribution = term is not None and term.needs_candidates is not None
    if has_teacher and config.rollout.is_truncated and not of_distribution:
        raise ConfigError(
            "rollout.top_k, top_p, min_p: tokens of a part of the distribution do not estimate its divergence from the "
            "teacher: leave them out, or set objective.distillation: topk_reverse_kl, which sees more than the token"
        )
    has_policy = objective.has_rl or (has_teacher and (term is None or term.placement == "advantage"))
    if config.rollout.ahead and objective.kind == "on_policy" and has_policy and objective.behavior is None:
        raise ConfigError(
            "rollout.ahead: a batch is sampled by the policy of one update ago, and without a correction the ratio "
            "would be clipped around that one: set objective.proximal: recomputed and objective.behavior: "
            "{action: clamp}"
        )
    if config.optimizer.accumulate > 1:
        rejects = objective.behavior is not None and objective.behavior.action == "mask"
        if rejects or objective.distill_entropy_weight:
            key = "behavior.action: mask" if rejects else "distill_entropy_weight"
            raise ConfigError(
                f"optimizer.accumulate: objective.{key} is relative to all tokens of an update, which are then never "
                "looked at together: leave one of the two out (optimizer.packing and model.remat save memory too)"
            )
    several = None if teacher is None else teacher.several
    unknown = sorted(set(objective.teacher_weights) - set(several or ()))
    if unknown:
        raise ConfigError(f"objective.teacher_weights: {unknown[0]} is none of teacher.several")


def needs_candidates(objective: ObjectiveSection) -> bool:
    """Whether the distillation is over K tokens of each position: False, True, or (auto) whatever the teacher can."""
    term = distillation_of(objective)
    return term is not None and term.needs_candidates is not None


def term_of(objective: ObjectiveSection, batch: TrainBatch) -> estimators.Objective | None:
    """The distillation term of a batch; `auto` takes what the batch has: candidates where the teacher scored them."""
    if not objective.has_distillation:
        return None
    term = distillation_of(objective)
    if term is None:
        name = AUTO_SAMPLED if batch.candidate_ids is None else AUTO_CANDIDATES
        term = estimators.OBJECTIVES[name]
    return term


def check_batch(config: TrainConfig, batch: TrainBatch, *, num_parts: int | None = None) -> None:
    """Whether a batch has what the objective reads, and splits into the parts of a step. Raises ValueError."""
    objective = config.objective
    if num_parts is None:
        num_parts = config.optimizer.minibatches * config.optimizer.accumulate
    needed = []
    if objective.kind == "on_policy":
        needed += ["sampler_logprobs"]
        if objective.has_rl:
            needed += ["token_rewards" if objective.advantage == "gae" else "advantages"]
    term = term_of(objective, batch)
    if term is not None:
        needed += ["teacher_logprobs"] if term.needs_candidates is None else _CANDIDATE_FIELDS
    missing = [name for name in needed if getattr(batch, name) is None]
    if missing:
        raise ValueError(
            f"the objective needs {', '.join(missing)}, which the batch does not have: score the completions (and "
            "their candidates) before make_batch, or change objective.distillation or the weights"
        )
    num_rows = len(batch.tokens)
    if num_rows % num_parts:
        raise ValueError(
            f"optimizer.minibatches * optimizer.accumulate = {num_parts} does not divide the batch's {num_rows} rows"
        )
    if isinstance(batch.loss_mask, np.ndarray) and not batch.loss_mask.any():
        raise ValueError("no target of the batch is scored: there is nothing to learn from it")


_CANDIDATE_FIELDS = ["candidate_ids", "teacher_candidate_logprobs"]


# ---- the loss ----


def weight_at(weight: float | ScheduleSection, step: Int[Array, ""], num_steps: int) -> Float[Array, ""] | float:
    """A weight of the configuration at a step, which counts from 0."""
    if not isinstance(weight, ScheduleSection):
        return weight
    last = (num_steps - 1 if weight.num_steps is None else weight.num_steps) or 1
    match weight.kind:
        case "linear":
            return weights.linear(step, begin=weight.begin, end=weight.end, num_steps=last)
        case "cosine":
            return weights.cosine(step, begin=weight.begin, end=weight.end, num_steps=last)
        case "kdrl":
            assert weight.decrement is not None
            return weights.kdrl_annealing(step, begin=weight.begin, end=weight.end, decrement=weight.decrement)


def adds_over_targets(config: TrainConfig, batch: TrainBatch) -> bool:
    """Whether the loss is a sum over targets, each a function of that target's own log-probs and constants.

    Then its gradient at some targets can be had before the others are scored; see `logprobs.loss_of_targets`. Constants
    are what the batch holds and counts of its mask. A value head's loss is another sum, which is not asked about.
    """
    objective, term = config.objective, term_of(config.objective, batch)
    if objective.kind != "on_policy":
        return True
    if objective.has_rl or (term is not None and term.placement == "advantage"):
        behavior = objective.behavior
        if objective.policy in policy_gradient.BY_SEQUENCE:
            return False
        if behavior is not None and (behavior.level == "sequence" or behavior.action == "mask"):
            return False
    if term is not None and term.placement == "advantage":
        # What a token is worth includes what came after it, or the rest of its segment.
        if objective.distill_discount or batch.teacher_segments is not None:
            return False
    return not (term is not None and objective.distill_entropy_weight)


def loss(
    config: TrainConfig, scored: Scored, batch: TrainBatch, step: Int[Array, ""]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The scalar to be lowered, and the metrics of it (without a gradient)."""
    objective = config.objective
    total, metrics = (_on_policy if objective.kind == "on_policy" else _supervised)(config, scored, batch, step)
    metrics["entropy"] = masked.masked_mean(scored.entropy, batch.loss_mask)
    return total, jax.lax.stop_gradient(metrics)


class Shares(NamedTuple):
    """How much of a whole each of the A parts of an update is."""

    of_loss: Float[Array, "A"]
    of_tokens: Float[Array, "A"]


# Metrics that are reduced as the loss is; the others are means over scored tokens, or maxima.
_REDUCED = ("policy_loss", "distill_loss", "reference_kl", "value_loss")


def shares_of_parts(config: TrainConfig, num_tokens: Num[Array, "A"], num_sequences: Num[Array, "A"]) -> Shares:
    """What to weigh the parts' losses with, so that they add up to the loss of all rows at once.

    Every reduction is a sum over a count: of scored tokens, or of sequences that have any.

    Args:
        config: of the run.
        num_tokens: scored, of each part.
        num_sequences: of each part, with a scored token.
    """
    total_tokens, total_sequences = jnp.sum(num_tokens), jnp.sum(num_sequences)
    of_loss = share_of_loss(config, num_tokens, num_sequences, total_tokens, total_sequences)
    return Shares(of_loss, num_tokens / jnp.maximum(total_tokens, 1))


def share_of_loss(config: TrainConfig, num_tokens, num_sequences, total_tokens, total_sequences):
    """Of a part with these counts in a whole with those; numbers or arrays."""
    if config.objective.reduction == "token_mean":
        return num_tokens / jnp.maximum(total_tokens, 1)
    return num_sequences / jnp.maximum(total_sequences, 1)


def join_metrics(parts: dict[str, Float[Array, "A"]], shares: Shares) -> dict[str, Float[Array, ""]]:
    """The metrics of all rows at once from those of the parts that `loss` gave."""
    joined = {}
    for name, values_A in parts.items():
        if name.endswith("_max"):
            joined[name] = jnp.max(values_A)
            continue
        share_A = shares.of_loss if name in _REDUCED else shares.of_tokens
        if name == "reverse_kl" and "teacher_usable_share" in parts:  # a mean over the usable tokens alone
            share_A = share_A * parts["teacher_usable_share"]
            share_A /= jnp.maximum(jnp.sum(share_A), jnp.finfo(jnp.float32).tiny)
        joined[name] = jnp.sum(share_A * values_A)
    return joined


def _supervised(config: TrainConfig, scored: Scored, batch: TrainBatch, step: Int[Array, ""]):
    return _reducer(config)(supervised.cross_entropy(scored.logprobs), batch.loss_mask), {}


def _reducer(config: TrainConfig) -> Any:
    reduce, length = masked.REDUCTIONS[config.objective.reduction], config.rollout.max_new_tokens
    return lambda x, mask: reduce(x, mask, length=length)


def _on_policy(config: TrainConfig, scored: Scored, batch: TrainBatch, step: Int[Array, ""]):
    objective, mask_BT, reduce = config.objective, batch.loss_mask, _reducer(config)
    rl_weight = weight_at(objective.rl_loss_weight, step, config.num_steps)
    distill_weight = weight_at(objective.distill_loss_weight, step, config.num_steps)
    # fill() before any product: what unscored targets hold must not touch a value or a gradient.
    logprobs_BT = masked.fill(scored.logprobs, mask_BT)
    sampler_BT = masked.fill(batch.sampler_logprobs, mask_BT)
    if objective.proximal == "sampler":
        proximal_BT = sampler_BT
    elif batch.proximal_logprobs is not None:
        proximal_BT = masked.fill(batch.proximal_logprobs, mask_BT)
    else:  # one update a step: the proximal policy is the one being trained
        proximal_BT = jax.lax.stop_gradient(logprobs_BT)

    total, metrics = jnp.zeros(()), {}
    advantages_BT = jnp.zeros_like(logprobs_BT)
    if objective.has_rl:
        advantages_BT += rl_weight * masked.fill(batch.advantages, mask_BT)
    term = term_of(objective, batch)
    distill_weights_BT = jnp.ones_like(logprobs_BT)
    if term is not None:
        distill_weights_BT = _distill_weights(objective, scored, batch)
    if term is not None and term.placement == "advantage":
        distill_BT = _distill_advantage(objective, logprobs_BT, batch, metrics)
        advantages_BT += distill_weight * distill_weights_BT * distill_BT
    if objective.has_rl or (term is not None and term.placement == "advantage"):
        policy_loss = _policy(objective, logprobs_BT, proximal_BT, sampler_BT, advantages_BT, mask_BT, reduce, metrics)
        total += policy_loss
    if term is not None and term.placement == "loss":
        distill_BT, to_reduce_BT = _distill_loss(objective, term, scored, batch, logprobs_BT, sampler_BT, metrics)
        metrics["distill_loss"] = reduce(distill_BT, mask_BT)
        total += distill_weight * reduce(distill_weights_BT * to_reduce_BT, mask_BT)
    if (reference := reference_of(objective)) is not None:
        gap_BT = reference.function(logprobs_BT, masked.fill(batch.reference_logprobs, mask_BT))
        metrics["reference_kl"] = reduce(gap_BT, mask_BT)
        total += weight_at(objective.reference.weight, step, config.num_steps) * metrics["reference_kl"]
    if scored.values is not None:
        returns_BT = masked.fill(batch.returns, mask_BT)
        values_BT = masked.fill(scored.values, mask_BT)
        old_BT = masked.fill(batch.values, mask_BT)
        metrics["value_loss"] = reduce(
            value.value_loss(values_BT, old_BT, returns_BT, clip=objective.value_clip), mask_BT
        )
        total += objective.value_loss_weight * metrics["value_loss"]

    ratio_BT = policy_gradient.probability_ratio(logprobs_BT, sampler_BT)
    sampler_gap_BT = jnp.abs(logprobs_BT - sampler_BT)
    metrics |= {
        "ratio_mean": masked.masked_mean(ratio_BT, mask_BT),
        "ratio_max": jnp.max(masked.fill(ratio_BT, mask_BT)),
        "sampler_gap_mean": masked.masked_mean(sampler_gap_BT, mask_BT),
        "sampler_gap_max": jnp.max(sampler_gap_BT),
    }
    if isinstance(objective.distill_loss_weight, ScheduleSection):
        metrics["distill_loss_weight"] = jnp.asarray(distill_weight)
    return total, metrics


def _policy(
    objective: ObjectiveSection,
    logprobs_BT: Float[Array, "B T"],
    proximal_BT: Float[Array, "B T"],
    sampler_BT: Float[Array, "B T"],
    advantages_BT: Float[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    reduce: Any,
    metrics: dict[str, Array],
) -> Float[Array, ""]:
    kept_BT, weight_BT = mask_BT, None
    if (behavior := objective.behavior) is not None:
        weight_BT, kept_BT = off_policy.behavior_weight(
            proximal_BT,
            sampler_BT,
            mask_BT,
            action=behavior.action,
            level=behavior.level,
            lower=behavior.lower,
            upper=behavior.upper,
        )
        metrics["behavior_weight_mean"] = masked.masked_mean(weight_BT, kept_BT)
        metrics["behavior_kept_share"] = masked.masked_mean(kept_BT.astype(jnp.float32), mask_BT)
    options = policy_options(objective)
    policy = policy_gradient.POLICIES[objective.policy]
    policy_BT = policy(logprobs_BT, proximal_BT, advantages_BT, kept_BT, **options)
    if weight_BT is not None:
        policy_BT *= weight_BT
    metrics["policy_loss"] = reduce(policy_BT, kept_BT)
    if (is_active := policy_gradient.CLIPS.get(objective.policy)) is not None:
        clip = {name: options[name] for name in ("clip_low", "clip_high") if name in options}
        clipped_BT = is_active(logprobs_BT, proximal_BT, advantages_BT, kept_BT, **clip)
        metrics["clip_fraction"] = masked.masked_mean(clipped_BT.astype(jnp.float32), kept_BT)
    return metrics["policy_loss"]


def policy_options(objective: ObjectiveSection) -> dict[str, float]:
    """What is passed to the policy's function by name; what is None is left to its own default."""
    names = {
        "ppo_clip": ("clip_low", "clip_high", "dual_clip"),
        "gspo": ("clip_low", "clip_high"),
        "cispo": ("clip_low", "clip_high"),
        "sapo": ("tau_positive", "tau_negative"),
    }[objective.policy]
    return {name: number for name in names if (number := getattr(objective, name)) is not None}


def _distill_weights(objective: ObjectiveSection, scored: Scored, batch: TrainBatch) -> Float[Array, "B T"]:
    weights_BT = jnp.ones_like(scored.logprobs)
    if batch.distill_weights is not None:
        weights_BT = masked.fill(batch.distill_weights, batch.loss_mask)
    if objective.distill_entropy_weight:
        weights_BT *= weights.entropy_weights(
            scored.entropy, batch.loss_mask, strength=objective.distill_entropy_weight
        )
    return weights_BT


def _distill_advantage(
    objective: ObjectiveSection, logprobs_BT: Float[Array, "B T"], batch: TrainBatch, metrics: dict[str, Array]
) -> Float[Array, "B T"]:
    """The sampled reverse KL as an advantage.

    Under the parameters being trained, not the sampler's: with several updates a step, the ratio times this is the
    gradient of the KL where the student is now.
    """
    mask_BT = batch.loss_mask
    if batch.teacher_segments is None:
        usable_BT = mask_BT
        advantages_BT = distillation.sampled_reverse_kl_advantage(
            logprobs_BT, batch.teacher_logprobs, mask_BT, discount=objective.distill_discount
        )
    else:
        advantages_BT, usable_BT = segments.sampled_reverse_kl_advantage(
            logprobs_BT, batch.teacher_logprobs, batch.teacher_segments, mask_BT, discount=objective.distill_discount
        )
        metrics["teacher_usable_share"] = masked.masked_mean(usable_BT.astype(jnp.float32), mask_BT)
    metrics["reverse_kl"] = masked.masked_mean(logprobs_BT - masked.fill(batch.teacher_logprobs, usable_BT), usable_BT)
    if objective.distill_clip is not None:
        advantages_BT = weights.clip_per_token(advantages_BT, limit=objective.distill_clip)
    return advantages_BT


def _distill_loss(
    objective: ObjectiveSection,
    term: estimators.Objective,
    scored: Scored,
    batch: TrainBatch,
    logprobs_BT: Float[Array, "B T"],
    sampler_BT: Float[Array, "B T"],
    metrics: dict[str, Array],
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Per token: the divergence, and what is to be differentiated in its place."""
    mask_BT = batch.loss_mask
    if term.needs_candidates is None:
        teacher_BT = masked.fill(batch.teacher_logprobs, mask_BT)
        distill_BT = term.function(logprobs_BT, teacher_BT)
        metrics["reverse_kl"] = masked.masked_mean(logprobs_BT - teacher_BT, mask_BT)
        # The sampled token came from an older policy, or from a sampler that rounds otherwise: its weight, which is 1
        # on-policy, makes the expectation the current policy's.
        ratio_BT = jax.lax.stop_gradient(policy_gradient.probability_ratio(logprobs_BT, sampler_BT))
        to_reduce_BT = ratio_BT * distill_BT
    else:
        options: dict[str, Any] = {"tail": objective.distill_tail}
        if term.name == "topk_jsd":
            options["beta"] = objective.distill_beta
        distill_BT = to_reduce_BT = term.function(
            masked.fill(scored.candidate_logprobs, mask_BT),
            masked.fill(batch.teacher_candidate_logprobs, mask_BT),
            **options,
        )
        if term.name == AUTO_CANDIDATES:
            metrics["reverse_kl"] = masked.masked_mean(distill_BT, mask_BT)
    if objective.distill_clip is not None:
        to_reduce_BT = weights.clip_per_token(to_reduce_BT, limit=objective.distill_clip)
    return distill_BT, to_reduce_BT
