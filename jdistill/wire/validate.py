"""Check that a model can score a request: in the client before sending, and again in the sidecar.

Engines rely on these checks: a single token id outside the vocabulary kills a vLLM or SGLang engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jdistill.wire.errors import InvalidRequestError, UnsupportedError
from jdistill.wire.types import ModelInfo, SequenceToScore

MIN_TEMPERATURE = 1e-3  # below it, logits in the thousands overflow float32 to infinite scores


def validate_request(
    sequences: Sequence[SequenceToScore], *, info: ModelInfo, top_k: int = 0, temperature: float = 1.0
) -> None:
    """Checks a whole request against a model.

    Raises:
        InvalidRequestError: the request is wrong; has the field and, where one is to blame, the sequence's index.
        UnsupportedError: the engine of this model cannot do what is asked.
    """
    validate_options(info=info, top_k=top_k, temperature=temperature)
    for b, sequence in enumerate(sequences):
        validate_sequence(sequence, b, info=info)


def validate_options(*, info: ModelInfo, top_k: int, temperature: float) -> None:
    """Checks top_k and temperature; raises as `validate_request` does."""
    if top_k < 0 or int(top_k) != top_k:
        raise InvalidRequestError(f"top_k = {top_k}, expected a whole number of at least 0", field="top_k")
    if top_k > 0 and info.max_top_k == 0:
        raise UnsupportedError(
            f"top_k = {top_k}, but the engine of teacher {info.model!r} cannot return its top-k; "
            "use top_k = 0 or another engine"
        )
    limit = min(info.max_top_k, info.vocab_size)
    if top_k > limit:
        raise InvalidRequestError(
            f"top_k = {top_k} is above the limit of teacher {info.model!r}: {limit} (max_top_k {info.max_top_k}, "
            f"vocabulary {info.vocab_size}); ask for fewer, or start the teacher with a higher limit",
            field="top_k",
        )
    if not MIN_TEMPERATURE <= temperature < math.inf:
        raise InvalidRequestError(
            f"temperature = {temperature}, expected a number of at least {MIN_TEMPERATURE}", field="temperature"
        )
    if temperature != 1 and not info.any_temperature:
        raise UnsupportedError(
            f"temperature = {temperature:g}, but the engine of teacher {info.model!r} scores at temperature 1 only; "
            "sample and train at temperature 1, or use an engine that can (transformers, jax)"
        )


def validate_sequence(sequence: SequenceToScore, index: int, *, info: ModelInfo) -> None:
    """Checks one sequence, called `index` in messages; raises as `validate_request` does."""
    token_ids = np.asarray(sequence.token_ids)
    _check_integers(token_ids, 1, "token_ids", index)
    length = len(token_ids)
    if length < 2:
        raise InvalidRequestError(
            f"sequence {index} has {length} token{'' if length == 1 else 's'}; at least 2 are needed, "
            "since the first has no score",
            field="token_ids",
            sequence=index,
        )
    prefix = np.empty(0, np.int32) if sequence.teacher_prefix is None else np.asarray(sequence.teacher_prefix)
    num_scored_tokens = length - sequence.num_replaced + len(prefix)  # as the teacher sees it
    if num_scored_tokens > info.max_sequence_length:
        with_prefix = "" if sequence.teacher_prefix is None else " with its teacher_prefix"
        raise InvalidRequestError(
            f"sequence {index}{with_prefix} has {num_scored_tokens} tokens, teacher {info.model!r} takes at most "
            f"{info.max_sequence_length}; shorten it or start the teacher with a larger --max-sequence-length",
            field="token_ids",
            sequence=index,
        )
    _check_vocabulary(token_ids, "token_ids", index, info)
    _check_prefix(sequence, prefix, index, info)
    _check_spans(sequence, length, index)
    if sequence.candidate_ids is not None:
        _check_candidates(sequence, index, info)


def _check_spans(sequence: SequenceToScore, length: int, index: int) -> None:
    before = max(1, sequence.num_replaced)
    for start, stop in sequence.spans:
        if not before <= start < stop <= length:
            raise InvalidRequestError(
                f"span [{start}, {stop}) of sequence {index} ({length} tokens): spans are ascending, disjoint, "
                f"not empty and inside [{max(1, sequence.num_replaced)}, {length})",
                field="spans",
                sequence=index,
            )
        before = stop


def _check_candidates(sequence: SequenceToScore, index: int, info: ModelInfo) -> None:
    candidate_ids = np.asarray(sequence.candidate_ids)
    _check_integers(candidate_ids, 2, "candidate_ids", index)
    num_scored, count = candidate_ids.shape
    if num_scored != sequence.num_scored:
        raise InvalidRequestError(
            f"candidate_ids of sequence {index} has {num_scored} rows, its spans score {sequence.num_scored} positions",
            field="candidate_ids",
            sequence=index,
        )
    if count == 0:
        raise InvalidRequestError(
            f"candidate_ids of sequence {index} has no columns; use None for no candidates",
            field="candidate_ids",
            sequence=index,
        )
    if info.max_candidate_count == 0:
        raise UnsupportedError(
            f"candidate_ids given, but the engine of teacher {info.model!r} cannot score candidates; use top_k, the "
            "sampled tokens alone (objective.distillation: sampled_reverse_kl), or another engine"
        )
    if count > info.max_candidate_count:
        raise InvalidRequestError(
            f"candidate_ids of sequence {index} has {count} candidates a position, teacher {info.model!r} takes at "
            f"most {info.max_candidate_count}",
            field="candidate_ids",
            sequence=index,
        )
    _check_vocabulary(candidate_ids, "candidate_ids", index, info)


def _check_prefix(sequence: SequenceToScore, prefix: np.ndarray, index: int, info: ModelInfo) -> None:
    num_replaced, length = sequence.num_replaced, len(sequence.token_ids)
    if sequence.teacher_prefix is None:
        if num_replaced:
            raise InvalidRequestError(
                f"num_replaced of sequence {index} is {num_replaced}, but it has no teacher_prefix to put there",
                field="prefix_replaced",
                sequence=index,
            )
        return
    _check_integers(prefix, 1, "teacher_prefix", index)
    _check_vocabulary(prefix, "teacher_prefix", index, info)
    if not 0 <= num_replaced < length:
        raise InvalidRequestError(
            f"num_replaced of sequence {index} is {num_replaced}, expected 0 to {length - 1}: what is replaced is the "
            "prompt, and something must be left to score",
            field="prefix_replaced",
            sequence=index,
        )
    if not len(prefix) and sequence.spans[0][0] <= num_replaced:
        raise InvalidRequestError(
            f"teacher_prefix of sequence {index} is empty, so token {num_replaced} is the first that the teacher sees: "
            "it has no score. Give at least one token (begin of sequence), or score from the next token on",
            field="prefix_lengths",
            sequence=index,
        )


def _check_integers(array: np.ndarray, ndim: int, field: str, index: int) -> None:
    if array.ndim != ndim or (array.dtype.kind not in "iu" and array.size):
        raise InvalidRequestError(
            f"{field} of sequence {index} is {array.dtype} of shape {array.shape}, expected integers with "
            f"{ndim} dimension{'s' if ndim > 1 else ''}",
            field=field,
            sequence=index,
        )


def _check_vocabulary(ids: np.ndarray, field: str, index: int, info: ModelInfo) -> None:
    if not ids.size or (ids.min() >= 0 and ids.max() < info.vocab_size):
        return
    place = np.unravel_index(int(np.argmax((ids < 0) | (ids >= info.vocab_size))), ids.shape)
    where = ", ".join(str(int(p)) for p in place)
    raise InvalidRequestError(
        f"{field} of sequence {index} has {ids[place]} at {where}: outside the vocabulary of teacher {info.model!r}, "
        f"[0, {info.vocab_size}). Padding that was not cut off, or another tokenizer than the teacher's?",
        field=field,
        sequence=index,
    )
