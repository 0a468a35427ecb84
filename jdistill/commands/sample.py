"""`jdistill sample`: samples completions from a checkpoint and prints them as they end."""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

from jdistill.text_files import read_json_lines, read_lines

PROMPT_LINE = '{"prompt": TEXT} or {"token_ids": [..]}'  # one line of a prompts file
DESCRIPTION = """\
Sample completions from a Hugging Face checkpoint with the sampler that `jdistill train` uses. Each is printed as it
ends, so short ones come first; --jsonl writes one JSON object per line, with token ids and log-probabilities.

examples:
  jdistill sample --model DIR --prompt "850+636=" --num-completions 4
  jdistill sample --model DIR --chat --prompt "What is 17 * 23?" --max-new-tokens 512 --temperature 0.7
  jdistill sample --model DIR --prompts-file prompts.txt --greedy --jsonl > answers.jsonl
  jdistill sample --model DIR --token-ids 8,5,0,10 --token-ids 1,2,3

A prompts file has one prompt per line; in a .jsonl file each line is {"prompt": TEXT} or {"token_ids": [..]}.
The same seed, prompts and checkpoint give the same completions."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_model_arguments(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or more prompts")
    prompts.add_argument("--prompts-file", metavar="FILE", help="one prompt per line, or JSONL (see above)")
    prompts.add_argument("--token-ids", action="append", metavar="I,J,K", help="a prompt as token ids; may be repeated")
    parser.add_argument(
        "--chat", action="store_true", help="apply the chat template to each prompt, as a user's message"
    )
    parser.add_argument(
        "--num-completions", type=int, default=1, metavar="N", help="completions per prompt (default 1)"
    )
    add_sampling_arguments(parser)
    parser.add_argument(
        "--stop-token-ids",
        metavar="I,J",
        help="end a completion at any of these (default: the end tokens of the chat template, the tokenizer, and "
        "generation_config.json or else config.json)",
    )
    parser.add_argument("--jsonl", action="store_true", help="write one JSON object per line")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --model and --dtype, which `jdistill eval` shares."""
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face checkpoint directory")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="compute dtype (default: float32 on a CPU, bfloat16 on an accelerator)",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds temperature, limits, stop strings and seed, which `jdistill eval` shares."""
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="temperature of sampling and log-probs (default 1)"
    )
    parser.add_argument("--greedy", action="store_true", help="always take the most likely token")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="R",
        help="longest completion (default 512, or as many tokens as the model has positions left)",
    )
    parser.add_argument(
        "--min-new-tokens", type=int, default=0, metavar="R", help="tokens before any stop token or stop string"
    )
    parser.add_argument(
        "--stop-string",
        action="append",
        default=[],
        metavar="TEXT",
        help="end a completion with this text too; may be repeated",
    )
    parser.add_argument(
        "--include-stop-str-in-output",
        action="store_true",
        help="keep the stop token or stop string in the text that is printed or rewarded",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--max-rows", type=int, default=256, metavar="B", help="sequences decoded at once; fewer need less memory"
    )


def run(args: argparse.Namespace) -> int:
    """Samples completions and prints each as it ends."""
    from jdistill import checkpoint_files

    checkpoint_files.check_checkpoint(args.model)  # before importing jax and loading weights, so a typo fails at once
    check_sampling_arguments(args)
    if args.num_completions < 1:
        raise ValueError(f"--num-completions must be at least 1, got {args.num_completions}")
    tokenizer = decode = None
    if checkpoint_files.has_tokenizer(args.model):
        from jdistill.tasks.base import decode_all, load_tokenizer

        tokenizer = load_tokenizer(args.model)
        decode = functools.partial(decode_all, tokenizer)
    elif args.stop_string:
        raise ValueError(f"--stop-string is searched for in text, but {args.model} has no tokenizer: --stop-token-ids")
    prompts = _read_prompts(args, tokenizer)
    stop_token_ids = _stop_token_ids(args, tokenizer)

    import numpy as np

    requests = [(p, c) for p in range(len(prompts)) for c in range(args.num_completions)]
    seeds = np.random.default_rng(args.seed).integers(0, 2**32, len(requests), dtype=np.uint32)
    sampler, params = load_sampler(args, max(len(ids) for _, ids in prompts), stop_token_ids, decode)
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
            answer = _answer(tokenizer, (p, c), prompts[p], completion)
            print(json.dumps(answer, ensure_ascii=False) if args.jsonl else _as_text(answer), flush=True)
    seconds = time.monotonic() - began
    print(
        f"{len(requests)} completions, {num_tokens:,} tokens in {seconds:.1f} s "
        f"({num_tokens / seconds:,.0f} tokens/s, compilation included)",
        file=sys.stderr,
    )
    return 0


def _answer(
    tokenizer: Any, place: tuple[int, int], prompt: tuple[str | None, list[int]], completion: Any
) -> dict[str, Any]:
    """Describes one completion: a line of --jsonl. Texts that need a tokenizer are None without one."""
    text, prompt_text = None, prompt[0]
    if tokenizer is not None:
        from jdistill.tasks.base import decode_all, without_special_tokens

        text = without_special_tokens(completion.text(functools.partial(decode_all, tokenizer)), tokenizer)
        prompt_text = prompt_text or tokenizer.decode(list(prompt[1]), skip_special_tokens=False)
    return {
        "prompt_index": place[0],
        "completion_index": place[1],
        "prompt": prompt_text,
        "text": text,
        "prompt_token_ids": list(map(int, prompt[1])),
        "token_ids": completion.completion_ids.tolist(),
        "logprobs": completion.sampler_logprobs.tolist(),
        "mean_logprob": float(completion.sampler_logprobs.mean()),
        "finish_reason": completion.finish_reason,
    }


def _as_text(answer: dict[str, Any]) -> str:
    header = (
        f"-- prompt {answer['prompt_index']}, completion {answer['completion_index']}: "
        f"{len(answer['token_ids'])} tokens, {answer['finish_reason']}, mean log-prob {answer['mean_logprob']:.3f}"
    )
    if answer["text"] is not None:
        return f"{header}\n{answer['prompt']}{answer['text']}"
    return f"{header}\n{' '.join(map(str, answer['prompt_token_ids'] + answer['token_ids']))}"


def check_sampling_arguments(args: argparse.Namespace) -> None:
    """Checks sizes, temperature and seed; raises ValueError for one out of range."""
    for name in ("max_new_tokens", "max_rows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not args.temperature > 0:
        raise ValueError(f"--temperature must be above 0, got {args.temperature}; for the most likely tokens: --greedy")
    if args.min_new_tokens < 0:
        raise ValueError(f"--min-new-tokens must not be negative, got {args.min_new_tokens}")
    if "" in args.stop_string:
        raise ValueError("--stop-string must not be empty: an empty text would end every completion")
    if args.seed < 0:
        raise ValueError(f"--seed must not be negative, got {args.seed}")


def load_sampler(
    args: argparse.Namespace,
    prompt_length: int,
    stop_token_ids: tuple[int, ...],
    decode: Callable[[Any], str] | None,
) -> tuple[Any, Any]:
    """Loads args.model; returns its sampler for prompts of up to `prompt_length` tokens, and its parameters.

    Raises:
        ValueError: prompt and completion together exceed the model's positions, or min_new_tokens is above their limit.
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
            f"--max-new-tokens can be at most {left}, got {max_new_tokens}"
            if left > 0
            else "no position is left for a completion"
        )
        raise ValueError(
            f"{args.model} has {limit} positions (max_position_embeddings in config.json), and the longest prompt has "
            f"{prompt_length} tokens: {remedy}"
        )
    dtype = args.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    decoder = models.load(args.model, compute_dtype=dtype, param_dtype=dtype)
    graphdef, params = nnx.split(decoder)
    sampler = Sampler(
        graphdef,
        max_prompt_tokens=prompt_length,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_ids,
        min_new_tokens=args.min_new_tokens,
        stop_strings=args.stop_string,
        decode=decode,
        include_stop=args.include_stop_str_in_output,
    )
    return sampler, params


def _read_prompts(args: argparse.Namespace, tokenizer: Any) -> list[tuple[str | None, list[int]]]:
    """Reads each prompt as (text, token ids); the text is None where token ids were given."""
    prompts: list[tuple[str | None, list[int]]]
    if args.token_ids is not None:
        prompts = [(None, _int_list("--token-ids", text)) for text in args.token_ids]
    elif args.prompt is not None:
        prompts = [(text, _encode(args, tokenizer, text)) for text in args.prompt]
    else:
        path = pathlib.Path(args.prompts_file)
        if not path.is_file():
            raise ValueError(f"--prompts-file: no file {path}")
        if path.suffix == ".jsonl":
            objects = read_json_lines(path, PROMPT_LINE)
            prompts = [_from_json(args, tokenizer, value, f"{path} line {number}") for number, value in objects]
        else:
            prompts = [(line, _encode(args, tokenizer, line)) for _, line in read_lines(path) if line.strip()]
    if args.chat and any(text is None for text, _ in prompts):
        raise ValueError("--chat applies a template to text, but a prompt is given as token ids: omit --chat")
    if not prompts:
        raise ValueError(f"--prompts-file: {args.prompts_file} has no prompts; expected one per line")
    return prompts


def _from_json(
    args: argparse.Namespace, tokenizer: Any, value: dict[str, Any], where: str
) -> tuple[str | None, list[int]]:
    if isinstance(value.get("prompt"), str):
        return value["prompt"], _encode(args, tokenizer, value["prompt"])
    ids = value.get("token_ids")
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ValueError(f"{where}: expected {PROMPT_LINE}, got {json.dumps(value)[:80]}")
    return None, ids


def _encode(args: argparse.Namespace, tokenizer: Any, text: str) -> list[int]:
    if tokenizer is None:
        raise ValueError(
            f"{args.model} has no tokenizer: copy tokenizer.json from the checkpoint it was made from, "
            "or give --token-ids"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"--prompt {text!a}: it is not UTF-8; is the terminal's encoding another one?") from None
    if not args.chat:
        return tokenizer.encode(text)
    from jdistill.tasks.base import render_chats

    (chat,) = render_chats(tokenizer, [[{"role": "user", "content": text}]], "--chat")
    return tokenizer(chat, add_special_tokens=False)["input_ids"]


def _stop_token_ids(args: argparse.Namespace, tokenizer: Any) -> tuple[int, ...]:
    from jdistill.turn_end import read_turn_end

    if args.stop_token_ids is not None:
        return tuple(_int_list("--stop-token-ids", args.stop_token_ids))
    stop_token_ids = read_turn_end(args.model, tokenizer).stop_token_ids
    if not stop_token_ids:
        print(
            f"{args.model} has no end token: completions continue to --max-new-tokens unless you set --stop-token-ids",
            file=sys.stderr,
        )
    return stop_token_ids


def _int_list(flag: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag}: expected token ids like 5,6,7, got {text!r}") from None
