"""Fixtures: scripted teachers and clients that end with the test; random choices are seeded and the seed is printed."""

import pytest

from jdistill.client import TeacherClient
from tests.client.factories import FakeTeacher, seed_random


@pytest.fixture(autouse=True)
def _seeded():
    seed_random()


@pytest.fixture
def start_teacher():
    """start_teacher(**changes of ServerInfo or ModelInfo) -> a running FakeTeacher."""
    teachers = []

    def start(**info) -> FakeTeacher:
        teachers.append(FakeTeacher(**info).start())
        return teachers[-1]

    yield start
    for teacher in teachers:
        teacher.stop()


@pytest.fixture
def connect():
    """connect(*teachers, **arguments) or connect(endpoints, ...): a TeacherClient that the test need not close."""
    clients = []

    def make(*teachers, **arguments) -> TeacherClient:
        arguments.setdefault("deadline_s", 20.0)
        endpoints = [t.endpoint for t in teachers if isinstance(t, FakeTeacher)]
        clients.append(TeacherClient(endpoints or teachers[0], **arguments))
        return clients[-1]

    yield make
    for client in clients:
        client.close()
