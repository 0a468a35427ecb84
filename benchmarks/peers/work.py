"""The work that every side of `make bench-student` does: model, batch, requests; and how a side is driven.

numpy and the standard library alone, since every side's environment imports it. The work is the same where `train`
finds LOSS_FIRST and `score` finds MEAN_LOGPROB.

Dimension key: B rows, S tokens of a row, R completion tokens, N requests, D width, V vocabulary, L layers.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

# A small model of Qwen3's architecture, float32. Rope theta 1e6: google-tunix 0.1.7 takes no other for Qwen3.
NUM_LAYERS, WIDTH, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, MLP_WIDTH, VOCAB_SIZE = 4, 256, 8, 4, 32, 768, 8192
NORM_EPS, ROPE_THETA = 1e-6, 1e6
NUM_ROWS, PROMPT_TOKENS, NEW_TOKENS, GROUP = 16, 64, 192, 4
ROW_TOKENS = PROMPT_TOKENS + NEW_TOKENS
CLIP, KL_WEIGHT, LEARNING_RATE, WEIGHT_DECAY = 0.2, 0.04, 1e-5, 1e-4
PAD_ID = 0  # never in the data
SEED = 1234
# Of requests whose lengths vary.
NUM_VARIED, LEAST_VARIED, MOST_VARIED = 64, 16, 512

LOSS_FIRST = 0.0404191  # of train, under the first parameters: token clip + KL_WEIGHT * (log p - log p_reference)
MEAN_LOGPROB = -9.05892  # of score


def weights() -> dict[str, np.ndarray]:
    """float32 tensors by their names in a Hugging Face checkpoint, [out, in]: N(0, 0.02), norms 1."""
    rng = np.random.default_rng(SEED)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)

    tensors = {"model.embed_tokens.weight": normal(VOCAB_SIZE, WIDTH)}
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}"
        # The order decides which numbers each gets.
        tensors |= {
            f"{prefix}.self_attn.q_proj.weight": normal(NUM_HEADS * HEAD_DIM, WIDTH),
            f"{prefix}.self_attn.k_proj.weight": normal(NUM_KV_HEADS * HEAD_DIM, WIDTH),
            f"{prefix}.self_attn.v_proj.weight": normal(NUM_KV_HEADS * HEAD_DIM, WIDTH),
            f"{prefix}.self_attn.o_proj.weight": normal(WIDTH, NUM_HEADS * HEAD_DIM),
            f"{prefix}.mlp.gate_proj.weight": normal(MLP_WIDTH, WIDTH),
            f"{prefix}.mlp.up_proj.weight": normal(MLP_WIDTH, WIDTH),
            f"{prefix}.mlp.down_proj.weight": normal(WIDTH, MLP_WIDTH),
            f"{prefix}.input_layernorm.weight": np.ones(WIDTH, np.float32),
            f"{prefix}.post_attention_layernorm.weight": np.ones(WIDTH, np.float32),
            f"{prefix}.self_attn.q_norm.weight": np.ones(HEAD_DIM, np.float32),
            f"{prefix}.self_attn.k_norm.weight": np.ones(HEAD_DIM, np.float32),
        }
    return tensors | {"model.norm.weight": np.ones(WIDTH, np.float32)}


def hf_config() -> dict[str, Any]:
    """The config.json of the model."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": WIDTH,
        "intermediate_size": MLP_WIDTH,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "use_sliding_window": False,
    }


def batch() -> dict[str, np.ndarray]:
    """prompt_ids [B, 64], completion_ids, old_logprobs and reference_logprobs [B, 192], advantages [B]."""
    rng = np.random.default_rng(SEED + 1)
    prompt_ids = rng.integers(2, VOCAB_SIZE, (NUM_ROWS, PROMPT_TOKENS), dtype=np.int32)
    completion_ids = rng.integers(2, VOCAB_SIZE, (NUM_ROWS, NEW_TOKENS), dtype=np.int32)
    rewards = rng.random((NUM_ROWS // GROUP, GROUP), dtype=np.float32)
    centred = rewards - rewards.mean(1, keepdims=True)
    advantages = centred / (rewards.std(1, ddof=1, keepdims=True) + 1e-6)
    old, reference = (
        (-np.log(VOCAB_SIZE) + 0.1 * rng.standard_normal((NUM_ROWS, NEW_TOKENS))).astype(np.float32) for _ in range(2)
    )
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "advantages": advantages.reshape(-1).astype(np.float32),
        "old_logprobs": old,
        "reference_logprobs": reference,
    }


def varied() -> tuple[np.ndarray, np.ndarray]:
    """int32 prompts [N, 64], and how many tokens each of the N requests may have: uniform from 16 to 512."""
    rng = np.random.default_rng(SEED + 2)
    prompts = rng.integers(2, VOCAB_SIZE, (NUM_VARIED, PROMPT_TOKENS), dtype=np.int32)
    return prompts, rng.integers(LEAST_VARIED, MOST_VARIED + 1, NUM_VARIED, dtype=np.int32)


def rewards(step: int, count: int) -> np.ndarray:
    """float32 [count], of one step of the whole loop."""
    return np.random.default_rng(step).random(count).astype(np.float32)


def train_flops() -> float:
    """Of one training step: the matrix products of a forward pass, times 3; logits of the completions alone."""
    projections = WIDTH * (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM + NUM_HEADS * HEAD_DIM * WIDTH
    weights_per_layer = projections + 3 * WIDTH * MLP_WIDTH
    attention = 2 * 2 * ROW_TOKENS**2 * NUM_HEADS * HEAD_DIM / 2  # causal: half of the square
    row = NUM_LAYERS * (2 * ROW_TOKENS * weights_per_layer + attention) + 2 * NEW_TOKENS * WIDTH * VOCAB_SIZE
    return 3 * NUM_ROWS * row


# ---- how a side is driven ----


def versions(*packages: str) -> dict[str, str]:
    """Of the packages that are installed, and Python's."""
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


class Door:
    """Lines of JSON with the process that drives this one; what libraries print goes to stderr from here on."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def say(self, answer: Any) -> None:
        self._out.write(json.dumps(answer) + "\n")

    def wait(self) -> dict[str, Any] | None:
        """Until the next repetition is asked for, and what is said of it; None: there will be none."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def serve(self, once: Callable[[dict[str, Any]], dict[str, Any]], facts: dict[str, Any]) -> None:
        """Does `once`, which blocks until its result is there, for each request, and answers what it took.

        The first answer is `facts`.
        """
        self.say(facts)
        while (request := self.wait()) is not None:
            begin = time.perf_counter(), time.process_time()
            found = once(request)
            self.say({**costs(*begin), **found})


def costs(begin_s: float, cpu_begin_s: float) -> dict[str, float]:
    """Seconds and CPU seconds since, and the peak of memory so far."""
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": time.perf_counter() - begin_s,
        "cpu_s": time.process_time() - cpu_begin_s,
        "peak_rss_mib": peak_kib / 1024,
    }


def main(tasks: dict[str, Callable[[Door], None]]) -> None:
    """The task that the command line names."""
    tasks[sys.argv[1]](Door())
