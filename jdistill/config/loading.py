"""Reads a YAML file, applies dotted overrides, and checks the result against a section.

pydantic checks types and relations (vLLM and most of the field use it); ruamel.yaml reads YAML 1.2, in which
`1e-5` is a number (PyYAML reads YAML 1.1, in which it is a string).
"""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Sequence
from typing import Any, TypeVar

import pydantic
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from jdistill.config.section import ConfigError, Section
from jdistill.text_files import read_text

C = TypeVar("C", bound=Section)


def load(schema: type[C], path: str | pathlib.Path | None, overrides: Sequence[str] = ()) -> C:
    """Read a YAML file, apply overrides, and check the result.

    Args:
        schema: section class of the whole file.
        path: YAML file; None starts from an empty configuration.
        overrides: `section.key=value` each; values are YAML.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type or contradiction.
    """
    if path is None:
        data: Any = {}
        for override in overrides:
            _apply(data, override)
        return parse(schema, data, source="command line")
    path = pathlib.Path(path)
    try:
        data = YAML(typ="safe").load(read_text(path))
    except FileNotFoundError:
        raise ConfigError(f"no config file {path}") from None
    except YAMLError as e:
        raise ConfigError(f"{path} is not YAML: {e}") from None
    except ValueError as e:  # not UTF-8
        raise ConfigError(str(e)) from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, got {type(data).__name__}")
    for override in overrides:
        _apply(data, override)
    return parse(schema, data, source=str(path))


def parse(schema: type[C], data: dict[str, Any], *, source: str = "config") -> C:
    """Check `data` against `schema`. Raises ConfigError with one line per mistake."""
    try:
        return schema.model_validate(data)
    except pydantic.ValidationError as e:
        raise ConfigError("\n".join(_explain(schema, error, source) for error in e.errors())) from None


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected section.key=value, e.g. optimizer.learning_rate=1e-5")
    try:
        value = YAML(typ="safe").load(text) if text.strip() else None
    except YAMLError as e:
        raise ConfigError(f"override {override!r}: the value is not YAML: {e}") from None
    *parents, leaf = key.split(".")
    node = data
    for i, parent in enumerate(parents):
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(parents[: i + 1])} is not a section")
        node = child
    node[leaf] = value


def _section_at(schema: type[Section], loc: Sequence[Any]) -> type[Section] | None:
    """Return the section at the path `loc`, or None if there is no section."""
    section: type[Section] | None = schema
    for key in loc:
        field = section.model_fields.get(key) if section is not None else None
        if field is None:
            return None
        section = section_type(field.annotation)
    return section


def section_type(annotation: Any) -> type[Section] | None:
    """Return the section class in a field's annotation (`X`, `X | None`, `float | X`), or None."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _explain(schema: type[Section], error: Any, source: str) -> str:
    loc = error["loc"]
    key = ".".join(str(part) for part in loc)
    if error["type"] == "extra_forbidden":
        section = _section_at(schema, loc[:-1])
        names = list(section.model_fields) if section is not None else []
        near = difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.5)
        hint = (
            f"did you mean {'.'.join([*map(str, loc[:-1]), near[0]])}?" if near else f"valid keys: {', '.join(names)}"
        )
        return f"{source}: unknown key {key}; {hint}"
    if error["type"] == "missing":
        return f"{source}: missing key {key}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{source}: {key + ': ' if key else ''}{message}"
    return f"{source}: {key}: {message}, got {error['input']!r}"
