"""Target log-probs forward and backward, ours and the naive form: `python -m benchmarks.peers.logprob FORM N V D`.

Dimension key: N tokens, V vocabulary, D width, K candidates.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import work
from jdistill.config import ObjectiveSection
from jdistill.student.logprobs import TargetLogprobs, loss_of_targets

CANDIDATES = 8
VARIANTS = ("plain", "entropy", "topk")
CHUNK_TOKENS = ObjectiveSection().chunk_tokens
Form = Literal["ours", "naive", "log_softmax"]


def of_logprobs(logprobs_NK: jax.Array, advantages_N: jax.Array) -> jax.Array:
    """A policy gradient's loss by the ratio to a policy of log-prob -12 (about 1 / 151,936); candidates weigh 1/K."""
    ratio_NK = jnp.exp(logprobs_NK + 12)
    return -jnp.mean(advantages_N * jnp.mean(ratio_NK, axis=1))


def loss(
    form: Form, variant: str, hidden_ND: jax.Array, head_DV: jax.Array, ids_NK: jax.Array, advantages_N: jax.Array
) -> Any:
    """A scalar of the log-prob of the first id (topk: of all) at each token; the entropy beside it."""
    if variant != "topk":
        ids_NK = ids_NK[:, :1]
    if form == "ours":

        def of_scores(found: TargetLogprobs, advantages_N: jax.Array) -> jax.Array:
            logprobs_NK = found.logprobs[0, :, None]
            if found.candidate_logprobs is not None:
                logprobs_NK = jnp.concatenate([logprobs_NK, found.candidate_logprobs[0]], axis=1)
            return of_logprobs(logprobs_NK, advantages_N)

        total, found = loss_of_targets(
            of_scores,
            advantages_N,
            hidden_ND[None],
            head_DV,
            ids_NK[None, :, 0],
            jnp.ones((1, len(ids_NK)), bool),
            ids_NK[None, :, 1:] if variant == "topk" else None,
            temperature=1.0,
            chunk_tokens=CHUNK_TOKENS,
        )
        entropy = found.entropy.sum()
    else:
        logits_NV = (hidden_ND @ head_DV).astype(jnp.float32)
        if form == "log_softmax":
            logprobs_NV = jax.nn.log_softmax(logits_NV)
            total = of_logprobs(jnp.take_along_axis(logprobs_NV, ids_NK, axis=1), advantages_N)
        else:
            norm_N1 = jax.nn.logsumexp(logits_NV, axis=1, keepdims=True)
            total = of_logprobs(jnp.take_along_axis(logits_NV, ids_NK, axis=1) - norm_N1, advantages_N)
            logprobs_NV = logits_NV - norm_N1
        entropy = -(jnp.exp(logprobs_NV) * logprobs_NV).sum()
    # A metric: without a gradient. "plain" does not ask for it, so the naive forms do not pay for it.
    return total, jax.lax.stop_gradient(entropy) if variant == "entropy" else None


def compiled(form: Form, variant: str, num_tokens: int, vocab_size: int, width: int) -> Any:
    shapes = (
        jax.ShapeDtypeStruct((num_tokens, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocab_size), jnp.float32),
        jax.ShapeDtypeStruct((num_tokens, 1 + CANDIDATES), jnp.int32),
        jax.ShapeDtypeStruct((num_tokens,), jnp.float32),
    )
    grad = jax.value_and_grad(functools.partial(loss, form, variant), argnums=(0, 1), has_aux=True)
    return jax.jit(grad).lower(*shapes).compile()


def temp_mib(*args: Any) -> float:
    return compiled(*args).memory_analysis().temp_size_in_bytes / 2**20


def inputs(num_tokens: int, vocab_size: int, width: int) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(work.SEED)
    hidden_ND = rng.standard_normal((num_tokens, width), dtype=np.float32)
    head_DV = rng.standard_normal((width, vocab_size), dtype=np.float32) * np.float32(0.02)
    # Distinct ids of a token: a stretch from a random place.
    first_N1 = rng.integers(0, vocab_size - CANDIDATES, (num_tokens, 1))
    ids_NK = (first_N1 + np.arange(1 + CANDIDATES)[None]).astype(np.int32)
    advantages_N = rng.standard_normal(num_tokens, dtype=np.float32)
    return tuple(jnp.asarray(x) for x in (hidden_ND, head_DV, ids_NK, advantages_N))


def gradient_error() -> float:
    """Of ours against the naive form at a small size: the largest difference, relative to the largest gradient."""
    sizes, worst = (512, 4096, 64), 0.0
    args = inputs(*sizes)
    for variant in VARIANTS:
        found, expected = (compiled(form, variant, *sizes)(*args) for form in ("ours", "naive"))
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            worst = max(worst, float(jnp.abs(x - y).max() / jnp.abs(y).max()))
    return worst


def main() -> None:
    form, num_tokens, vocab_size, width = sys.argv[1], *map(int, sys.argv[2:])
    door, sizes = work.Door(), (num_tokens, vocab_size, width)
    runs = {variant: compiled(form, variant, *sizes) for variant in VARIANTS}
    facts = {
        "temp_mib": {v: run.memory_analysis().temp_size_in_bytes / 2**20 for v, run in runs.items()},
        "temp_mib_half": {v: temp_mib(form, v, num_tokens // 2, vocab_size, width) for v in VARIANTS},
        "chunk_tokens": CHUNK_TOKENS,
    }
    if form == "ours":
        facts["gradient_error"] = gradient_error()
    else:
        facts["temp_mib_log_softmax"] = temp_mib("log_softmax", "plain", *sizes)
    args = inputs(*sizes)

    def once(request: dict[str, Any]) -> dict[str, Any]:
        (value, _), _ = jax.block_until_ready(runs[request["variant"]](*args))
        return {"value": float(value)}

    door.serve(once, facts)


if __name__ == "__main__":
    main()
