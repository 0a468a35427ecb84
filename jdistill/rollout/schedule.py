"""The host's side of one call of the sampler: requests get rows, chunks are started, completions are handed out.

The host never waits for a token: while it reads one chunk the next one is already running. A row whose completion has
ended takes the next request of the queue. Once the queue is empty, the remaining rows are moved together into a smaller
batch. A prompt that several requests share is computed once.

Dimension key: `B` rows (a bucket), `A` requests that are given rows together, `U` distinct prompts of these, `S` prompt
tokens (padded to a bucket), `C` steps of a chunk, `R` completion tokens, `K` candidates.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jdistill import buckets
from jdistill.rollout.completion import Completion
from jdistill.rollout.decode import Admission, CallSettings, DecodeWeights, Programs, Rows, Sampled
from jdistill.rollout.stop_strings import StopStrings
from jdistill.turn_end import FinishReason

_LEAST_ROWS = 8  # fewer are not faster


@dataclass(frozen=True)
class ScheduleSettings:
    """The part of a sampler's settings that only the host reads."""

    max_prompt_tokens: int
    max_rows: int | None  # None: every request has a row from the start
    num_shards: int  # devices that the rows are spread over
    stop_strings: StopStrings | None
    include_stop: bool  # see Completion


@dataclass
class Request:
    """One prompt of a call, and what the host knows of its completion."""

    index: int  # position in the call
    prompt: np.ndarray
    seed: int
    most: int  # tokens of its completion
    row: int = -1  # on the device; -1: waiting
    ahead: int = 0  # tokens requested from the device
    length: int = 0  # tokens that have arrived
    pieces: list[tuple[Sampled, int]] = dataclasses.field(default_factory=list)  # (chunk, its row there)


class Schedule:
    """Runs the requests of one call; `completions` yields their completions as they end.

    Args:
        programs: of the sampler.
        settings: of the sampler.
        params: the decoder's state, for prefill.
        weights: the same parameters in the form that decoding reads.
        requests: at least one.
        call: temperature and greedy.
    """

    def __init__(
        self,
        programs: Programs,
        settings: ScheduleSettings,
        params: Any,
        weights: DecodeWeights,
        requests: Sequence[Request],
        call: CallSettings,
    ):
        self._programs = programs
        self._settings = settings
        self._params = params
        self._weights = weights
        self._call = call
        self._queue = collections.deque(requests)
        self._num_rows = self._row_bucket(min(len(requests), settings.max_rows or len(requests)))
        self._most_slots = max(self._prompt_slots([r]) + r.most for r in requests)
        self._num_slots = 0
        self._rows: Rows | None = None
        self._running: dict[int, Request] = {}  # by row
        # Chunks that the device has not finished or the host has not read, each with the requests of its rows.
        self._unread: collections.deque[tuple[Sampled, dict[int, Request]]] = collections.deque()

    def completions(self) -> Iterator[Completion]:
        """Yields each completion as it ends.

        Raises:
            FloatingPointError: a log-prob of the model is not finite.
        """
        while self._queue or self._running:
            admitted = self._assign_rows()
            if not self._queue and not admitted:
                self._shrink()
            self._reserve_slots(admitted)
            if admitted:
                self._admit(admitted)
            if any(r.ahead < r.most for r in self._running.values()):
                self._decode()
                if len(self._unread) < 2:
                    continue  # keep the device busy while the host reads
            yield from self._read()
            while len(self._unread) > 1 or (self._unread and not self._running):
                yield from self._read()

    def _assign_rows(self) -> list[Request]:
        """Takes requests from the queue into the free rows."""
        free = [row for row in range(self._num_rows) if row not in self._running]
        admitted = [self._queue.popleft() for _ in range(min(len(free), len(self._queue)))]
        for row, request in zip(free, admitted, strict=False):
            request.row = row
            self._running[row] = request
        return admitted

    def _shrink(self) -> None:
        """Moves the remaining rows into a smaller batch where that halves it."""
        fewer = self._row_bucket(len(self._running))
        # With rows spread over devices the move would send caches between them.
        if self._settings.num_shards > 1 or 2 * fewer > self._num_rows or fewer < _LEAST_ROWS:
            return
        kept = sorted(self._running)
        index_B = np.resize(np.array(kept, np.int32), fewer)
        is_padding_B = np.arange(fewer) >= len(kept)
        self._rows = self._programs.resize(self._rows, index_B, is_padding_B, num_slots=self._num_slots)
        self._num_rows = fewer
        self._running = {row: self._running[old] for row, old in enumerate(kept)}
        for row, request in self._running.items():
            request.row = row

    def _reserve_slots(self, admitted: Sequence[Request]) -> None:
        """Makes or grows the cache, so that it holds the admitted prompts and one more chunk of every row."""
        chunk = self._programs.settings.chunk_tokens
        needed = max(len(r.prompt) + min(r.ahead + 1 + chunk, r.most) for r in self._running.values())
        needed = max(needed, self._prompt_slots(admitted))
        if needed <= self._num_slots:
            return
        self._num_slots = buckets.cache_slots(needed, self._most_slots)
        if self._rows is None:
            self._rows = self._programs.empty(self._params, num_rows=self._num_rows, num_slots=self._num_slots)
        else:
            self._rows = self._programs.resize(self._rows, None, None, num_slots=self._num_slots)

    def _admit(self, admitted: Sequence[Request]) -> None:
        """Starts the prefill of the admitted requests and the draw of their first tokens."""
        token_US, admission = self._admission(admitted)
        prompts = self._programs.prefill(self._params, token_US, admission.lengths)
        self._rows, sampled = self._programs.admit(self._rows, *prompts, admission, self._call)
        for request in admitted:
            request.ahead = 1
        self._unread.append((sampled, dict(enumerate(admitted))))

    def _admission(self, admitted: Sequence[Request]) -> tuple[Any, Admission]:
        """Returns the distinct prompts, int32[U, S], and which of them each request has."""
        places: dict[bytes, int] = {}
        source = [places.setdefault(request.prompt.tobytes(), len(places)) for request in admitted]
        num_prompts = self._prefill_row_bucket(len(places))
        token_US = np.zeros((num_prompts, self._prompt_slots(admitted)), np.int32)
        length_U = np.ones(num_prompts, np.int32)  # a row of padding is a prompt of one token
        for request, place in zip(admitted, source, strict=True):
            token_US[place, : len(request.prompt)] = request.prompt
            length_U[place] = len(request.prompt)
        # A request of padding goes to a row that does not exist, and so is dropped.
        A = self._prefill_row_bucket(len(admitted))
        source_A, row_A = np.zeros(A, np.int32), np.full(A, self._num_rows, np.int32)
        seed_A, first_end_A, last_position_A = np.zeros(A, np.uint32), np.zeros(A, np.int32), np.zeros(A, np.int32)
        for a, request in enumerate(admitted):
            source_A[a], row_A[a], seed_A[a] = source[a], request.row, request.seed
            first_end_A[a] = len(request.prompt) + self._programs.settings.min_new_tokens
            last_position_A[a] = len(request.prompt) + request.most - 1
        admission = Admission(length_U, source_A, row_A, seed_A, first_end_A, last_position_A)
        return self._put(token_US), Admission(*map(self._put, admission))

    def _decode(self) -> None:
        """Starts one chunk for all rows."""
        self._rows, sampled = self._programs.decode(self._weights, self._rows, self._call)
        for request in self._running.values():
            request.ahead += self._programs.settings.chunk_tokens
        self._unread.append((sampled, dict(self._running)))

    def _read(self) -> Iterator[Completion]:
        """Waits for the oldest unread chunk; yields the completions that end in it and frees their rows."""
        sampled, sources = self._unread.popleft()
        chunk = Sampled(*(np.asarray(array) for array in sampled))
        # The same rule as decode._ends, by which the device has stopped already; here it says which rows are free.
        stop_BC = np.isin(chunk.token_ids, self._programs.settings.stop_token_ids)
        for place, request in sources.items():
            if self._running.get(request.row) is not request:
                continue  # it ended in an earlier chunk
            left = min(chunk.token_ids.shape[1], request.most - request.length)
            early = max(self._programs.settings.min_new_tokens - request.length, 0)
            stops = np.flatnonzero(stop_BC[place, early:left])
            num_taken = early + int(stops[0]) + 1 if len(stops) else left
            request.pieces.append((chunk, place))
            before, request.length = request.length, request.length + num_taken
            reason: FinishReason | None = "stop" if len(stops) else None
            span = None
            if self._settings.stop_strings is not None:
                ids = np.concatenate([chunk.token_ids[row] for chunk, row in request.pieces])
                text_length = request.length - len(stops[:1])  # a stop token is not text
                if (end := self._settings.stop_strings.find(ids[:text_length], before)) is not None:
                    (request.length, span), reason = end, "stop"
            if reason is None and request.length >= request.most:
                reason = "length"
            if reason is not None:
                del self._running[request.row]
                yield self._completion(request, reason, span)

    def _completion(
        self, request: Request, finish_reason: FinishReason, stop_string_span: tuple[int, int] | None
    ) -> Completion:
        token_R, logprob_R, candidate_RK = (
            np.concatenate([getattr(chunk, name)[row] for chunk, row in request.pieces])[: request.length]
            for name in Sampled._fields
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
            candidate_ids=candidate_RK if self._programs.settings.num_candidates else None,
            finish_reason=finish_reason,
            stop_string_span=stop_string_span,
            include_stop=self._settings.include_stop,
        )

    def _prompt_slots(self, requests: Sequence[Request]) -> int:
        longest = max((len(r.prompt) for r in requests), default=1)
        return buckets.prompt_slots(longest, self._settings.max_prompt_tokens)

    def _row_bucket(self, num: int) -> int:
        """Rounds `num` rows up to a bucket on each device."""
        shards = self._settings.num_shards
        return shards * buckets.decode_rows(-(-num // shards))

    def _prefill_row_bucket(self, num: int) -> int:
        """Rounds `num` prompts or admissions up to one of the few row counts of prefill on each device."""
        shards = self._settings.num_shards
        return shards * buckets.prefill_rows(-(-num // shards))

    def _put(self, array: np.ndarray) -> jax.Array | np.ndarray:
        sharding = self._programs.settings.row_sharding
        return array if sharding is None else jax.device_put(array, sharding)
