"""Shows training progress: reward, held-out accuracy, reverse KL, tokens/s, teacher wait and time left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text


class Progress:
    """Shows one line that is updated in place on a terminal, or prints one line per step to a file.

    Args:
        label: heads each line, e.g. the run's name.
        num_steps: last step of the run.
        console: where to show it; default: stderr.
    """

    def __init__(self, label: str, num_steps: int, console: Console | None = None):
        self._label = label
        self._num_steps = num_steps
        self._first_step = 0
        self._console = console or Console(stderr=True, highlight=False)
        self._live = Live(console=self._console, refresh_per_second=4, transient=False)
        self._start = 0.0
        self._values: dict[str, float] = {}
        self._step = 0
        self._phase = "compiling"

    def __enter__(self) -> Progress:
        self._start = time.monotonic()
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._live.update(self._line(), refresh=True)
            self._live.stop()

    def begin_at(self, step: int) -> None:
        """Starts counting at `step`, after a resume; the time left is estimated from later steps only."""
        self._first_step = self._step = step

    def phase(self, text: str) -> None:
        """Shows the current activity, e.g. "waiting for the teacher"."""
        self._phase = text
        if self._console.is_terminal:
            self._live.update(self._line())

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the values of a finished step; values not given keep their previous ones."""
        self._step = step
        self._values.update(values)
        if self._console.is_terminal:
            self._live.update(self._line())
        else:
            self._console.print(self._line(), soft_wrap=True)

    def say(self, text: str) -> None:
        """Prints a message above the live line."""
        self._console.print(f"{self._label}  {text}", soft_wrap=True)

    def _line(self) -> Text:
        v = self._values
        parts = [f"{self._label}  {self._step:>{len(str(self._num_steps))}}/{self._num_steps}"]
        for name, form in SHOWN.items():
            if name in v:
                parts.append(form.format(v[name]))
        done = self._step - self._first_step
        if 0 < done and self._step < self._num_steps:
            left_s = (time.monotonic() - self._start) / done * (self._num_steps - self._step)
            parts.append(f"{int(left_s // 60)}:{int(left_s % 60):02d} left")
        elif self._step < self._num_steps:
            parts.append(self._phase)
        return Text("  ".join(parts))


# Metric -> its format, in the order of the line.
SHOWN = {
    "loss": "loss {:.3f}",
    "reward": "reward {:.3f}",
    "eval/accuracy": "held-out {:.3f}",
    "eval/accuracy_greedy": "greedy {:.3f}",
    "reverse_kl": "rev. KL {:.3f} nats",
    "tokens_per_s": "{:,.0f} tok/s",
    "teacher_wait_s": "teacher wait {:.2f} s",
}
