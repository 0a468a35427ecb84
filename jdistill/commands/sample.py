"""`jdistill sample`: completions of a checkpoint, as they end."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from typing import Any

DESCRIPTION = """\
Sample completions from a Hugging Face checkpoint with the sampler that `jdistill train` uses. They are printed as they
end, so short ones come first; --jsonl writes one JSON object a line, with token ids and log-probabilities.

examples:
  jdistill sample --model DIR --prompt "850+636=" --num-completions 4
  jdistill sample --model DIR --chat --prompt "What is 17 * 23?" --max-new-tokens 512 --temperature 0.7
  jdistill sample --model DIR --prompts-file prompts.txt --greedy --jsonl > answers.jsonl
  jdistill sample --model DIR --token-ids 8,5,0,10 --token-ids 1,2,3

A prompts file has one prompt a line; in a .jsonl file a line is {"prompt": TEXT} or {"token_ids": [..]}.
The same seed, prompts and checkpoint give the same completions."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_model_arguments(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or more prompts")
    prompts.add_argument("--prompts-file", metavar="FILE", help="one prompt a line, or JSONL (see above)")
    prompts.add_argument("--token-ids", action="append", metavar="I,J,K", help="a prompt as token ids; may be repeated")
    parser.add_argument("--chat", action="store_true", help="each prompt is a user's message: apply the chat template")
    parser.add_argument("--num-completions", type=int, default=1, metavar="N", help="for each prompt (default 1)")
    add_sampling_arguments(parser)
    parser.add_argument(
        "--stop-token-ids",
        metavar="I,J",
        help="end at any of these (default: eos_token_id of generation_config.json, config.json or the tokenizer)",
    )
    parser.add_argument("--jsonl", action="store_true", help="one JSON object a line")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model and --dtype, which `jdistill eval` has too."""
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face checkpoint directory")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the computation (default: float32 on a CPU, bfloat16 on an accelerator)",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Temperature, limits and seed, which `jdistill eval` has too."""
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampling and the log-probs (default 1)")
    parser.add_argument("--greedy", action="store_true", help="the most likely token each time")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="R",
        help="limit of a completion (default 512, or what the model can hold)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--max-rows", type=int, default=256, metavar="B", help="sequences decoded at once; less needs less memory"
    )


def run(args: argparse.Namespace) -> int:
    """Samples and prints."""
    from jdistill import checkpoint_files

    checkpoint_files.check_checkpoint(args.model)  # before jax and the weights: a typo is answered at once
    check_sampling_arguments(args)
    if args.num_completions < 1:
        raise ValueError(f"--num-completions must be at least 1, got {args.num_completions}")
    tokenizer = None
    if checkpoint_files.has_tokenizer(args.model):
        from jdistill.tasks.base import load_tokenizer

        tokenizer = load_tokenizer(args.model)
    prompts = _read_prompts(args, tokenizer)
    stop_token_ids = _stop_token_ids(args, tokenizer)

    import numpy as np

    requests = [(p, c) for p in range(len(prompts)) for c in range(args.num_completions)]
    seeds = np.random.default_rng(args.seed).integers(0, 2**32, len(requests), dtype=np.uint32)
    sampler, params = load_sampler(args, max(len(ids) for _, ids in prompts), stop_token_ids)
    began = time.monotonic()
    weights = sampler.prepare(params)
    num_tokens = 0
    for start in range(0, len(requests), args.max_rows):
        group = requests[start : start + args.max_rows]
        for completion in sampler.sample(
            weights,
            [prompts[p][1] for p, _ in group],
            seeds=seeds[start : start + args.max_rows],
            temperature=args.temperature,
            greedy=args.greedy,
        ):
            p, c = group[completion.index]
            num_tokens += len(completion.completion_ids)
            text, prompt_text = None, prompts[p][0]
            if tokenizer is not None:
                text = tokenizer.decode(completion.completion_ids.tolist(), skip_special_tokens=True)
                prompt_text = prompt_text or tokenizer.decode(list(prompts[p][1]), skip_special_tokens=False)
            if args.jsonl:
                line = {
                    "prompt_index": p,
                    "completion_index": c,
                    "prompt": prompt_text,
                    "text": text,
                    "prompt_token_ids": list(map(int, prompts[p][1])),
                    "token_ids": completion.completion_ids.tolist(),
                    "logprobs": completion.sampler_logprobs.tolist(),
                    "mean_logprob": float(completion.sampler_logprobs.mean()),
                    "finish_reason": completion.finish_reason,
                }
                print(json.dumps(line, ensure_ascii=False), flush=True)
                continue
            print(
                f"-- prompt {p}, completion {c}: {len(completion.completion_ids)} tokens, {completion.finish_reason}, "
                f"mean log-prob {completion.sampler_logprobs.mean():.3f}"
            )
            shown = f"{prompt_text}{text}" if text is not None else " ".join(map(str, completion.token_ids))
            print(shown, flush=True)
    seconds = time.monotonic() - began
    print(
        f"{len(requests)} completions, {num_tokens:,} tokens in {seconds:.1f} s "
        f"({num_tokens / seconds:,.0f} tokens/s, compilation included)",
        file=sys.stderr,
    )
    return 0


def check_sampling_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError for sizes and a temperature that make no sense."""
    for name in ("max_new_tokens", "max_rows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not args.temperature > 0:
        raise ValueError(f"--temperature must be above 0, got {args.temperature}; for the most likely tokens: --greedy")
    if args.seed < 0:
        raise ValueError(f"--seed must not be negative, got {args.seed}")


def load_sampler(args: argparse.Namespace, prompt_length: int, stop_token_ids: tuple[int, ...]) -> tuple[Any, Any]:
    """(Sampler, parameters) of args.model for prompts of up to `prompt_length` tokens.

    Raises:
        ValueError: prompt and completion together are longer than the model's positions.
    """
    import jax
    from flax import nnx

    from jdistill import models
    from jdistill.rollout.sampler import Sampler

    limit = models.config_from_hf(args.model).max_position_embeddings
    left = limit - prompt_length
    max_new_tokens = min(512, left) if args.max_new_tokens is None else args.max_new_tokens
    if left < max(1, max_new_tokens):
        remedy = (
            f"--max-new-tokens can be at most {left}, got {max_new_tokens}" if left > 0 else "nothing can follow it"
        )
        raise ValueError(
            f"{args.model} has {limit} positions (max_position_embeddings in config.json), the longest prompt has "
            f"{prompt_length} tokens: {remedy}"
        )
    dtype = args.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    decoder = models.load(args.model, compute_dtype=dtype, param_dtype=dtype)
    graphdef, params = nnx.split(decoder)
    sampler = Sampler(
        graphdef, max_prompt_tokens=prompt_length, max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids
    )
    return sampler, params


def _read_prompts(args: argparse.Namespace, tokenizer: Any) -> list[tuple[str | None, list[int]]]:
    """(text or None, token ids) of each prompt."""
    prompts: list[tuple[str | None, list[int]]]
    if args.token_ids is not None:
        prompts = [(None, _int_list("--token-ids", text)) for text in args.token_ids]
    elif args.prompt is not None:
        prompts = [(text, _encode(args, tokenizer, text)) for text in args.prompt]
    else:
        path = pathlib.Path(args.prompts_file)
        if not path.is_file():
            raise ValueError(f"--prompts-file: no file {path}")
        prompts = []
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if line.strip():
                where = f"{path}, line {number}"
                prompts.append(
                    _from_json(args, tokenizer, line, where)
                    if path.suffix == ".jsonl"
                    else (line, _encode(args, tokenizer, line))
                )
    if args.chat and any(text is None for text, _ in prompts):
        raise ValueError("--chat applies a template to text; a prompt of token ids is taken as it is: leave out --chat")
    if not prompts:
        raise ValueError(f"--prompts-file: {args.prompts_file} has no prompts; expected one a line")
    return prompts


def _from_json(args: argparse.Namespace, tokenizer: Any, line: str, where: str) -> tuple[str | None, list[int]]:
    expected = 'expected {"prompt": TEXT} or {"token_ids": [..]}'
    try:
        value = json.loads(line)
    except json.JSONDecodeError as e:
        raise ValueError(f"{where}: not JSON ({e}); {expected}") from None
    if isinstance(value, dict) and isinstance(value.get("prompt"), str):
        return value["prompt"], _encode(args, tokenizer, value["prompt"])
    ids = value.get("token_ids") if isinstance(value, dict) else None
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ValueError(f"{where}: {expected}, got {line[:80]}")
    return None, ids


def _encode(args: argparse.Namespace, tokenizer: Any, text: str) -> list[int]:
    if tokenizer is None:
        raise ValueError(
            f"{args.model} has no tokenizer: copy tokenizer.json from the checkpoint that it comes from, "
            "or give --token-ids"
        )
    if not args.chat:
        return tokenizer.encode(text)
    if tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer in {args.model} has no chat template: leave out --chat")
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def _stop_token_ids(args: argparse.Namespace, tokenizer: Any) -> tuple[int, ...]:
    if args.stop_token_ids is not None:
        return tuple(_int_list("--stop-token-ids", args.stop_token_ids))
    for name in ("generation_config.json", "config.json"):  # the order in which Hugging Face's generate() looks
        path = pathlib.Path(args.model) / name
        if path.is_file():
            ids = json.loads(path.read_text()).get("eos_token_id")
            if ids is not None:
                return tuple(ids) if isinstance(ids, list) else (ids,)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        return (tokenizer.eos_token_id,)
    print(f"{args.model} names no end token: completions go on to --max-new-tokens", file=sys.stderr)
    return ()


def _int_list(flag: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag}: expected token ids like 5,6,7, got {text!r}") from None
