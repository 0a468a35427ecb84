"""Warns of a reward that trains nothing: the rewards of every group were equal for several steps."""

from __future__ import annotations

from collections.abc import Mapping

_WARN_AFTER = (3, 10, 30, 100, 300, 1000)  # steps in a row


class AdvantageWatch:
    """Counts the steps in a row whose `signal_share` is 0."""

    def __init__(self) -> None:
        self._num_steps = self._without = 0

    def warning(self, values: Mapping[str, float], *, is_last: bool) -> str | None:
        """Takes the metrics of a step in; returns a warning if it is time for one.

        Args:
            values: metrics of the step; without signal_share there is nothing to watch.
            is_last: a run in which no step had a signal is warned of however short it was.
        """
        self._num_steps += 1
        self._without = self._without + 1 if values.get("signal_share") == 0 else 0
        if self._without in _WARN_AFTER or (is_last and self._without == self._num_steps):
            return _message(self._without, values["reward"])
        return None


def _message(num_steps: int, reward: float) -> str:
    remedy = "raise rollout.num_completions or rollout.temperature, or filter prompts with objective.dynamic_sampling"
    if reward == 0:
        remedy = (
            "is no answer right, or none recognised? Read some with `jdistill eval --output`; use easier problems or a "
            "better student, or distil first"
        )
    elif reward == 1:
        remedy = "every answer is right: use harder problems"
    steps = "step" if num_steps == 1 else f"{num_steps} steps"
    return (
        f"warning: the rewards of every group were equal in the last {steps} (mean reward {reward:g}, signal_share 0), "
        f"so there was no advantage, and the reward trained nothing: {remedy}"
    )
