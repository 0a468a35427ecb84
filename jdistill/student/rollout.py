"""The sampler: prefill, then chunks of decoding on the device, each completion handed over as it ends.

The host never waits for a token: while it looks at one chunk of steps the next is already running. What is drawn for a
request depends on its seed, the position and the logits alone, so neither batch mates nor buckets change a completion
beyond the dtype's rounding.

Dimension key: `N` requests, `B` rows (N rounded up to a bucket), `S` prompt tokens (padded to a bucket), `C` steps of a
chunk, `R` completion tokens, `V` vocabulary, `K` candidates, `D` width, `J` blocks of the vocabulary.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int, UInt32

from jdistill import models
from jdistill.student.sharding import BATCH_AXES, batch_sharding

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, eq=False)
class Completion:
    """One finished request, on the host.

    Example: prompt (5, 6), sampled 7 and then the stop token 2: `token_ids` = (5, 6, 7, 2), `prompt_length` = 2,
    `sampler_logprobs` has 2 entries, the stop token's included; `finish_reason` = "stop".
    """

    index: int  # the place of its prompt in the call
    token_ids: np.ndarray  # int32[S + R], prompt and completion, the stop token included
    prompt_length: int
    sampler_logprobs: np.ndarray  # float32[R], nats, at the temperature of sampling, over the whole vocabulary
    candidate_ids: np.ndarray | None  # int32[R, K], the model's own most likely tokens, best first; None where K = 0
    finish_reason: FinishReason  # stop: a stop token; length: max_new_tokens

    @property
    def completion_ids(self) -> np.ndarray:
        """int32[R], the sampled tokens alone."""
        return self.token_ids[self.prompt_length :]


class _Rows(NamedTuple):
    """What decoding carries from chunk to chunk, on the device; donated to the next chunk."""

    cache: models.KVCache
    tokens: Int[jax.Array, "B"]  # the last sampled token, not yet in the cache
    positions: Int[jax.Array, "B"]  # its position
    done: Bool[jax.Array, "B"]


class _Fixed(NamedTuple):
    """What does not change during one call of `sample`."""

    seeds: UInt32[jax.Array, "B"]
    last_positions: Int[jax.Array, "B"]  # where a completion has its max_new_tokens
    temperature: Float[jax.Array, ""]
    greedy: Bool[jax.Array, ""]


class _Sampled(NamedTuple):
    """What the host looks at: C columns, those after a row's end without meaning."""

    token_ids: Int[jax.Array, "B C"]
    logprobs: Float[jax.Array, "B C"]
    candidate_ids: Int[jax.Array, "B C K"]


class Sampler:
    """Samples completions from a decoder whose parameters are given at each call.

    Args:
        decoder: a `models.Decoder`, or the graph definition of one (`nnx.split`); its parameters are not kept.
        max_prompt_tokens: a longer prompt is an error.
        max_new_tokens: R at most, the stop token included.
        stop_token_ids: a completion ends with the first of these; may be empty.
        num_candidates: K, how many of the model's own most likely tokens to report for each sampled token; 0: none.
        chunk_tokens: C, steps between two looks at which completions have ended. Small: completions leave sooner, and
            fewer steps are wasted on rows that have ended; large: less work on the host.
        cache_dtype: of keys and values; None: the decoder's compute dtype.
        mesh: rows are spread over its data and fsdp axes; None: one device, or wherever the parameters are.

    Raises:
        ValueError: sizes that make no sense.
    """

    def __init__(
        self,
        decoder: nnx.Module | nnx.GraphDef,
        *,
        max_prompt_tokens: int,
        max_new_tokens: int,
        stop_token_ids: Sequence[int],
        num_candidates: int = 0,
        chunk_tokens: int = 16,
        cache_dtype: jax.typing.DTypeLike | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        for name, value, least in (
            ("max_prompt_tokens", max_prompt_tokens, 1),
            ("max_new_tokens", max_new_tokens, 1),
            ("num_candidates", num_candidates, 0),
            ("chunk_tokens", chunk_tokens, 1),
        ):
            if value < least:
                raise ValueError(f"Sampler: {name} must be at least {least}, got {value}")
        self._graphdef = nnx.split(decoder)[0] if isinstance(decoder, nnx.Module) else decoder
        self.max_prompt_tokens = max_prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.stop_token_ids = tuple(int(i) for i in stop_token_ids)
        self.num_candidates = num_candidates
        self.chunk_tokens = chunk_tokens
        self._cache_dtype = cache_dtype
        self._row_sharding = None
        self._num_shards = 1
        if mesh is not None and mesh.size > 1:
            self._num_shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
            self._row_sharding = batch_sharding(mesh)
        # One program a bucket of (rows, prompt length or cache slots); nothing else that changes is static.
        self._cast = jax.jit(self._cast_impl)
        self._prefill = jax.jit(self._prefill_impl, static_argnames="num_slots")
        self._grow = jax.jit(self._grow_impl, static_argnames="num_slots")
        self._decode = jax.jit(self._decode_impl, donate_argnames="rows")

    def sample(
        self,
        params: Any,
        prompts: Sequence[np.ndarray],
        *,
        seeds: Sequence[int] | np.ndarray,
        temperature: float,
        greedy: bool = False,
    ) -> Iterator[Completion]:
        """Samples one completion for each prompt; yields them as they end, in no particular order.

        Args:
            params: the decoder's state (`nnx.split`), on one device or sharded over a mesh.
            prompts: N arrays of token ids, of any lengths from 1 to max_prompt_tokens.
            seeds: uint32[N], one for each request: equal seed, prompt and parameters give an equal completion.
            temperature: the logits are divided by it, for sampling and for the log-probs.
            greedy: takes the most likely token; the log-probs are still those at `temperature`.

        Raises:
            ValueError: before anything is computed: a prompt that is empty, too long or has ids outside the vocabulary,
                another number of seeds than prompts, a temperature that is not above 0.
            FloatingPointError: while it runs: the model's log-probs are NaN.
        """
        temperature = float(temperature)
        if not (temperature > 0 and np.isfinite(temperature)):
            raise ValueError(
                f"sample: temperature must be above 0, got {temperature}; for the most likely tokens use greedy=True"
            )
        vocab_size = nnx.merge(self._graphdef, params).config.vocab_size
        if self.num_candidates > vocab_size:
            raise ValueError(
                f"Sampler: num_candidates must be at most the vocabulary's {vocab_size}, got {self.num_candidates}"
            )
        checked = [self._check_prompt(i, prompt, vocab_size) for i, prompt in enumerate(prompts)]
        seed_N = np.asarray(seeds)
        if not checked:
            return iter(())
        if seed_N.shape != (len(checked),) or not np.issubdtype(seed_N.dtype, np.integer):
            raise ValueError(
                f"sample: expected one integer seed for each of {len(checked)} prompts, "
                f"got {seed_N.dtype} of shape {seed_N.shape}"
            )
        if seed_N.min() < 0 or seed_N.max() >= 2**32:
            raise ValueError(f"sample: seeds must be in [0, 2^32), got {seed_N.min()} to {seed_N.max()}")
        return self._run(params, checked, seed_N.astype(np.uint32), temperature, greedy)

    def _check_prompt(self, index: int, prompt: np.ndarray, vocab_size: int) -> np.ndarray:
        ids = np.asarray(prompt)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise ValueError(
                f"sample: prompt {index}: expected a list of token ids, got {ids.dtype} of shape {ids.shape}"
            )
        if not 1 <= len(ids) <= self.max_prompt_tokens:
            remedy = "raise max_prompt_tokens or shorten it" if len(ids) else "a decoder needs a token to start from"
            raise ValueError(
                f"sample: prompt {index} has {len(ids)} tokens, expected 1 to {self.max_prompt_tokens}: {remedy}"
            )
        if ids.min() < 0 or ids.max() >= vocab_size:
            place = int(np.argmax((ids < 0) | (ids >= vocab_size)))
            raise ValueError(
                f"sample: prompt {index}, token {place}: id {ids[place]} is outside the model's vocabulary of "
                f"{vocab_size}; is it another model's tokenizer?"
            )
        return ids.astype(np.int32)

    def _run(
        self, params: Any, prompts: list[np.ndarray], seed_N: np.ndarray, temperature: float, greedy: bool
    ) -> Iterator[Completion]:
        num = len(prompts)
        length_N = np.array([len(prompt) for prompt in prompts], np.int32)
        num_rows = self._num_shards * _bucket(-(-num // self._num_shards), 1)
        prompt_slots = _bucket(int(length_N.max()), 16, self.max_prompt_tokens)
        token_BS = np.zeros((num_rows, prompt_slots), np.int32)
        for row, prompt in enumerate(prompts):
            token_BS[row, : len(prompt)] = prompt
        length_B = np.ones(num_rows, np.int32)  # a row of padding is a prompt of one token that has ended already
        length_B[:num] = length_N
        seed_B = np.zeros(num_rows, np.uint32)
        seed_B[:num] = seed_N
        fixed = _Fixed(
            seeds=self._put(seed_B),
            last_positions=self._put(length_B + np.int32(self.max_new_tokens - 1)),
            temperature=np.float32(temperature),
            greedy=np.bool_(greedy),
        )
        params = self._cast(params)
        most_slots = prompt_slots + self.max_new_tokens
        num_slots = _bucket(prompt_slots + self.chunk_tokens, _LEAST_SLOTS, most_slots)
        rows, sampled = self._prefill(
            params,
            self._put(token_BS),
            self._put(length_B),
            self._put(np.arange(num_rows) >= num),
            fixed,
            num_slots=num_slots,
        )

        chunks: list[_Sampled] = []
        running = list(range(num))
        columns_ahead = self.max_new_tokens - 1
        start = 0
        while running:
            behind = sampled
            if columns_ahead > 0:
                slots_needed = int(length_N.max()) + self.max_new_tokens - columns_ahead + self.chunk_tokens
                if slots_needed > num_slots < most_slots:
                    num_slots = _bucket(slots_needed, _LEAST_SLOTS, most_slots)
                    rows = self._grow(rows, num_slots=num_slots)
                rows, sampled = self._decode(params, rows, fixed)
                columns_ahead -= self.chunk_tokens
            chunk = _Sampled(*(np.asarray(array) for array in behind))
            chunks.append(chunk)
            # The device decides with the same rule; here it only says which rows to hand over.
            stop_BC = np.isin(chunk.token_ids, self.stop_token_ids)
            stop = start + chunk.token_ids.shape[1]
            still = []
            for row in running:
                stops = np.flatnonzero(stop_BC[row, : self.max_new_tokens - start])
                if len(stops):
                    yield self._completion(row, prompts[row], chunks, start + int(stops[0]) + 1, "stop")
                elif stop >= self.max_new_tokens:
                    yield self._completion(row, prompts[row], chunks, self.max_new_tokens, "length")
                else:
                    still.append(row)
            running = still
            start = stop

    def _put(self, array: np.ndarray) -> jax.Array | np.ndarray:
        return array if self._row_sharding is None else jax.device_put(array, self._row_sharding)

    def _completion(
        self, row: int, prompt: np.ndarray, chunks: list[_Sampled], length: int, finish_reason: FinishReason
    ) -> Completion:
        token_R, logprob_R, candidate_RK = (
            np.concatenate([getattr(chunk, name)[row] for chunk in chunks])[:length] for name in _Sampled._fields
        )
        if not np.isfinite(logprob_R).all():
            place = int(np.argmin(np.isfinite(logprob_R)))
            raise FloatingPointError(
                f"sample: request {row}, sampled token {place}: the model's log-prob is {logprob_R[place]}; its "
                "parameters or activations are not finite. Look at the last update's gradient norm and learning rate."
            )
        return Completion(
            index=row,
            token_ids=np.concatenate([prompt, token_R]),
            prompt_length=len(prompt),
            sampler_logprobs=logprob_R,
            candidate_ids=candidate_RK if self.num_candidates else None,
            finish_reason=finish_reason,
        )

    def _cast_impl(self, params: Any) -> Any:
        """The parameters as decoding reads them: bf16 once for a call rather than float32 masters at every step."""
        dtype = nnx.merge(self._graphdef, params).compute_dtype

        # Norm scales are multiplied in float32 by the decoder whatever its compute dtype; casting them would change it.
        def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
            return x if "norm" in jax.tree_util.keystr(path) else x.astype(dtype)

        return jax.tree_util.tree_map_with_path(cast, params)

    def _prefill_impl(
        self, params: Any, token_BS: jax.Array, length_B: jax.Array, padding_B: jax.Array, fixed: _Fixed, num_slots: int
    ) -> tuple[_Rows, _Sampled]:
        decoder = nnx.merge(self._graphdef, params)
        num_rows, prompt_slots = token_BS.shape
        cache = models.init_cache(decoder.config, num_rows, num_slots, self._dtype(decoder))
        position_BS = jnp.broadcast_to(jnp.arange(prompt_slots, dtype=jnp.int32), token_BS.shape)
        hidden_BSD, cache = decoder(token_BS, position_BS, cache=self._constrain(cache))
        hidden_BD = jnp.take_along_axis(hidden_BSD, (length_B - 1)[:, None, None], axis=1)[:, 0]
        token_B, logprob_B, candidate_BK = self._draw(decoder.logits(hidden_BD), length_B, fixed)
        rows = _Rows(
            cache=self._constrain(cache),
            tokens=token_B,
            positions=length_B,
            done=padding_B | self._ends(token_B, length_B, fixed),
        )
        return rows, _Sampled(token_B[:, None], logprob_B[:, None], candidate_BK[:, None])

    def _grow_impl(self, rows: _Rows, num_slots: int) -> _Rows:
        more = num_slots - rows.cache.k.shape[2]
        cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0), (0, 0))), rows.cache)
        return rows._replace(cache=self._constrain(cache))

    def _decode_impl(self, params: Any, rows: _Rows, fixed: _Fixed) -> tuple[_Rows, _Sampled]:
        decoder = nnx.merge(self._graphdef, params)
        shape_BC = (rows.tokens.shape[0], self.chunk_tokens)
        sampled = _Sampled(
            token_ids=jnp.zeros(shape_BC, jnp.int32),
            logprobs=jnp.zeros(shape_BC, jnp.float32),
            candidate_ids=jnp.zeros((*shape_BC, self.num_candidates), jnp.int32),
        )

        def goes_on(carry: tuple[jax.Array, _Rows, _Sampled]) -> jax.Array:
            step, rows, _ = carry
            return (step < self.chunk_tokens) & ~jnp.all(rows.done)

        def one_step(carry: tuple[jax.Array, _Rows, _Sampled]) -> tuple[jax.Array, _Rows, _Sampled]:
            step, rows, sampled = carry
            hidden_B1D, cache = decoder(rows.tokens[:, None], rows.positions[:, None], cache=rows.cache)
            next_B = rows.positions + 1
            drawn = self._draw(decoder.logits(hidden_B1D[:, 0]), next_B, fixed)
            sampled = _Sampled(
                *(
                    jax.lax.dynamic_update_index_in_dim(columns, column, step, axis=1)
                    for columns, column in zip(sampled, drawn, strict=True)
                )
            )
            rows = _Rows(
                cache=self._constrain(cache),
                tokens=jnp.where(rows.done, rows.tokens, drawn[0]),
                positions=jnp.where(rows.done, rows.positions, next_B),
                done=rows.done | self._ends(drawn[0], next_B, fixed),
            )
            return step + 1, rows, sampled

        _, rows, sampled = jax.lax.while_loop(goes_on, one_step, (jnp.int32(0), rows, sampled))
        return rows, sampled

    def _draw(
        self, logits_BV: jax.Array, position_B: jax.Array, fixed: _Fixed
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tokens for `position_B`, their log-probs, and the K most likely tokens."""
        scaled_BV = logits_BV.astype(jnp.float32) / fixed.temperature
        token_B, logprob_B = draw_tokens(scaled_BV, fixed.seeds, position_B, fixed.greedy)
        if self.num_candidates:
            candidate_BK = jax.lax.top_k(scaled_BV, self.num_candidates)[1].astype(jnp.int32)
        else:
            candidate_BK = jnp.zeros((token_B.shape[0], 0), jnp.int32)
        return token_B, logprob_B, candidate_BK

    def _ends(self, token_B: jax.Array, position_B: jax.Array, fixed: _Fixed) -> jax.Array:
        is_stop = functools.reduce(operator.or_, (token_B == i for i in self.stop_token_ids), jnp.bool_(False))
        return is_stop | (position_B >= fixed.last_positions)

    def _dtype(self, decoder: models.Decoder) -> jax.typing.DTypeLike:
        return decoder.compute_dtype if self._cache_dtype is None else self._cache_dtype

    def _constrain(self, cache: models.KVCache) -> models.KVCache:
        if self._row_sharding is None:
            return cache
        sharding = NamedSharding(self._row_sharding.mesh, PartitionSpec(None, BATCH_AXES))
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding), cache)


def draw_tokens(
    logits_BV: jax.Array, seed_B: jax.Array, position_B: jax.Array, greedy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draws one token a row from softmax(logits), or takes the most likely one.

    Inverse transform in two stages, a block of the vocabulary and then a token in it, with one uniform number each. The
    usual Gumbel trick needs V random numbers for a token.

    Args:
        logits_BV: float32, already divided by the temperature.
        seed_B: uint32, one a request.
        position_B: int32, where the drawn token will stand. Seed and position are all the randomness there is.
        greedy: bool scalar; True: the most likely token, the first of several equal ones.

    Returns:
        int32[B] tokens and float32[B] their log-probs in nats, over the whole vocabulary.
    """
    num_rows, vocab_size = logits_BV.shape
    max_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    weight_BV = jnp.exp(logits_BV - max_B1)
    padded_BV = jnp.pad(weight_BV, ((0, 0), (0, -vocab_size % _BLOCK)))
    weight_BJb = padded_BV.reshape(num_rows, -1, _BLOCK)
    weight_BJ = weight_BJb.sum(axis=-1)

    def most_likely() -> jax.Array:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def drawn() -> jax.Array:
        uniform_B2 = jax.vmap(_two_uniforms)(seed_B, position_B)
        block_B = _inverse_transform(weight_BJ, uniform_B2[:, 0])
        weight_Bb = jnp.take_along_axis(weight_BJb, block_B[:, None, None], axis=1)[:, 0]
        return block_B * _BLOCK + _inverse_transform(weight_Bb, uniform_B2[:, 1])

    token_B = jax.lax.cond(greedy, most_likely, drawn)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B, chosen_B - max_B1[:, 0] - jnp.log(weight_BJ.sum(axis=-1))


# Attention reads every slot of the cache, empty ones too, so the cache starts small and grows by buckets of this.
_LEAST_SLOTS = 128
_BLOCK = 128  # about sqrt(V) for the vocabularies of today, so that both stages are short


def _two_uniforms(seed: jax.Array, position: jax.Array) -> jax.Array:
    # The generator is named because completions must not change with jax_default_prng_impl.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
    return jax.random.uniform(key, (2,))


def _inverse_transform(weight_BJ: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The first column at which the running sum exceeds uniform * total; never one of weight 0."""
    # A parallel prefix sum need not be monotonic in its last digit: without the mask an impossible token could be drawn
    # about once in 2^24 times, with a log-prob of -inf. The largest entry is the total, so some column always exceeds.
    running_BJ = jnp.where(weight_BJ > 0, jnp.cumsum(weight_BJ, axis=-1), 0.0)
    target_B1 = uniform_B[:, None] * running_BJ.max(axis=-1, keepdims=True)
    return jnp.argmax(running_BJ > target_B1, axis=-1).astype(jnp.int32)


def _bucket(size: int, least: int, most: int | None = None) -> int:
    """The smallest of least * (1, 2, 3, 4, 6, 8, 12, 16 ...) that holds `size`, cut at `most`."""
    power = least
    while power < size:
        power *= 2
    bucket = power * 3 // 4 if power >= 4 * least and power * 3 // 4 >= size else power
    return bucket if most is None else min(bucket, most)
