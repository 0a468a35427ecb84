"""The package's shape: modules and functions of a readable size, no circle of imports, no imports of test modules."""

from __future__ import annotations

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 400, 60
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "jdistill").rglob("*.py"))
    if "wire/v1/" not in path.as_posix()  # generated
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_functions_have_a_readable_size(name: str) -> None:
    text = MODULES[name].read_text()
    assert len(text.splitlines()) <= MAX_MODULE_LINES, f"{name}: cut it by its jobs (CONTRIBUTING, Size)"
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    too_long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= MAX_FUNCTION_LINES}
    assert not too_long, f"{name}: functions of more than {MAX_FUNCTION_LINES} lines: {too_long}"


def imported(name: str) -> set[str]:
    """Modules of jdistill that a module imports anywhere: in functions and for type checkers too."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                base = f"{parent}.{base}".removesuffix(".")
            # `from package import module` needs the module; `from module import name` the module that has the name.
            found |= {full if (full := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return {other for other in found if other in MODULES and other != name}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""
    reached: dict[str, set[str]] = {}
    for start in edges:
        seen, stack = set(), [start]
        while stack:
            for other in edges[stack.pop()] - seen:
                seen.add(other)
                stack.append(other)
        reached[start] = seen
    groups = {frozenset(b for b in reached[a] if a in reached[b]) for a in edges if a in reached[a]}
    return [sorted(group) for group in groups]


def test_no_modules_import_each_other_in_a_circle() -> None:
    found = circles({name: imported(name) for name in MODULES})
    assert not found, f"circles of imports: {found}"


def test_a_circle_would_be_found() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}
    assert sorted(circles(edges)) == [["b", "c"], ["d"]]


def test_what_tests_share_lies_in_modules_that_hold_no_tests() -> None:
    # Strings count too: tests run them in other processes.
    pattern = re.compile(r"\b(?:import|from)\s[^\n;()]*\b(?:test_\w+|conftest)\b")
    found = {
        str(path.relative_to(ROOT)): imports
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if (imports := pattern.findall(path.read_text()))
    }
    assert not found, f"move what is shared to a module beside it, such as factories.py: {found}"
