"""Convert padded batches on the target grid to ragged sequences with spans, and scores back, for any mask.

Dimension key: B rows, S tokens of a row, T = S - 1 targets, P scored positions of a row, C candidates, K teacher top-k.

Target t is token t + 1: `loss_mask_BT[b, t]` asks for log p(tokens[b, t + 1] | tokens[b, : t + 1]).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jdistill.wire.errors import InvalidRequestError
from jdistill.wire.types import SequenceToScore, TokenScores


class BatchScores(NamedTuple):
    """A teacher's scores on the target grid, float32 nats. Invalid targets hold NaN (ids: -1).

    Args:
        valid: bool [B, T], equal to the requested loss mask.
        logprobs: [B, T].
        candidate_logprobs: [B, T, C], or None if no candidates were given.
        top_ids, top_logprobs: int32 and float32 [B, T, K], or None if top_k is 0. Ids of the teacher: its output may
            have more rows than the student's, so an id is no index into the student's logits unchecked.
    """

    valid: np.ndarray
    logprobs: np.ndarray
    candidate_logprobs: np.ndarray | None
    top_ids: np.ndarray | None
    top_logprobs: np.ndarray | None


def mask_to_spans(mask_T: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Returns the spans of token positions that a mask on the target grid selects: [0 1 1 0 1] -> ((2, 4), (5, 6))."""
    edges = np.diff(np.concatenate([[0], np.asarray(mask_T, np.int8), [0]]))
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return tuple(zip((starts + 1).tolist(), (stops + 1).tolist(), strict=True))


def to_sequences(
    tokens_BS: np.ndarray,
    loss_mask_BT: np.ndarray,
    *,
    lengths_B: np.ndarray | None = None,
    candidate_ids_BTC: np.ndarray | None = None,
    teachers_B: Sequence[str] | None = None,
    teacher_prefixes_B: Sequence[Any] | None = None,
    num_replaced_B: np.ndarray | None = None,
) -> tuple[list[int], list[SequenceToScore]]:
    """Returns the rows with anything to score, and the sequence to send for each.

    A row is sent up to its last scored token: later tokens cannot change a causal model's score, and padding is never
    sent.

    Raises:
        InvalidRequestError: shapes or dtypes do not match, or the mask covers padding; names the row and target.
    """
    _check_grid(tokens_BS, loss_mask_BT, candidate_ids_BTC)
    if lengths_B is not None:
        _check_lengths(lengths_B, tokens_BS, loss_mask_BT)
    _check_columns(len(tokens_BS), teachers_B, teacher_prefixes_B, num_replaced_B)
    rows = np.flatnonzero(loss_mask_BT.any(axis=1)).tolist()
    sequences = []
    for b in rows:
        spans = mask_to_spans(loss_mask_BT[b])
        candidates_PC = None if candidate_ids_BTC is None else candidate_ids_BTC[b, loss_mask_BT[b]]
        prefix = None if teacher_prefixes_B is None else teacher_prefixes_B[b]
        sequences.append(
            SequenceToScore(
                tokens_BS[b, : spans[-1][1]],
                spans,
                candidates_PC,
                teacher="" if teachers_B is None else teachers_B[b],
                teacher_prefix=None if prefix is None else np.asarray(prefix),
                # A row without a prefix keeps all of its tokens, whatever num_replaced_B says.
                num_replaced=0 if prefix is None or num_replaced_B is None else int(num_replaced_B[b]),
            )
        )
    return rows, sequences


def _check_grid(tokens_BS: np.ndarray, loss_mask_BT: np.ndarray, candidate_ids_BTC: np.ndarray | None) -> None:
    """Checks that tokens, mask and candidates fit together."""
    if tokens_BS.ndim != 2 or tokens_BS.dtype.kind not in "iu":
        raise InvalidRequestError(
            f"tokens_BS is {tokens_BS.dtype} of shape {tokens_BS.shape}, expected integers of shape [B, S]",
            field="token_ids",
        )
    num_rows, num_tokens = tokens_BS.shape
    grid = (num_rows, max(num_tokens - 1, 0))
    if loss_mask_BT.shape != grid:
        raise InvalidRequestError(
            f"loss_mask_BT has shape {loss_mask_BT.shape}; tokens of shape {tokens_BS.shape} have a target grid of "
            f"{grid}: target t is token t + 1, so the grid is one shorter",
            field="loss_mask",
        )
    if loss_mask_BT.dtype != np.bool_:
        raise InvalidRequestError(
            f"loss_mask_BT is {loss_mask_BT.dtype}, expected bool: a weight is not a mask", field="loss_mask"
        )
    if candidate_ids_BTC is not None and (candidate_ids_BTC.ndim != 3 or candidate_ids_BTC.shape[:2] != grid):
        raise InvalidRequestError(
            f"candidate_ids_BTC has shape {candidate_ids_BTC.shape}, expected [{grid[0]}, {grid[1]}, C]",
            field="candidate_ids",
        )


def _check_lengths(lengths_B: np.ndarray, tokens_BS: np.ndarray, loss_mask_BT: np.ndarray) -> None:
    """Checks the lengths, and that the mask does not reach into the padding."""
    num_rows, num_tokens = tokens_BS.shape
    if lengths_B.shape != (num_rows,) or lengths_B.dtype.kind not in "iu":
        raise InvalidRequestError(
            f"lengths_B is {lengths_B.dtype} of shape {lengths_B.shape}, expected integers of shape ({num_rows},)",
            field="lengths",
        )
    if ((lengths_B < 0) | (lengths_B > num_tokens)).any():
        b = int(np.argmax((lengths_B < 0) | (lengths_B > num_tokens)))
        raise InvalidRequestError(
            f"lengths_B[{b}] = {lengths_B[b]}, but a row has {num_tokens} tokens", field="lengths", sequence=b
        )
    on_padding_BT = loss_mask_BT & (np.arange(1, num_tokens) >= lengths_B[:, None])
    if on_padding_BT.any():
        b, t = (int(i) for i in np.argwhere(on_padding_BT)[0])
        raise InvalidRequestError(
            f"loss_mask_BT[{b}, {t}] asks for token {t + 1} of row {b}, which has {lengths_B[b]} tokens: that is "
            "padding. Is the mask on the token grid rather than on the target grid (one to the left)?",
            field="loss_mask",
            sequence=b,
        )


def _check_columns(
    num_rows: int,
    teachers_B: Sequence[str] | None,
    teacher_prefixes_B: Sequence[Any] | None,
    num_replaced_B: np.ndarray | None,
) -> None:
    """Checks that there is one entry per row."""
    for name, column_B in (("teachers", teachers_B), ("teacher_prefixes", teacher_prefixes_B)):
        if column_B is not None and (isinstance(column_B, str) or len(column_B) != num_rows):
            got = "a string" if isinstance(column_B, str) else f"{len(column_B)} entries"
            raise InvalidRequestError(f"{name}_B has {got}, expected one for each of {num_rows} rows", field=name)
    if num_replaced_B is not None:
        if num_replaced_B.shape != (num_rows,) or num_replaced_B.dtype.kind not in "iu":
            raise InvalidRequestError(
                f"num_replaced_B is {num_replaced_B.dtype} of shape {num_replaced_B.shape}, expected integers of shape "
                f"({num_rows},)",
                field="num_replaced",
            )
        if teacher_prefixes_B is None:
            raise InvalidRequestError(
                "num_replaced_B without teacher_prefixes_B: nothing replaces the tokens",
                field="num_replaced",
            )


class BatchBuilder:
    """Puts scores back on the grid, row by row as they arrive; the inverse of `to_sequences`.

    The grid is allocated at the first row: only then is it known that the teacher accepts this top_k.
    """

    def __init__(self, loss_mask_BT: np.ndarray, *, top_k: int, candidate_count: int):
        self._valid_BT = np.array(loss_mask_BT, np.bool_)
        self._top_k, self._candidate_count = top_k, candidate_count
        self._batch: BatchScores | None = None

    def put(self, b: int, scores: TokenScores) -> None:
        """Stores the scores of row `b`."""
        batch = self.finish()
        for name in ("logprobs", "candidate_logprobs", "top_ids", "top_logprobs"):
            column = getattr(batch, name)
            if column is not None:
                column[b, self._valid_BT[b]] = getattr(scores, name)

    def finish(self) -> BatchScores:
        """Returns the batch; targets without scores hold NaN (ids: -1)."""
        if self._batch is None:

            def grid(width: int | None, fill: float, dtype: type) -> np.ndarray:
                shape = self._valid_BT.shape
                return np.full(shape if width is None else (*shape, width), fill, dtype)

            self._batch = BatchScores(
                valid=self._valid_BT,
                logprobs=grid(None, np.nan, np.float32),
                candidate_logprobs=grid(self._candidate_count, np.nan, np.float32) if self._candidate_count else None,
                top_ids=grid(self._top_k, -1, np.int32) if self._top_k else None,
                top_logprobs=grid(self._top_k, np.nan, np.float32) if self._top_k else None,
            )
        return self._batch
