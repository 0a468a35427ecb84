"""Help texts and the option tables of the docs, from the descriptions of the fields.

`python -m jdistill.config.describe --write docs` renews every table between these two lines of a page:

    <!-- keys of jdistill.config:TrainConfig -->      one table per section, or
    <!-- flags of jdistill.config:TeacherServerConfig -->
    <!-- end -->
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from jdistill.config.loading import section_type
from jdistill.config.section import Section

_BLOCK = re.compile(r"(<!-- (keys|flags) of ([\w.]+):(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


class Option(NamedTuple):
    """One field, in words."""

    name: str
    type: str  # with its bounds: "int ≥ 1", "float or schedule"
    default: str  # as YAML; "required" for a field without a default
    description: str


def options(section: type[Section]) -> list[Option]:
    """Describe each field of a section, in order."""
    return [
        Option(name, _type_text(field), _default_text(field), field.description or "")
        for name, field in section.model_fields.items()
    ]


def sections(schema: type[Section], path: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Yield (dotted key, section class) of `schema` and the sections in it, outermost first."""
    yield path, schema
    for name, field in schema.model_fields.items():
        inner = section_type(field.annotation)
        if inner is not None:
            yield from sections(inner, f"{path}.{name}" if path else name)


def flag(section: type[Section], name: str) -> str:
    """Return the command-line flag of a field; a list or mapping is given once per entry, so its flag is singular."""
    kind = _without_none(section.model_fields[name].annotation)
    is_repeated = typing.get_origin(kind) in (list, dict)
    return "--" + (name.removesuffix("s") if is_repeated else name).replace("_", "-")


def help_text(schema: type[Section], width: int = 110) -> str:
    """List all keys of `schema` by section, for the end of a command's `--help`."""
    lines = ["keys of the configuration file (any of them as section.key=value on the command line):"]
    for path, section in sections(schema):
        lines += ["", f"{path or 'top level'}: {_summary(section)}"]
        for option in options(section):
            if section_type(section.model_fields[option.name].annotation) is not None and option.default == "section":
                continue
            text = f"{option.description} ({option.type}; {_default_words(option)})"
            first, *rest = textwrap.wrap(text, width - 26)
            lines.append(f"  {option.name:<22}  {first}" if len(option.name) <= 22 else f"  {option.name}  {first}")
            lines += [" " * 26 + line for line in rest]
    return "\n".join(lines)


def keys_table(schema: type[Section]) -> str:
    """Markdown: one table per section, with key, type, default and description."""
    parts = []
    for path, section in sections(schema):
        if path:
            parts += [f"### `{path}`", ""]
        parts += [_summary(section), "", "| key | type | default | description |", "|---|---|---|---|"]
        parts += [
            f"| `{o.name}` | {_cell(o.type)} | {_cell(_code(o.default))} | {_cell(o.description)} |"
            for o in options(section)
        ]
        parts.append("")
    return "\n".join(parts)


def flags_table(schema: type[Section]) -> str:
    """Markdown: one table with the command-line flag of each field."""
    lines = ["| option | type | default | description |", "|---|---|---|---|"]
    lines += [
        f"| `{flag(schema, o.name)}` | {_cell(o.type)} | {_cell(_code(o.default))} | {_cell(o.description)} |"
        for o in options(schema)
    ]
    return "\n".join([*lines, ""])


def renewed(text: str) -> str:
    """Return a page with its option tables written again."""

    def block(match: re.Match[str]) -> str:
        begin, kind, module, name, end = match.groups()
        schema = getattr(importlib.import_module(module), name)
        table = keys_table(schema) if kind == "keys" else flags_table(schema)
        return f"{begin}\n{table}\n{end}"

    return _BLOCK.sub(block, text)


def old_pages(docs: pathlib.Path) -> dict[pathlib.Path, str]:
    """Return the pages of a directory whose tables are out of date, with their new text."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(docs.glob("*.md"))}
    new = {path: renewed(text) for path, text in texts.items()}
    return {path: new[path] for path in texts if new[path] != texts[path]}


def _summary(section: type[Section]) -> str:
    return " ".join((section.__doc__ or "").split())


def _without_none(annotation: Any) -> Any:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else annotation
    return annotation


def _type_text(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(m, name):g}" for m in field.metadata for name, sign in _BOUNDS.items() if hasattr(m, name)
    ]
    return " ".join([_kind_text(_without_none(field.annotation)), " and ".join(bounds)]).strip()


def _kind_text(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " or ".join(map(str, args))
    if origin is typing.Annotated:
        return _kind_text(args[0])
    if origin in (list, tuple):
        return f"list of {_kind_text(args[0])}"
    if origin is dict:
        return f"mapping of {_kind_text(args[0])} to {_kind_text(args[1])}"
    if args:
        return " or ".join(_kind_text(arg) for arg in args)
    if isinstance(kind, type) and issubclass(kind, Section):
        return kind.__name__.removesuffix("Section").lower() + " section"
    return "any" if kind is Any else kind.__name__


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, Section):
        return "section"
    if isinstance(value, float):
        return f"{value:g}" if value < 1e-3 else str(value)
    return value if isinstance(value, str) and value else json.dumps(value)


def _default_words(option: Option) -> str:
    return "required" if option.default == "required" else f"default {option.default}"


def _code(default: str) -> str:
    return default if default in ("required", "section") else f"`{default}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(argv: list[str] | None = None) -> int:
    """Write the tables, or say which pages are out of date. Returns 1 if some are and `--write` was not given."""
    parser = argparse.ArgumentParser(prog="python -m jdistill.config.describe", description="option tables of the docs")
    parser.add_argument("docs", type=pathlib.Path, help="directory of the pages, e.g. docs")
    parser.add_argument("--write", action="store_true", help="write the tables instead of checking them")
    args = parser.parse_args(argv)
    old = old_pages(args.docs)
    for path, text in old.items():
        if args.write:
            path.write_text(text, encoding="utf-8")
        print(f"{path}: {'written' if args.write else 'out of date; run make docs'}")
    return int(bool(old) and not args.write)


if __name__ == "__main__":
    sys.exit(main())
