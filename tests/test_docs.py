"""The docs list every option, every error and every method; an addition to the code that they lack fails here."""

import ast
import pathlib
import re
import tomllib

import pytest

from jdistill.config import TeacherServerConfig, TrainConfig, describe
from jdistill.sidecar.engines.fake import FakeOptions
from jdistill.sidecar.engines.sglang_http import SglangHttpOptions
from jdistill.sidecar.engines.vllm_http import VllmHttpOptions
from jdistill.tasks.addition import AdditionOptions
from jdistill.tasks.gsm8k import Gsm8kOptions
from jdistill.wire import errors
from jdistill.wire.v1 import teacher_pb2

ROOT = pathlib.Path(__file__).parent.parent
SERVICE = (ROOT / "docs" / "service.md").read_text()


def test_every_option_table_is_what_make_docs_writes():
    old = describe.old_pages(ROOT / "docs")
    assert not old, f"run make docs: {', '.join(map(str, old))}"


def test_a_table_that_is_out_of_date_is_found_and_written(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- flags of jdistill.config:EvalSection -->\nold\n<!-- end -->\nafter\n")
    assert describe.main([str(tmp_path)]) == 1 and "old" in page.read_text()
    assert describe.main([str(tmp_path), "--write"]) == 0 and describe.main([str(tmp_path)]) == 0
    row = "| `--every` | int \u2265 0 | `25` | steps between evaluations; 0: never |"
    assert row in page.read_text() and page.read_text().endswith("<!-- end -->\nafter\n")


SCHEMAS = [
    *(TrainConfig, TeacherServerConfig, AdditionOptions, Gsm8kOptions),
    *(VllmHttpOptions, SglangHttpOptions, FakeOptions),
]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_option_has_a_description(schema):
    for path, section in describe.sections(schema):
        for option in describe.options(section):
            assert option.description, f"{path}.{option.name} of {section.__name__} has no description"


def test_every_error_is_explained_with_its_reason():
    section = SERVICE.partition("## Errors")[2].partition("\n## ")[0]
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.TeacherError):
            assert f"`{error.reason}`" in section and f"`{error.__name__}`" in section, error


def test_every_method_and_message_field_of_the_protocol_is_told():
    section = SERVICE.partition("## Protocol")[2]
    for service in teacher_pb2.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            assert f"`{method.name}`" in section, method.name
    for message in ("ScoreSequencesRequest", "ScoreSequencesResponse"):
        for field in teacher_pb2.DESCRIPTOR.message_types_by_name[message].fields:
            assert f"`{field.name}`" in section, f"{message}.{field.name}"


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
)
def test_links_to_files_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{page} links to {target}"


def test_the_readmes_absolute_links_lead_to_files_of_this_repository():
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    raw = repository.replace("github.com", "raw.githubusercontent.com")
    targets = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert len(targets) > 5
    for target in targets:
        path = target.removeprefix(f"{repository}/blob/main/").removeprefix(f"{raw}/main/")
        assert path != target and (ROOT / path.partition("#")[0]).is_file(), target


def tree():
    """(path, line) of each entry of the README's tree."""
    block = re.search(r"## What is where\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    for row in block.splitlines():
        name, _, text = row.strip().partition(" ")
        yield pathlib.Path("jdistill" if row.startswith("  ") else ".", name), text.strip()


def test_every_path_of_the_readmes_tree_exists():
    paths = [path for path, _ in tree()]
    assert len(paths) > 15
    for path in paths:
        assert (ROOT / path).exists(), path


def test_every_package_opens_with_its_line_of_the_readmes_tree():
    lines = {path: text for path, text in tree() if (ROOT / path / "__init__.py").is_file() and text}
    packages = {init.parent.relative_to(ROOT) for init in ROOT.glob("jdistill/*/__init__.py")}
    assert packages <= set(lines), "a package without a line in the README's tree"
    for path, text in lines.items():
        docstring = ast.get_docstring(ast.parse((ROOT / path / "__init__.py").read_text()))
        assert docstring.splitlines()[0].rstrip(".") == text, path


def test_contributing_names_tables_and_files_that_exist():
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Adding a part")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| [\w ]+ \| `([^`]+)`.* \| `([A-Z]+)`, `([^`]+)` \|$", section, re.MULTILINE)
    assert len(rows) >= 8
    for place, table, file in rows:
        assert (ROOT / place).exists(), place
        assert re.search(rf"^{table}\b.*=", (ROOT / file).read_text(), re.MULTILINE), f"{table} in {file}"
