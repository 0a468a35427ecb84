"""docs/service.md tells every option, every error, every method: what is added to the code is missed here."""

import pathlib
import re

import pytest

from jdistill.commands import teacher
from jdistill.config import TeacherServerConfig
from jdistill.wire import errors
from jdistill.wire.v1 import teacher_pb2

ROOT = pathlib.Path(__file__).parent.parent
SERVICE = (ROOT / "docs" / "service.md").read_text()


def flag(name):
    return teacher.REPEATED[name][0] if name in teacher.REPEATED else "--" + name.replace("_", "-")


def test_every_option_of_the_teacher_is_in_the_table_with_its_help_and_no_other_is():
    section = SERVICE.partition("## Options")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(--[a-z-]+)` \| [^|]* \| (.*) \|$", section, re.MULTILINE))
    assert rows == {flag(name): teacher.HELP[name] for name in TeacherServerConfig.model_fields}


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


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/service.md"])
def test_links_to_files_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{page} links to {target}"
