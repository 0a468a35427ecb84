"""Ways of requesting scores from vLLM and reading its replies: request fields, our worker extension, or plain.

fields     `prompt_logprob_token_ids` and `prompt_logprob_start`; needs vLLM's second model runner (GPUs).
extension  our code in vLLM's workers (worker.py); needs its first model runner (CPUs); any temperature.
plain      `prompt_logprobs`; works everywhere. Candidates and temperatures other than 1 only if the vocabulary is small
           enough for vLLM to return all of it; otherwise they are refused.

Dimension key: S tokens of a sequence, P scored positions, W entries that vLLM returns per position, V vocabulary, K
top-k, C candidates.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import numpy as np
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from jdistill.sidecar.engines.vllm import worker
from jdistill.wire.errors import TeacherError
from jdistill.wire.types import SequenceToScore

PARAMETERS = frozenset(SamplingParams.__struct_fields__)
HAS_ID_SCORES = hasattr(
    RequestOutput("", None, [], None, [], True), "prompt_token_id_logprobs"
)  # the reply field of `fields` and `extension`


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class WayScores:
    """TokenScores without the checksum."""

    logprobs: np.ndarray
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    candidate_logprobs: np.ndarray | None = None


class Way(abc.ABC):
    """One way of requesting scores from vLLM and reading its reply."""

    name: str
    max_top_k: int
    max_candidate_count: int
    any_temperature: bool

    @abc.abstractmethod
    def params(self, sequence: SequenceToScore, *, top_k: int, temperature: float) -> SamplingParams:
        """Returns the parameters of the request that scores `sequence`."""

    @abc.abstractmethod
    def read(self, output: RequestOutput, sequence: SequenceToScore, *, top_k: int, temperature: float) -> WayScores:
        """Returns the scores in the reply; raises TeacherError if they are incomplete."""


def _sampling_params(**kwargs: Any) -> SamplingParams:
    """Returns parameters that generate one token, vLLM's minimum, and never read the prefix cache."""
    optional = {
        "flat_logprobs": True,  # lists instead of one object per entry
        # A prompt read from the prefix cache has no hidden states: versions have returned uninitialised memory for it.
        "skip_reading_prefix_cache": True,
    }
    kwargs |= {name: value for name, value in optional.items() if name in PARAMETERS}
    return SamplingParams(
        max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **kwargs
    )


class PlainWay(Way):
    """`prompt_logprobs`: the prompt's own token and the top-k at every position."""

    name = "plain"

    def __init__(self, vocab_size: int, max_logprobs: int):
        self._vocab_size = vocab_size
        whole = max_logprobs >= vocab_size
        self.max_top_k = min(max_logprobs, vocab_size)
        self.max_candidate_count = vocab_size if whole else 0
        self.any_temperature = whole

    def _whole(self, sequence: SequenceToScore, temperature: float) -> bool:
        return sequence.candidate_ids is not None or temperature != 1

    def params(self, sequence: SequenceToScore, *, top_k: int, temperature: float) -> SamplingParams:
        """See Way.params."""
        whole = self._whole(sequence, temperature)
        return _sampling_params(prompt_logprobs=self._vocab_size if whole else top_k)

    def read(self, output: RequestOutput, sequence: SequenceToScore, *, top_k: int, temperature: float) -> WayScores:
        """See Way.read."""
        positions_P = sequence.scored_positions()
        targets_P = sequence.token_ids[positions_P]
        whole = self._whole(sequence, temperature)
        ids_PW, logprobs_PW = _entries(output.prompt_logprobs, positions_P)
        if not whole:
            top_ids, top_logprobs = _top(ids_PW, logprobs_PW, top_k) if top_k else (None, None)
            return WayScores(_select(ids_PW, logprobs_PW, targets_P), top_ids, top_logprobs)
        logprobs_PV = np.full((len(positions_P), self._vocab_size), np.nan, np.float32)
        rows_P1 = np.arange(len(positions_P))[:, None]
        known_PW = ids_PW >= 0
        logprobs_PV[np.broadcast_to(rows_P1, ids_PW.shape)[known_PW], ids_PW[known_PW]] = logprobs_PW[known_PW]
        if np.isnan(logprobs_PV).any():
            raise TeacherError("vLLM did not return the whole vocabulary for every requested position")
        if temperature != 1:
            scaled_PV = logprobs_PV.astype(np.float64) / temperature
            scaled_PV -= scaled_PV.max(axis=-1, keepdims=True)
            logprobs_PV = scaled_PV - np.log(np.exp(scaled_PV).sum(axis=-1, keepdims=True))
            logprobs_PV = logprobs_PV.astype(np.float32)
        top_ids = top_logprobs = candidate_logprobs = None
        if top_k:
            top_ids = np.argsort(-logprobs_PV, axis=-1, kind="stable")[:, :top_k].astype(np.int32)
            top_logprobs = np.take_along_axis(logprobs_PV, top_ids, axis=-1)
        if sequence.candidate_ids is not None:
            candidate_logprobs = np.take_along_axis(logprobs_PV, sequence.candidate_ids, axis=-1)
        return WayScores(logprobs_PV[rows_P1[:, 0], targets_P], top_ids, top_logprobs, candidate_logprobs)


class FieldsWay(Way):
    """`prompt_logprob_token_ids` from `prompt_logprob_start` on: only the response's positions, and any ids."""

    name = "fields"
    any_temperature = False

    def __init__(self, vocab_size: int, max_logprobs: int):
        self.max_top_k = min(max_logprobs, vocab_size)
        self.max_candidate_count = max_logprobs - 1  # the scored token itself takes one column

    def params(self, sequence: SequenceToScore, *, top_k: int, temperature: float) -> SamplingParams:
        """See Way.params."""
        positions_P = sequence.scored_positions()
        targets_P1 = sequence.token_ids[positions_P][:, None]
        ids_PC = targets_P1 if sequence.candidate_ids is None else np.hstack([targets_P1, sequence.candidate_ids])
        # Row i is for token position start + i + 1, up to the prompt's last; -1 requests nothing.
        start = int(positions_P[0]) - 1
        ids = np.full((len(sequence.token_ids) - 1 - start, ids_PC.shape[1]), -1, np.int32)
        ids[positions_P - 1 - start] = ids_PC
        return _sampling_params(
            prompt_logprob_token_ids=ids,
            prompt_logprob_start=start,
            prompt_logprobs=top_k or None,
        )

    def read(self, output: RequestOutput, sequence: SequenceToScore, *, top_k: int, temperature: float) -> WayScores:
        """See Way.read."""
        positions_P = sequence.scored_positions()
        start = int(positions_P[0]) - 1
        C = 0 if sequence.candidate_ids is None else sequence.candidate_ids.shape[1]
        rows = _id_scores(output, (len(sequence.token_ids) - 1 - start, 1 + C))[positions_P - 1 - start]
        top_ids = top_logprobs = None
        if top_k:
            top_ids, top_logprobs = _top(*_entries(output.prompt_logprobs, positions_P), top_k)
        return WayScores(rows[:, 0], top_ids, top_logprobs, rows[:, 1:] if C else None)


class ExtensionWay(Way):
    """Our code in vLLM's workers."""

    name = "extension"
    any_temperature = True

    def __init__(self, vocab_size: int):
        self.max_top_k = self.max_candidate_count = vocab_size

    def params(self, sequence: SequenceToScore, *, top_k: int, temperature: float) -> SamplingParams:
        """See Way.params."""
        args = worker.request_args(sequence.spans, sequence.candidate_ids, top_k=top_k, temperature=float(temperature))
        return _sampling_params(extra_args=args)

    def read(self, output: RequestOutput, sequence: SequenceToScore, *, top_k: int, temperature: float) -> WayScores:
        """See Way.read."""
        targets_P = sequence.token_ids[sequence.scored_positions()]
        C = 0 if sequence.candidate_ids is None else sequence.candidate_ids.shape[1]
        rows = _id_scores(output, (len(targets_P), 2 + C + 2 * top_k))
        if not np.array_equal(rows[:, 0].astype(np.int64), targets_P):
            raise TeacherError("vLLM's worker scored other token ids than requested")
        top = rows[:, 2 + C :]
        return WayScores(
            rows[:, 1],
            top[:, :top_k].astype(np.int32) if top_k else None,
            top[:, top_k:] if top_k else None,
            rows[:, 2 : 2 + C] if C else None,
        )


def _id_scores(output: RequestOutput, shape: tuple[int, int]) -> np.ndarray:
    scores = output.prompt_token_id_logprobs
    if scores is None or np.shape(scores) != shape:
        got = "none" if scores is None else f"shape {np.shape(scores)}"
        raise TeacherError(f"vLLM returned {got} for the requested scores, expected shape {shape}")
    return np.asarray(scores)


def _entries(prompt_logprobs: Any, positions_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and log-probabilities [P, W] at the positions, in vLLM's order; short rows end in -1, -inf."""
    if prompt_logprobs is None:
        raise TeacherError("vLLM returned no prompt log-probabilities")
    if hasattr(prompt_logprobs, "start_indices"):  # FlatLogprobs
        starts_P = np.asarray(prompt_logprobs.start_indices)[positions_P]
        counts_P = np.asarray(prompt_logprobs.end_indices)[positions_P] - starts_P
        columns_W = np.arange(counts_P.max(initial=0))
        known_PW = columns_W < counts_P[:, None]
        places_PW = np.where(known_PW, starts_P[:, None] + columns_W, 0)
        ids = np.asarray(prompt_logprobs.token_ids, np.int64)
        logprobs = np.asarray(prompt_logprobs.logprobs, np.float32)
        return np.where(known_PW, ids[places_PW], -1), np.where(known_PW, logprobs[places_PW], -np.inf)
    rows = [prompt_logprobs[position] or {} for position in positions_P]
    width = max(map(len, rows))
    ids_PW = np.full((len(rows), width), -1, np.int64)
    logprobs_PW = np.full((len(rows), width), -np.inf, np.float32)
    for p, row in enumerate(rows):
        ids_PW[p, : len(row)] = list(row)
        logprobs_PW[p, : len(row)] = [entry.logprob for entry in row.values()]
    return ids_PW, logprobs_PW


def _select(ids_PW: np.ndarray, logprobs_PW: np.ndarray, targets_P: np.ndarray) -> np.ndarray:
    """Returns the targets' log-probabilities [P]; raises TeacherError if one is missing."""
    # By id, never by order: in older versions the first entry was the most likely token, not the prompt's.
    found_PW = ids_PW == targets_P[:, None]
    if not found_PW.any(axis=-1).all():
        p = int(np.argmin(found_PW.any(axis=-1)))
        raise TeacherError(f"vLLM returned no log-probability of token {targets_P[p]} at scored position number {p}")
    return logprobs_PW[np.arange(len(targets_P)), found_PW.argmax(axis=-1)]


def _top(ids_PW: np.ndarray, logprobs_PW: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and log-probabilities [P, K] of the most likely entries.

    The prompt's own token may be listed twice, or in addition to the top-k.
    """
    # Flat rows begin with the prompt's token and repeat it if it is among the top-k.
    twice_P = (ids_PW[:, 1:] == ids_PW[:, :1]).any(axis=-1)
    logprobs_PW = logprobs_PW.copy()
    logprobs_PW[twice_P, 0] = -np.inf
    order_PK = np.argsort(-logprobs_PW, axis=-1, kind="stable")[:, :top_k]
    top_ids = np.take_along_axis(ids_PW, order_PK, axis=-1).astype(np.int32)
    top_logprobs = np.take_along_axis(logprobs_PW, order_PK, axis=-1)
    if top_ids.shape[1] < top_k or (top_ids < 0).any():
        raise TeacherError(f"vLLM returned fewer than the {top_k} most likely tokens at a position")
    return top_ids, top_logprobs
