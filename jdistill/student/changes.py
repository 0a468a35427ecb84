"""What a resumed run may change: a table of all keys, and the differences between two configurations of one run.

A key is free if it says where or how often something is done, or how the work is cut into pieces: the numbers stay the
same within rounding. Every other key defines the run; a directory that defines it may have moved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from jdistill import checkpoint_files
from jdistill.config import ConfigError, ScheduleSection, Section, TrainConfig
from jdistill.fingerprint import model_fingerprint

# Section -> its keys. An optional section is also a key of the section around it: whether it is there at all.
FREE: dict[str, tuple[str, ...]] = {
    "": ("run_dir", "num_steps", "teacher"),  # for num_steps see `notes`
    "model": ("remat",),
    "teacher": (
        *("endpoints", "several", "spawn", "deadline_s", "max_in_flight", "batch_tokens", "hedge_after_s", "stall_s"),
        *("model", "offload", "tls_ca", "tls_cert", "tls_key", "token_file"),
    ),
    "rollout": ("max_rows", "chunk_tokens"),
    "objective": ("chunk_tokens",),
    "optimizer": ("accumulate", "packing"),
    "eval": ("every", "greedy"),
    "checkpoint": ("every", "keep"),
    "mesh": ("data", "fsdp", "tensor"),
}
DEFINES: dict[str, tuple[str, ...]] = {
    "": ("seed",),
    "model": ("path", "init", "compute_dtype", "lora"),
    "model.lora": ("rank", "alpha", "targets"),
    "task": ("name", "options"),
    "teacher": ("privileged", "tokenizer"),
    "rollout": (
        *("num_prompts", "num_completions", "max_prompt_tokens", "max_new_tokens", "temperature", "min_new_tokens"),
        *("top_k", "top_p", "min_p", "stop_strings", "include_stop_str_in_output", "cache_dtype", "ahead"),
    ),
    "objective": (
        *("kind", "rl_loss_weight", "advantage", "policy", "clip_low", "clip_high", "dual_clip", "tau_positive"),
        *("tau_negative", "proximal", "behavior", "discount", "gae_lambda", "value_loss_weight", "value_clip"),
        *("dynamic_sampling", "overlong_buffer", "reference", "distill_loss_weight", "distillation"),
        *("distill_placement", "distill_top_k", "distill_candidates", "distill_tail", "distill_beta"),
        *("distill_discount", "distill_clip", "distill_where", "distill_threshold", "distill_entropy_weight"),
        *("teacher_weights", "reduction"),
    ),
    "objective.behavior": ("action", "level", "lower", "upper"),
    "objective.reference": ("path", "weight", "estimator"),
    "optimizer": (
        *("name", "learning_rate", "b1", "b2", "eps", "moment_dtype", "weight_decay", "clip_norm", "warmup_steps"),
        *("schedule", "end_factor", "minibatches", "batch_size"),
    ),
    "eval": ("num_prompts",),
}


class Change(NamedTuple):
    """One key with another value than before."""

    key: str
    old: Any  # JSON
    new: Any


def between(old: TrainConfig, new: TrainConfig, contents: Mapping[str, str]) -> list[Change]:
    """Returns the free keys that differ, and the directories that have moved.

    Args:
        old: configuration of the run in the directory.
        new: configuration that it is resumed with.
        contents: `contents(old)`, as recorded when the run began.

    Raises:
        ConfigError: a key that defines the run differs; the message lists all of them with both values.
    """
    free, differ = _compare("", old, new)
    moved = [
        change for change in differ if change.key in contents and contents[change.key] == _content(new, change.key)
    ]
    free, refused = free + moved, [change for change in differ if change not in moved]
    if refused:
        raise ConfigError(
            "the run in the directory was made with another configuration, so the resumed run would not be the same "
            "run. Restore the old values, or use another run_dir. (A moved directory must have the contents of the old "
            "one.)\n  " + "\n  ".join(f"{change.key}: was {change.old!r}, is {change.new!r}" for change in refused)
        )
    return free


def contents(config: TrainConfig) -> dict[str, str]:
    """Returns a fingerprint of each directory that defines the run, by its key."""
    return {key: found for key in _DIRECTORIES if (found := _content(config, key)) is not None}


_DIRECTORIES = ("model.path", "objective.reference.path", "teacher.tokenizer")


def _content(config: TrainConfig, key: str) -> str | None:
    """Fingerprint of the directory that a key names; None: it names none, or one that cannot be read."""
    teacher, reference = config.teacher, config.objective.reference
    paths = {"model.path": config.model.path}
    paths["objective.reference.path"] = "" if reference is None else reference.path
    paths["teacher.tokenizer"] = "" if teacher is None else teacher.tokenizer or ""
    if not (path := paths[key]):
        return None
    try:
        tokenizer = checkpoint_files.tokenizer_fingerprint(path)
        if key == "teacher.tokenizer":
            return tokenizer
        if key == "model.path" and config.model.init == "random":
            return f"{tokenizer} {json.dumps(checkpoint_files.read_config(path), sort_keys=True)}"
        return f"{tokenizer} {model_fingerprint(path, config.model.compute_dtype)}"
    except (ValueError, OSError):
        return None


def _compare(path: str, old: Section, new: Section) -> tuple[list[Change], list[Change]]:
    """The differences within one section: those of free keys, and those of others."""
    free: list[Change] = []
    refused: list[Change] = []
    was, now = old.model_dump(mode="json"), new.model_dump(mode="json")
    for name in was:
        key = f"{path}.{name}" if path else name
        before, after = getattr(old, name), getattr(new, name)
        if before == after:
            continue
        if (key in FREE or key in DEFINES) and isinstance(before, Section) and isinstance(after, Section):
            inner = _compare(key, before, after)
            free, refused = free + inner[0], refused + inner[1]
        else:
            (free if name in FREE.get(path, ()) else refused).append(Change(key, was[name], now[name]))
    return free, refused


def notes(config: TrainConfig, changed: Mapping[str, Any], step: int) -> list[str]:
    """Says what becomes of a run that is resumed with another length, or on another number of processes.

    Args:
        config: configuration that it is resumed with.
        changed: what has changed: keys, and "processes"; each with its old and new value.
        step: steps done.
    """
    found = []
    if "num_steps" in changed:
        if depends := _end_with_the_run(config):
            found.append(
                f"num_steps was changed, and {', '.join(depends)} end with the run: from here on they follow the new "
                "length, so this is not the run that it would have been from the start"
            )
        if config.rollout.ahead and changed["num_steps"][0] == step:
            found.append(
                "num_steps was changed, and rollout.ahead sampled nothing ahead in the last step: the next batch is "
                "sampled after the update instead of before it"
            )
    if "processes" in changed and config.objective.dynamic_sampling:
        found.append(
            "objective.dynamic_sampling looks for groups on each process, and their number was changed: the batches "
            "are not those of the run as it would have continued"
        )
    return found


def _end_with_the_run(config: TrainConfig) -> list[str]:
    """The schedules that depend on num_steps."""
    objective, section = config.objective, config.optimizer
    weights = {"objective.rl_loss_weight": objective.rl_loss_weight}
    weights["objective.distill_loss_weight"] = objective.distill_loss_weight
    if objective.reference is not None:
        weights["objective.reference.weight"] = objective.reference.weight
    depends = [
        key
        for key, weight in weights.items()
        if isinstance(weight, ScheduleSection) and weight.kind != "kdrl" and weight.num_steps is None
    ]
    if section.schedule != "constant":
        depends.append(f"optimizer.schedule: {section.schedule}")
    return depends
