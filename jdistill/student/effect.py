"""Finds keys that were given and have no effect in their configuration: mistakes, or parts that are switched off.

Only what was given counts, never a default. A key that belongs to a choice that was not made (`tau_positive` with
`policy: ppo_clip`) is refused. Keys of a part that was switched off on purpose (`distill_loss_weight: 0`, say, on the
command line, to train a file's run without its teacher) are only named in the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from jdistill.config import ConfigError, ScheduleSection, Section, TrainConfig
from jdistill.losses.estimators import Objective

Term = Objective | None  # the distillation by its name; None: there is none, or it is `auto`


class Idle(NamedTuple):
    """Keys, and when they have no effect."""

    keys: str
    when: Callable[[TrainConfig, Term], bool]
    why: str  # and what to do


def given(config: TrainConfig) -> set[str]:
    """Returns the dotted keys that the user gave, sections among them."""
    return set(_given("", config))


def _given(path: str, section: Section) -> Iterator[str]:
    fields = type(section).model_fields
    # config.json of a run gives every key: there only other values than the defaults were the user's.
    is_dump = section.model_fields_set == set(fields)
    for name in section.model_fields_set:
        value, key = getattr(section, name), f"{path}{name}"
        if value is None and fields[name].default is None:
            continue  # `null` leaves a key out
        if not is_dump or value != fields[name].default:
            yield key
            if isinstance(value, Section):
                yield from _given(f"{key}.", value)


def check(config: TrainConfig, term: Term) -> None:
    """Refuses keys that were given and have no effect.

    Args:
        config: configuration of the run.
        term: the distillation term by its name; None: there is none, or it is `auto`.

    Raises:
        ConfigError: names all of them, each with the reason.
    """
    keys = given(config) - {key for off in SWITCHED_OFF if off.when(config, term) for key in off.keys.split()}
    wrong = [
        f"{key} has no effect here: {idle.why}"
        for idle in REFUSED
        if idle.when(config, term)
        for key in idle.keys.split()
        if key in keys
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))


def notes(config: TrainConfig, term: Term) -> list[str]:
    """Names keys that were given for a part that is switched off, and numbers that a run this short never reaches."""
    keys, found = given(config), []
    for off in SWITCHED_OFF:
        idle = [key for key in off.keys.split() if key in keys]
        if idle and off.when(config, term):
            found.append(f"{off.why}: {', '.join(idle)} {'have' if len(idle) > 1 else 'has'} no effect")
    objective, section = config.objective, config.optimizer
    if objective.kind == "on_policy" and objective.reference is not None and objective.reference.weight == 0:
        found.append(
            "objective.reference.weight: 0: the KL to the reference is measured (reference_kl), not trained on"
        )
    if section.warmup_steps >= config.num_steps:
        found.append(
            f"optimizer.warmup_steps = {section.warmup_steps} takes all of num_steps = {config.num_steps}: the "
            "learning rate rises throughout the run"
        )
    for key in ("rl_loss_weight", "distill_loss_weight"):
        weight = getattr(objective, key)
        if isinstance(weight, ScheduleSection) and (weight.num_steps or 0) >= config.num_steps:
            found.append(
                f"objective.{key}.num_steps = {weight.num_steps} is beyond the last of {config.num_steps} steps: the "
                f"weight does not reach end = {weight.end:g}"
            )
    return found


# ---- the tables ----


def _has_no_policy(config: TrainConfig, term: Term) -> bool:
    """Whether neither the reward nor the distillation is an advantage; `auto` may turn out to be one."""
    objective = config.objective
    is_advantage = objective.has_distillation and (term is None or term.placement == "advantage")
    return objective.kind == "on_policy" and not objective.has_rl and not is_advantage


def _is_unsaid(config: TrainConfig) -> bool:
    """Whether there is no distillation only because nothing was said about it."""
    objective = config.objective
    unsaid = "distill_loss_weight" not in objective.model_fields_set
    return objective.kind == "on_policy" and unsaid and not objective.has_distillation


def _has_other_tokenizer(config: TrainConfig) -> bool:
    return config.teacher is not None and config.teacher.tokenizer is not None


def _has_no_candidates(config: TrainConfig, term: Term) -> bool:
    if not config.objective.has_distillation:
        return False
    return _has_other_tokenizer(config) if term is None else term.needs_candidates is None


def _has_no_discount(config: TrainConfig, term: Term) -> bool:
    if not config.objective.has_distillation:
        return False
    return not _has_other_tokenizer(config) if term is None else term.placement != "advantage"


def _is_greedy(config: TrainConfig) -> bool:
    return config.rollout.top_k == 1


_DISTILLATION = (
    "objective.distillation objective.distill_placement objective.distill_top_k objective.distill_candidates "
    "objective.distill_tail objective.distill_beta objective.distill_discount objective.distill_clip "
    "objective.distill_where objective.distill_threshold objective.distill_entropy_weight objective.teacher_weights"
)
_POLICY = (
    "objective.policy objective.clip_low objective.clip_high objective.dual_clip objective.tau_positive "
    "objective.tau_negative objective.proximal objective.behavior"
)
_ADVANTAGE = "objective.advantage objective.discount objective.gae_lambda objective.value_loss_weight"

# Parts that are switched off by a value that was given.
SWITCHED_OFF = (
    Idle(
        f"teacher objective.rl_loss_weight {_ADVANTAGE} objective.value_clip {_POLICY} objective.dynamic_sampling "
        f"objective.overlong_buffer objective.reference objective.distill_loss_weight {_DISTILLATION} "
        "rollout.num_prompts rollout.num_completions rollout.ahead",
        lambda c, term: c.objective.kind == "supervised",
        "objective.kind: supervised trains on the task's solutions, without samples, reward, teacher or reference",
    ),
    Idle(
        f"teacher {_DISTILLATION}",
        lambda c, term: c.objective.kind == "on_policy" and not c.objective.has_distillation and not _is_unsaid(c),
        "objective.distill_loss_weight: 0 asks no teacher",
    ),
    Idle(
        _ADVANTAGE,
        lambda c, term: c.objective.kind == "on_policy" and not c.objective.has_rl,
        "objective.rl_loss_weight: 0 uses no reward",
    ),
    Idle(
        "objective.overlong_buffer",
        lambda c, term: c.objective.kind == "on_policy" and not c.objective.has_rl and not c.objective.dynamic_sampling,
        "objective.rl_loss_weight: 0 uses no reward",
    ),
    Idle(_POLICY, _has_no_policy, "objective.rl_loss_weight: 0 leaves no advantage for a policy loss"),
    Idle("eval.num_prompts eval.greedy", lambda c, term: c.eval.every == 0, "eval.every: 0 evaluates never"),
)

# Keys of something that was not chosen.
REFUSED = (
    Idle(
        _DISTILLATION,
        lambda c, term: _is_unsaid(c),
        "objective.distill_loss_weight is not given, and its default is 0: set it above 0 to distil, or to 0 to train "
        "with the reward alone",
    ),
    Idle(
        "objective.clip_low objective.clip_high",
        lambda c, term: c.objective.policy == "sapo",
        "policy: sapo has a gate (tau_positive, tau_negative) and no clip: leave it out, or choose another policy",
    ),
    Idle(
        "objective.tau_positive objective.tau_negative",
        lambda c, term: c.objective.policy != "sapo",
        "it belongs to policy: sapo: leave it out, or choose that policy",
    ),
    Idle(
        "objective.discount objective.gae_lambda objective.value_loss_weight",
        lambda c, term: c.objective.advantage != "gae",
        "it belongs to the value head of advantage: gae: leave it out, or choose that advantage",
    ),
    Idle(
        "objective.value_clip",
        lambda c, term: c.optimizer.minibatches == 1,
        "it bounds how far a value moves over the updates of a step, and optimizer.minibatches: 1 makes one: leave it "
        "out, or make several",
    ),
    Idle(
        "objective.dynamic_sampling",
        lambda c, term: c.objective.dynamic_sampling == 1,
        "one round of prompts is what 0 samples too: give 2 or more, or 0",
    ),
    Idle(
        "objective.dynamic_sampling",
        lambda c, term: c.objective.dynamic_sampling > 1 and c.rollout.num_completions == 1,
        "it looks for prompts whose completions have different rewards: set rollout.num_completions to 2 or more",
    ),
    Idle(
        "objective.distill_placement",
        lambda c, term: c.objective.has_distillation and term is None,
        "distillation: auto goes where its gradient is right: name the estimator, or leave it out",
    ),
    Idle(
        "objective.distill_top_k objective.distill_candidates objective.distill_tail",
        _has_no_candidates,
        "the distillation compares the sampled token alone: leave it out, or set objective.distillation to "
        "topk_reverse_kl, topk_forward_kl or topk_jsd",
    ),
    Idle(
        "objective.distill_beta",
        lambda c, term: c.objective.has_distillation and (term is None or term.name != "topk_jsd"),
        "it belongs to distillation: topk_jsd: leave it out, or choose that",
    ),
    Idle(
        "objective.distill_discount",
        _has_no_discount,
        "it belongs to distillation: sampled_reverse_kl, as an advantage: leave it out, or choose that",
    ),
    Idle(
        "objective.distill_threshold",
        lambda c, term: c.objective.has_distillation and c.objective.distill_where == "all",
        "distill_where: all asks for no threshold: leave it out, or set distill_where: wrong",
    ),
    Idle(
        "rollout.top_k",
        lambda c, term: (
            _is_greedy(c) and c.objective.has_rl and c.objective.advantage != "gae" and c.rollout.num_completions > 1
        ),
        "with 1 all completions of a prompt are the same, and so are their rewards: the reward would train nothing. "
        "Leave it out, or give 2 or more",
    ),
    Idle(
        "rollout.top_p rollout.min_p",
        lambda c, term: _is_greedy(c),
        "rollout.top_k: 1 leaves one token: leave one of the two out",
    ),
    Idle(
        "rollout.stop_strings",
        lambda c, term: c.rollout.min_new_tokens == c.rollout.max_new_tokens,
        "rollout.min_new_tokens = max_new_tokens lets no completion end before its last token: lower it",
    ),
    Idle(
        "optimizer.end_factor",
        lambda c, term: c.optimizer.schedule == "constant",
        "optimizer.schedule: constant has no end: leave it out, or set schedule: linear or cosine",
    ),
    Idle(
        "optimizer.moment_dtype",
        lambda c, term: c.optimizer.name == "sgd" and not c.optimizer.b1 and c.optimizer.moment_dtype != "float32",
        "sgd without b1 has no moments: leave it out",
    ),
    Idle(
        "optimizer.batch_size",
        lambda c, term: c.objective.kind == "on_policy",
        "it belongs to objective.kind: supervised; the rows of a step are rollout.num_prompts * num_completions",
    ),
    Idle(
        "teacher.hedge_after_s",
        lambda c, term: c.teacher is not None and c.teacher.spawn is not None and c.teacher.hedge_after_s is not None,
        "a slow call goes to a second replica, and teacher.spawn starts one: leave it out, or give teacher.endpoints",
    ),
    Idle(
        "teacher.spawn.offload",
        lambda c, term: (
            c.teacher is not None and c.teacher.spawn is not None and c.teacher.spawn.offload > c.teacher.offload
        ),
        "it only allows the sidecar to sleep, and the trainer never asks for it: set teacher.offload: true",
    ),
)
