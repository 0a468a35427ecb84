"""The decisions that `make_recipe` makes from a configuration and the teacher's capabilities, and what it refuses."""

import dataclasses
import logging
import re

import pytest

from jdistill.config import ConfigError, TrainConfig, parse
from jdistill.losses import advantages, estimators, policy_gradient
from jdistill.student import recipe
from jdistill.student.recipe import TeacherCapabilities, make_recipe


def train_config(**sections):
    data = {
        "run_dir": "unused",
        "num_steps": 10,
        "model": {"path": "unused"},
        "task": {"name": "unused"},
        "teacher": {"endpoints": ["unused:1"]},
        "objective": {"distill_loss_weight": 0},
        "rollout": {"num_prompts": 4, "num_completions": 2, "temperature": 0.7},
    }
    for name, section in sections.items():
        data[name] = section if section is None else data.get(name, {}) | section
    return parse(TrainConfig, data)


# ---- configuration -> decisions ----

# The recipe of the reward alone with every default; terms, policies and advantages by their names.
REWARD_ALONE = {
    "on_policy": True,
    "num_rows": 8,
    "temperature": 0.7,
    "policy": "ppo_clip",
    "policy_options": {},
    "distillation": None,
    "distill_options": {},
    "distill_entropy_weight": 0.0,
    "reference": None,
    "has_rl": True,
    "has_critic": False,
    "group_advantage": "grpo",
    "num_candidates": 0,
    "teacher_top_k": 0,
    "num_shared_ids": None,
    "has_segments": False,
    "batch_fields": ("sampler_logprobs", "advantages"),
    "recomputes_proximal": False,
    "adds_over_targets": True,
    "takes_parts": False,
}
TEACHER_ALONE = {"rl_loss_weight": 0, "distill_loss_weight": 0.5}
BOTH = {"distill_loss_weight": 0.5}
# The decisions of TEACHER_ALONE: a distribution, or the sampled token as an advantage.
DISTRIBUTION = {
    "policy": None,
    "distillation": "topk_reverse_kl",
    "distill_options": {"tail": True},
    "has_rl": False,
    "group_advantage": None,
    "num_candidates": 8,
    "batch_fields": ("sampler_logprobs", "candidate_ids", "teacher_candidate_logprobs"),
}
SAMPLED = {
    "distillation": "sampled_reverse_kl_advantage",
    "distill_options": {"discount": 0.0},
    "has_rl": False,
    "group_advantage": None,
    "batch_fields": ("sampler_logprobs", "teacher_logprobs"),
}
NO_SUM = {"adds_over_targets": False}
RECOMPUTED = {"proximal": "recomputed"}

CASES = {
    "the reward alone": ({}, {}),
    "a scheduled weight counts although it ends at 0": (
        {"objective": {"rl_loss_weight": {"kind": "linear", "begin": 1.0, "end": 0.0}}},
        {},
    ),
    # Advantages and policies.
    "dr_grpo": ({"objective": {"advantage": "dr_grpo"}}, {"group_advantage": "dr_grpo"}),
    "rloo": ({"objective": {"advantage": "rloo"}}, {"group_advantage": "rloo"}),
    "reinforce_plus_plus": (
        {"objective": {"advantage": "reinforce_plus_plus"}},
        {"group_advantage": "reinforce_plus_plus"},
    ),
    "gae": (
        {"objective": {"advantage": "gae"}},
        {"has_critic": True, "group_advantage": None, "batch_fields": ("sampler_logprobs", "token_rewards")},
    ),
    "a clip and its options": (
        {"objective": {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 3.0}},
        {"policy_options": {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 3.0}},
    ),
    "gspo": ({"objective": {"policy": "gspo"}}, {"policy": "gspo", **NO_SUM}),
    "cispo": (
        {"objective": {"policy": "cispo", "clip_high": 5.0}},
        {"policy": "cispo", "policy_options": {"clip_high": 5.0}},
    ),
    "sapo takes its temperatures and no clip": (
        {"objective": {"policy": "sapo"}},
        {"policy": "sapo", "policy_options": {"tau_positive": 1.0, "tau_negative": 1.05}},
    ),
    # Corrections for the sampler.
    "one update of a recomputed proximal policy": ({"objective": RECOMPUTED}, {}),
    "two updates of a recomputed proximal policy": (
        {"objective": RECOMPUTED, "optimizer": {"minibatches": 2}},
        {"recomputes_proximal": True},
    ),
    "two updates of the sampler's log-probs": ({"optimizer": {"minibatches": 2}}, {}),
    "clamped tokens": ({"objective": {**RECOMPUTED, "behavior": {}}}, {}),
    "masked tokens": ({"objective": {**RECOMPUTED, "behavior": {"action": "mask"}}}, NO_SUM),
    "clamped sequences": ({"objective": {**RECOMPUTED, "behavior": {"level": "sequence"}}}, NO_SUM),
    "a correction without a policy that it could correct": (
        {"objective": {**TEACHER_ALONE, **RECOMPUTED, "behavior": {"level": "sequence"}}},
        DISTRIBUTION,
    ),
    # Distillation.
    "auto": ({"objective": TEACHER_ALONE}, DISTRIBUTION),
    "auto beside the reward": (
        {"objective": BOTH},
        {
            **DISTRIBUTION,
            "policy": "ppo_clip",
            "has_rl": True,
            "group_advantage": "grpo",
            "batch_fields": ("sampler_logprobs", "advantages", "candidate_ids", "teacher_candidate_logprobs"),
        },
    ),
    "the sampled token is an advantage of the policy": (
        {"objective": {**TEACHER_ALONE, "distillation": "sampled_reverse_kl"}},
        SAMPLED,
    ),
    "a discount reaches later tokens": (
        {"objective": {**TEACHER_ALONE, "distillation": "sampled_reverse_kl", "distill_discount": 0.9}},
        {**SAMPLED, "distill_options": {"discount": 0.9}, **NO_SUM},
    ),
    "the sampled token in the loss": (
        {"objective": {**TEACHER_ALONE, "distillation": "sampled_reverse_kl", "distill_placement": "loss"}},
        {**SAMPLED, "policy": None, "distillation": "sampled_reverse_kl", "distill_options": {}},
    ),
    "a straight-through estimator": (
        {"objective": {**TEACHER_ALONE, "distillation": "k3+"}},
        {**SAMPLED, "policy": None, "distillation": "straight_through_reverse_kl", "distill_options": {}},
    ),
    "an alias": (
        {"objective": {**TEACHER_ALONE, "distillation": "K1"}},
        SAMPLED,
    ),
    "topk_forward_kl asks for the teacher's tokens": (
        {"objective": {**TEACHER_ALONE, "distillation": "topk_forward_kl", "distill_top_k": 4}},
        {**DISTRIBUTION, "distillation": "topk_forward_kl", "num_candidates": 0, "teacher_top_k": 4},
    ),
    "topk_forward_kl over the student's tokens": (
        {"objective": {**TEACHER_ALONE, "distillation": "topk_forward_kl", "distill_candidates": "student"}},
        {**DISTRIBUTION, "distillation": "topk_forward_kl"},
    ),
    "topk_jsd over the teacher's tokens": (
        {
            "objective": {
                **TEACHER_ALONE,
                "distillation": "topk_jsd",
                "distill_candidates": "teacher",
                "distill_beta": 0.3,
                "distill_tail": False,
            }
        },
        {
            **DISTRIBUTION,
            "distillation": "topk_jsd",
            "distill_options": {"tail": False, "beta": 0.3},
            "num_candidates": 0,
            "teacher_top_k": 8,
        },
    ),
    "weights relative to the other tokens": (
        {"objective": {**TEACHER_ALONE, "distill_entropy_weight": 1.5}},
        {**DISTRIBUTION, "distill_entropy_weight": 1.5, **NO_SUM},
    ),
    "weights of a distillation that there is not": ({"objective": {"distill_entropy_weight": 1.5}}, {}),
    "auto with another tokenizer": (
        {"objective": TEACHER_ALONE, "teacher": {"tokenizer": "theirs"}},
        {**SAMPLED, "has_segments": True, "batch_fields": (*SAMPLED["batch_fields"], "teacher_segments"), **NO_SUM},
    ),
    "another tokenizer of a teacher that is not asked": ({"teacher": {"tokenizer": "theirs"}}, {}),
    # The reference.
    "a reference": ({"objective": {"reference": {"path": "frozen"}}}, {"reference": "sampled_reverse_kl"}),
    "a forward reference": (
        {"objective": {"reference": {"path": "frozen", "estimator": "forward_kl"}}},
        {"reference": "sampled_forward_kl"},
    ),
    # Parts of an update.
    "parts": ({"optimizer": {"accumulate": 2}}, {"takes_parts": True}),
    "parts of each of two updates": ({"optimizer": {"accumulate": 2, "minibatches": 2}}, {}),
    "parts with a critic": (
        {"optimizer": {"accumulate": 2}, "objective": {"advantage": "gae"}},
        {"has_critic": True, "group_advantage": None, "batch_fields": ("sampler_logprobs", "token_rewards")},
    ),
    # Supervised.
    "supervised training ignores reward, teacher and reference": (
        {
            "objective": {
                "kind": "supervised",
                "distill_loss_weight": 0.5,
                "reference": {"path": "frozen"},
                **RECOMPUTED,
            },
            "optimizer": {"batch_size": 6, "minibatches": 2},
        },
        {
            "on_policy": False,
            "num_rows": 6,
            "temperature": 1.0,
            "policy": None,
            "has_rl": False,
            "group_advantage": None,
            "batch_fields": (),
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_decisions_follow_from_configuration_and_teacher(name):
    sections, changes = CASES[name]
    found = make_recipe(train_config(**sections))
    expected = REWARD_ALONE | changes
    functions = {"policy": policy_gradient.POLICIES, "group_advantage": advantages.ADVANTAGES}
    functions |= dict.fromkeys(("distillation", "reference"), estimators.OBJECTIVES)
    expected |= {field: table.get(expected[field]) for field, table in functions.items()}
    assert {field.name: getattr(found, field.name) for field in dataclasses.fields(found)} == expected
    assert found.candidates_per_target == max(expected["num_candidates"], expected["teacher_top_k"])


def test_every_policy_advantage_and_distillation_has_a_case():
    named = {
        value for _, changes in CASES.values() for value in (REWARD_ALONE | changes).values() if type(value) is str
    }
    assert {*policy_gradient.POLICIES, *advantages.ADVANTAGES, *estimators.OBJECTIVES} <= named


# ---- what the teacher can do ----

ABLE = TeacherCapabilities("able 1.0", max_top_k=8, max_candidate_count=8)
TOP_K_ALONE = TeacherCapabilities("topk 2.0", max_top_k=20, max_candidate_count=0)
CANDIDATES_ALONE = TeacherCapabilities("candidates 3.0", max_top_k=0, max_candidate_count=64)


def resolved(*teachers, vocab_size=None, **objective):
    return make_recipe(train_config(objective=TEACHER_ALONE | objective), vocab_size=vocab_size, teachers=teachers)


@pytest.mark.parametrize("teachers", [(ABLE,), (CANDIDATES_ALONE,), (ABLE, CANDIDATES_ALONE)])
def test_auto_chooses_candidates_if_every_teacher_scores_them(teachers, caplog):
    found = resolved(*teachers)
    assert (found.distillation.name, found.num_candidates, found.teacher_top_k) == ("topk_reverse_kl", 8, 0)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("teachers", "keys", "message"),
    [
        ((TOP_K_ALONE,), {}, "topk 2.0 scores 0 candidates per token, not 8"),
        ((ABLE, TOP_K_ALONE), {}, "topk 2.0 scores 0 candidates per token, not 8"),
        ((ABLE,), {"distill_top_k": 9}, "able 1.0 scores 8 candidates per token, not 9"),
        (
            (CANDIDATES_ALONE,),
            {"distill_candidates": "teacher"},
            "candidates 3.0 returns the 0 most likely tokens, not 8",
        ),
    ],
)
def test_auto_warns_and_chooses_sampled_tokens_if_a_teacher_scores_no_candidates(teachers, keys, message, caplog):
    with caplog.at_level(logging.WARNING, "jdistill"):
        found = resolved(*teachers, **keys)
    assert (found.distillation.name, found.num_candidates, found.teacher_top_k) == (
        "sampled_reverse_kl_advantage",
        0,
        0,
    )
    assert (found.policy.name, found.batch_fields) == ("ppo_clip", SAMPLED["batch_fields"])
    assert caplog.messages == [
        f"{message}: distilling from the sampled tokens alone; to distil from candidates, lower "
        "objective.distill_top_k or use another engine"
    ]


@pytest.mark.parametrize(
    ("teachers", "keys", "message"),
    [
        (
            (TOP_K_ALONE,),
            {"distillation": "topk_reverse_kl"},
            "objective.distillation: topk_reverse_kl needs 8 tokens at each position, but topk 2.0 scores 0 candidates "
            "per token: lower objective.distill_top_k, use another engine, or set objective.distillation: "
            "sampled_reverse_kl",
        ),
        (
            (ABLE, CANDIDATES_ALONE),
            {"distillation": "gkd", "distill_candidates": "teacher"},
            "objective.distillation: gkd needs 8 tokens at each position, but candidates 3.0 returns the 0 most likely "
            "tokens: lower objective.distill_top_k, use another engine, or set objective.distillation: "
            "sampled_reverse_kl",
        ),
    ],
)
def test_an_explicit_distillation_is_never_replaced(teachers, keys, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        resolved(*teachers, **keys)


def test_the_vocabulary_bounds_the_number_of_candidates():
    few = TeacherCapabilities("few 1.0", max_top_k=5, max_candidate_count=5)
    assert resolved(few, vocab_size=5).num_candidates == 5
    assert resolved(few, vocab_size=5, distillation="topk_forward_kl").teacher_top_k == 5
    assert resolved(ABLE, vocab_size=100).num_candidates == 8


def test_sampled_tokens_need_no_teacher_capability(caplog):
    nothing = TeacherCapabilities("plain 1.0", 0, 0)
    assert resolved(nothing, distillation="sampled_reverse_kl").distillation.name == "sampled_reverse_kl_advantage"
    other = make_recipe(train_config(objective=TEACHER_ALONE, teacher={"tokenizer": "theirs"}), teachers=[nothing])
    assert other.has_segments
    assert caplog.messages == []


# ---- refusals ----

WHOLE_UPDATE = (
    "optimizer.accumulate: objective.{} is relative to all tokens of an update, and accumulation never has all of them "
    "at once: leave one of the two out (optimizer.packing and model.remat save memory too)"
)
TRUNCATED = (
    "rollout.top_k, top_p, min_p: tokens sampled from a truncated distribution do not estimate its divergence from "
    "the teacher: leave them out, or set objective.distillation: topk_reverse_kl, which compares more than the sampled "
    "token"
)
AHEAD = (
    "rollout.ahead: each batch is sampled by the policy of one update ago, and without a correction the ratio would be "
    "clipped around that policy: set objective.proximal: recomputed and objective.behavior: {action: clamp}"
)
OTHER_TOKENIZER = (
    "teacher.tokenizer: a teacher with another tokenizer scores spans of text, not the student's tokens, so "
    "objective.distillation must be sampled_reverse_kl, got {}"
)
CLAMP = {**RECOMPUTED, "behavior": {"action": "clamp"}}

REFUSED = [
    (
        {"objective": {**BOTH, "distillation": "topk_jsd"}, "teacher": {"tokenizer": "x"}},
        OTHER_TOKENIZER.format("topk_jsd"),
    ),
    ({"objective": {**BOTH, "distillation": "k2"}, "teacher": {"tokenizer": "x"}}, OTHER_TOKENIZER.format("k2")),
    ({"objective": BOTH, "rollout": {"top_k": 5}}, TRUNCATED),  # auto may be the sampled token
    ({"objective": {**BOTH, "distillation": "sampled_reverse_kl"}, "rollout": {"top_p": 0.9}}, TRUNCATED),
    ({"objective": {**BOTH, "distillation": "k2"}, "rollout": {"min_p": 0.1}}, TRUNCATED),
    ({"rollout": {"ahead": 1}}, AHEAD),
    ({"objective": TEACHER_ALONE, "rollout": {"ahead": 1}}, AHEAD),  # auto may be an advantage
    ({"objective": {**TEACHER_ALONE, "distillation": "k1"}, "rollout": {"ahead": 1}}, AHEAD),
    (
        {"objective": {**RECOMPUTED, "behavior": {"action": "mask"}}, "optimizer": {"accumulate": 2}},
        WHOLE_UPDATE.format("behavior.action: mask"),
    ),
    (
        {"objective": {**BOTH, "distill_entropy_weight": 1.0}, "optimizer": {"accumulate": 2}},
        WHOLE_UPDATE.format("distill_entropy_weight"),
    ),
    (
        {
            "objective": {**BOTH, "teacher_weights": {"math": 2.0, "code": 1.0}},
            "teacher": {"endpoints": None, "several": {"math": ["unused:1"]}},
        },
        "objective.teacher_weights: code is none of teacher.several",
    ),
    ({"objective": {"teacher_weights": {"math": 2.0}}}, "objective.teacher_weights: math is none of teacher.several"),
    (
        {"objective": {"teacher_weights": {"math": 2.0}}, "teacher": None},
        "objective.teacher_weights: math is none of teacher.several",
    ),
    (
        {"objective": {"reference": {"path": "x", "estimator": "topk_reverse_kl"}}},
        "objective.reference.estimator: topk_reverse_kl needs candidates, which a reference does not score: use an "
        "estimator on the sampled token",
    ),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED)
def test_invalid_combinations_are_refused_before_anything_is_loaded(sections, message):
    config = train_config(**sections)
    for decide in (recipe.check, make_recipe):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            decide(config)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"distillation": "k1", "distill_placement": "loss"},
            "objective.distillation: k1 in the loss is refused: the teacher drops out",
        ),
        (
            {"distillation": "k2", "distill_placement": "advantage"},
            "objective.distillation: k2 as an advantage is refused",
        ),
        (
            {"distillation": "k3", "distill_placement": "advantage"},
            "objective.distillation: k3 as an advantage is refused",
        ),
        ({"distillation": "no_such"}, "objective.distillation: unknown estimator no_such"),
        ({"reference": {"path": "x", "estimator": "k1"}}, "objective.reference.estimator: k1 in the loss is refused"),
    ],
)
def test_an_estimator_with_the_wrong_gradient_is_refused(keys, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        recipe.check(train_config(objective=BOTH | keys))


@pytest.mark.parametrize(
    "sections",
    [
        {"objective": {**BOTH, "distillation": "sampled_reverse_kl"}, "teacher": {"tokenizer": "x"}},
        {"objective": {**BOTH, "distillation": "topk_jsd"}, "rollout": {"top_k": 5, "top_p": 0.9, "min_p": 0.1}},
        {"rollout": {"top_k": 5}},  # no divergence is estimated
        {"objective": CLAMP, "rollout": {"ahead": 1}},
        {"objective": {**TEACHER_ALONE, "distillation": "topk_reverse_kl"}, "rollout": {"ahead": 1}},
        {"objective": CLAMP, "optimizer": {"accumulate": 2}},
        {"objective": {**BOTH, "distill_entropy_weight": 1.0}, "optimizer": {"minibatches": 2}},
        {
            "objective": {**BOTH, "teacher_weights": {"math": 2.0}},
            "teacher": {"endpoints": None, "several": {"math": ["unused:1"], "code": ["unused:2"]}},
        },
    ],
)
def test_valid_combinations_close_to_a_refusal_are_accepted(sections):
    recipe.check(train_config(**sections))
