"""Counts the programs that XLA compiles in this process; after the first steps of a run there should be none."""

from __future__ import annotations

from typing import Any

import jax.monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"  # also sent for a program from JAX's cache on disk


class Compilations:
    """Counts compilations since its construction. JAX keeps listeners forever, so make only one per process."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, name: str, seconds: float, **_: Any) -> None:
        if name == _EVENT:
            self.count += 1
            self.seconds += seconds


COMPILATIONS = Compilations()
