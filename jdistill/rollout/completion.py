"""The completion that every sampler returns, on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

FinishReason = Literal["stop", "length"]


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

    @property
    def completion_ids(self) -> np.ndarray:
        """int32[R], the sampled tokens without the prompt."""
        return self.token_ids[self.prompt_length :]
