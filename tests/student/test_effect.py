"""Every key either always has an effect, or is refused or named in the configurations in which it has none."""

import logging
import pathlib

import numpy as np
import pytest

from jdistill.config import ConfigError, TrainConfig, describe, load, parse
from jdistill.losses import policy_gradient
from jdistill.student import advantage_watch, metrics, recipe
from jdistill.student.update import signal_share

ROOT = pathlib.Path(__file__).parents[2]
SPAWN = {"spawn": {"engine": "jax", "model": "unused"}}
DISTIL = {"distill_loss_weight": 0.5}
SUPERVISED = {"kind": "supervised"}


def train_config(**sections):
    data = {"run_dir": "unused", "num_steps": 10, "model": {"path": "unused"}, "task": {"name": "unused"}}
    data |= {"rollout": {"num_prompts": 4, "num_completions": 2}}
    if sections.get("objective", {}).get("distill_loss_weight"):
        data["teacher"] = {"endpoints": ["unused:1"]}
    for name, section in sections.items():
        data[name] = data.get(name, {}) | section if isinstance(section, dict) else section
    return parse(TrainConfig, data)


# (key, its value, the rest of the configuration, "refused", "noted" or "used")
CASES = [
    ("teacher.endpoints", ["unused:1"], {}, "refused"),
    ("teacher.endpoints", ["unused:1"], {"objective": {"distill_loss_weight": 0}}, "noted"),
    ("teacher.endpoints", ["unused:1"], {"objective": SUPERVISED}, "noted"),
    ("teacher.endpoints", ["unused:1"], {"objective": DISTIL}, "used"),
    ("objective.distill_clip", None, {}, "used"),  # null leaves a key out
    ("teacher.hedge_after_s", 2.0, {"objective": DISTIL, "teacher": SPAWN | {"endpoints": None}}, "refused"),
    ("teacher.hedge_after_s", None, {"objective": DISTIL, "teacher": SPAWN | {"endpoints": None}}, "used"),
    ("teacher.hedge_after_s", 2.0, {"objective": DISTIL}, "used"),
    ("teacher.spawn.offload", True, {"objective": DISTIL, "teacher": SPAWN | {"endpoints": None}}, "refused"),
    (
        *("teacher.spawn.offload", True),
        *({"objective": DISTIL, "teacher": SPAWN | {"endpoints": None, "offload": True}}, "used"),
    ),
    ("rollout.num_prompts", 8, {"objective": SUPERVISED}, "noted"),
    ("rollout.num_completions", 4, {"objective": SUPERVISED}, "noted"),
    ("rollout.num_completions", 1, {}, "refused"),
    ("rollout.num_completions", 1, {"objective": {"advantage": "gae"}}, "used"),
    ("rollout.ahead", 1, {"objective": SUPERVISED}, "noted"),
    ("rollout.top_k", 1, {}, "refused"),
    ("rollout.top_k", 1, {"objective": {"advantage": "gae"}}, "used"),
    ("rollout.top_k", 2, {}, "used"),
    ("rollout.top_p", 0.9, {"rollout": {"top_k": 1}, "objective": {"advantage": "gae"}}, "refused"),
    ("rollout.min_p", 0.1, {"rollout": {"top_k": 1}, "objective": {"advantage": "gae"}}, "refused"),
    ("rollout.top_p", 1.0, {"objective": DISTIL | {"distillation": "k2"}}, "used"),  # all tokens: not truncated
    ("rollout.stop_strings", ["."], {"rollout": {"min_new_tokens": 5, "max_new_tokens": 5}}, "refused"),
    ("rollout.stop_strings", ["."], {"rollout": {"min_new_tokens": 4, "max_new_tokens": 5}}, "used"),
    ("rollout.min_new_tokens", 6, {"rollout": {"max_new_tokens": 5}}, "refused"),
    *(
        (f"objective.{key}", value, {"objective": SUPERVISED}, "noted")
        for key, value in {
            **{"rl_loss_weight": 0.5, "advantage": "rloo", "policy": "gspo", "clip_low": 0.1, "clip_high": 0.1},
            **{"dual_clip": 3.0, "proximal": "recomputed", "tau_positive": 2.0, "tau_negative": 2.0, "discount": 0.9},
            **{"gae_lambda": 0.9, "value_loss_weight": 1.0, "dynamic_sampling": 2, "overlong_buffer": 4},
            **{"reference": {"path": "x"}, "distill_loss_weight": 0.5, "distillation": "k2", "distill_clip": 1.0},
        }.items()
    ),
    *(
        (f"objective.{key}", value, {"objective": {"rl_loss_weight": 0, "distillation": "gkd"} | DISTIL}, "noted")
        for key, value in {
            **{"advantage": "rloo", "policy": "gspo", "clip_low": 0.1, "clip_high": 0.1, "dual_clip": 3.0},
            **{"tau_positive": 2.0, "tau_negative": 2.0, "proximal": "recomputed", "discount": 0.9, "gae_lambda": 0.9},
            **{"value_loss_weight": 1.0, "overlong_buffer": 4},
        }.items()
    ),
    ("objective.overlong_buffer", 4, {"objective": {"rl_loss_weight": 0, "dynamic_sampling": 2} | DISTIL}, "used"),
    ("objective.policy", "gspo", {"objective": {"rl_loss_weight": 0, "distillation": "k1"} | DISTIL}, "used"),
    ("objective.clip_low", 0.1, {"objective": {"policy": "sapo"}}, "refused"),
    ("objective.clip_high", 0.1, {"objective": {"policy": "sapo"}}, "refused"),
    ("objective.dual_clip", 3.0, {"objective": {"policy": "gspo"}}, "refused"),
    ("objective.tau_positive", 1.0, {}, "refused"),  # given, although it is the default
    ("objective.tau_negative", 2.0, {"objective": {"policy": "gspo"}}, "refused"),
    ("objective.tau_positive", 2.0, {"objective": {"policy": "sapo"}}, "used"),
    ("objective.behavior", {"action": "clamp"}, {}, "refused"),
    ("objective.discount", 0.9, {}, "refused"),
    ("objective.gae_lambda", 0.9, {"objective": {"advantage": "rloo"}}, "refused"),
    ("objective.value_loss_weight", 0.9, {}, "refused"),
    ("objective.value_clip", 0.9, {}, "refused"),
    ("objective.value_clip", 0.9, {"objective": {"advantage": "gae"}}, "refused"),
    ("objective.value_clip", 0.9, {"objective": {"advantage": "gae"}, "optimizer": {"minibatches": 2}}, "used"),
    ("objective.advantage", "gae", {"objective": {"rl_loss_weight": 0} | DISTIL}, "refused"),
    ("objective.dynamic_sampling", 1, {}, "refused"),
    (
        *("objective.dynamic_sampling", 2),
        *({"rollout": {"num_completions": 1}, "objective": {"advantage": "reinforce_plus_plus"}}, "refused"),
    ),
    ("objective.dynamic_sampling", 2, {}, "used"),
    ("objective.overlong_buffer", 600, {}, "refused"),
    ("objective.reference", {"path": "x", "weight": 0}, {}, "noted"),
    ("objective.rl_loss_weight", {"kind": "linear", "begin": 1.0, "end": 1.0}, {}, "refused"),
    ("objective.rl_loss_weight", {"kind": "linear", "begin": 1.0, "end": 0.0, "num_steps": 10}, {}, "noted"),
    ("objective.rl_loss_weight", {"kind": "linear", "begin": 1.0, "end": 0.0, "num_steps": 9}, {}, "used"),
    ("objective.rl_loss_weight", 0, {}, "refused"),
    *(
        (f"objective.{key}", value, rest, outcome)
        for key, value in {
            **{"distillation": "k2", "distill_placement": "loss", "distill_top_k": 4, "distill_candidates": "teacher"},
            **{"distill_tail": False, "distill_beta": 0.3, "distill_discount": 0.5, "distill_clip": 1.0},
            **{"distill_where": "wrong", "distill_threshold": 0.9, "distill_entropy_weight": 1.0},
        }.items()
        for rest, outcome in (({}, "refused"), ({"objective": {"distill_loss_weight": 0}}, "noted"))
    ),
    ("objective.teacher_weights", {"math": 1.0}, {}, "refused"),
    ("objective.distill_placement", "loss", {"objective": DISTIL}, "refused"),
    ("objective.distill_placement", "loss", {"objective": DISTIL | {"distillation": "k2"}}, "used"),
    *(
        (f"objective.{key}", value, {"objective": DISTIL | {"distillation": name}} | teacher, "refused")
        for key, value in {"distill_top_k": 8, "distill_candidates": "student", "distill_tail": True}.items()
        for name, teacher in (("k1", {}), ("sampled_reverse_kl", {}), ("auto", {"teacher": {"tokenizer": "other"}}))
    ),
    ("objective.distill_top_k", 4, {"objective": DISTIL}, "used"),
    ("objective.distill_beta", 0.3, {"objective": DISTIL}, "refused"),
    ("objective.distill_beta", 0.3, {"objective": DISTIL | {"distillation": "GKD"}}, "used"),
    ("objective.distill_discount", 0.5, {"objective": DISTIL}, "refused"),
    ("objective.distill_discount", 0.5, {"objective": DISTIL, "teacher": {"tokenizer": "other"}}, "used"),
    ("objective.distill_discount", 0.5, {"objective": DISTIL | {"distillation": "k2"}}, "refused"),
    ("objective.distill_discount", 0.5, {"objective": DISTIL | {"distillation": "k1"}}, "used"),
    ("objective.distill_threshold", 0.9, {"objective": DISTIL}, "refused"),
    ("objective.distill_threshold", 0.9, {"objective": DISTIL | {"distill_where": "wrong"}}, "used"),
    *((f"optimizer.{key}", 0.9, {"optimizer": {"name": "adafactor"}}, "refused") for key in ("b1", "b2", "eps")),
    ("optimizer.b2", 0.9, {"optimizer": {"name": "sgd"}}, "refused"),
    ("optimizer.moment_dtype", "bfloat16", {"optimizer": {"name": "sgd"}}, "refused"),
    ("optimizer.moment_dtype", "bfloat16", {"optimizer": {"name": "sgd", "b1": 0.9}}, "used"),
    ("optimizer.end_factor", 0.1, {}, "refused"),
    ("optimizer.end_factor", 0.1, {"optimizer": {"schedule": "linear"}}, "used"),
    ("optimizer.warmup_steps", 10, {}, "noted"),
    ("optimizer.warmup_steps", 9, {}, "used"),
    ("optimizer.batch_size", 64, {}, "refused"),
    ("optimizer.batch_size", 64, {"objective": SUPERVISED}, "used"),
    ("eval.num_prompts", 8, {"eval": {"every": 0}}, "noted"),
    ("eval.greedy", False, {"eval": {"every": 0}}, "noted"),
    ("eval.greedy", False, {}, "used"),
]

# Keys that have an effect in every configuration that is accepted, or are checked where they are used.
ALWAYS = {
    "": {"run_dir", "seed", "num_steps"},
    "model": {"path", "init", "compute_dtype", "remat", "lora"},
    "model.lora": {"rank", "alpha", "targets"},
    "task": {"name", "options"},
    # Part of a teacher that is used. A task without privileged prompts refuses `privileged`.
    "teacher": {
        *("several", "spawn", "deadline_s", "max_in_flight", "batch_tokens", "stall_s", "model", "offload"),
        *("privileged", "tokenizer", "tls_ca", "tls_cert", "tls_key", "token_file"),
    },
    # The sidecar refuses at its start what its engine does not take.
    "teacher.spawn": {
        *("engine", "model", "urls", "served_name", "adapters", "dtype", "quantization", "max_sequence_length"),
        *("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "memory_fraction"),
        *("max_batch_tokens", "engine_args", "python", "env", "startup_timeout_s"),
    },
    # Limits, and what evaluation samples with too.
    "rollout": {
        *("max_prompt_tokens", "max_new_tokens", "temperature", "max_rows", "cache_dtype", "chunk_tokens"),
        "include_stop_str_in_output",  # stop tokens count too
    },
    "objective": {"kind", "reduction", "chunk_tokens"},
    "objective.behavior": {"action", "level", "lower", "upper"},
    "objective.reference": {"path", "weight", "estimator"},
    "optimizer": {
        *("name", "learning_rate", "weight_decay", "clip_norm", "schedule", "minibatches", "accumulate", "packing"),
    },
    "eval": {"every"},
    "checkpoint": {"every", "keep"},
    "mesh": {"data", "fsdp", "tensor"},
}


def test_every_key_has_a_case_or_always_an_effect():
    with_case = {key for key, *_ in CASES}
    for path, section in describe.sections(TrainConfig):
        if path.rpartition(".")[2] in ("rl_loss_weight", "distill_loss_weight", "weight"):
            continue  # a schedule
        inner = {
            inner.rpartition(".")[2] for inner, _ in describe.sections(TrainConfig) if inner.rpartition(".")[0] == path
        }
        own = {
            name for name in section.model_fields if name not in inner or not section.model_fields[name].is_required()
        }
        prefix = f"{path}." if path else ""
        own = {n for n in own if not (path == "" and n in inner)}
        missing = {n for n in own if f"{prefix}{n}" not in with_case and n not in ALWAYS.get(path, ())}
        assert not missing, f"{path}: say when {sorted(missing)} has no effect"


def with_key(key, value, rest):
    sections = {name: dict(section) for name, section in rest.items()}
    *parents, leaf = key.split(".")
    node = sections
    for parent in parents:
        node[parent] = node = dict(node.get(parent) or {})
    node[leaf] = value
    return sections


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{case[0]}-{case[3]}" for case in CASES])
def test_a_given_key_without_an_effect_is_refused_or_named(number):
    key, value, rest, outcome = CASES[number]
    if outcome == "refused":
        with pytest.raises(ConfigError, match=key.rpartition(".")[2] if "teacher.end" not in key else "teacher"):
            recipe.check(train_config(**with_key(key, value, rest)))
        return
    config = train_config(**with_key(key, value, rest))
    recipe.check(config)
    name = "teacher" if key.startswith("teacher.end") else key
    assert any(name in note for note in recipe.notes(config)) == (outcome == "noted"), recipe.notes(config)


@pytest.mark.parametrize("number", [i for i, case in enumerate(CASES) if case[3] == "refused"])
def test_without_the_key_nothing_is_refused(number):
    """Defaults are silent: what is refused is refused because the key was given."""
    _, _, rest, _ = CASES[number]
    sections = {name: dict(section) for name, section in rest.items()}
    recipe.check(train_config(**sections))


def test_the_table_agrees_with_what_policies_take():
    for policy in policy_gradient.POLICIES.values():
        for key in ("clip_low", "clip_high", "dual_clip", "tau_positive", "tau_negative"):
            keys = {"objective": {"policy": policy.name, key: 1.5}}
            if key in policy.options:
                recipe.check(train_config(**keys))
            else:
                with pytest.raises(ConfigError, match=key):
                    recipe.check(train_config(**keys))


def test_several_mistakes_are_in_one_message():
    config = train_config(objective={"tau_positive": 2.0, "discount": 0.9}, optimizer={"end_factor": 0.5})
    with pytest.raises(ConfigError) as caught:
        recipe.check(config)
    for key in ("objective.tau_positive", "objective.discount", "optimizer.end_factor"):
        assert f"{key} has no effect here: " in str(caught.value)


@pytest.mark.parametrize("name", ["configs/demo.yaml", "configs/gsm8k_qwen3_0.6b_from_14b.yaml"])
def test_the_recorded_configuration_of_a_run_starts_the_same_run_again(name, tmp_path):
    config = load(TrainConfig, ROOT / name)
    recipe.check(config)
    assert recipe.notes(config) == []
    # config.json of a run gives every key, most of them with their defaults.
    (tmp_path / "config.json").write_text(config.model_dump_json())
    again = load(TrainConfig, tmp_path / "config.json")
    recipe.check(again)
    assert again == config and recipe.notes(again) == []
    given_later = load(TrainConfig, tmp_path / "config.json", ["objective.tau_positive=2.0"])
    with pytest.raises(ConfigError, match="tau_positive has no effect"):
        recipe.check(given_later)


def test_a_files_run_can_be_trained_without_its_teacher_from_the_command_line(caplog):
    config = load(TrainConfig, ROOT / "configs/demo.yaml", ["objective.distill_loss_weight=0", "eval.every=0"])
    with caplog.at_level(logging.WARNING):
        recipe.check(config)
    assert recipe.notes(config) == [
        "objective.distill_loss_weight: 0 asks no teacher: teacher has no effect",
        "eval.every: 0 evaluates never: eval.num_prompts has no effect",
    ]


# ---- rewards without a signal ----


def test_the_share_of_groups_with_a_signal():
    rewards_PG = np.array([[0, 0], [0, 1], [1, 1], [1, 0.5]], np.float32)
    assert signal_share(rewards_PG) == 0.5
    assert signal_share(np.full((4, 2), 0.1, np.float32)) == 0
    # One completion per prompt: REINFORCE++ compares the batch.
    assert signal_share(np.array([[0], [1]], np.float32)) == 1 and signal_share(np.ones((2, 1), np.float32)) == 0
    assert "signal_share" in metrics.METRICS


def test_a_run_without_a_signal_is_warned_of_with_the_reason():
    watch, said = advantage_watch.AdvantageWatch(), []
    for step in range(1, 13):
        share = 0.25 if step == 2 else 0.0
        said.append(watch.warning({"signal_share": share, "reward": 0.0}, is_last=step == 12))
    assert [step for step, text in enumerate(said, 1) if text] == [5, 12]  # three and ten steps in a row
    assert "in the last 3 steps" in said[4] and "is no answer right, or none recognised?" in said[4]
    short = advantage_watch.AdvantageWatch()
    assert "use harder problems" in short.warning({"signal_share": 0.0, "reward": 1.0}, is_last=True)
    assert advantage_watch.AdvantageWatch().warning({"loss": 1.0}, is_last=True) is None  # no reward
