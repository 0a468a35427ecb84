"""JAX engine: scores with jdistill's decoders, in a few static shapes, so that few programs are compiled.

A sequence is padded to the bucket of its length and runs in a pass with a fixed number of rows, so its scores do not
depend on the rest of the batch. Only scored positions are projected onto the vocabulary, in chunks of a fixed size.

Dimension key: B rows per pass, S bucket length, D hidden size, V vocabulary, N scored positions of the whole batch, n
scored positions per chunk, K top-k, C candidates.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

from jdistill import buckets, models
from jdistill.sidecar.batching import BatchedEngine, split_scores
from jdistill.sidecar.engines.options import check_engine_args, check_sizes, model_info
from jdistill.wire.errors import EngineDeadError
from jdistill.wire.types import SequenceToScore, TokenScores

# The names that `engine_args` may have, and their defaults.
ENGINE_ARGS: dict[str, int | None] = {
    "pass_tokens": None,  # padded tokens of one forward pass; None: max_batch_tokens, on a CPU at most CPU_PASS_TOKENS
    "chunk_tokens": None,  # positions whose logits exist at once; None: CHUNK_LOGITS / vocab_size, from 16 to 1024
}
# A pass always computes all its rows, and on a CPU an empty row costs as much as a full one: 1,024 tokens keep two to
# sixteen cores busy, and a single sequence does not pay for 16,384.
CPU_PASS_TOKENS = 1024
CHUNK_LOGITS = 64 << 20  # 256 MiB in float32


class JaxEngine(BatchedEngine):
    """Scores with jdistill.models; top-k, candidates and any temperature, all up to the whole vocabulary."""

    name = "jax"
    _compiled = False

    def load(self) -> None:
        """See BatchedEngine.load."""
        config = self.config
        check_engine_args(self.name, config.engine_args, ENGINE_ARGS)
        args = {**ENGINE_ARGS, **config.engine_args}
        for name, value in args.items():
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"engine_args: {name} must be a positive integer, got {value!r}")
        self.version = jax.__version__
        check_sizes(self.name, config, "tensor_parallel_size")
        self.info = model_info(config)
        devices = jax.devices()
        if config.tensor_parallel_size > len(devices):
            raise ValueError(
                f"tensor_parallel_size = {config.tensor_parallel_size}, but JAX sees {len(devices)} "
                f"{devices[0].platform} device(s) ({', '.join(map(str, devices[:8]))})"
            )
        mesh = None
        if config.tensor_parallel_size > 1:
            devices = devices[: config.tensor_parallel_size]
            mesh = jax.make_mesh((len(devices),), ("tensor",), axis_types=(AxisType.Auto,), devices=devices)
        on_cpu = devices[0].platform == "cpu"
        self._pass_tokens = args["pass_tokens"] or (
            min(config.max_batch_tokens, CPU_PASS_TOKENS) if on_cpu else config.max_batch_tokens
        )
        self._chunk_tokens = args["chunk_tokens"] or int(np.clip(CHUNK_LOGITS // self.info.vocab_size, 16, 1024))
        decoder = models.load(
            config.model, compute_dtype=self.info.dtype, param_dtype=self.info.dtype, mesh=mesh, remat="none"
        )
        graphdef, self._params = nnx.split(decoder)
        if self._compiled:
            return
        self._compiled = True
        self._hidden = jax.jit(functools.partial(_hidden, graphdef))
        self._take = jax.jit(lambda hidden_BSD, rows_n, columns_n: hidden_BSD[rows_n, columns_n])
        self._project = jax.jit(functools.partial(_project, graphdef), static_argnames="top_k")

    def score_batch(
        self, sequences: list[SequenceToScore], *, top_k: int, temperature: float, adapter: str = ""
    ) -> list[TokenScores]:
        """See BatchedEngine.score_batch."""
        by_bucket: dict[int, list[int]] = {}
        for i, sequence in enumerate(sequences):
            bucket = buckets.scored_length(len(sequence.token_ids), self.info.max_sequence_length)
            by_bucket.setdefault(bucket, []).append(i)
        passes = [
            (S, indices[start : start + self._num_rows(S)])
            for S, indices in by_bucket.items()
            for start in range(0, len(indices), self._num_rows(S))
        ]
        ids: dict[int, np.ndarray] = {}
        results: dict[int, list[np.ndarray]] = {}
        try:
            # All passes are dispatched before the first result is read, so the device does not wait for the host.
            pending = []
            for S, indices in passes:
                tokens_BS = np.zeros((self._num_rows(S), S), np.int32)
                for row, i in enumerate(indices):
                    tokens_BS[row, : len(sequences[i].token_ids)] = sequences[i].token_ids
                    ids[i] = tokens_BS[row, : len(sequences[i].token_ids)]
                chosen = [sequences[i] for i in indices]
                pending.append(self._score_pass(tokens_BS, chosen, top_k, temperature))
            for (_, indices), chunks in zip(passes, pending, strict=True):
                counts = [sequences[i].num_scored for i in indices]
                # [N, ...] of this pass without the padding of its last chunk, then split by sequence.
                joined = [
                    np.concatenate([np.asarray(x) for x in part])[: sum(counts)] for part in zip(*chunks, strict=True)
                ]
                cuts = [np.split(part, np.cumsum(counts)[:-1]) for part in joined]
                for row, i in enumerate(indices):
                    results[i] = [cut[row] for cut in cuts]
        except jax.errors.JaxRuntimeError as e:
            # Out of memory fails only these sequences; after any other accelerator error the process is unusable.
            if "RESOURCE_EXHAUSTED" in str(e) or jax.default_backend() == "cpu":
                raise
            raise EngineDeadError(f"the jax engine's device failed: {e}") from e
        order = range(len(sequences))
        logprobs_N, top_ids_NK, top_logprobs_NK, candidate_logprobs_NC = (
            np.concatenate(part) for part in zip(*(results[i] for i in order), strict=True)
        )
        return split_scores(
            sequences,
            [ids[i] for i in order],
            logprobs_N,
            top_ids_NK=top_ids_NK if top_k else None,
            top_logprobs_NK=top_logprobs_NK if top_k else None,
            candidate_logprobs_NC=None if sequences[0].candidate_ids is None else candidate_logprobs_NC,
        )

    def _num_rows(self, bucket: int) -> int:
        return max(1, self._pass_tokens // bucket)

    def _score_pass(
        self, tokens_BS: np.ndarray, sequences: list[SequenceToScore], top_k: int, temperature: float
    ) -> list[tuple[jax.Array, ...]]:
        """Dispatches one forward pass and its projections; returns one tuple (see _project) per chunk."""
        positions = [sequence.scored_positions() for sequence in sequences]
        columns_N = np.concatenate(positions)
        rows_N = np.repeat(np.arange(len(sequences), dtype=np.int32), [len(p) for p in positions])
        targets_N = tokens_BS[rows_N, columns_N]
        if sequences[0].candidate_ids is None:
            candidates_NC = np.zeros((len(rows_N), 0), np.int32)
        else:
            candidates_NC = np.concatenate([sequence.candidate_ids for sequence in sequences]).astype(np.int32)
        hidden_BSD = self._hidden(self._params, tokens_BS)
        chunks = []
        for start in range(0, len(rows_N), self._chunk_tokens):
            rows_n, columns_n, targets_n, candidates_nC = (
                _padded(part[start : start + self._chunk_tokens], self._chunk_tokens)
                for part in (rows_N, columns_N - 1, targets_N, candidates_NC)  # the logits at t - 1 are for token t
            )
            hidden_nD = self._take(hidden_BSD, rows_n, columns_n)
            chunks.append(
                self._project(self._params, hidden_nD, targets_n, candidates_nC, np.float32(temperature), top_k=top_k)
            )
        return chunks

    def unload(self) -> None:
        """See BatchedEngine.unload."""
        self._params = None  # compiled functions stay, so waking reads the weights and compiles nothing


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([values, np.zeros((size - len(values), *values.shape[1:]), values.dtype)])


def _hidden(graphdef: nnx.GraphDef, params: nnx.State, tokens_BS: jax.Array) -> jax.Array:
    # No lengths are needed: padding is on the right, and causal attention hides it from real tokens.
    positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
    return nnx.merge(graphdef, params)(tokens_BS, positions_BS)[0]


def _project(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    hidden_nD: jax.Array,
    targets_n: jax.Array,
    candidates_nC: jax.Array,
    temperature: jax.Array,
    *,
    top_k: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns log-probs of targets [n], top-k ids [n, K], their log-probs [n, K] and those of candidates [n, C].

    Log-probs are float32, in nats.
    """
    logits_nV = nnx.merge(graphdef, params).logits(hidden_nD) / temperature
    normalizer_n1 = jax.nn.logsumexp(logits_nV, axis=-1, keepdims=True)

    def logprobs(logits_nX: jax.Array) -> jax.Array:
        # logit - normalizer can round to a few 1e-7 above 0.
        return jnp.minimum(logits_nX - normalizer_n1, 0.0)

    top_logits_nK, top_ids_nK = jax.lax.top_k(logits_nV, top_k)
    return (
        logprobs(jnp.take_along_axis(logits_nV, targets_n[:, None], axis=-1))[:, 0],
        top_ids_nK,
        logprobs(top_logits_nK),
        logprobs(jnp.take_along_axis(logits_nV, candidates_nC, axis=-1)),
    )
