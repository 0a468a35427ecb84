"""The loss of a batch, put together from the terms of the recipe.

One loss joins reward and teacher:

    rl_loss_weight * policy + distill_loss_weight * distillation + reference.weight * reference + value_loss_weight * V

A distillation that is an advantage (the sampled reverse KL) joins the reward's advantage, after the groups were
normalised and before the clip, so that one ratio clips both; any other is a separate term.

Dimension key: B sequences, T targets, K candidates, A parts of an update.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from jdistill.config import ObjectiveSection, ScheduleSection, TrainConfig
from jdistill.losses import distillation, masked, off_policy, policy_gradient, segments, supervised, value, weights
from jdistill.student.batch import TrainBatch
from jdistill.student.recipe import AUTO_CANDIDATES, Recipe

Metrics = dict[str, Array]


class Scored(NamedTuple):
    """Log-probs under the parameters being trained, [B, T] nats in float32; 0 where a target is not scored."""

    logprobs: Float[Array, "B T"]
    candidate_logprobs: Float[Array, "B T K"] | None
    entropy: Float[Array, "B T"]  # without a gradient
    values: Float[Array, "B T"] | None = None  # of the value head, before the target's token is chosen


def check_batch(recipe: Recipe, batch: TrainBatch, *, num_parts: int, vocab_size: int) -> None:
    """Checks that a batch has the fields that the loss reads, ids of the student, and splits into the parts of a step.

    Raises:
        ValueError: a field is missing, an id is not below `vocab_size`, the rows do not split into `num_parts`, or no
            target is scored.
    """
    missing = [name for name in recipe.batch_fields if getattr(batch, name) is None]
    if missing:
        raise ValueError(
            f"the objective needs {', '.join(missing)}, which the batch does not have: score the completions (and "
            "their candidates) before make_batch, or change objective.distillation or the weights"
        )
    if batch.teacher_segments is not None and recipe.distillation is not None and not recipe.has_segments:
        raise ValueError("the batch has teacher_segments, of a teacher with another tokenizer: set teacher.tokenizer")
    for name in ("tokens", "candidate_ids"):
        ids = getattr(batch, name)
        # As an index, an id that the student lacks would read NaN, or another token's number.
        if isinstance(ids, np.ndarray) and ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
            raise ValueError(
                f"{name} of the batch hold ids from {ids.min()} to {ids.max()}, and the student has {vocab_size}: is "
                "the teacher's vocabulary larger? Give make_batch num_shared_ids"
            )
    num_rows = len(batch.tokens)
    if num_rows % num_parts:
        raise ValueError(
            f"optimizer.minibatches * optimizer.accumulate = {num_parts} does not divide the batch's {num_rows} rows"
        )
    if isinstance(batch.loss_mask, np.ndarray) and not batch.loss_mask.any():
        raise ValueError("no target of the batch is scored: there is nothing to learn from it")


def weight_at(weight: float | ScheduleSection, step: Int[Array, ""], num_steps: int) -> Float[Array, ""] | float:
    """A configured weight at a step, counted from 0, of a run of `num_steps`."""
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


# ---- parts of an update ----


class Shares(NamedTuple):
    """Fraction of the whole update that each of its A parts is."""

    of_loss: Float[Array, "A"]
    of_tokens: Float[Array, "A"]


# Metrics that are reduced as the loss is; the others are means over scored tokens, or maxima.
_REDUCED = ("policy_loss", "distill_loss", "reference_kl", "value_loss")


def shares_of_parts(config: TrainConfig, num_tokens: Num[Array, "A"], num_sequences: Num[Array, "A"]) -> Shares:
    """Weights of the parts' losses that make them add up to the loss of all rows at once.

    Every reduction is a sum divided by a count: of scored tokens, or of sequences that have any.

    Args:
        config: configuration of the run.
        num_tokens: scored tokens of each part.
        num_sequences: sequences with a scored token, of each part.
    """
    total_tokens, total_sequences = jnp.sum(num_tokens), jnp.sum(num_sequences)
    of_loss = share_of_loss(config, num_tokens, num_sequences, total_tokens, total_sequences)
    return Shares(of_loss, num_tokens / jnp.maximum(total_tokens, 1))


def share_of_loss(config: TrainConfig, num_tokens, num_sequences, total_tokens, total_sequences):
    """Fraction of the update's loss contributed by one part; counts are numbers or arrays."""
    if config.objective.reduction == "token_mean":
        return num_tokens / jnp.maximum(total_tokens, 1)
    return num_sequences / jnp.maximum(total_sequences, 1)


def join_metrics(parts: dict[str, Float[Array, "A"]], shares: Shares) -> dict[str, Float[Array, ""]]:
    """The metrics of all rows at once, from those that `loss` gave for each part."""
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


# ---- the loss ----


def loss(
    config: TrainConfig, recipe: Recipe, scored: Scored, batch: TrainBatch, step: Int[Array, ""]
) -> tuple[Float[Array, ""], Metrics]:
    """The scalar to minimise, and its metrics (without a gradient).

    Args:
        config: weights, clips, discounts and the reduction.
        recipe: the terms; from `recipe.make_recipe(config)`.
        scored: the rows of `batch` under the parameters being trained.
        batch: with the fields that the recipe names.
        step: steps done, for scheduled weights.
    """
    reduce = functools.partial(masked.REDUCTIONS[config.objective.reduction], length=config.rollout.max_new_tokens)
    if recipe.on_policy:
        total, metrics = _on_policy(config, recipe, scored, batch, step, reduce)
    else:
        total, metrics = reduce(supervised.cross_entropy(scored.logprobs), batch.loss_mask), {}
    metrics["entropy"] = masked.masked_mean(scored.entropy, batch.loss_mask)
    return total, jax.lax.stop_gradient(metrics)


Reduce = Callable[[Float[Array, "B T"], Bool[Array, "B T"]], Float[Array, ""]]


class _Logprobs(NamedTuple):
    """Log-probs of the sampled tokens under three policies; 0 where a target is not scored."""

    now: Float[Array, "B T"]  # being trained
    proximal: Float[Array, "B T"]  # that the ratio is relative to
    sampler: Float[Array, "B T"]  # when they were sampled


def _on_policy(
    config: TrainConfig, recipe: Recipe, scored: Scored, batch: TrainBatch, step: Int[Array, ""], reduce: Reduce
) -> tuple[Float[Array, ""], Metrics]:
    objective, mask_BT = config.objective, batch.loss_mask
    rl_weight, distill_weight = (
        weight_at(weight, step, config.num_steps)
        for weight in (objective.rl_loss_weight, objective.distill_loss_weight)
    )
    logprobs = _logprobs(objective, scored, batch)
    term = recipe.distillation
    total, metrics = jnp.zeros(()), {}
    advantages_BT = jnp.zeros_like(logprobs.now)
    if recipe.has_rl:
        advantages_BT += rl_weight * masked.fill(batch.advantages, mask_BT)
    if term is not None:
        distill_weights_BT = _distill_weights(recipe, scored, batch)
    if term is not None and term.placement == "advantage":
        distill_BT = _distill_advantage(objective, recipe, logprobs.now, batch, metrics)
        advantages_BT += distill_weight * distill_weights_BT * distill_BT
    if recipe.policy is not None:
        total += _policy(objective, recipe, logprobs, advantages_BT, mask_BT, reduce, metrics)
    if term is not None and term.placement == "loss":
        distill_BT, to_reduce_BT = _distill_loss(objective, recipe, scored, batch, logprobs, metrics)
        metrics["distill_loss"] = reduce(distill_BT, mask_BT)
        total += distill_weight * reduce(distill_weights_BT * to_reduce_BT, mask_BT)
    if recipe.reference is not None:
        gap_BT = recipe.reference.function(logprobs.now, masked.fill(batch.reference_logprobs, mask_BT))
        metrics["reference_kl"] = reduce(gap_BT, mask_BT)
        total += weight_at(objective.reference.weight, step, config.num_steps) * metrics["reference_kl"]
    if recipe.has_critic:
        metrics["value_loss"] = _value_loss(objective, scored, batch, reduce)
        total += objective.value_loss_weight * metrics["value_loss"]
    if isinstance(objective.distill_loss_weight, ScheduleSection):
        metrics["distill_loss_weight"] = jnp.asarray(distill_weight)
    return total, metrics | _ratio_metrics(logprobs, mask_BT)


def _logprobs(objective: ObjectiveSection, scored: Scored, batch: TrainBatch) -> _Logprobs:
    # fill() before any product: what unscored targets hold must not touch a value or a gradient.
    mask_BT = batch.loss_mask
    now_BT = masked.fill(scored.logprobs, mask_BT)
    sampler_BT = masked.fill(batch.sampler_logprobs, mask_BT)
    if objective.proximal == "sampler":
        proximal_BT = sampler_BT
    elif batch.proximal_logprobs is not None:
        proximal_BT = masked.fill(batch.proximal_logprobs, mask_BT)
    else:  # one update a step: the proximal policy is the one being trained
        proximal_BT = jax.lax.stop_gradient(now_BT)
    return _Logprobs(now_BT, proximal_BT, sampler_BT)


def _ratio_metrics(logprobs: _Logprobs, mask_BT: Bool[Array, "B T"]) -> Metrics:
    """How far the trainer's policy is from the sampler's."""
    ratio_BT = policy_gradient.probability_ratio(logprobs.now, logprobs.sampler)
    sampler_gap_BT = jnp.abs(logprobs.now - logprobs.sampler)
    return {
        "ratio_mean": masked.masked_mean(ratio_BT, mask_BT),
        "ratio_max": jnp.max(masked.fill(ratio_BT, mask_BT)),
        "sampler_gap_mean": masked.masked_mean(sampler_gap_BT, mask_BT),
        "sampler_gap_max": jnp.max(sampler_gap_BT),
    }


def _policy(
    objective: ObjectiveSection,
    recipe: Recipe,
    logprobs: _Logprobs,
    advantages_BT: Float[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    reduce: Reduce,
    metrics: Metrics,
) -> Float[Array, ""]:
    """The policy loss, corrected for the sampler's policy where objective.behavior asks for it."""
    policy, options = recipe.policy, recipe.policy_options
    assert policy is not None
    kept_BT, weight_BT = mask_BT, None
    if (behavior := objective.behavior) is not None:
        weight_BT, kept_BT = off_policy.behavior_weight(
            logprobs.proximal,
            logprobs.sampler,
            mask_BT,
            action=behavior.action,
            level=behavior.level,
            lower=behavior.lower,
            upper=behavior.upper,
        )
        metrics["behavior_weight_mean"] = masked.masked_mean(weight_BT, kept_BT)
        metrics["behavior_kept_share"] = masked.masked_mean(kept_BT.astype(jnp.float32), mask_BT)
    policy_BT = policy.function(logprobs.now, logprobs.proximal, advantages_BT, kept_BT, **options)
    if weight_BT is not None:
        policy_BT *= weight_BT
    metrics["policy_loss"] = reduce(policy_BT, kept_BT)
    if policy.clip_is_active is not None:
        clip = {name: options[name] for name in policy.clip_options if name in options}
        clipped_BT = policy.clip_is_active(logprobs.now, logprobs.proximal, advantages_BT, kept_BT, **clip)
        metrics["clip_fraction"] = masked.masked_mean(clipped_BT.astype(jnp.float32), kept_BT)
    return metrics["policy_loss"]


def _value_loss(objective: ObjectiveSection, scored: Scored, batch: TrainBatch, reduce: Reduce) -> Float[Array, ""]:
    mask_BT = batch.loss_mask
    returns_BT = masked.fill(batch.returns, mask_BT)
    values_BT = masked.fill(scored.values, mask_BT)
    old_BT = masked.fill(batch.values, mask_BT)
    return reduce(value.value_loss(values_BT, old_BT, returns_BT, clip=objective.value_clip), mask_BT)


# ---- the distillation ----


def _distill_weights(recipe: Recipe, scored: Scored, batch: TrainBatch) -> Float[Array, "B T"]:
    """Weight of each token in the distillation term."""
    weights_BT = jnp.ones_like(scored.logprobs)
    if batch.distill_weights is not None:
        weights_BT = masked.fill(batch.distill_weights, batch.loss_mask)
    if strength := recipe.distill_entropy_weight:
        weights_BT *= weights.entropy_weights(scored.entropy, batch.loss_mask, strength=strength)
    return weights_BT


def _distill_advantage(
    objective: ObjectiveSection,
    recipe: Recipe,
    logprobs_BT: Float[Array, "B T"],
    batch: TrainBatch,
    metrics: Metrics,
) -> Float[Array, "B T"]:
    """The sampled reverse KL as an advantage.

    It is taken under the parameters being trained, not the sampler's: with several updates per step, the ratio times
    this advantage is the gradient of the KL at the current student.
    """
    mask_BT, options = batch.loss_mask, recipe.distill_options
    if recipe.has_segments:
        advantages_BT, usable_BT = segments.sampled_reverse_kl_advantage(
            logprobs_BT, batch.teacher_logprobs, batch.teacher_segments, mask_BT, **options
        )
        metrics["teacher_usable_share"] = masked.masked_mean(usable_BT.astype(jnp.float32), mask_BT)
    else:
        usable_BT = mask_BT
        advantages_BT = distillation.sampled_reverse_kl_advantage(
            logprobs_BT, batch.teacher_logprobs, mask_BT, **options
        )
    metrics["reverse_kl"] = masked.masked_mean(logprobs_BT - masked.fill(batch.teacher_logprobs, usable_BT), usable_BT)
    if objective.distill_clip is not None:
        advantages_BT = weights.clip_per_token(advantages_BT, limit=objective.distill_clip)
    return advantages_BT


def _distill_loss(
    objective: ObjectiveSection,
    recipe: Recipe,
    scored: Scored,
    batch: TrainBatch,
    logprobs: _Logprobs,
    metrics: Metrics,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """The divergence per token, and the quantity to differentiate in its place."""
    term, mask_BT = recipe.distillation, batch.loss_mask
    assert term is not None
    if term.needs_candidates is None:
        teacher_BT = masked.fill(batch.teacher_logprobs, mask_BT)
        distill_BT = term.function(logprobs.now, teacher_BT, **recipe.distill_options)
        metrics["reverse_kl"] = masked.masked_mean(logprobs.now - teacher_BT, mask_BT)
        # The token was sampled by an older policy, or by a sampler that rounds otherwise. Its importance weight, 1
        # on-policy, makes the expectation the current policy's.
        ratio_BT = jax.lax.stop_gradient(policy_gradient.probability_ratio(logprobs.now, logprobs.sampler))
        to_reduce_BT = ratio_BT * distill_BT
    else:
        candidates_BTK = masked.fill(scored.candidate_logprobs, mask_BT)
        teacher_BTK = masked.fill(batch.teacher_candidate_logprobs, mask_BT)
        if recipe.num_shared_ids is not None:
            is_missing_BTK = jnp.isneginf(teacher_BTK)
            candidates_BTK = jnp.where(is_missing_BTK, -jnp.inf, candidates_BTK)
            missing_BT = jnp.mean(is_missing_BTK, axis=-1, dtype=jnp.float32)
            metrics["unshared_candidates_share"] = masked.masked_mean(missing_BT, mask_BT)
        distill_BT = to_reduce_BT = term.function(candidates_BTK, teacher_BTK, **recipe.distill_options)
        if term.name == AUTO_CANDIDATES:
            metrics["reverse_kl"] = masked.masked_mean(distill_BT, mask_BT)
    if objective.distill_clip is not None:
        to_reduce_BT = weights.clip_per_token(to_reduce_BT, limit=objective.distill_clip)
    return distill_BT, to_reduce_BT
