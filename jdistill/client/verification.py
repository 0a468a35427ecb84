"""Is a reply the answer to what was asked? Every chunk is checked before a number of it is used.

Dimension key: B sequences of a call, E entries of a chunk, N scored positions of a chunk, P of a sequence, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jdistill.wire import codec
from jdistill.wire.errors import CorruptedError, FingerprintMismatchError, VerificationError
from jdistill.wire.types import ModelInfo, SequenceToScore, TokenScores


class Reply:
    """Collects the chunks of one call into one TokenScores a sequence.

    Args:
        sequences: what was asked, [B].
        crcs: `codec.token_crc` of each, [B].
        indexes: how errors call each, [B].
        endpoint: how errors call the server.
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
        self._num_missing = sum(self._num_scored_B)
        self._scores_B = [
            TokenScores(
                logprobs=np.empty(num_scored, np.float32),
                top_ids=np.empty((num_scored, top_k), np.int32) if top_k else None,
                top_logprobs=np.empty((num_scored, top_k), np.float32) if top_k else None,
                candidate_logprobs=np.empty((num_scored, self._candidate_count), np.float32)
                if self._candidate_count
                else None,
                token_crc=crc,
            )
            for num_scored, crc in zip(self._num_scored_B, crcs, strict=True)
        ]
        self.blamed: int | None = None  # the sequence of the call that a VerificationError speaks of

    def add(self, data: bytes) -> None:
        """Checks and takes one chunk.

        Raises:
            VerificationError: it is not the answer to what was asked; `blamed` says of which sequence, if of one.
            CorruptedError: it was changed on its way.
            FingerprintMismatchError: another model or tokenizer has answered.
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
        for b, first, scores in chunk.runs():
            self._take(b, first, scores)

    def finish(self) -> list[TokenScores]:
        """All scores, once the stream has ended well. Raises VerificationError if any are missing."""
        for b, (received, num_scored) in enumerate(zip(self._received_B, self._num_scored_B, strict=True)):
            if received != num_scored:
                raise self._blame(b, f"the stream ended after {received} of {num_scored} scores: truncated")
        return self._scores_B

    @property
    def is_whole(self) -> bool:
        """Whether all scores are there."""
        return self._num_missing == 0

    def complete(self, b: int) -> TokenScores | None:
        """Scores of sequence `b` if all of them came, else None: what can be kept of a stream that broke."""
        return self._scores_B[b] if self._received_B[b] == self._num_scored_B[b] else None

    def _take(self, b: int, first: int, part: TokenScores) -> None:
        if part.token_crc != self._crcs[b]:
            raise self._blame(
                b,
                f"the teacher scored other token ids than were sent (CRC-32 {part.token_crc:#010x}, sent "
                f"{self._crcs[b]:#010x})",
            )
        received, count = self._received_B[b], len(part.logprobs)
        if first != received or count == 0 or received + count > self._num_scored_B[b]:
            raise self._blame(
                b,
                f"scores [{first}, {first + count}) came after {received} of {self._num_scored_B[b]}; every position "
                "is scored once, and pieces of one sequence come in order",
            )
        whole, place = self._scores_B[b], slice(first, first + count)
        for name in ("logprobs", "top_ids", "top_logprobs", "candidate_logprobs"):
            if getattr(whole, name) is not None:
                getattr(whole, name)[place] = getattr(part, name)
        self._received_B[b] += count
        self._num_missing -= count

    def _check_values(self, chunk: codec.ScoreChunk) -> None:
        for name in ("logprobs", "top_logprobs", "candidate_logprobs"):
            values = getattr(chunk, name)
            if values is not None and not (good := values <= 0).all():  # NaN <= 0 is false
                n = int(np.argwhere(~good)[0, 0])
                value = values[n][~good[n]].flat[0] if values.ndim == 2 else values[n]
                b, p = self._locate(chunk, n)
                raise self._blame(b, f"{name} has {value} at scored position {p}; a log-probability is at most 0")
        if chunk.top_ids is None or chunk.top_logprobs is None:
            return
        ids, top = chunk.top_ids, chunk.top_logprobs
        if not (good := (ids >= 0) & (ids < self._info.vocab_size)).all():
            n = int(np.argwhere(~good)[0, 0])
            b, p = self._locate(chunk, n)
            raise self._blame(
                b, f"top_ids has {ids[n][~good[n]][0]} at scored position {p}, outside [0, {self._info.vocab_size})"
            )
        if not (good := (top[:, 1:] <= top[:, :-1]).all(axis=1)).all():
            b, p = self._locate(chunk, int(np.argmin(good)))
            raise self._blame(b, f"top_logprobs at scored position {p} are not in descending order")

    def _locate(self, chunk: codec.ScoreChunk, n: int) -> tuple[int, int]:
        """(sequence, scored position) of the n-th value of a chunk."""
        stops_E = np.cumsum(chunk.target_counts)
        e = int(np.searchsorted(stops_E, n, side="right"))
        offset = n - int(stops_E[e] - chunk.target_counts[e])
        return int(chunk.sequence_indexes[e]), int(chunk.first_targets[e]) + offset

    def _blame(self, b: int, what: str) -> VerificationError:
        self.blamed = b
        return VerificationError(f"{self._endpoint}: sequence {self._indexes[b]}: {what}")
