"""The sampler: prefill, then chunks of decoding on the device, each completion handed over as it ends.

The host never waits for a token: while it looks at one chunk of steps the next is already running. A row whose
completion has ended takes the next request of the queue; when there is none, the rows that still run are moved
together. A prompt that several requests share is computed once. What is drawn for a
request depends on its seed, the position and the logits alone, so neither batch mates nor buckets change a completion
beyond the dtype's rounding.

Dimension key: `N` requests, `B` rows (a bucket), `A` requests that are given rows at once, `U` different prompts of
these, `S` prompt tokens (padded to a bucket), `C` steps of a chunk, `R` completion tokens, `V` vocabulary, `K`
candidates, `D` width, `J` blocks of the vocabulary.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int, UInt32

from jdistill import buckets, models
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
    seeds: UInt32[jax.Array, "B"]
    first_ends: Int[jax.Array, "B"]  # no completion ends before this position: min_new_tokens
    last_positions: Int[jax.Array, "B"]  # where a completion has its max_new_tokens


class _Fixed(NamedTuple):
    """What does not change during one call of `sample`."""

    temperature: Float[jax.Array, ""]
    greedy: Bool[jax.Array, ""]


class _Sampled(NamedTuple):
    """What the host looks at: C columns, those after a row's end without meaning."""

    token_ids: Int[jax.Array, "B C"]
    logprobs: Float[jax.Array, "B C"]
    candidate_ids: Int[jax.Array, "B C K"]


@dataclass
class _Request:
    """One prompt of a call, and what the host knows of its completion."""

    index: int
    prompt: np.ndarray
    most: int  # tokens of its completion
    row: int = -1  # of the device; -1: it waits
    ahead: int = 0  # tokens that have been asked of the device
    length: int = 0  # tokens that have arrived
    pieces: list[tuple[_Sampled, int]] = dataclasses.field(default_factory=list)  # (chunk, its row there)


class Sampler:
    """Samples completions from a decoder whose parameters are given at each call.

    Args:
        decoder: a `models.Decoder`, or the graph definition of one (`nnx.split`); its parameters are not kept.
        max_prompt_tokens: a longer prompt is an error.
        max_new_tokens: R at most, the stop token included.
        stop_token_ids: a completion ends with the first of these; may be empty.
        num_candidates: K, how many of the model's own most likely tokens to report for each sampled token; 0: none.
        max_rows: requests that are decoded at once; the others wait for a row. None: all.
        min_new_tokens: no stop token is sampled before so many tokens.
        top_k, top_p, min_p: sample among the k most likely tokens, among the most likely ones that have a share of p,
            among those at least p times as likely as the most likely one; after the temperature, in this order, each
            None: off. The log-probs stay those of the whole distribution, so that ratios to them are not those of
            the policy that sampled.
        stop_strings: a completion ends with the token that completes the first of these; needs `decode`.
        decode: token ids -> text, for stop_strings.
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
        max_rows: int | None = None,
        min_new_tokens: int = 0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        stop_strings: Sequence[str] = (),
        decode: Callable[[np.ndarray], str] | None = None,
        chunk_tokens: int = 16,
        cache_dtype: jax.typing.DTypeLike | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        for name, value, least in (
            ("max_prompt_tokens", max_prompt_tokens, 1),
            ("max_new_tokens", max_new_tokens, 1),
            ("num_candidates", num_candidates, 0),
            ("max_rows", max_rows, 1),
            ("min_new_tokens", min_new_tokens, 0),
            ("top_k", top_k, 1),
            ("chunk_tokens", chunk_tokens, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"Sampler: {name} must be at least {least}, got {value}")
        for name, share in (("top_p", top_p), ("min_p", min_p)):
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"Sampler: {name} must be above 0 and at most 1, got {share}")
        if min_new_tokens > max_new_tokens:
            raise ValueError(f"Sampler: min_new_tokens {min_new_tokens} is above max_new_tokens {max_new_tokens}")
        if stop_strings and decode is None:
            raise ValueError("Sampler: stop_strings need decode, which makes text of token ids (tokenizer.decode)")
        self._graphdef = nnx.split(decoder)[0] if isinstance(decoder, nnx.Module) else decoder
        self.max_prompt_tokens = max_prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.stop_token_ids = tuple(int(i) for i in stop_token_ids)
        self.num_candidates = num_candidates
        self.max_rows = max_rows
        self.min_new_tokens = min_new_tokens
        self.stop_strings = tuple(stop_strings)
        self.chunk_tokens = chunk_tokens
        self._decode_text = decode
        self._kept = _Kept(top_k, top_p, min_p)
        self._cache_dtype = cache_dtype
        self._mesh = mesh
        self._row_sharding = None
        self._num_shards = 1
        if mesh is not None and mesh.size > 1:
            self._num_shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
            self._row_sharding = batch_sharding(mesh)
        # One program a bucket of (rows, requests, prompts, prompt length, cache slots); nothing else is static.
        self._cast = jax.jit(self._cast_impl)
        self._empty = jax.jit(self._empty_impl, static_argnames=("num_rows", "num_slots"))
        self._prefill = jax.jit(self._prefill_impl)
        self._admit = jax.jit(self._admit_impl, donate_argnames="rows")
        self._resize = jax.jit(self._resize_impl, static_argnames="num_slots")
        self._decode = jax.jit(self._decode_impl, donate_argnames="rows")

    def sample(
        self,
        params: Any,
        prompts: Sequence[np.ndarray],
        *,
        seeds: Sequence[int] | np.ndarray,
        temperature: float,
        greedy: bool = False,
        max_new_tokens: Sequence[int] | None = None,
    ) -> Iterator[Completion]:
        """Samples one completion for each prompt; yields them as they end, in no particular order.

        Args:
            params: the decoder's state (`nnx.split`), on one device or sharded over a mesh.
            prompts: N arrays of token ids, of any lengths from 1 to max_prompt_tokens.
            seeds: uint32[N], one for each request: equal seed, prompt and parameters give an equal completion.
            temperature: the logits are divided by it, for sampling and for the log-probs.
            greedy: takes the most likely token; the log-probs are still those at `temperature`.
            max_new_tokens: of each request, at most the sampler's own; None: that for all.

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
        most_N = [self.max_new_tokens] * len(checked) if max_new_tokens is None else list(max_new_tokens)
        if len(most_N) != len(checked) or not all(
            max(self.min_new_tokens, 1) <= most <= self.max_new_tokens for most in most_N
        ):
            raise ValueError(
                f"sample: max_new_tokens must be one number for each of {len(checked)} prompts, from "
                f"{max(self.min_new_tokens, 1)} to the sampler's {self.max_new_tokens}, got {most_N}"
            )
        requests = [
            _Request(i, prompt, int(most)) for i, (prompt, most) in enumerate(zip(checked, most_N, strict=True))
        ]
        return self._run(params, requests, seed_N.astype(np.uint32), temperature, greedy)

    def on_its_devices(self) -> contextlib.AbstractContextManager[Any]:
        """To sample in, where JAX's current mesh may be another one: that of all hosts."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

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
        self, params: Any, requests: list[_Request], seed_N: np.ndarray, temperature: float, greedy: bool
    ) -> Iterator[Completion]:
        fixed = _Fixed(np.float32(temperature), np.bool_(greedy))
        cast = self._cast(params)
        queue = collections.deque(requests)
        num_rows = self._num_rows(min(len(requests), self.max_rows or len(requests)))
        most_slots = max(buckets.prompt_slots(len(r.prompt), self.max_prompt_tokens) + r.most for r in requests)
        num_slots = 0
        rows: _Rows | None = None
        running: dict[int, _Request] = {}  # by row
        behind: collections.deque[tuple[_Sampled, dict[int, _Request]]] = collections.deque()
        while queue or running:
            free = num_rows - len(running)
            admitted = [queue.popleft() for _ in range(min(free, len(queue)))]
            taken = running.keys()
            for row, request in zip((row for row in range(num_rows) if row not in taken), admitted, strict=False):
                request.row = row
            running |= {request.row: request for request in admitted}
            if not queue and not admitted and self._num_shards == 1:
                fewer = self._num_rows(len(running))
                if 2 * fewer <= num_rows and fewer >= _LEAST_ROWS:
                    # The others have ended: decode what is left as a smaller batch.
                    kept = sorted(running)
                    index_B = np.resize(np.array(kept, np.int32), fewer)
                    rows = self._resize(rows, index_B, np.arange(fewer) >= len(kept), num_slots=num_slots)
                    num_rows = fewer
                    running = {row: running[old] for row, old in enumerate(kept)}
                    for row, request in running.items():
                        request.row = row
            needed = max(len(r.prompt) + min(r.ahead + 1 + self.chunk_tokens, r.most) for r in running.values())
            longest = max((len(r.prompt) for r in admitted), default=1)
            prompt_slots = buckets.prompt_slots(longest, self.max_prompt_tokens)
            needed = max(needed, prompt_slots)
            if needed > num_slots:
                num_slots = buckets.cache_slots(needed, most_slots)
                if rows is None:
                    rows = self._empty(params, num_rows=num_rows, num_slots=num_slots)
                else:
                    rows = self._resize(rows, None, None, num_slots=num_slots)
            if admitted:
                prompts, places = self._to_admit(admitted, seed_N, prompt_slots, num_rows)
                rows, sampled = self._admit(rows, *self._prefill(params, *prompts), *places, fixed)
                for request in admitted:
                    request.ahead = 1
                behind.append((sampled, dict(enumerate(admitted))))
            if any(r.ahead < r.most for r in running.values()):
                rows, sampled = self._decode(cast, rows, fixed)
                for request in running.values():
                    request.ahead += self.chunk_tokens
                behind.append((sampled, dict(running)))
                if len(behind) < 2:
                    continue  # the device is kept busy while the host looks
            yield from self._look(*behind.popleft(), running)
            while len(behind) > 1 or (behind and not running):
                yield from self._look(*behind.popleft(), running)

    def _look(
        self, sampled: _Sampled, sources: dict[int, _Request], running: dict[int, _Request]
    ) -> Iterator[Completion]:
        """Takes in what the device has sampled; frees the rows of completions that have ended."""
        chunk = _Sampled(*(np.asarray(array) for array in sampled))
        # The device decides with the same rule; here it only says which rows to hand over.
        stop_BC = np.isin(chunk.token_ids, self.stop_token_ids)
        for place, request in sources.items():
            if running.get(request.row) is not request:
                continue  # it had ended in an earlier chunk
            left = min(chunk.token_ids.shape[1], request.most - request.length)
            early = max(self.min_new_tokens - request.length - 1, 0)
            stops = np.flatnonzero(stop_BC[place, early:left])
            stop = early + int(stops[0]) + 1 if len(stops) else left
            request.pieces.append((chunk, place))
            before, request.length = request.length, request.length + stop
            reason: FinishReason | None = "stop" if len(stops) else None
            if self.stop_strings and (end := self._string_end(request, before)):
                request.length, reason = end, "stop"
            if reason is None and request.length >= request.most:
                reason = "length"
            if reason is not None:
                del running[request.row]
                yield self._completion(request, reason)

    def _string_end(self, request: _Request, before: int) -> int | None:
        """How many tokens a completion has where the first stop string is complete; None: none is."""
        assert self._decode_text is not None
        ids = np.concatenate([chunk.token_ids[row] for chunk, row in request.pieces])[: request.length]

        def has(length: int) -> bool:
            text = self._decode_text(ids[:length])
            return any(string in text for string in self.stop_strings)

        if not has(len(ids)):
            return None
        low, high = before, len(ids)  # not with `low` tokens, but with `high`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if has(middle) else (middle, high)
        return high

    def _num_rows(self, num: int, coarse: bool = False) -> int:
        """`num` in whole rows of each device, rounded up to a bucket; coarse: to one of the few of prefill."""
        per_shard = -(-num // self._num_shards)
        return self._num_shards * (buckets.prefill_rows(per_shard) if coarse else buckets.decode_rows(per_shard))

    def _to_admit(
        self, admitted: list[_Request], seed_N: np.ndarray, prompt_slots: int, num_rows: int
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What `_prefill` and `_admit` take: U different prompts, and of each request which of them it has."""
        places: dict[bytes, int] = {}
        source = [places.setdefault(request.prompt.tobytes(), len(places)) for request in admitted]
        num_prompts = self._num_rows(len(places), coarse=True)
        token_US = np.zeros((num_prompts, prompt_slots), np.int32)
        length_U = np.ones(num_prompts, np.int32)  # a row of padding is a prompt of one token
        for request, place in zip(admitted, source, strict=True):
            token_US[place, : len(request.prompt)] = request.prompt
            length_U[place] = len(request.prompt)
        # What fills up the bucket goes to a row that does not exist, and so nowhere.
        A = self._num_rows(len(admitted), coarse=True)
        source_A, row_A = np.zeros(A, np.int32), np.full(A, num_rows, np.int32)
        seed_A, min_A, max_A = np.zeros(A, np.uint32), np.zeros(A, np.int32), np.zeros(A, np.int32)
        for a, request in enumerate(admitted):
            source_A[a], row_A[a], seed_A[a] = source[a], request.row, seed_N[request.index]
            min_A[a] = len(request.prompt) + self.min_new_tokens - 1
            max_A[a] = len(request.prompt) + request.most - 1
        prompts = tuple(map(self._put, (token_US, length_U)))
        return prompts, tuple(map(self._put, (length_U, source_A, row_A, seed_A, min_A, max_A)))

    def _put(self, array: np.ndarray) -> jax.Array | np.ndarray:
        return array if self._row_sharding is None else jax.device_put(array, self._row_sharding)

    def _completion(self, request: _Request, finish_reason: FinishReason) -> Completion:
        token_R, logprob_R, candidate_RK = (
            np.concatenate([getattr(chunk, name)[row] for chunk, row in request.pieces])[: request.length]
            for name in _Sampled._fields
        )
        if not np.isfinite(logprob_R).all():
            place = int(np.argmin(np.isfinite(logprob_R)))
            raise FloatingPointError(
                f"sample: request {request.index}, sampled token {place}: the model's log-prob is {logprob_R[place]}; "
                "its parameters or activations are not finite. Look at the last update's gradient norm and learning "
                "rate."
            )
        return Completion(
            index=request.index,
            token_ids=np.concatenate([request.prompt, token_R]),
            prompt_length=len(request.prompt),
            sampler_logprobs=logprob_R,
            candidate_ids=candidate_RK if self.num_candidates else None,
            finish_reason=finish_reason,
        )

    def _cast_impl(self, params: Any) -> tuple[Any, list[dict[str, jax.Array]]]:
        """What decoding reads: bf16 once for a call rather than float32 masters at every step, and an array a layer."""
        decoder = nnx.merge(self._graphdef, params)

        # Norm scales are multiplied in float32 by the decoder whatever its compute dtype; casting them would change it.
        def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
            return x if "norm" in jax.tree_util.keystr(path) else x.astype(decoder.compute_dtype)

        def without_layers(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
            return jnp.zeros(0, x.dtype) if "layers" in jax.tree_util.keystr(path) else cast(path, x)

        layers = jax.tree_util.tree_map_with_path(cast, decoder.unstacked())
        return jax.tree_util.tree_map_with_path(without_layers, params), layers

    def _empty_impl(self, params: Any, num_rows: int, num_slots: int) -> _Rows:
        decoder = nnx.merge(self._graphdef, params)
        zeros = functools.partial(jnp.zeros, num_rows)
        return _Rows(
            cache=self._constrain(models.init_cache(decoder.config, num_rows, num_slots, self._dtype(decoder))),
            tokens=zeros(jnp.int32),
            positions=zeros(jnp.int32),
            done=jnp.ones(num_rows, bool),
            seeds=zeros(jnp.uint32),
            first_ends=zeros(jnp.int32),
            last_positions=zeros(jnp.int32),
        )

    def _prefill_impl(self, params: Any, token_US: jax.Array, length_U: jax.Array) -> tuple[jax.Array, models.KVCache]:
        """The logits after each prompt, and its cache."""
        decoder = nnx.merge(self._graphdef, params)
        position_US = jnp.broadcast_to(jnp.arange(token_US.shape[1], dtype=jnp.int32), token_US.shape)
        hidden_USD, cache = decoder.prefill(token_US, position_US)
        hidden_UD = jnp.take_along_axis(hidden_USD, (length_U - 1)[:, None, None], axis=1)[:, 0]
        return decoder.logits(hidden_UD), self._constrain(cache)

    def _admit_impl(
        self,
        rows: _Rows,
        logits_UV: jax.Array,
        cache: models.KVCache,
        length_U: jax.Array,
        source_A: jax.Array,
        row_A: jax.Array,
        seed_A: jax.Array,
        min_A: jax.Array,
        max_A: jax.Array,
        fixed: _Fixed,
    ) -> tuple[_Rows, _Sampled]:
        """Gives every request a row with its prompt's cache, and its first token."""
        logits_AV, length_A = logits_UV[source_A], length_U[source_A]
        drawn = self._draw(logits_AV, length_A, seed_A, min_A, fixed)
        done_A = self._ends(drawn[0], length_A, min_A, max_A)
        new = _Rows(None, drawn[0], length_A, done_A, seed_A, min_A, max_A)
        put = {
            name: getattr(rows, name).at[row_A].set(getattr(new, name), mode="drop")
            for name in _Rows._fields
            if name != "cache"
        }
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
        return _Rows(cache=self._constrain(kept), **put), _Sampled(*(x[:, None] for x in drawn))

    def _resize_impl(
        self, rows: _Rows, index_B: jax.Array | None, padding_B: jax.Array | None, num_slots: int
    ) -> _Rows:
        """The rows at `index_B` (None: all), with as many slots."""
        if index_B is not None:
            cache = jax.tree.map(lambda x: x[index_B], rows.cache)
            rows = _Rows(cache, *(x[index_B] for x in rows[1:]))
            rows = rows._replace(done=rows.done | padding_B)
        return rows._replace(cache=self._constrain(models.resize_cache(rows.cache, num_slots)))

    def _decode_impl(
        self, cast: tuple[Any, list[dict[str, jax.Array]]], rows: _Rows, fixed: _Fixed
    ) -> tuple[_Rows, _Sampled]:
        params, layers = cast
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
            hidden_B1D, cache = decoder(rows.tokens[:, None], rows.positions[:, None], cache=rows.cache, layers=layers)
            next_B = rows.positions + 1
            drawn = self._draw(decoder.logits(hidden_B1D[:, 0]), next_B, rows.seeds, rows.first_ends, fixed)
            sampled = _Sampled(
                *(
                    jax.lax.dynamic_update_index_in_dim(columns, column, step, axis=1)
                    for columns, column in zip(sampled, drawn, strict=True)
                )
            )
            rows = rows._replace(
                cache=self._constrain(cache),
                tokens=jnp.where(rows.done, rows.tokens, drawn[0]),
                positions=jnp.where(rows.done, rows.positions, next_B),
                done=rows.done | self._ends(drawn[0], next_B, rows.first_ends, rows.last_positions),
            )
            return step + 1, rows, sampled

        _, rows, sampled = jax.lax.while_loop(goes_on, one_step, (jnp.int32(0), rows, sampled))
        return rows, sampled

    def _draw(
        self, logits_BV: jax.Array, position_B: jax.Array, seed_B: jax.Array, min_B: jax.Array, fixed: _Fixed
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tokens for `position_B`, their log-probs, and the K most likely tokens."""
        scaled_BV = logits_BV.astype(jnp.float32) / fixed.temperature
        allowed_BV = self._kept(scaled_BV)
        if self.min_new_tokens and self.stop_token_ids:
            stops_BV = jnp.zeros(scaled_BV.shape, bool).at[:, np.array(self.stop_token_ids)].set(True)
            too_early_BV = stops_BV & (position_B < min_B)[:, None]
            allowed_BV = jnp.where(too_early_BV, -jnp.inf, scaled_BV if allowed_BV is None else allowed_BV)
        token_B, logprob_B = draw_tokens(scaled_BV, seed_B, position_B, fixed.greedy, allowed_BV)
        if self.num_candidates:
            candidate_BK = jax.lax.top_k(scaled_BV, self.num_candidates)[1].astype(jnp.int32)
        else:
            candidate_BK = jnp.zeros((token_B.shape[0], 0), jnp.int32)
        return token_B, logprob_B, candidate_BK

    def _ends(self, token_B: jax.Array, position_B: jax.Array, min_B: jax.Array, max_B: jax.Array) -> jax.Array:
        is_stop = functools.reduce(operator.or_, (token_B == i for i in self.stop_token_ids), jnp.bool_(False))
        return (is_stop & (position_B >= min_B)) | (position_B >= max_B)

    def _dtype(self, decoder: models.Decoder) -> jax.typing.DTypeLike:
        return decoder.compute_dtype if self._cache_dtype is None else self._cache_dtype

    def _constrain(self, cache: models.KVCache) -> models.KVCache:
        if self._row_sharding is None:
            return cache
        sharding = NamedSharding(self._row_sharding.mesh, PartitionSpec(BATCH_AXES))
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding), cache)


class _Kept(NamedTuple):
    """Which tokens may be drawn."""

    top_k: int | None
    top_p: float | None
    min_p: float | None

    def __call__(self, logits_BV: jax.Array) -> jax.Array | None:
        """The logits, -inf for a token that may not be drawn; None: all may be. Equal logits are kept together."""
        if self == (None, None, None):
            return None
        least_B1 = jnp.full((logits_BV.shape[0], 1), -jnp.inf)
        if self.top_k is not None:
            k = min(self.top_k, logits_BV.shape[1])
            least_B1 = jnp.maximum(least_B1, jax.lax.top_k(logits_BV, k)[0][:, -1:])
        if self.top_p is not None:
            sorted_BV = jnp.sort(jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf), axis=-1, descending=True)
            share_BV = jax.nn.softmax(sorted_BV, axis=-1)
            # Kept: the tokens before which less than p has been seen; so always the first.
            is_kept_BV = jnp.cumsum(share_BV, axis=-1) - share_BV < self.top_p
            least_B1 = jnp.min(jnp.where(is_kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        if self.min_p is not None:
            least_B1 = jnp.maximum(least_B1, logits_BV.max(axis=-1, keepdims=True) + math.log(self.min_p))
        return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def draw_tokens(
    logits_BV: jax.Array,
    seed_B: jax.Array,
    position_B: jax.Array,
    greedy: jax.Array,
    allowed_BV: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws one token a row from softmax(logits), or takes the most likely one.

    Inverse transform in two stages, a block of the vocabulary and then a token in it, with one uniform number each. The
    usual Gumbel trick needs V random numbers for a token.

    Args:
        logits_BV: float32, already divided by the temperature.
        seed_B: uint32, one a request.
        position_B: int32, where the drawn token will stand. Seed and position are all the randomness there is.
        greedy: bool scalar; True: the most likely token, the first of several equal ones.
        allowed_BV: the logits with -inf for tokens that may not be drawn; None: all may be.

    Returns:
        int32[B] tokens and float32[B] their log-probs in nats, over the whole vocabulary.
    """
    num_rows, vocab_size = logits_BV.shape
    max_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    weight_BV = jnp.exp(logits_BV - max_B1)
    total_B = None
    if allowed_BV is not None:
        total_B = weight_BV.sum(axis=-1)
        # Its own maximum: the most likely token need not be allowed.
        weight_BV = jnp.exp(allowed_BV - jnp.max(allowed_BV, axis=-1, keepdims=True))
    padded_BV = jnp.pad(weight_BV, ((0, 0), (0, -vocab_size % _BLOCK)))
    weight_BJb = padded_BV.reshape(num_rows, -1, _BLOCK)
    weight_BJ = weight_BJb.sum(axis=-1)

    def most_likely() -> jax.Array:
        return jnp.argmax(logits_BV if allowed_BV is None else allowed_BV, axis=-1).astype(jnp.int32)

    def drawn() -> jax.Array:
        uniform_B2 = jax.vmap(_two_uniforms)(seed_B, position_B)
        block_B = _inverse_transform(weight_BJ, uniform_B2[:, 0])
        weight_Bb = jnp.take_along_axis(weight_BJb, block_B[:, None, None], axis=1)[:, 0]
        return block_B * _BLOCK + _inverse_transform(weight_Bb, uniform_B2[:, 1])

    token_B = jax.lax.cond(greedy, most_likely, drawn)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    total_B = weight_BJ.sum(axis=-1) if total_B is None else total_B
    return token_B, chosen_B - max_B1[:, 0] - jnp.log(total_B)


_LEAST_ROWS = 8  # fewer are not faster
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
