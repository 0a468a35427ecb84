"""Tells people that work waits since no teacher is up, and that it goes on: one voice for all teachers of a client."""

from __future__ import annotations

import logging
from collections.abc import Callable

REPORT_EVERY_S = 10.0

logger = logging.getLogger("jdistill.client")


class WaitReport:
    """Logs, and calls `on_wait` with a message, or with None when nobody waits any more."""

    def __init__(self, on_wait: Callable[[str | None], None] | None):
        self._on_wait = on_wait
        self._reported_at: dict[str, float] = {}  # by teacher, of those that wait

    def due(self, teacher: str, now: float) -> bool:
        """Whether it is time to say again that `teacher` is waited for."""
        return now >= self._reported_at.get(teacher, -REPORT_EVERY_S) + REPORT_EVERY_S

    def waits(self, teacher: str, message: str, now: float) -> None:
        """Work waits for `teacher`."""
        self._reported_at[teacher] = now
        logger.warning("%s", message)
        self._tell(message)

    def over(self, teacher: str) -> None:
        """No work waits for `teacher`, or it is up."""
        if self._reported_at.pop(teacher, None) is not None and not self._reported_at:
            self._tell(None)

    def _tell(self, message: str | None) -> None:
        if self._on_wait is not None:
            try:
                self._on_wait(message)
            except Exception:  # a broken progress display must not stop the scoring
                logger.exception("on_wait")
