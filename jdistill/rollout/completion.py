"""The completion that every sampler returns, on the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jdistill.turn_end import FinishReason


@dataclass(frozen=True, eq=False)
class Completion:
    """One sampled completion: S prompt tokens, then R sampled ones.

    Example: the prompt (5, 6), then 7 and the stop token 2 are sampled: `token_ids` = (5, 6, 7, 2), `prompt_length` =
    2, `sampler_logprobs` has 2 entries, one of them the stop token's; `finish_reason` = "stop".
    """

    index: int  # position of its prompt in the call
    token_ids: np.ndarray  # int32[S + R], prompt and completion, stop token included
    prompt_length: int  # S
    sampler_logprobs: np.ndarray  # float32[R], nats, at the sampling temperature, over the whole vocabulary
    candidate_ids: np.ndarray | None  # int32[R, K], the model's most likely tokens, best first; None where K = 0
    finish_reason: FinishReason  # stop: a stop token or stop string; length: max_new_tokens
    # First character of the stop string in the decoded completion, and the one after its last; None: no stop string
    # ended it, so with finish_reason "stop" the last token is a stop token.
    stop_string_span: tuple[int, int] | None = None
    include_stop: bool = False  # whether `text` includes the stop token or stop string

    def __post_init__(self) -> None:
        assert self.stop_string_span is None or self.finish_reason == "stop", self

    @property
    def completion_ids(self) -> np.ndarray:
        """int32[R], the sampled tokens without the prompt."""
        return self.token_ids[self.prompt_length :]

    def text(self, decode: Callable[[np.ndarray], str]) -> str:
        """Returns what a reward reads: up to the stop token or stop string, or with `include_stop` up to its end.

        Args:
            decode: token ids -> text, special tokens included; the same that found the stop string.
        """
        if self.stop_string_span is not None:
            start, end = self.stop_string_span
            return decode(self.completion_ids)[: end if self.include_stop else start]
        leaves_out = self.finish_reason == "stop" and not self.include_stop
        return decode(self.completion_ids[:-1] if leaves_out else self.completion_ids)
