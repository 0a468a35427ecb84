"""The sampler: continuous batching of completions from a JAX decoder, each handed over as it ends.

What is drawn for a request depends on its seed, the position and the logits alone, so neither batch mates nor buckets
change a completion beyond the dtype's rounding.

Dimension key: `N` requests, `S` prompt tokens, `R` completion tokens, `C` steps of a chunk, `K` candidates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jdistill.models.mesh import batch_sharding, num_batch_shards
from jdistill.rollout.completion import Completion
from jdistill.rollout.decode import CallSettings, DecodeSettings, DecodeWeights, Programs
from jdistill.rollout.draw import Truncation
from jdistill.rollout.schedule import Request, Schedule, ScheduleSettings
from jdistill.rollout.stop_strings import StopStrings


@dataclass(frozen=True, eq=False)
class Weights:
    """One version of a decoder's parameters, prepared for sampling; made by `Sampler.prepare`."""

    params: Any  # as given; prefill reads them
    decode: DecodeWeights  # what each decoding step reads
    vocab_size: int


class Sampler:
    """Samples completions from a decoder whose parameters are given at each call.

    Args:
        decoder: a `models.Decoder`, or the graph definition of one (`nnx.split`); its parameters are not kept.
        max_prompt_tokens: a longer prompt is an error.
        max_new_tokens: limit on R, stop token included.
        stop_token_ids: a completion ends with the first of these; may be empty.
        num_candidates: K, how many of the model's most likely tokens to report for each sampled token; 0: none.
        max_rows: requests that are decoded at once; the others wait for a row. None: all.
        min_new_tokens: tokens that precede any end: the first of them to be a stop token, or to complete a stop string,
            is the next one (as in vLLM and transformers).
        top_k, top_p, min_p: see `draw.Truncation`. The log-probs stay those of the whole distribution, so ratios to
            them are not ratios to the policy that sampled.
        stop_strings: a completion ends with the token that completes the first of these; needs `decode`.
        decode: token ids -> text, special tokens included, for stop_strings.
        include_stop: `Completion.text` includes the stop token or stop string.
        chunk_tokens: C, steps between two checks for ended completions. Small: completions leave sooner, and fewer
            steps are wasted on rows that have ended; large: less work on the host.
        cache_dtype: of keys and values; None: the decoder's compute dtype.
        mesh: rows are spread over its data and fsdp axes; None: one device, or wherever the parameters are.

    Raises:
        ValueError: a size or share out of range, an empty stop string, or stop_strings without decode.
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
        include_stop: bool = False,
        chunk_tokens: int = 16,
        cache_dtype: jax.typing.DTypeLike | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        _check_at_least(1, max_prompt_tokens=max_prompt_tokens, max_new_tokens=max_new_tokens, max_rows=max_rows)
        _check_at_least(1, top_k=top_k, chunk_tokens=chunk_tokens)
        _check_at_least(0, num_candidates=num_candidates, min_new_tokens=min_new_tokens)
        _check_shares(top_p=top_p, min_p=min_p)
        if min_new_tokens > max_new_tokens:
            raise ValueError(f"Sampler: min_new_tokens {min_new_tokens} is above max_new_tokens {max_new_tokens}")
        if stop_strings and decode is None:
            raise ValueError("Sampler: stop_strings need decode, which turns token ids into text (tokenizer.decode)")
        if not all(stop_strings):
            raise ValueError(f"Sampler: an empty stop string would end every completion: {list(stop_strings)}")
        self._graphdef = nnx.split(decoder)[0] if isinstance(decoder, nnx.Module) else decoder
        self._max_new_tokens = max_new_tokens
        self._mesh = mesh
        is_spread = mesh is not None and mesh.size > 1
        self._schedule_settings = ScheduleSettings(
            max_prompt_tokens=max_prompt_tokens,
            max_rows=max_rows,
            num_shards=num_batch_shards(mesh) if is_spread else 1,
            stop_strings=StopStrings(tuple(stop_strings), decode, min_new_tokens) if stop_strings and decode else None,
            include_stop=include_stop,
        )
        self._decode_settings = DecodeSettings(
            stop_token_ids=tuple(int(i) for i in stop_token_ids),
            min_new_tokens=min_new_tokens,
            num_candidates=num_candidates,
            chunk_tokens=chunk_tokens,
            truncation=Truncation(top_k, top_p, min_p),
            cache_dtype=cache_dtype,
            row_sharding=batch_sharding(mesh) if is_spread else None,
        )
        self._programs = Programs(self._graphdef, self._decode_settings)

    def prepare(self, params: Any) -> Weights:
        """Casts parameters to the compute dtype and unstacks their layers, once for all calls until the next update.

        The result refers to `params`, so it is invalid once these are donated, and it holds a second copy of the
        weights where the compute dtype is not theirs: drop it before the update.

        Args:
            params: the decoder's state (`nnx.split`), on one device or sharded over a mesh.

        Raises:
            ValueError: num_candidates is above the decoder's vocabulary, or no stop token is in it.
        """
        vocab_size = nnx.merge(self._graphdef, params).config.vocab_size
        num_candidates = self._decode_settings.num_candidates
        if num_candidates > vocab_size:
            raise ValueError(
                f"Sampler: num_candidates must be at most the vocabulary's {vocab_size}, got {num_candidates}"
            )
        stops = self._decode_settings.stop_token_ids
        if stops and min(stops) >= vocab_size:
            raise ValueError(
                f"Sampler: the stop tokens {list(stops)} are all outside the model's vocabulary of {vocab_size}, so no "
                "completion would end: is it another model's tokenizer or generation_config.json?"
            )
        with self.on_its_devices():
            return Weights(params, self._programs.cast(params), vocab_size)

    def sample(
        self,
        weights: Weights,
        prompts: Sequence[np.ndarray],
        *,
        seeds: Sequence[int] | np.ndarray,
        temperature: float,
        greedy: bool = False,
        max_new_tokens: Sequence[int] | None = None,
    ) -> Iterator[Completion]:
        """Samples one completion for each prompt; yields them as they end, in no particular order.

        Args:
            weights: from `prepare`.
            prompts: N arrays of token ids, each of 1 to max_prompt_tokens tokens.
            seeds: uint32[N], one per request: equal seed, prompt and parameters give an equal completion.
            temperature: divides the logits, for sampling and for the log-probs.
            greedy: takes the most likely token; the log-probs are still those at `temperature`.
            max_new_tokens: one limit per request, at most the sampler's; None: the sampler's for all.

        Raises:
            ValueError: before anything is computed: a prompt that is empty, too long or has ids outside the vocabulary,
                another number of seeds than prompts, a temperature that is not above 0.
            FloatingPointError: during iteration: the model's log-probs are not finite.
        """
        temperature = float(temperature)
        if not (temperature > 0 and np.isfinite(temperature)):
            raise ValueError(
                f"sample: temperature must be above 0, got {temperature}; for the most likely tokens use greedy=True"
            )
        checked = [self._check_prompt(i, prompt, weights.vocab_size) for i, prompt in enumerate(prompts)]
        if not checked:
            return iter(())
        seed_N = _check_seeds(seeds, len(checked))
        most_N = self._check_limits(max_new_tokens, len(checked))
        requests = [
            Request(i, prompt, int(seed), int(most))
            for i, (prompt, seed, most) in enumerate(zip(checked, seed_N, most_N, strict=True))
        ]
        call = CallSettings(np.float32(temperature), np.bool_(greedy))
        return self._run(weights, requests, call)

    def on_its_devices(self) -> contextlib.AbstractContextManager[Any]:
        """Makes the sampler's mesh JAX's current one; sample in this context where that may be the mesh of all hosts.

        `sample` cannot enter it: its caller would be in the context between two completions.
        """
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _run(self, weights: Weights, requests: Sequence[Request], call: CallSettings) -> Iterator[Completion]:
        # A generator, so that nothing is computed before the first completion is asked for.
        yield from Schedule(
            self._programs, self._schedule_settings, weights.params, weights.decode, requests, call
        ).completions()

    def _check_prompt(self, index: int, prompt: np.ndarray, vocab_size: int) -> np.ndarray:
        ids, limit = np.asarray(prompt), self._schedule_settings.max_prompt_tokens
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise ValueError(
                f"sample: prompt {index}: expected a list of token ids, got {ids.dtype} of shape {ids.shape}"
            )
        if not 1 <= len(ids) <= limit:
            remedy = "raise max_prompt_tokens or shorten it" if len(ids) else "a decoder needs a token to start from"
            raise ValueError(f"sample: prompt {index} has {len(ids)} tokens, expected 1 to {limit}: {remedy}")
        if ids.min() < 0 or ids.max() >= vocab_size:
            place = int(np.argmax((ids < 0) | (ids >= vocab_size)))
            raise ValueError(
                f"sample: prompt {index}, token {place}: id {ids[place]} is outside the model's vocabulary of "
                f"{vocab_size}; is it another model's tokenizer?"
            )
        return ids.astype(np.int32)

    def _check_limits(self, max_new_tokens: Sequence[int] | None, num_requests: int) -> list[int]:
        most, least = self._max_new_tokens, max(self._decode_settings.min_new_tokens, 1)
        if max_new_tokens is None:
            return [most] * num_requests
        limits = list(max_new_tokens)
        if len(limits) != num_requests or not all(least <= limit <= most for limit in limits):
            raise ValueError(
                f"sample: max_new_tokens must be one number for each of {num_requests} prompts, from {least} to the "
                f"sampler's {most}, got {limits}"
            )
        return limits


def _check_at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"Sampler: {name} must be at least {least}, got {value}")


def _check_shares(**shares: float | None) -> None:
    for name, share in shares.items():
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"Sampler: {name} must be above 0 and at most 1, got {share}")


def _check_seeds(seeds: Sequence[int] | np.ndarray, num_requests: int) -> np.ndarray:
    seed_N = np.asarray(seeds)
    if seed_N.shape != (num_requests,) or not np.issubdtype(seed_N.dtype, np.integer):
        raise ValueError(
            f"sample: expected one integer seed for each of {num_requests} prompts, "
            f"got {seed_N.dtype} of shape {seed_N.shape}"
        )
    if seed_N.min() < 0 or seed_N.max() >= 2**32:
        raise ValueError(f"sample: seeds must be in [0, 2^32), got {seed_N.min()} to {seed_N.max()}")
    return seed_N
