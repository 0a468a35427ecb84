"""What a reward judges: the answer to a problem, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jdistill.turn_end import FinishReason


@dataclass(frozen=True, eq=False)
class Response:
    """One completion, as a task's reward sees it; made by `Task.response`.

    Example: `#### 72<|im_end|>` ended by its stop token: `text` = "#### 72", `finish_reason` = "stop".
    """

    # Special tokens included; without the stop token or stop string, unless rollout.include_stop_str_in_output.
    text: str
    token_ids: np.ndarray  # int32[R], as sampled
    finish_reason: FinishReason

    @property
    def ended(self) -> bool:
        """Whether the model ended it, rather than the length limit."""
        return self.finish_reason == "stop"
