"""On-policy distillation in plain JAX and optax, with its own student; it uses only TeacherClient of jdistill.

  jdistill teacher --engine jax --model examples/addition/teacher --port 50051
  python examples/plain_jax_loop.py 127.0.0.1:50051

The student samples answers to 3-digit additions, the teacher scores the tokens that the student finds most likely at
each position, and the student moves towards the teacher (reverse KL; the rest of the vocabulary is one more outcome).

Dimension key: B sequences, S tokens, T = S - 1 targets (target t is token t + 1), V vocabulary, C candidates, W window.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdistill.client import TeacherClient

IDS = json.loads((pathlib.Path(__file__).parent / "addition/teacher/tokenizer.json").read_text())["model"]["vocab"]
V, W, S, PROMPT, END = len(IDS), 24, 41, 8, IDS["<end>"]  # "850+636=" and 33 tokens of response


def init(key):
    """Returns the parameters of an MLP that sees the last W tokens and its position."""
    keys = jax.random.split(key, 3)
    shapes = {"embed": (V + 1, 16), "hidden": (W * 16, 256), "out": (256, V)}
    params = {name: jax.random.normal(k, s) / s[0] ** 0.5 for k, (name, s) in zip(keys, shapes.items(), strict=True)}
    return params | {"position": jnp.zeros((S - 1, 256))}


def predict(params, window_W, position):
    """Log-probabilities [V] of the next token, given the last W tokens and the number of all tokens before it.

    Both arguments may have leading dims.
    """
    inputs = params["embed"][window_W].reshape(*window_W.shape[:-1], -1)
    hidden = jax.nn.gelu(inputs @ params["hidden"] + params["position"][position - 1])
    return jax.nn.log_softmax(hidden @ params["out"])


def log_probs(params, tokens_BS):
    """Log-probabilities of every token at every target, float32 [B, T, V]."""
    padded = jnp.pad(tokens_BS, ((0, 0), (W - 1, 0)), constant_values=V)
    windows_BTW = jnp.stack([padded[:, i : i + S - 1] for i in range(W)], axis=-1)
    return predict(params, windows_BTW, jnp.arange(1, S))


@jax.jit
def sample(params, prompts_BP, key):
    """Samples responses; returns tokens [B, S] and the mask [B, T] of sampled targets, up to and including <end>."""

    def step(t, padded):
        logprobs_BV = predict(params, jax.lax.dynamic_slice_in_dim(padded, t, W, axis=1), t)
        return padded.at[:, W + t].set(jax.random.categorical(jax.random.fold_in(key, t), logprobs_BV))

    padded = jnp.pad(prompts_BP, ((0, 0), (W, S - PROMPT)), constant_values=V)
    tokens_BS = jax.lax.fori_loop(PROMPT, S, step, padded)[:, W:]
    ended_BS = jnp.cumsum(tokens_BS == END, axis=1) > 0
    return tokens_BS, (jnp.arange(1, S) >= PROMPT) & ~ended_BS[:, :-1]


def reverse_kl(logprobs_BTC, teacher_logprobs_BTC):
    """KL(student || teacher) [B, T] over the candidates and one more outcome, all other tokens."""

    def with_tail(logprobs_BTC):
        rest = jnp.maximum(
            1 - jnp.exp(logprobs_BTC).sum(-1, keepdims=True), 1e-6
        )  # with all 16 tokens as candidates it is 0 or just below
        return jnp.concatenate([logprobs_BTC, jnp.log(rest)], axis=-1)

    own, teachers = with_tail(logprobs_BTC), with_tail(teacher_logprobs_BTC)
    return (jnp.exp(own) * (own - teachers)).sum(-1)


@jax.jit
@jax.value_and_grad
def loss_and_gradient(params, tokens_BS, mask_BT, candidate_ids_BTC, teacher_logprobs_BTC):
    """Mean reverse KL over the sampled tokens, in nats, and its gradient."""
    own_BTC = jnp.take_along_axis(log_probs(params, tokens_BS), candidate_ids_BTC, axis=-1)
    # where() before the product: targets that were not scored are NaN, so that they cannot pass for scores.
    teacher_BTC = jnp.where(mask_BT[..., None], teacher_logprobs_BTC, own_BTC)
    return reverse_kl(own_BTC, teacher_BTC).mean(where=mask_BT)


def train(teacher, params, *, num_steps=300, batch_size=64, num_candidates=4, seed=0, log=print):
    """Trains for `num_steps` steps; returns the parameters."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3, b2=0.95))
    rng, state = np.random.default_rng(seed), optimizer.init(params)
    for step in range(num_steps):
        prompts_BP = np.array([[IDS[c] for c in f"{a:03}+{b:03}="] for a, b in rng.integers(0, 1000, (batch_size, 2))])
        tokens_BS, mask_BT = sample(params, prompts_BP, jax.random.key(rng.integers(2**31)))
        candidate_ids_BTC = jax.lax.top_k(log_probs(params, tokens_BS), num_candidates)[1]
        scores = teacher.score_batch(tokens_BS, mask_BT, candidate_ids_BTC=candidate_ids_BTC)
        value, gradient = loss_and_gradient(params, tokens_BS, mask_BT, candidate_ids_BTC, scores.candidate_logprobs)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        if step % 25 == 0:
            log(f"step {step:4}  reverse KL {value:.3f}  {''.join(list(IDS)[i] for i in np.asarray(tokens_BS[0]))}")
    return params


if __name__ == "__main__":
    with TeacherClient([sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"]) as client:
        train(client, init(jax.random.key(0)))
