"""Prompts and rewards, one file per task; no jax, no torch."""

from __future__ import annotations

import difflib
import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

from jdistill.tasks.base import Problem, Task

# To add a task, add its file and its line here; tests/tasks/test_contract.py then tests it.
TASKS = {
    "addition": "jdistill.tasks.addition:Addition",
    "gsm8k": "jdistill.tasks.gsm8k:Gsm8k",
}

__all__ = ["TASKS", "Problem", "Task", "create_task"]


def create_task(
    name: str,
    options: Mapping[str, Any],
    tokenizer_path: str | pathlib.Path,
    *,
    seed: int = 0,
    max_prompt_tokens: int | None = None,
) -> Task:
    """Creates the task `name`.

    Args:
        name: `task.name` of the configuration, a key of TASKS.
        options: `task.options`, checked strictly against the task's `Options`.
        tokenizer_path: checkpoint directory with the tokenizer and the chat template.
        seed: orders the training problems; the held-out problems do not depend on it.
        max_prompt_tokens: longest prompt; a longer one fails here rather than in the middle of a run.

    Raises:
        ValueError: unknown task, invalid options, no tokenizer, or invalid data; the message names the remedy.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"available: {', '.join(TASKS)}"
        raise ValueError(f"task.name: no task {name!r}; {hint}")
    module, _, cls = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), cls).create(
        options, tokenizer_path, seed=seed, max_prompt_tokens=max_prompt_tokens
    )
