"""The base class of all configuration sections, and the error that a wrong configuration raises."""

from __future__ import annotations

import pydantic


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, what was expected and the nearest valid key."""


class Section(pydantic.BaseModel):
    """Frozen, strict, and closed to unknown keys. Every field has a `description`, which help and docs print."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())
