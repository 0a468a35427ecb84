"""Converts ragged completions and scores to arrays of a few static shapes on the target grid.

Dimension key: N completions = B rows, S tokens per row, T = S - 1 targets, R tokens of one completion, K candidates.

A worked example, prompt (5 6), completion (7 2), T = 4:

    tokens            5  6  7  2  2      [S = 5]; padding repeats the row's last token, which is a valid id
    targets              6  7  2  2      [T = 4]; column t is about token t + 1
    loss_mask            F  T  T  F
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jdistill import buckets
from jdistill.wire.types import TokenScores

if TYPE_CHECKING:
    from jdistill.rollout.completion import Completion


class TrainBatch(NamedTuple):
    """Data of one step. Where loss_mask is false the floats are 0 and have no meaning: losses must apply the mask.

    Fields that an objective does not use are None; which ones are None is part of the static shape.
    """

    tokens: Int[np.ndarray, "B S"]
    loss_mask: Bool[np.ndarray, "B T"]
    sampler_logprobs: Float[np.ndarray, "B T"] | None = None  # nats, at sampling time
    advantages: Float[np.ndarray, "B T"] | None = None
    teacher_logprobs: Float[np.ndarray, "B T"] | None = None  # nats
    candidate_ids: Int[np.ndarray, "B T K"] | None = None  # the student's own top-k at sampling time, or the teacher's
    # Nats; -inf marks a place without a candidate, which the bucket of all other tokens takes in (its id is 0).
    teacher_candidate_logprobs: Float[np.ndarray, "B T K"] | None = None
    distill_weights: Float[np.ndarray, "B T"] | None = None  # of the distillation term; None: 1 everywhere
    teacher_segments: Int[np.ndarray, "B T"] | None = None  # for a teacher with another tokenizer; see losses.segments
    token_rewards: Float[np.ndarray, "B T"] | None = None  # for a value head: the reward, at the last token
    # Added by the step, before its first update.
    proximal_logprobs: Float[np.ndarray, "B T"] | None = None
    reference_logprobs: Float[np.ndarray, "B T"] | None = None
    values: Float[np.ndarray, "B T"] | None = None
    returns: Float[np.ndarray, "B T"] | None = None


class SegmentScores(NamedTuple):
    """Scores of one completion of R tokens by a teacher with another tokenizer; see `losses.segments`."""

    logprobs: Float[np.ndarray, "R"]  # nats; a segment's log-prob at its last token, 0 at its other tokens
    segment_ids: Int[np.ndarray, "R"]  # -1: not usable


def make_batch(
    completions: Sequence[Completion],
    advantages: Float[np.ndarray, "N"],
    scores: Sequence[TokenScores] | Sequence[SegmentScores] | None,
    *,
    max_length: int,
    rewards: Float[np.ndarray, "N"] | None = None,
    distill_weights: Float[np.ndarray, "N"] | None = None,
    min_length: int = 0,
    num_shared_ids: int | None = None,
) -> TrainBatch:
    """Puts completions, their advantages and the teacher's scores on the target grid.

    Args:
        completions: one per row, in the order of the rows.
        advantages: one per completion, used for each of its tokens.
        scores: the teacher's scores of exactly the completions' tokens, with its top-k or the candidates' log-probs if
            they were requested; None without a teacher.
        max_length: maximum of S, prompt and completion together; rows are padded to `buckets.row_length`.
        rewards: one per completion, for a value head; written at the last token. None: left out.
        distill_weights: one per completion, for the distillation term; None: left out.
        min_length: minimum number of tokens that rows must have room for, e.g. the longest row of another host.
        num_shared_ids: candidates with this id or a larger one are marked as missing, because student or teacher lacks
            them (`Recipe.num_shared_ids`); None: there are none.

    Raises:
        ValueError: a completion has no tokens or more than max_length; scores are for another number of tokens, or a
            number is missing or not finite.
    """
    num_rows = len(completions)
    if len(advantages) != num_rows or (scores is not None and len(scores) != num_rows):
        raise ValueError(
            f"{num_rows} completions, {len(advantages)} advantages, {None if scores is None else len(scores)} scores: "
            "give one of each for every row"
        )
    tokens_BS, mask_BT = _pad(
        [c.token_ids for c in completions],
        [c.prompt_length for c in completions],
        max_length=max_length,
        min_length=min_length,
    )
    sampler_BT = np.zeros(mask_BT.shape, np.float32)
    for b, completion in enumerate(completions):
        _put(sampler_BT[b], mask_BT[b], completion.sampler_logprobs, f"sampler_logprobs of completion {b}")
    batch = TrainBatch(tokens_BS, mask_BT, sampler_BT, _spread(advantages, mask_BT))
    if distill_weights is not None:
        batch = batch._replace(distill_weights=_spread(distill_weights, mask_BT))
    if rewards is not None:
        last_BT = mask_BT & (np.cumsum(mask_BT, axis=1) == mask_BT.sum(axis=1, keepdims=True))
        batch = batch._replace(token_rewards=_spread(rewards, last_BT))
    return batch if scores is None else _with_scores(batch, completions, scores, num_shared_ids)


def _with_scores(
    batch: TrainBatch,
    completions: Sequence[Completion],
    scores: Sequence[TokenScores] | Sequence[SegmentScores],
    num_shared_ids: int | None,
) -> TrainBatch:
    """Adds the teacher's log-probs of the sampled tokens, and its segments or candidates where it scored them."""
    mask_BT = batch.loss_mask
    teacher_BT = np.zeros(mask_BT.shape, np.float32)
    for b, score in enumerate(scores):
        _put(teacher_BT[b], mask_BT[b], score.logprobs, f"the teacher's log-probs of completion {b}")
    batch = batch._replace(teacher_logprobs=teacher_BT)
    if isinstance(scores[0], SegmentScores):
        segments_BT = np.full(mask_BT.shape, -1, np.int32)
        for b, score in enumerate(scores):
            _put(segments_BT[b], mask_BT[b], score.segment_ids, f"segment_ids of completion {b}")
        return batch._replace(teacher_segments=segments_BT)
    return _with_candidates(batch, completions, scores, num_shared_ids)


def _with_candidates(
    batch: TrainBatch, completions: Sequence[Completion], scores: Sequence[TokenScores], num_shared_ids: int | None
) -> TrainBatch:
    """Adds the candidates, the teacher's own or the student's, and the teacher's log-probs of them."""
    mask_BT = batch.loss_mask
    by_teacher = scores[0].top_ids is not None
    ids = [score.top_ids if by_teacher else c.candidate_ids for c, score in zip(completions, scores, strict=True)]
    found = [score.top_logprobs if by_teacher else score.candidate_logprobs for score in scores]
    num_candidates = {None if row is None else row.shape[1] for row in ids}
    if len(num_candidates) > 1:
        raise ValueError(f"every completion must have the same number of candidates, got {num_candidates}")
    (K,) = num_candidates
    if K is None:
        return batch
    ids_BTK = np.zeros((*mask_BT.shape, K), np.int32)
    candidates_BTK = np.zeros((*mask_BT.shape, K), np.float32)
    for b in range(len(completions)):
        if found[b] is None:
            raise ValueError(
                f"completion {b} has {K} candidates per token and the teacher scored none of them: send "
                "candidate_ids with the sequence, or sample without candidates"
            )
        _put(ids_BTK[b], mask_BT[b], ids[b], f"candidate_ids of completion {b}")
        _put(candidates_BTK[b], mask_BT[b], found[b], f"the teacher's candidates of completion {b}")
    if num_shared_ids is not None:
        is_missing_BTK = ids_BTK >= num_shared_ids
        ids_BTK[is_missing_BTK], candidates_BTK[is_missing_BTK] = 0, -np.inf
    return batch._replace(candidate_ids=ids_BTK, teacher_candidate_logprobs=candidates_BTK)


def _spread(values_B: Float[np.ndarray, "B"], mask_BT: Bool[np.ndarray, "B T"]) -> Float[np.ndarray, "B T"]:
    """Spreads one number per row over the true targets of its mask; 0 elsewhere."""
    return np.where(mask_BT, np.asarray(values_B, np.float32)[:, None], np.float32(0))


def make_supervised_batch(
    prompts: Sequence[Int[np.ndarray, "_"]],
    solutions: Sequence[Int[np.ndarray, "_"]],
    *,
    max_length: int,
    min_length: int = 0,
) -> TrainBatch:
    """Makes a batch of prompts and correct completions, with the loss on the completions' tokens.

    Raises:
        ValueError: a prompt or a solution is empty, or a row has more than max_length tokens.
    """
    rows = [np.concatenate(pair) for pair in zip(prompts, solutions, strict=True)]
    return TrainBatch(*_pad(rows, [len(prompt) for prompt in prompts], max_length=max_length, min_length=min_length))


def _pad(
    rows: Sequence[np.ndarray], prompt_lengths: Sequence[int], *, max_length: int, min_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns int32 tokens [B, S], and the mask [B, T] of the targets after each prompt."""
    if not rows:
        raise ValueError("a batch needs at least one row")
    longest = max(len(row) for row in rows)
    if longest > max_length:
        raise ValueError(f"a row has {longest} tokens, more than max_length = {max_length}: raise it, or drop the row")
    num_tokens = buckets.row_length(max(longest, min_length), max_length)
    tokens_BS = np.empty((len(rows), num_tokens), np.int32)
    mask_BT = np.zeros((len(rows), num_tokens - 1), bool)
    for b, (row, prompt_length) in enumerate(zip(rows, prompt_lengths, strict=True)):
        if not 1 <= prompt_length < len(row):
            raise ValueError(
                f"row {b} has {len(row)} tokens and a prompt of {prompt_length}: it needs at least one token of each, "
                "since the first token of a sequence has no score"
            )
        tokens_BS[b, : len(row)] = row
        tokens_BS[b, len(row) :] = row[-1]
        mask_BT[b, prompt_length - 1 : len(row) - 1] = True
    return tokens_BS, mask_BT


def _put(row: np.ndarray, mask_T: np.ndarray, values: np.ndarray, what: str) -> None:
    """Writes the values of scored targets into a row; raises ValueError on a wrong shape or a non-finite value."""
    expected = (int(mask_T.sum()), *row.shape[1:])
    if values.shape != expected:
        raise ValueError(
            f"{what} have shape {values.shape}, expected {expected}, one entry for each token after the prompt: "
            "truncated, or another tokenizer?"
        )
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        where = np.argwhere(~np.isfinite(values))[0].tolist()
        raise ValueError(
            f"{what} hold {values[tuple(where)]} at {where}: a missing score is never trained on, and a teacher "
            "that gives a sampled token probability 0 has another vocabulary; compare the two checkpoints"
        )
    row[mask_T] = values
