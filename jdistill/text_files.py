"""Text files that users bring: UTF-8 or an error with file, line and remedy. Needs only the standard library."""

from __future__ import annotations

import codecs
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def check_output(option: str, path: str | pathlib.Path) -> None:
    """Checks, before the work begins, that a file can be written; messages call it by the `option`.

    Raises:
        ValueError: its directory is missing, it is a directory itself, or it is read-only.
    """
    path = pathlib.Path(path)
    parent = path.absolute().parent
    if not parent.is_dir():
        raise ValueError(f"{option} {path}: there is no directory {parent}")
    if path.is_dir():
        raise ValueError(f"{option} {path}: it is a directory, expected the name of a file")
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise ValueError(f"{option} {path}: this user may not write there")


def read_text(path: str | pathlib.Path) -> str:
    """Returns the text of a file, without a byte order mark.

    Raises:
        ValueError: it is not UTF-8.
        OSError: it cannot be read.
    """
    try:
        return pathlib.Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        for _ in read_lines(path):  # raises the error that names the line
            pass
        raise


def read_lines(path: str | pathlib.Path) -> Iterator[tuple[int, str]]:
    """Yields the lines of a file with their numbers from 1, without line ends and byte order mark.

    Raises:
        ValueError: it is not UTF-8; names the line, and the command that converts the file.
        OSError: it cannot be read.
    """
    with pathlib.Path(path).open("rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1:
                for mark, name in _OTHER_MARKS.items():
                    if raw.startswith(mark):
                        raise ValueError(f"{path} is {name}, expected UTF-8: iconv -f {name} -t UTF-8 {path} > NEW")
                raw = raw.removeprefix(codecs.BOM_UTF8)
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as e:
                raise ValueError(
                    f"{path} line {number} is not UTF-8 (byte {e.start + 1} is 0x{raw[e.start]:02x}): convert it, for "
                    f"example from Latin-1: iconv -f LATIN1 -t UTF-8 {path} > NEW"
                ) from None
            yield number, text.removesuffix("\n").removesuffix("\r")


def read_json_object(path: str | pathlib.Path) -> dict[str, Any]:
    """Reads a file that is one JSON object.

    Raises:
        ValueError: it is not.
        OSError: it cannot be read.
    """
    try:
        value = json.loads(text := read_text(path))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not JSON ({e}): half written, or changed by hand?") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {text[:80]!r}")
    return value


def read_json_lines(path: str | pathlib.Path, expected: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the JSON objects of a file with one per line, and their line numbers; skips blank lines.

    Args:
        path: of the file.
        expected: what a line holds, for error messages.

    Raises:
        ValueError: as `read_lines`, or a line is no JSON object or holds half of a surrogate pair; names the line.
        OSError: it cannot be read.
    """
    for number, text in read_lines(path):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except ValueError as e:
            raise ValueError(f"{path} line {number} is not JSON: {e}; expected {expected}") from None
        if not isinstance(value, dict):
            raise ValueError(f"{path} line {number}: expected an object, {expected}, got {type(value).__name__}")
        if "\\u" in text:
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as e:
                raise ValueError(
                    f"{path} line {number} holds \\u{ord(e.object[e.start]):04x}, half of a surrogate pair, which is "
                    "no character: something cut an emoji in two. Remove it, or write the file again"
                ) from None
        yield number, value
