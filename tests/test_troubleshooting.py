"""Every message that docs/troubleshooting.md quotes stands in jdistill's source, with a cause and a remedy."""

from __future__ import annotations

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
# Errors about a path that a command is told to write to: they need no explanation.
WRITING = ("dtype = ", "not an empty directory", "there is no directory", "it is a directory", "may not write there")
# (quoted message, what is said about it)
ENTRIES = re.findall(r"^### (.*)\n\n((?:(?!#).*\n?)*)", PAGE, re.MULTILINE)


def messages(tree: ast.AST) -> list[str]:
    """All strings of a module; the places that an f-string fills in become NUL."""
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            found.append(node.value)
    return found


SOURCE = [text for path in (ROOT / "jdistill").rglob("*.py") for text in messages(ast.parse(path.read_text()))]


def has(text: str, quoted: str) -> bool:
    """Whether a message has the parts between the `…`, in this order."""
    return bool(re.search(".*".join(re.escape(part.strip()) for part in quoted.split("…")), text, re.DOTALL))


def is_in_source(quoted: str) -> bool:
    """Whether one string of the source has the quoted parts."""
    return any(has(text, quoted) for text in SOURCE)


@pytest.mark.parametrize(("heading", "text"), ENTRIES, ids=[heading for heading, _ in ENTRIES])
def test_every_entry_quotes_a_message_and_says_cause_and_remedy(heading: str, text: str) -> None:
    quoted = re.fullmatch(r"`([^`]+)`", heading)
    assert quoted, f"{heading}: an entry's heading is one message in backticks"
    assert len(re.sub(r"\W", "", quoted[1])) >= 12, f"{heading}: quote enough of the message to be found"
    assert is_in_source(quoted[1]), f"no string of jdistill's source contains {heading}"
    assert re.match(r"Cause: .+\n(.+\n)*Remedy: .+", text), f"{heading}: expected lines Cause: ... and Remedy: ..."


def raised(path: pathlib.Path) -> list[str]:
    """Messages of the errors that a module raises, with NUL where something is filled in."""
    calls = [node.exc for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise) and node.exc]
    return [messages(call)[0] for call in calls if isinstance(call, ast.Call) and messages(call)]


@pytest.mark.parametrize("name", ["weight_files", "checkpoint_files", "models/checkpoint", "text_files"])
def test_every_error_of_what_reads_files_has_an_entry(name: str) -> None:
    quoted = [entry.strip("`") for entry, _ in ENTRIES]
    lacking = [text for text in raised(ROOT / "jdistill" / f"{name}.py") if not any(has(text, one) for one in quoted)]
    lacking = [text.replace("\0", "…") for text in lacking if not any(part in text for part in WRITING)]
    assert not lacking, "\n".join(["no entry in docs/troubleshooting.md for:", *lacking])


def test_there_are_entries_and_a_reworded_message_would_be_found() -> None:
    assert len(ENTRIES) == PAGE.count("\n### ") > 5
    assert is_in_source("needs …, which is not installed") and not is_in_source("needs …, which is not yet installed")
