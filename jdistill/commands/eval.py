"""`jdistill eval`: measures a checkpoint's accuracy on a task's held-out problems."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from jdistill.commands.sample import add_model_arguments, add_sampling_arguments, check_sampling_arguments, load_sampler
from jdistill.text_files import check_output

if TYPE_CHECKING:  # imported where they are needed: jax and the tasks are slow to import
    from jdistill.rollout.completion import Completion
    from jdistill.student.evaluate import EvalResult
    from jdistill.tasks import Problem, Task

DESCRIPTION = """\
Measure a Hugging Face checkpoint on a task's held-out problems: accuracy, mean reward, mean response length, and the
share of responses that ended by themselves. `jdistill train` logs its accuracies with the same code.

examples:
  jdistill eval --model DIR --task addition --num-prompts 512 --greedy
  jdistill eval --model DIR --task gsm8k --task-option train_path=train.jsonl --task-option test_path=test.jsonl \\
      --temperature 0.7 --output answers.jsonl
  jdistill eval --model DIR --task addition --json

--output writes one JSON object per line for each answer, in the order in which they end: problem, text, reward, token
ids."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    from jdistill.tasks import TASKS

    add_model_arguments(parser)
    parser.add_argument("--task", required=True, metavar="NAME", help=f"one of: {', '.join(TASKS)}")
    parser.add_argument(
        "--task-option", action="append", default=[], metavar="K=V", help="option of the task; repeat for several"
    )
    parser.add_argument(
        "--num-prompts", type=int, default=256, metavar="P", help="number of held-out problems (default 256)"
    )
    add_sampling_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--output", metavar="FILE", help="write every answer to this JSONL file")


def run(args: argparse.Namespace) -> int:
    """Evaluates and prints the result."""
    from jdistill import checkpoint_files

    # Before jax is imported and the weights are read: a typo is reported at once.
    checkpoint_files.check_checkpoint(args.model)
    check_sampling_arguments(args)
    task, problems = _task_and_problems(args)
    if args.output is not None:
        check_output("--output", args.output)
    _print_result(args, _evaluate(args, task, problems))
    return 0


def _task_and_problems(args: argparse.Namespace) -> tuple[Task, list[Problem]]:
    from jdistill.tasks import create_task

    if args.num_prompts < 1:
        raise ValueError(f"--num-prompts must be at least 1, got {args.num_prompts}")
    task = create_task(args.task, _options(args.task_option), args.model)
    if args.num_prompts > task.num_eval:
        raise ValueError(f"--num-prompts {args.num_prompts}: task {args.task} has {task.num_eval} held-out problems")
    return task, task.eval_problems(args.num_prompts)


def _evaluate(args: argparse.Namespace, task: Task, problems: list[Problem]) -> EvalResult:
    """Evaluates with a progress bar, and writes each answer to --output as it ends."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from jdistill.student.evaluate import evaluate

    sampler, params = load_sampler(args, max(len(p.prompt_ids) for p in problems), task.stop_token_ids, task.decode)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    num_answers, total_reward = 0, 0.0
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(open(args.output, "w", encoding="utf-8")) if args.output is not None else None
        bar = stack.enter_context(Progress(*columns, console=console, transient=True, disable=not console.is_terminal))
        line = bar.add_task("compiling", total=len(problems))

        def on_answer(problem: Problem, completion: Completion, reward: float) -> None:
            nonlocal num_answers, total_reward
            num_answers += 1
            total_reward += reward
            bar.update(line, advance=1, description=f"mean reward {total_reward / num_answers:.3f}")
            if output is not None:
                answer = _answer(task, problem, completion, reward)
                output.write(json.dumps(answer, ensure_ascii=False) + "\n")

        return evaluate(
            sampler,
            sampler.prepare(params),
            task,
            problems,
            temperature=args.temperature,
            greedy=args.greedy,
            seed=args.seed,
            max_rows=args.max_rows,
            on_answer=on_answer,
        )


def _answer(task: Task, problem: Problem, completion: Completion, reward: float) -> dict[str, Any]:
    """One line of the --output file."""
    return {
        "index": problem.index,
        "prompt": task.decode(problem.prompt_ids),
        "response": task.decode(completion.completion_ids),
        "reward": reward,
        "finish_reason": completion.finish_reason,
        "mean_logprob": float(completion.sampler_logprobs.mean()),
        "token_ids": completion.completion_ids.tolist(),
    }


def _print_result(args: argparse.Namespace, result: EvalResult) -> None:
    if args.json:
        settings = {"model": args.model, "task": args.task, "greedy": args.greedy, "seed": args.seed}
        if not args.greedy:
            settings["temperature"] = args.temperature
        print(json.dumps(settings | dataclasses.asdict(result)))
        return
    how = "greedy" if args.greedy else f"T = {args.temperature:g}"
    print(
        f"{args.task}, {result.num_problems} held-out problems, {how}: accuracy {result.accuracy:.3f}, "
        f"mean reward {result.mean_reward:.3f}, {result.mean_response_tokens:.1f} tokens per response, "
        f"{result.stop_share:.1%} ended by themselves"
        + ("" if result.readable_share is None else f", {result.readable_share:.1%} with a readable answer")
    )
    if result.stop_share < 0.5:
        print("most responses ran into the length limit: is --max-new-tokens too small for this task?", file=sys.stderr)
    elif result.readable_share is not None and result.readable_share < 0.5:
        print("most responses have no answer in the format that the task reads: compare --output", file=sys.stderr)


def _options(pairs: list[str]) -> dict[str, Any]:
    """Parses "k=v" pairs into a dict; values are YAML, as in a training config's task.options."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--task-option: expected name=value, got {pair!r}")
        if key in options:
            raise ValueError(f"--task-option: {key} is given twice")
        try:
            options[key] = YAML(typ="safe").load(text) if text.strip() else None
        except YAMLError as e:
            raise ValueError(f"--task-option {key}: the value is not YAML: {e}") from None
    return options
