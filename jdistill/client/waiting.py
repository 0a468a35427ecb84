"""Reports that work waits because no teacher is up, and that it continues; one report for all teachers of a client."""

from __future__ import annotations

import logging
from collections.abc import Callable

REPORT_EVERY_S = 10.0

logger = logging.getLogger("jdistill.client")


class WaitReport:
    """Logs and calls `on_wait`, with a message while work waits and with None once none does."""

    def __init__(self, on_wait: Callable[[str | None], None] | None):
        self._on_wait = on_wait
        self._reported_at: dict[str, float] = {}  # by waiting teacher

    def due(self, teacher: str, now: float) -> bool:
        """Whether the next message about `teacher` is due."""
        return now >= self._reported_at.get(teacher, -REPORT_EVERY_S) + REPORT_EVERY_S

    def waits(self, teacher: str, message: str, now: float) -> None:
        """Reports that work waits for `teacher`."""
        self._reported_at[teacher] = now
        logger.warning("%s", message)
        self._notify(message)

    def over(self, teacher: str) -> None:
        """Records that no work waits for `teacher`, or that it is up."""
        if self._reported_at.pop(teacher, None) is not None and not self._reported_at:
            self._notify(None)

    def _notify(self, message: str | None) -> None:
        if self._on_wait is not None:
            try:
                self._on_wait(message)
            except Exception:  # a broken progress display must not stop the scoring
                logger.exception("on_wait")
