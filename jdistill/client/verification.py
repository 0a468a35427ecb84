"""Verify that a reply answers the request; every chunk is checked before any of its numbers is used.

The checks are passes over whole columns and one loop over entries: a few numpy calls for each of 64 short sequences
would cost more than everything else.

Dimension key: B sequences of a call, E entries of a chunk, N scored positions of a chunk, P of a sequence, K top-k.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from jdistill.wire import codec
from jdistill.wire.errors import CorruptedError, FingerprintMismatchError, VerificationError
from jdistill.wire.types import ModelInfo, SequenceToScore, TokenScores


class Reply:
    """Collects the chunks of one call into one TokenScores per sequence.

    Args:
        sequences: the call's sequences, [B].
        crcs: `codec.token_crc` of each sequence, [B].
        indexes: index of each sequence in error messages, [B].
        endpoint: name of the server in error messages.
        info: the model that must have scored them.
    """

    def __init__(
        self,
        sequences: Sequence[SequenceToScore],
        crcs: Sequence[int],
        indexes: Sequence[int],
        *,
        endpoint: str,
        info: ModelInfo,
        top_k: int,
        temperature: float,
    ):
        self._crcs = crcs
        self._indexes = indexes
        self._endpoint = endpoint
        self._info = info
        self._top_k = top_k
        self._temperature = float(np.float32(temperature))  # as it was on the wire
        first = sequences[0].candidate_ids
        self._candidate_count = 0 if first is None else first.shape[1]
        self._num_scored_B = [s.num_scored for s in sequences]
        self._received_B = [0] * len(sequences)
        # One array for all sequences of the call: for 128 KiB per sequence the kernel would hand out single pages of
        # 4 KiB. A batch of 64 x 512 with top-64 took 14 ms that way, and takes 5 with large arrays (huge pages).
        self._stops_B = list(itertools.accumulate(self._num_scored_B))
        total = self._num_missing = self._stops_B[-1]
        self._columns: dict[str, np.ndarray] = {"logprobs": np.empty(total, np.float32)}
        if top_k:
            self._columns["top_ids"] = np.empty((total, top_k), np.int32)
            self._columns["top_logprobs"] = np.empty((total, top_k), np.float32)
        if self._candidate_count:
            self._columns["candidate_logprobs"] = np.empty((total, self._candidate_count), np.float32)
        self._scores_B: list[TokenScores | None] = [None] * len(sequences)
        self.blamed: int | None = None  # the sequence of the call that caused a VerificationError

    def add(self, data: bytes) -> None:
        """Checks and stores one chunk.

        Raises:
            VerificationError: the chunk does not answer the request; `blamed` is the sequence at fault, if one is.
            CorruptedError: the chunk was changed in transit.
            FingerprintMismatchError: another model or tokenizer scored it.
        """
        try:
            chunk = codec.decode_response(data, top_k=self._top_k, candidate_count=self._candidate_count)
        except (VerificationError, CorruptedError) as e:
            raise type(e)(f"{self._endpoint}: {e}") from None
        for name in ("fingerprint", "tokenizer_fingerprint"):
            got, expected = getattr(chunk, name), getattr(self._info, name)
            if got != expected:
                raise FingerprintMismatchError(
                    f"{self._endpoint}: {name} of the reply is {got!r}, of the run's teacher {expected!r}: the teacher "
                    "was exchanged in the middle of the run"
                )
        if chunk.temperature != self._temperature:
            raise VerificationError(
                f"{self._endpoint}: scored at temperature {chunk.temperature:g}, asked for {self._temperature:g}"
            )
        if (unknown := np.flatnonzero(chunk.sequence_indexes >= len(self._crcs))).size:
            raise VerificationError(
                f"{self._endpoint}: scores of sequence {chunk.sequence_indexes[unknown[0]]} of a request that has "
                f"{len(self._crcs)}"
            )
        self._check_values(chunk)
        self._take(chunk)

    def finish(self) -> list[TokenScores]:
        """Returns all scores after the stream has ended well; raises VerificationError if any are missing."""
        for b, (received, num_scored) in enumerate(zip(self._received_B, self._num_scored_B, strict=True)):
            if received != num_scored:
                raise self._blame(b, f"the stream ended after {received} of {num_scored} scores: truncated")
        return [self._scores(b) for b in range(len(self._num_scored_B))]

    @property
    def is_whole(self) -> bool:
        """Whether all scores have arrived."""
        return self._num_missing == 0

    def complete(self, b: int) -> TokenScores | None:
        """Returns the scores of sequence `b` if all have arrived, else None; they stay valid if the stream breaks."""
        return self._scores(b) if self._received_B[b] == self._num_scored_B[b] else None

    def _scores(self, b: int) -> TokenScores:
        scores = self._scores_B[b]
        if scores is None:
            place = slice(self._stops_B[b] - self._num_scored_B[b], self._stops_B[b])
            columns = {name: column[place] for name, column in self._columns.items()}
            scores = self._scores_B[b] = TokenScores(
                columns["logprobs"],
                columns.get("top_ids"),
                columns.get("top_logprobs"),
                columns.get("candidate_logprobs"),
                self._crcs[b],
            )
        return scores

    def _take(self, chunk: codec.ScoreChunk) -> None:
        """Checks a chunk's entries and copies its values into place."""
        received_B = self._received_B.copy()  # assigned only after the whole chunk has passed
        slabs: list[list[int]] = []  # [start in the chunk, start in the columns, length]; adjacent ones are merged
        start = 0
        for b, first, count, crc in zip(
            chunk.sequence_indexes.tolist(),
            chunk.first_targets.tolist(),
            chunk.target_counts.tolist(),
            chunk.token_crcs.tolist(),
            strict=True,
        ):
            if crc != self._crcs[b]:
                raise self._blame(
                    b,
                    f"the teacher scored other token ids than were sent (CRC-32 {crc:#010x}, sent "
                    f"{self._crcs[b]:#010x})",
                )
            received, num_scored = received_B[b], self._num_scored_B[b]
            if first != received or count == 0 or received + count > num_scored:
                raise self._blame(
                    b,
                    f"scores [{first}, {first + count}) came after {received} of {num_scored}; every position is "
                    "scored once, and pieces of one sequence come in order",
                )
            received_B[b] += count
            place = self._stops_B[b] - num_scored + first
            if slabs and slabs[-1][1] + slabs[-1][2] == place:
                slabs[-1][2] += count
            else:
                slabs.append([start, place, count])
            start += count
        for name, column in self._columns.items():
            values = getattr(chunk, name)
            for first, place, count in slabs:
                column[place : place + count] = values[first : first + count]
        self._received_B = received_B
        self._num_missing -= start

    def _check_values(self, chunk: codec.ScoreChunk) -> None:
        # Each comparison is written so that NaN fails it; a maximum is NaN if any value is.
        for name in ("logprobs", "candidate_logprobs"):
            values = getattr(chunk, name)
            if values is not None and values.size and not values.max() <= 0:
                self._refuse_values(chunk, name, values <= 0, "; a log-probability is at most 0")
        ids, top = chunk.top_ids, chunk.top_logprobs
        if ids is None or top is None or not ids.size:
            return
        if not ids.view(np.uint32).max() < self._info.vocab_size:  # as unsigned, negative ids are large
            good = (ids >= 0) & (ids < self._info.vocab_size)
            self._refuse_values(chunk, "top_ids", good, f", outside [0, {self._info.vocab_size})")
        # The largest value of each row comes first, so if it is at most 0 all others are too. One pass over adjacent
        # values in memory, ignoring pairs that span two rows, is seven times as fast as one over a [N, K - 1] view.
        descending = top.ravel()[1:] <= top.ravel()[:-1]
        descending[self._top_k - 1 :: self._top_k] = True
        if not (top[:, 0].max() <= 0 and descending.all()):
            self._refuse_values(chunk, "top_logprobs", top <= 0, "; a log-probability is at most 0")
            good = (top[:, 1:] <= top[:, :-1]).all(axis=1)
            b, p = self._locate(chunk, int(np.argmin(good)))
            raise self._blame(b, f"top_logprobs at scored position {p} are not in descending order")

    def _refuse_values(self, chunk: codec.ScoreChunk, name: str, good: np.ndarray, rule: str) -> None:
        """Raises VerificationError for the first value that is not good, if any."""
        if good.all():
            return
        values = getattr(chunk, name)
        n = int(np.argwhere(~good)[0, 0])
        value = values[n][~good[n]].flat[0] if values.ndim == 2 else values[n]
        b, p = self._locate(chunk, n)
        raise self._blame(b, f"{name} has {value} at scored position {p}{rule}")

    def _locate(self, chunk: codec.ScoreChunk, n: int) -> tuple[int, int]:
        """Returns (sequence, scored position) of the n-th value of a chunk."""
        stops_E = np.cumsum(chunk.target_counts)
        e = int(np.searchsorted(stops_E, n, side="right"))
        offset = n - int(stops_E[e] - chunk.target_counts[e])
        return int(chunk.sequence_indexes[e]), int(chunk.first_targets[e]) + offset

    def _blame(self, b: int, what: str) -> VerificationError:
        self.blamed = b
        return VerificationError(f"{self._endpoint}: sequence {self._indexes[b]}: {what}")
