"""Tunix's side, by its public classes: `python -m benchmarks.peers.tunix TASK`, with google-tunix 0.1.7."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen3.model import ModelConfig, Qwen3
from tunix.rl import algo_core, common, function_registry, rl_cluster  # noqa: F401  algo_core: registers the losses
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner, TrainExample
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.rl.trainer import Trainer
from tunix.sft.peft_trainer import TrainingConfig

from benchmarks.peers import work

logging.disable(logging.WARNING)
NEVER = 10**9
END_ID = work.VOCAB_SIZE  # outside the vocabulary: never sampled, so every row has its full length
FACTS = {"versions": work.versions("google-tunix", "jax", "flax", "optax")}


def make_model() -> Qwen3:
    config = ModelConfig(
        num_layers=work.NUM_LAYERS,
        vocab_size=work.VOCAB_SIZE,
        embed_dim=work.WIDTH,
        hidden_dim=work.MLP_WIDTH,
        num_heads=work.NUM_HEADS,
        head_dim=work.HEAD_DIM,
        num_kv_heads=work.NUM_KV_HEADS,
        rope_theta=int(work.ROPE_THETA),
        norm_eps=work.NORM_EPS,
        use_tied_embedding=True,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    )
    model = Qwen3(config, rngs=nnx.Rngs(0))
    tensors = work.weights()
    model.embedder.input_embedding.value = jnp.asarray(tensors["model.embed_tokens.weight"])
    model.final_norm.w.value = jnp.asarray(tensors["model.norm.weight"])
    for i, layer in enumerate(model.layers):
        attention, mlp = layer.attn, layer.mlp
        targets = {
            "input_layernorm": layer.input_layernorm.w,
            "post_attention_layernorm": layer.post_attention_layernorm.w,
            "self_attn.q_norm": attention.q_norm.w,
            "self_attn.k_norm": attention.k_norm.w,
            "self_attn.q_proj": attention.q_proj.w,
            "self_attn.k_proj": attention.k_proj.w,
            "self_attn.v_proj": attention.v_proj.w,
            "self_attn.o_proj": attention.o_proj.w,
            "mlp.gate_proj": mlp.gate_proj.kernel,
            "mlp.up_proj": mlp.up_proj.kernel,
            "mlp.down_proj": mlp.down_proj.kernel,
        }
        for name, param in targets.items():
            # [out, in] -> [in, out], then split into heads where Tunix does.
            param.value = jnp.asarray(tensors[f"model.layers.{i}.{name}.weight"].T.reshape(param.value.shape))
    return model


class IdTokenizer:
    """Text is numbers with spaces between them."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(str(int(i)) for i in ids)

    def bos_id(self) -> int:
        return 0  # false: the sampler puts no such token in front

    def eos_id(self) -> int:
        return END_ID

    def pad_id(self) -> int:
        return work.PAD_ID


def texts(prompts: np.ndarray) -> list[str]:
    return [IdTokenizer().decode(row) for row in prompts]


def optimizer() -> optax.GradientTransformation:
    return optax.adamw(work.LEARNING_RATE, weight_decay=work.WEIGHT_DECAY)


def algorithm() -> GRPOConfig:
    return GRPOConfig(num_generations=work.GROUP, num_iterations=1, beta=work.KL_WEIGHT, epsilon=work.CLIP)


def train(door: work.Door) -> None:
    model, config, data = make_model(), algorithm(), work.batch()
    config.temperature = 1.0
    trainer = Trainer(
        model,
        optimizer(),
        TrainingConfig(eval_every_n_steps=NEVER, max_steps=NEVER),
        custom_checkpoint_metadata_fn=lambda: {},
    )
    policy_loss = function_registry.get_policy_loss_fn("grpo")

    def loss(model: Qwen3, train_example: TrainExample, algo_config: GRPOConfig) -> Any:
        return policy_loss(
            model, train_example, algo_config=config, pad_id=work.PAD_ID, eos_id=END_ID, compute_logps_chunk_size=0
        )

    trainer.with_loss_fn(loss, has_aux=True)
    trainer.with_gen_model_input_fn(lambda example: {"train_example": example, "algo_config": config})
    step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    example = TrainExample(
        prompt_ids=jnp.asarray(data["prompt_ids"]),
        prompt_mask=jnp.ones(data["prompt_ids"].shape, bool),
        completion_ids=jnp.asarray(data["completion_ids"]),
        completion_mask=jnp.ones(data["completion_ids"].shape, bool),
        advantages=jnp.asarray(data["advantages"]),
        ref_per_token_logps=jnp.asarray(data["reference_logprobs"]),
        old_per_token_logps=jnp.asarray(data["old_logprobs"]),
    )

    def once(_: dict[str, Any]) -> dict[str, Any]:
        found = jax.block_until_ready(step(example))
        jax.block_until_ready(nnx.state(model))
        return {"loss": float(found[0])}

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
    """A batch runs to its longest request; the tokens after a shorter one's end are thrown away."""
    longest = int(lengths.max())
    cache = CacheConfig(
        cache_size=work.PROMPT_TOKENS + longest,
        num_layers=work.NUM_LAYERS,
        num_kv_heads=work.NUM_KV_HEADS,
        head_dim=work.HEAD_DIM,
    )
    sampler, words, seed = Sampler(make_model(), IdTokenizer(), cache), texts(prompts), 0

    def once(_: dict[str, Any]) -> dict[str, Any]:
        nonlocal seed
        seed += 1
        found = sampler(
            words,
            max_generation_steps=longest,
            max_prompt_length=work.PROMPT_TOKENS,
            temperature=1.0,
            top_p=1.0,
            top_k=None,
            return_logprobs=True,
            seed=seed,
            echo=False,
        )
        kept = sum(len(np.asarray(row)[:length]) for row, length in zip(found.tokens, lengths, strict=True))
        return {"tokens": kept}

    door.serve(once, FACTS)


def score(door: work.Door) -> None:
    graphdef, state = nnx.split(make_model())
    data = work.batch()
    run = functools.partial(
        common.compute_per_token_logps,
        graphdef,
        state,
        prompt_tokens=jnp.asarray(data["prompt_ids"]),
        completion_tokens=jnp.asarray(data["completion_ids"]),
        pad_id=work.PAD_ID,
        eos_id=END_ID,
        stop_gradient=True,
        temperature=1.0,
    )

    def once(_: dict[str, Any]) -> dict[str, Any]:
        found = run()
        found = jax.block_until_ready(found[0] if isinstance(found, tuple) else found)
        return {"mean_logprob": float(found.mean())}

    door.serve(once, FACTS)


def grpo_step(door: work.Door) -> None:
    """GRPOLearner's own loop; a step lasts from one look at the data to the next, with nothing left on the device."""
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    model = make_model()
    roles = rl_cluster.Role
    cluster = rl_cluster.RLCluster(
        actor=model,
        reference=make_model(),
        tokenizer=IdTokenizer(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys((roles.ACTOR, roles.REFERENCE, roles.ROLLOUT), mesh),
            rollout_engine="vanilla",
            offload_to_cpu=False,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optimizer(), eval_every_n_steps=NEVER, max_steps=NEVER
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=work.NEW_TOKENS,
                max_prompt_length=work.PROMPT_TOKENS,
                kv_cache_size=work.ROW_TOKENS,
                temperature=1.0,
                top_p=1.0,
                top_k=None,
                return_logprobs=True,
            ),
        ),
    )
    num_calls = 0

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        nonlocal num_calls
        num_calls += 1
        return work.rewards(num_calls, len(completions)).tolist()

    prompts = np.array(texts(work.batch()["prompt_ids"][: work.NUM_ROWS // work.GROUP]))

    def steps() -> Iterator[dict[str, Any]]:
        door.say(FACTS)
        while door.wait() is not None:
            begin = time.perf_counter(), time.process_time()
            yield {"prompts": prompts}
            jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
            door.say({**work.costs(*begin), "tokens": work.NUM_ROWS * work.NEW_TOKENS, "rewarded": num_calls})

    GRPOLearner(rl_cluster=cluster, reward_fns=reward, algo_config=algorithm()).train(steps())


if __name__ == "__main__":
    work.main(
        {
            "train": train,
            "generate": generate,
            "first_token": first_token,
            "generate_varied": generate_varied,
            "score": score,
            "grpo_step": grpo_step,
        }
    )
