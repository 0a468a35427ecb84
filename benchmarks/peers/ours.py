"""jdistill's side of the peers' work, by its public classes: `python -m benchmarks.peers.ours TASK`.

Dimension key: B rows, S tokens of a row, T = S - 1 targets, R completion tokens, K candidates.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import pathlib
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from benchmarks.peers import work
from jdistill import models
from jdistill.config import TrainConfig, parse
from jdistill.losses import advantages
from jdistill.rollout.sampler import Sampler
from jdistill.student.batch import TrainBatch, make_batch
from jdistill.student.logprobs import target_logprobs
from jdistill.student.optimizer import make_optimizer
from jdistill.student.state import TrainState, init_state
from jdistill.student.step import TrainStep, make_train_step

CANDIDATES = 8  # K of the distillation: objective.distill_top_k's default
REMAT = "layer"
FACTS = {"versions": work.versions("jax", "flax", "optax")}


def load_model() -> tuple[nnx.GraphDef, nnx.State]:
    """The model through a Hugging Face checkpoint, as a user's comes."""
    with tempfile.TemporaryDirectory(prefix="bench-student-") as name:
        directory = pathlib.Path(name)
        (directory / "config.json").write_text(json.dumps(work.hf_config()))
        safetensors.numpy.save_file(work.weights(), directory / "model.safetensors")
        return nnx.split(models.load(directory, remat=REMAT), nnx.Param)


def model_config() -> models.DecoderConfig:
    with tempfile.TemporaryDirectory(prefix="bench-student-") as name:
        pathlib.Path(name, "config.json").write_text(json.dumps(work.hf_config()))
        return models.config_from_hf(name)


def config(distillation: str, **changes: Any) -> TrainConfig:
    """The run's configuration; the KL to given log-probs is the term that a teacher's log-probs get.

    The peers' term is beta * (log p - log p_reference) itself, whose gradient has an expectation of 0; jdistill
    refuses that estimator, so its own step takes the right one, at the same cost.
    """
    data: dict[str, Any] = {
        "run_dir": "unused",
        "num_steps": 1_000_000,
        "model": {"path": "unused", "compute_dtype": "float32", "remat": REMAT},
        "task": {"name": "unused"},
        "teacher": {"endpoints": ["unused:1"]},
        "rollout": {
            "num_prompts": work.NUM_ROWS // work.GROUP,
            "num_completions": work.GROUP,
            "max_prompt_tokens": work.PROMPT_TOKENS,
            "max_new_tokens": work.NEW_TOKENS,
        },
        "objective": {
            "clip_low": work.CLIP,
            "clip_high": work.CLIP,
            "distillation": distillation,
            "distill_placement": "loss",
            "distill_loss_weight": work.KL_WEIGHT,
            **({"distill_top_k": CANDIDATES} if distillation.startswith("topk") else {}),
        },
        # clip_norm: the peers do not clip; the norm itself is still computed.
        "optimizer": {
            "learning_rate": work.LEARNING_RATE,
            "weight_decay": work.WEIGHT_DECAY,
            "b2": 0.999,
            "clip_norm": 1e9,
            "accumulate": 4,
        },
    }
    for name, section in changes.items():
        data[name] = data[name] | section
    return parse(TrainConfig, data)


def given_batch() -> TrainBatch:
    """The peers' batch on the target grid, the reference's log-probs as the teacher's."""
    data = work.batch()
    tokens_BS = np.concatenate([data["prompt_ids"], data["completion_ids"]], axis=1)
    mask_BT = np.zeros((work.NUM_ROWS, work.ROW_TOKENS - 1), bool)
    mask_BT[:, work.PROMPT_TOKENS - 1 :] = True

    def on_grid(values_BR: np.ndarray) -> np.ndarray:
        values_BT = np.zeros(mask_BT.shape, np.float32)
        values_BT[:, work.PROMPT_TOKENS - 1 :] = values_BR
        return values_BT

    return TrainBatch(
        tokens=tokens_BS,
        loss_mask=mask_BT,
        sampler_logprobs=on_grid(data["old_logprobs"]),
        advantages=on_grid(data["advantages"][:, None]),
        teacher_logprobs=on_grid(data["reference_logprobs"]),
    )


def with_candidates(batch: TrainBatch) -> TrainBatch:
    """The same with K tokens of each target and a teacher's log-probs of them."""
    rng = np.random.default_rng(work.SEED + 3)
    shape_BTK = (*batch.loss_mask.shape, CANDIDATES)
    # A stretch of the vocabulary from a random place: distinct, which drawing each by itself would not be.
    first_BT1 = rng.integers(0, work.VOCAB_SIZE - CANDIDATES, (*batch.loss_mask.shape, 1))
    logprobs_BTK = -np.log(work.VOCAB_SIZE) + 0.1 * rng.standard_normal(shape_BTK)
    return batch._replace(
        candidate_ids=(first_BT1 + np.arange(CANDIDATES)).astype(np.int32),
        teacher_candidate_logprobs=logprobs_BTK.astype(np.float32),
    )


def make_step(asked: TrainConfig, graphdef: nnx.GraphDef, params: nnx.State) -> tuple[TrainStep, TrainState]:
    optimizer = make_optimizer(asked.optimizer, asked.num_steps)
    return make_train_step(graphdef, asked, optimizer), init_state(params, optimizer)


def train(door: work.Door) -> None:
    asked, batch = config("straight_through_reverse_kl"), given_batch()
    graphdef, params = load_model()
    # The peers' loss under the first parameters, from the product's own log-probs and policy loss. It is compiled
    # before the clock runs and freed: it neither warms the step nor is part of its memory.
    mean_reference = float(batch.teacher_logprobs[batch.loss_mask].mean())
    facts = FACTS | {"mean_logprob": float(_logprobs(graphdef, params, batch)[batch.loss_mask].mean())}
    step, state = make_step(asked, graphdef, params)

    def once(_: dict[str, Any]) -> dict[str, Any]:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        given = work.KL_WEIGHT * (facts["mean_logprob"] - mean_reference)
        return {"loss": float(metrics["policy_loss"]) + given, "entropy": float(metrics["entropy"])}

    door.serve(once, facts)


def train_topk(door: work.Door) -> None:
    graphdef, params = load_model()
    batch = with_candidates(given_batch())
    step, state = make_step(config("topk_reverse_kl", objective={"distill_placement": None}), graphdef, params)

    def once(_: dict[str, Any]) -> dict[str, Any]:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        return {"loss": float(metrics["loss"])}

    door.serve(once, FACTS)


def _logprobs(graphdef: nnx.GraphDef, params: nnx.State, batch: TrainBatch) -> np.ndarray:
    return np.asarray(jax.jit(_score, static_argnums=0)(graphdef, params, batch.tokens, batch.loss_mask))


def _score(graphdef: nnx.GraphDef, params: nnx.State, tokens_BS: jax.Array, mask_BT: jax.Array) -> jax.Array:
    decoder = nnx.merge(graphdef, params)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1] - 1), mask_BT.shape)
    hidden_BTD, _ = decoder(tokens_BS[:, :-1], positions_BT)
    found = target_logprobs(
        hidden_BTD, decoder.head_DV(), tokens_BS[:, 1:], mask_BT, temperature=1.0, chunk_tokens=1024
    )
    return found.logprobs


def score(door: work.Door) -> None:
    graphdef, params = load_model()
    batch = given_batch()
    run = jax.jit(_score, static_argnums=0)

    def once(_: dict[str, Any]) -> dict[str, Any]:
        found = np.asarray(run(graphdef, params, batch.tokens, batch.loss_mask))
        return {"mean_logprob": float(found[batch.loss_mask].mean())}

    door.serve(once, FACTS)


def generate(door: work.Door) -> None:
    prompts = work.batch()["prompt_ids"]
    _generate(door, prompts, np.full(len(prompts), work.NEW_TOKENS))


def first_token(door: work.Door) -> None:
    prompts = work.batch()["prompt_ids"]
    _generate(door, prompts, np.ones(len(prompts), np.int32))


def generate_varied(door: work.Door) -> None:
    _generate(door, *work.varied())


def _generate(door: work.Door, prompts: np.ndarray, lengths: np.ndarray) -> None:
    graphdef, params = load_model()
    sampler = Sampler(
        graphdef, max_prompt_tokens=work.PROMPT_TOKENS, max_new_tokens=int(lengths.max()), stop_token_ids=()
    )
    # A sampler that takes a length for each request stops there; one that does not runs all to the longest.
    weights = sampler.prepare(params)
    own_lengths = "max_new_tokens" in inspect.signature(sampler.sample).parameters
    more = {"max_new_tokens": lengths} if own_lengths else {}
    seed = 0

    def once(_: dict[str, Any]) -> dict[str, Any]:
        nonlocal seed
        seed += 1
        seeds = np.arange(len(prompts)) + seed * len(prompts)
        kept = 0
        for completion in sampler.sample(weights, list(prompts), seeds=seeds, temperature=1.0, **more):
            kept += min(len(completion.sampler_logprobs), int(lengths[completion.index]))
        return {"tokens": kept}

    door.serve(once, FACTS | {"own_lengths": own_lengths})


def grpo_step(door: work.Door) -> None:
    """The whole loop: rollout, the frozen reference's log-probs, rewards, one update."""
    asked = config(
        "auto",
        objective={
            "distill_loss_weight": 0.0,
            "distill_placement": None,
            "reference": {"path": "unused", "weight": work.KL_WEIGHT, "estimator": "straight_through_reverse_kl"},
        },
    )
    graphdef, params = load_model()
    reference = jax.tree.map(jnp.copy, params)
    optimizer = make_optimizer(asked.optimizer, asked.num_steps)
    state = init_state(params, optimizer)
    step = make_train_step(graphdef, asked, optimizer, reference=reference)
    rollout = asked.rollout
    sampler = Sampler(
        graphdef,
        max_prompt_tokens=rollout.max_prompt_tokens,
        max_new_tokens=rollout.max_new_tokens,
        stop_token_ids=(),
        chunk_tokens=rollout.chunk_tokens,
    )
    prompts = np.repeat(work.batch()["prompt_ids"][: rollout.num_prompts], work.GROUP, axis=0)
    num_calls = 0

    def once(_: dict[str, Any]) -> dict[str, Any]:
        nonlocal state, num_calls
        num_calls += 1
        seeds = np.arange(len(prompts)) + num_calls * len(prompts)
        found = sampler.sample(sampler.prepare(state.params), list(prompts), seeds=seeds, temperature=1.0)
        completions = sorted(found, key=lambda completion: completion.index)
        rewards_PG = work.rewards(num_calls, len(prompts)).reshape(rollout.num_prompts, work.GROUP)
        advantages_B = np.asarray(advantages.ADVANTAGES["grpo"](rewards_PG)).reshape(-1)
        batch = make_batch(completions, advantages_B, None, max_length=work.ROW_TOKENS)
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        return {
            "tokens": sum(len(completion.sampler_logprobs) for completion in completions),
            "rewarded": num_calls,
            "loss": float(metrics["loss"]),
        }

    door.serve(once, FACTS)


def compile_time(door: work.Door) -> None:
    """Tracing, lowering and compiling the training step of the model with request["layers"] layers."""
    steps: dict[int, tuple[TrainStep, TrainState]] = {}
    asked, batch = config("straight_through_reverse_kl"), given_batch()

    def once(request: dict[str, Any]) -> dict[str, Any]:
        num_layers = request["layers"]
        if num_layers not in steps:
            decoder = models.random_init(
                dataclasses.replace(model_config(), num_layers=num_layers), work.SEED, remat=REMAT
            )
            steps[num_layers] = make_step(asked, *nnx.split(decoder, nnx.Param))
        step, state = steps[num_layers]
        jax.clear_caches()
        begin = time.perf_counter()
        compiled = jax.jit(step.program.step, donate_argnums=0).lower(state, batch, step.frozen).compile()
        return {
            "seconds": time.perf_counter() - begin,
            "temp_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        }

    door.serve(once, FACTS)


if __name__ == "__main__":
    work.main(
        {
            "train": train,
            "train_topk": train_topk,
            "generate": generate,
            "first_token": first_token,
            "generate_varied": generate_varied,
            "score": score,
            "grpo_step": grpo_step,
            "compile_time": compile_time,
        }
    )
