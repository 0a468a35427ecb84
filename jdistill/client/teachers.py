"""A client's teachers: one, or several by name, each with its replicas and the model that scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from jdistill.wire.endpoint import parse_endpoints
from jdistill.wire.errors import InvalidRequestError


@dataclasses.dataclass(frozen=True)
class Teacher:
    """One teacher: equivalent sidecars, and which of their served models scores.

    Args:
        endpoints: "host:port", "[IPv6 address]:port" or "unix:/path" of each replica; each means one server.
        model: served name of the model or of a LoRA adapter on it; "" is the base model.

    Raises:
        ValueError: an address is malformed or listed twice.
    """

    endpoints: Sequence[str]
    model: str = ""

    def __post_init__(self) -> None:
        endpoints = parse_endpoints(self.endpoints)
        object.__setattr__(self, "endpoints", tuple(endpoint.text for endpoint in endpoints))


Endpoints: TypeAlias = Sequence[str] | Teacher | Mapping[str, "Sequence[str] | Teacher"]


def parse_teachers(endpoints: Endpoints) -> dict[str, Teacher]:
    """Returns the teachers by name; a single teacher without a name is called "".

    >>> parse_teachers(["127.0.0.1:50051"])
    {'': Teacher(endpoints=('127.0.0.1:50051',), model='')}
    """
    if not isinstance(endpoints, Mapping):
        return {"": endpoints if isinstance(endpoints, Teacher) else Teacher(endpoints)}
    if not endpoints:
        raise ValueError('endpoints = {}, expected at least one teacher, such as {"math": ["127.0.0.1:50051"]}')
    return {name: one if isinstance(one, Teacher) else Teacher(one) for name, one in endpoints.items()}


def choose_teacher(name: str, names: Sequence[str], index: int | None = None) -> str:
    """Resolves a teacher's name; "" means the only one. `index` is the sequence's number in the error message.

    Raises:
        InvalidRequestError: no teacher has that name; lists the names.
    """
    if name in names:
        return name
    if name == "" and len(names) == 1:
        return names[0]
    whose = "" if index is None else f" of sequence {index}"
    known = ", ".join(repr(known) for known in names)
    remedy = (
        "this TeacherClient has one teacher without a name: leave it out" if list(names) == [""] else f"one of {known}"
    )
    raise InvalidRequestError(f"teacher {name!r}{whose}, expected {remedy}", field="teacher", sequence=index)
