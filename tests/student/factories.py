"""Small decoders, configurations and batches for the tests of the training step."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdistill import models
from jdistill.config import TrainConfig, parse
from jdistill.student.batch import TrainBatch

V, K = 19, 4


def decoder_config(**changes):
    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 4}
    sizes |= {"num_kv_heads": 2, "head_dim": 4, "max_position_embeddings": 64}
    return models.DecoderConfig(family="qwen3", qk_norm=True, initializer_range=0.3, **(sizes | changes))


def train_config(**sections):
    data = {
        "run_dir": "unused",
        "num_steps": 10,
        "model": {"path": "unused"},
        "task": {"name": "unused"},
        "teacher": {"endpoints": ["unused:1"]},
        "rollout": {"num_prompts": 4, "num_completions": 2, "temperature": 0.7},
        "objective": {"distill_loss_weight": 0.5, "rl_loss_weight": 0.8, "chunk_tokens": 7},
        "optimizer": {"learning_rate": 0.01, "weight_decay": 0.1},
    }
    for name, section in sections.items():
        data[name] = data.get(name, {}) | section
    return parse(TrainConfig, data)


def make_params(mesh=None, **changes):
    decoder = models.random_init(decoder_config(**changes), 3, compute_dtype="float32", remat="layer", mesh=mesh)
    return nnx.split(decoder, nnx.Param)


def random_batch(num_rows=8, num_targets=12, seed=0, vocab=V):
    """Prompts of different lengths, right padding; the mask of one row has a hole."""
    rng = np.random.default_rng(seed)
    mask_BT = np.zeros((num_rows, num_targets), bool)
    for b in range(num_rows):
        start = int(rng.integers(1, 5))
        mask_BT[b, start : int(rng.integers(start + 1, num_targets + 1))] = True
    mask_BT[0, 1:9] = [True, True, False, True, True, False, True, True]
    ids_BTK = np.stack([rng.permutation(vocab)[:K] for _ in range(mask_BT.size)]).reshape(*mask_BT.shape, K)
    teacher_BTK = np.log(rng.dirichlet(np.ones(K + 1), mask_BT.shape)[..., :K])

    def floats(*shape):
        return np.where(mask_BT, rng.normal(size=shape), 0).astype(np.float32)

    return TrainBatch(
        tokens=rng.integers(0, vocab, (num_rows, num_targets + 1)).astype(np.int32),
        loss_mask=mask_BT,
        sampler_logprobs=floats(*mask_BT.shape) * 0.3 - 2.8,
        advantages=floats(*mask_BT.shape),
        teacher_logprobs=-np.abs(floats(*mask_BT.shape)) - 2,
        candidate_ids=ids_BTK.astype(np.int32),
        teacher_candidate_logprobs=teacher_BTK.astype(np.float32),
    )


def plain_logprobs(graphdef, params, batch, temperature):
    """Log-softmax [B, T, V] of a plain forward pass, all logits at once."""
    decoder = nnx.merge(graphdef, params)
    inputs_BT = jnp.asarray(batch.tokens[:, :-1])
    hidden_BTD, _ = decoder(inputs_BT, jnp.broadcast_to(jnp.arange(inputs_BT.shape[1]), inputs_BT.shape))
    return jax.nn.log_softmax(decoder.logits(hidden_BTD) / temperature)


def copy(tree):
    return jax.tree.map(jnp.copy, tree)
