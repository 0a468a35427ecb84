"""What the sampler runs on the device, compiled: prefill, admission into rows, resizing, chunks of decoding.

Every shape is a bucket, so a sampler compiles one program per (rows, requests, prompts, prompt length, cache slots).

Dimension key: `B` rows, `A` requests that are given rows together, `U` distinct prompts of these, `S` prompt tokens
(padded to a bucket), `C` steps of a chunk, `V` vocabulary, `K` candidates, `D` width.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Bool, Float, Int, UInt32

from jdistill import models
from jdistill.models.precision import cast_params
from jdistill.rollout.draw import Truncation, draw_tokens, most_likely_tokens


@dataclass(frozen=True)
class DecodeSettings:
    """The part of a sampler's settings that its programs are compiled for."""

    stop_token_ids: tuple[int, ...]
    min_new_tokens: int
    num_candidates: int  # K
    chunk_tokens: int  # C
    truncation: Truncation
    cache_dtype: jax.typing.DTypeLike | None  # None: the decoder's compute dtype
    row_sharding: NamedSharding | None  # of arrays [B, ...]; None: rows are on one device


class Rows(NamedTuple):
    """State of the rows that are being decoded, on the device; each program consumes it (donated)."""

    cache: models.KVCache
    tokens: Int[jax.Array, "B"]  # the last sampled token, not yet in the cache
    positions: Int[jax.Array, "B"]  # its position
    done: Bool[jax.Array, "B"]
    seeds: UInt32[jax.Array, "B"]
    first_ends: Int[jax.Array, "B"]  # position of the first token that may be a stop token: min_new_tokens
    last_positions: Int[jax.Array, "B"]  # position at which a completion has its max_new_tokens


class Sampled(NamedTuple):
    """Results of one chunk, which the host reads. Columns after a row's end are meaningless."""

    token_ids: Int[jax.Array, "B C"]
    logprobs: Float[jax.Array, "B C"]
    candidate_ids: Int[jax.Array, "B C K"]


class CallSettings(NamedTuple):
    """Settings of one call of `Sampler.sample`; traced, so changing them compiles nothing."""

    temperature: Float[np.ndarray, ""]
    greedy: Bool[np.ndarray, ""]


class DecodeWeights(NamedTuple):
    """Weights that every decoding step reads: in compute dtype (norms in float32), one array per layer."""

    params: Any  # the decoder's state; its stacked layers are empty
    layers: list[dict[str, jax.Array]]


class Programs:
    """The compiled programs of one sampler; attributes are the functions of this module, jitted."""

    def __init__(self, graphdef: nnx.GraphDef, settings: DecodeSettings):
        self.settings = settings

        def bound(function: Any) -> Any:
            return functools.partial(function, graphdef, settings)

        self.cast = jax.jit(functools.partial(cast_weights, graphdef))
        self.empty = jax.jit(bound(empty_rows), static_argnames=("num_rows", "num_slots"))
        self.prefill = jax.jit(bound(prefill))
        self.admit = jax.jit(functools.partial(admit, settings), donate_argnames="rows")
        self.resize = jax.jit(functools.partial(resize, settings), static_argnames="num_slots")
        self.decode = jax.jit(bound(decode_chunk), donate_argnames="rows")


def cast_weights(graphdef: nnx.GraphDef, params: Any) -> DecodeWeights:
    """Casts a decoder's parameters for decoding, and unstacks its layers."""
    decoder = nnx.merge(graphdef, params)
    layers = cast_params(decoder.unstacked(), decoder.compute_dtype)
    # The decoder gets its layers apart; an empty array keeps their place in its state.
    emptied = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros(0, x.dtype) if "layers" in jax.tree_util.keystr(path) else x, params
    )
    return DecodeWeights(cast_params(emptied, decoder.compute_dtype), layers)


def empty_rows(graphdef: nnx.GraphDef, settings: DecodeSettings, params: Any, num_rows: int, num_slots: int) -> Rows:
    """Returns `num_rows` rows without a request, with a cache of `num_slots` slots."""
    decoder = nnx.merge(graphdef, params)
    dtype = decoder.compute_dtype if settings.cache_dtype is None else settings.cache_dtype
    zeros = functools.partial(jnp.zeros, num_rows)
    return Rows(
        cache=_constrained(settings, models.init_cache(decoder.config, num_rows, num_slots, dtype)),
        tokens=zeros(jnp.int32),
        positions=zeros(jnp.int32),
        done=jnp.ones(num_rows, bool),
        seeds=zeros(jnp.uint32),
        first_ends=zeros(jnp.int32),
        last_positions=zeros(jnp.int32),
    )


def prefill(
    graphdef: nnx.GraphDef,
    settings: DecodeSettings,
    params: Any,
    token_US: Int[jax.Array, "U S"],
    length_U: Int[jax.Array, "U"],
) -> tuple[Float[jax.Array, "U V"], models.KVCache]:
    """Returns the logits after each prompt, and the prompts' cache."""
    decoder = nnx.merge(graphdef, params)
    position_US = jnp.broadcast_to(jnp.arange(token_US.shape[1], dtype=jnp.int32), token_US.shape)
    hidden_USD, cache = decoder.prefill(token_US, position_US)
    hidden_UD = jnp.take_along_axis(hidden_USD, (length_U - 1)[:, None, None], axis=1)[:, 0]
    return decoder.logits(hidden_UD), _constrained(settings, cache)


class Admission(NamedTuple):
    """A requests that are given rows together, padded to a bucket."""

    lengths: Int[np.ndarray, "U"]  # of the distinct prompts
    sources: Int[np.ndarray, "A"]  # which of the prompts a request has
    rows: Int[np.ndarray, "A"]  # its row; padding has a row that does not exist
    seeds: UInt32[np.ndarray, "A"]
    first_ends: Int[np.ndarray, "A"]  # see Rows
    last_positions: Int[np.ndarray, "A"]


def admit(
    settings: DecodeSettings,
    rows: Rows,
    logits_UV: Float[jax.Array, "U V"],
    cache: models.KVCache,
    admission: Admission,
    call: CallSettings,
) -> tuple[Rows, Sampled]:
    """Copies each request's prompt cache into its row, and draws its first token."""
    length_U, source_A, row_A, seed_A, first_end_A, last_position_A = admission
    logits_AV, length_A = logits_UV[source_A], length_U[source_A]
    drawn = _draw(settings, logits_AV, length_A, seed_A, first_end_A, call)
    done_A = _ends(settings, drawn[0], length_A, first_end_A, last_position_A)
    new = (drawn[0], length_A, done_A, seed_A, first_end_A, last_position_A)
    put = [to.at[row_A].set(x, mode="drop") for to, x in zip(rows[1:], new, strict=True)]
    prompt_slots = cache.num_slots
    kept = models.KVCache(
        tuple(
            to.at[row_A, :, :, :prompt_slots].set(k[source_A].astype(to.dtype), mode="drop")
            for to, k in zip(rows.cache.k, cache.k, strict=True)
        ),
        tuple(
            to.at[row_A, :, :prompt_slots].set(v[source_A].astype(to.dtype), mode="drop")
            for to, v in zip(rows.cache.v, cache.v, strict=True)
        ),
    )
    return Rows(_constrained(settings, kept), *put), Sampled(*(x[:, None] for x in drawn))


def resize(
    settings: DecodeSettings,
    rows: Rows,
    index_B: Int[jax.Array, "B"] | None,
    padding_B: Bool[jax.Array, "B"] | None,
    num_slots: int,
) -> Rows:
    """Returns the rows at `index_B` (None: all of them) with `num_slots` cache slots; rows of padding are done."""
    if index_B is not None:
        cache = jax.tree.map(lambda x: x[index_B], rows.cache)
        rows = Rows(cache, *(x[index_B] for x in rows[1:]))
        rows = rows._replace(done=rows.done | padding_B)
    return rows._replace(cache=_constrained(settings, models.resize_cache(rows.cache, num_slots)))


def decode_chunk(
    graphdef: nnx.GraphDef, settings: DecodeSettings, weights: DecodeWeights, rows: Rows, call: CallSettings
) -> tuple[Rows, Sampled]:
    """Decodes C steps, or fewer if all rows end before."""
    decoder = nnx.merge(graphdef, weights.params)
    shape_BC = (rows.tokens.shape[0], settings.chunk_tokens)
    sampled = Sampled(
        token_ids=jnp.zeros(shape_BC, jnp.int32),
        logprobs=jnp.zeros(shape_BC, jnp.float32),
        candidate_ids=jnp.zeros((*shape_BC, settings.num_candidates), jnp.int32),
    )

    def goes_on(carry: tuple[jax.Array, Rows, Sampled]) -> jax.Array:
        step, rows, _ = carry
        return (step < settings.chunk_tokens) & ~jnp.all(rows.done)

    def one_step(carry: tuple[jax.Array, Rows, Sampled]) -> tuple[jax.Array, Rows, Sampled]:
        step, rows, sampled = carry
        hidden_B1D, cache = decoder(
            rows.tokens[:, None], rows.positions[:, None], cache=rows.cache, layers=weights.layers
        )
        next_B = rows.positions + 1
        logits_BV = decoder.logits(hidden_B1D[:, 0])
        drawn = _draw(settings, logits_BV, next_B, rows.seeds, rows.first_ends, call)
        sampled = Sampled(
            *(
                jax.lax.dynamic_update_index_in_dim(columns, column, step, axis=1)
                for columns, column in zip(sampled, drawn, strict=True)
            )
        )
        rows = rows._replace(
            cache=_constrained(settings, cache),
            tokens=jnp.where(rows.done, rows.tokens, drawn[0]),
            positions=jnp.where(rows.done, rows.positions, next_B),
            done=rows.done | _ends(settings, drawn[0], next_B, rows.first_ends, rows.last_positions),
        )
        return step + 1, rows, sampled

    _, rows, sampled = jax.lax.while_loop(goes_on, one_step, (jnp.int32(0), rows, sampled))
    return rows, sampled


def _draw(
    settings: DecodeSettings,
    logits_BV: jax.Array,
    position_B: jax.Array,
    seed_B: jax.Array,
    first_end_B: jax.Array,
    call: CallSettings,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws the tokens at `position_B`; returns them, their log-probs, and the K most likely tokens."""
    scaled_BV = logits_BV.astype(jnp.float32) / call.temperature
    possible_BV = None
    if settings.min_new_tokens and settings.stop_token_ids:
        stops_BV = jnp.zeros(scaled_BV.shape, bool).at[:, np.array(settings.stop_token_ids)].set(True)
        too_early_BV = stops_BV & (position_B < first_end_B)[:, None]
        possible_BV = jnp.where(too_early_BV, -jnp.inf, scaled_BV)
    # After the stop tokens are taken out: with top_k = 1 a stop token would otherwise leave nothing to draw.
    allowed_BV = settings.truncation(scaled_BV if possible_BV is None else possible_BV)
    allowed_BV = possible_BV if allowed_BV is None else allowed_BV
    token_B, logprob_B = draw_tokens(scaled_BV, seed_B, position_B, call.greedy, allowed_BV)
    return token_B, logprob_B, most_likely_tokens(scaled_BV, settings.num_candidates)


def _ends(
    settings: DecodeSettings,
    token_B: jax.Array,
    position_B: jax.Array,
    first_end_B: jax.Array,
    last_position_B: jax.Array,
) -> jax.Array:
    """bool[B]: whether a completion ends with this token at this position. `schedule` has the same rule on the host."""
    is_stop = functools.reduce(operator.or_, (token_B == i for i in settings.stop_token_ids), jnp.bool_(False))
    return (is_stop & (position_B >= first_end_B)) | (position_B >= last_position_B)


def _constrained(settings: DecodeSettings, cache: models.KVCache) -> models.KVCache:
    """Keeps the rows of a cache spread over the devices."""
    if settings.row_sharding is None:
        return cache
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, settings.row_sharding), cache)
