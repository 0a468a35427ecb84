"""Measures the student on one large GPU: model FLOP/s utilisation of training, bandwidth utilisation of decoding.

    python -m benchmarks.gpu_student [--models 0.6b 1.7b 4b] [--tasks train decode] [--output FILE.json]
    JAX_PLATFORMS=cpu python -m benchmarks.gpu_student --tiny      # a functional check on any machine

The models have Qwen3's shapes, random weights, bfloat16 compute and float32 master weights. Each model and task runs in
a separate process, so that it has the whole memory. The last line printed is one JSON object; `null` marks a run that
did not fit.

Dimension key: B rows, S tokens per row, T = S - 1 targets, L layers, D width, N heads, K key-value heads, H head_dim,
F MLP width, V vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from typing import Any


@dataclasses.dataclass(frozen=True)
class Size:
    """Shape of a Qwen3 model, and its batch sizes."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    train_rows: int  # B of a step, chosen to fit in 80 GB
    train_tokens: int = 4096  # T
    decode_rows: int = 64
    decode_prompt: int = 512
    decode_new: int = 512

    @property
    def matmul_weights(self) -> int:
        """Number of weights that each token is multiplied by; the tied embedding counts once, as the head."""
        D, N, K, H = self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim
        layer = D * (N + 2 * K) * H + N * H * D + 3 * D * self.intermediate_size
        return self.num_layers * layer + D * self.vocab_size

    def train_flops(self) -> float:
        """Return the model FLOPs of one step: one forward and two for the backward pass, without remat's recomputation.

        Multiplying a token by a weight takes 2 FLOPs. Attention takes 2 * 2 * T * N * H per token and layer for the
        scores and the weighted sum of values, of which causal attention needs half.
        """
        weights = 2 * self.matmul_weights
        attention = self.num_layers * 2 * 2 * self.train_tokens * self.num_heads * self.head_dim / 2
        return 3 * self.train_rows * self.train_tokens * (weights + attention)

    def decode_bytes(self) -> float:
        """Return the bytes one decoding step reads on average: bfloat16 weights once, and keys and values."""
        length = self.decode_prompt + self.decode_new / 2
        cached = self.decode_rows * length * self.num_layers * 2 * self.num_kv_heads * self.head_dim
        return 2 * (self.matmul_weights + cached)


SIZES = {
    "0.6b": Size(1024, 3072, 28, 16, 8, 128, 151_936, train_rows=8),
    "1.7b": Size(2048, 6144, 28, 16, 8, 128, 151_936, train_rows=4),
    "4b": Size(2560, 9728, 36, 32, 8, 128, 151_936, train_rows=1),
}
TINY = Size(64, 128, 2, 4, 2, 16, 512, 2, train_tokens=64, decode_rows=4, decode_prompt=16, decode_new=32)
# Substring of the device's name -> (dense bfloat16 FLOP/s, memory bytes/s), from NVIDIA's data sheets (SXM).
PEAKS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}
TASKS = ("train", "decode")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_student", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["0.6b", "1.7b"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rows", type=int, help="of a training step, in place of the model's default")
    parser.add_argument("--remat", choices=("none", "layer"), default="layer")
    parser.add_argument("--chunk-tokens", type=int, default=2048, help="of the log-probs, objective.chunk_tokens")
    parser.add_argument("--reps", type=int, default=10)
    parser.add_argument("--peak-flops", type=float, help="dense bfloat16 FLOP/s; default: by the device's name")
    parser.add_argument("--bandwidth", type=float, help="bytes/s of its memory; default: by the device's name")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights: a check that it works")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "TASK"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(*args.child, args)))
        return
    figures: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.gpu_student", *sys.argv[1:]]),
        "date": str(datetime.date.today()),
        "versions": versions(),
    }
    # Nothing else runs on the device, and the larger models do not fit in the default of 75 %.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ}
    failed = False
    for model in ["tiny"] if args.tiny else args.models:
        for task in args.tasks:
            command = [sys.executable, "-m", "benchmarks.gpu_student", *sys.argv[1:], "--child", model, task]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
            found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
            failed |= found is None
            figures[f"{task}_{model}"] = found
            print(f"{model} {task}: {json.dumps(found)}", file=sys.stderr)
    if args.output is not None:
        args.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))
    sys.exit(int(failed))


def versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "jax-cuda12-plugin", "flax", "optax")
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {"python": platform.python_version()} | {name: installed[name] for name in names if name in installed}


def measure(model: str, task: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one task on one model."""
    import jax

    size = TINY if args.tiny else SIZES[model]
    if args.rows is not None:
        size = dataclasses.replace(size, train_rows=args.rows)
    device = jax.devices()[0]
    known = next((peaks for name, peaks in PEAKS.items() if name in device.device_kind), (None, None))
    peak_flops, bandwidth = args.peak_flops or known[0], args.bandwidth or known[1]
    if None in (peak_flops, bandwidth) and not args.tiny:
        raise SystemExit(
            f"no peak is known for {device.device_kind!r} (only {', '.join(PEAKS)}): give --peak-flops and --bandwidth"
        )
    found = {"train": train, "decode": decode}[task](size, args, peak_flops, bandwidth)
    memory = device.memory_stats() or {}
    return found | {"device": device.device_kind, "peak_gib": memory.get("peak_bytes_in_use", 0) / 2**30}


def make_decoder(size: Size, remat: str) -> Any:
    from jdistill import models

    config = models.DecoderConfig(
        family="qwen3",
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        num_kv_heads=size.num_kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=40_960,
        rope=models.Rope(theta=1e6),
        qk_norm=True,
        tie_word_embeddings=True,
    )
    return models.random_init(config, 0, compute_dtype="bfloat16", remat=remat)


def train(size: Size, args: argparse.Namespace, peak_flops: float | None, bandwidth: float | None) -> dict[str, Any]:
    """Time a GRPO step over full rows, with all targets scored; AdamW with float32 moments."""
    import jax
    import numpy as np
    from flax import nnx

    from jdistill.config import TrainConfig, parse
    from jdistill.student.batch import TrainBatch
    from jdistill.student.optimizer import make_optimizer
    from jdistill.student.state import init_state
    from jdistill.student.step import make_train_step

    config = parse(
        TrainConfig,
        {
            "run_dir": "unused",
            "num_steps": 1_000_000,
            "model": {"path": "unused"},
            "task": {"name": "unused"},
            "objective": {"chunk_tokens": args.chunk_tokens},
        },
    )
    graphdef, params = nnx.split(make_decoder(size, args.remat), nnx.Param)
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    state = init_state(params, optimizer)
    step = make_train_step(graphdef, config, optimizer)
    rng, shape_BT = np.random.default_rng(0), (size.train_rows, size.train_tokens)
    batch = TrainBatch(
        tokens=rng.integers(0, size.vocab_size, (shape_BT[0], shape_BT[1] + 1)).astype(np.int32),
        loss_mask=np.ones(shape_BT, bool),
        sampler_logprobs=np.full(shape_BT, -np.log(size.vocab_size), np.float32),
        advantages=rng.standard_normal(shape_BT).astype(np.float32),
    )
    times_s = []
    for _ in range(3 + args.reps):
        begin = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        times_s.append(time.perf_counter() - begin)
    if not bool(metrics["finite"]):
        raise AssertionError("the loss or a gradient is not finite")
    seconds = statistics.median(times_s[3:])
    flops = size.train_flops()
    return {
        "step_s": seconds,
        "tokens_per_s": shape_BT[0] * shape_BT[1] / seconds,
        "rows": shape_BT[0],
        "tokens": shape_BT[1],
        "remat": args.remat,
        "tflop_per_step": flops / 1e12,
        "tflop_per_s": flops / seconds / 1e12,
        "model_flops_utilisation": None if peak_flops is None else flops / seconds / peak_flops,
        "first_call_s": times_s[0],
    }


def decode(size: Size, args: argparse.Namespace, peak_flops: float | None, bandwidth: float | None) -> dict[str, Any]:
    """Time decoding of equally long completions; a step's time excludes that of a call for a single token."""
    import jax
    import numpy as np
    from flax import nnx

    from jdistill.rollout.sampler import Sampler

    graphdef, params = nnx.split(make_decoder(size, "none"), nnx.Param)
    rng = np.random.default_rng(0)
    prompts = list(rng.integers(0, size.vocab_size, (size.decode_rows, size.decode_prompt)).astype(np.int32))
    median_s = {}
    for num_new in (1, size.decode_new):
        sampler = Sampler(
            graphdef, max_prompt_tokens=size.decode_prompt, max_new_tokens=num_new, stop_token_ids=(), chunk_tokens=64
        )
        weights = sampler.prepare(params)
        times_s = []
        for rep in range(2 + args.reps):
            begin = time.perf_counter()
            seeds = np.arange(len(prompts)) + rep * len(prompts)
            num_tokens = sum(
                len(completion.sampler_logprobs)
                for completion in sampler.sample(weights, prompts, seeds=seeds, temperature=1.0)
            )
            jax.effects_barrier()
            times_s.append(time.perf_counter() - begin)
        if num_tokens != num_new * len(prompts):
            raise AssertionError(f"{num_tokens} tokens were sampled, expected {num_new * len(prompts)}")
        median_s[num_new] = statistics.median(times_s[2:])
    step_s = (median_s[size.decode_new] - median_s[1]) / (size.decode_new - 1)
    num_bytes = size.decode_bytes()
    return {
        "step_ms": 1e3 * step_s,
        "tokens_per_s": size.decode_rows / step_s,
        "tokens_per_s_with_prefill": size.decode_rows * size.decode_new / median_s[size.decode_new],
        "first_token_s": median_s[1],
        "rows": size.decode_rows,
        "prompt": size.decode_prompt,
        "new_tokens": size.decode_new,
        "gb_per_step": num_bytes / 1e9,
        "gb_per_s": num_bytes / step_s / 1e9,
        "bandwidth_share": None if bandwidth is None else num_bytes / bandwidth / step_s,
    }


if __name__ == "__main__":
    main()
