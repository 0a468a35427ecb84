"""How many programs XLA has compiled in this process: after the first steps of a run it should be none."""

from __future__ import annotations

from typing import Any

import jax.monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"  # also of a program that comes from JAX's cache on disk


class Compilations:
    """Counts from when it is made. Listeners of JAX stay for good, so make one for a process and keep it."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, name: str, seconds: float, **_: Any) -> None:
        if name == _EVENT:
            self.count += 1
            self.seconds += seconds


COMPILATIONS = Compilations()
