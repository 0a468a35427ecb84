"""Fixtures of the fault tests: clients and proxies that end with the test; `random` is seeded, the seed printed."""

import functools

import pytest

from jdistill.client import TeacherClient
from tests.client.factories import seed_random
from tests.faults.harness import WATCHED
from tests.faults.proxy import FaultProxy
from tests.sidecar import processes


@pytest.fixture(autouse=True)
def _seeded():
    seed_random()


@pytest.fixture
def start_sidecar(start_sidecar):
    """Like `start_sidecar` of tests/conftest.py, with metrics and a log that tests read."""
    return functools.partial(start_sidecar, *WATCHED)


@pytest.fixture
def connect():
    """connect(*sidecars, proxies or endpoints, **arguments of TeacherClient)"""
    clients = []

    def make(*teachers, **arguments):
        addresses = [getattr(t, "endpoint", None) or getattr(t, "address", t) for t in teachers]
        clients.append(TeacherClient(addresses, **{"deadline_s": 60.0, **arguments}))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def proxy():
    """proxy(sidecar, fault=None): a FaultProxy before it."""
    proxies = []

    def make(target, fault=None):
        proxies.append(FaultProxy(target.port, fault))
        return proxies[-1]

    yield make
    for one in proxies:
        one.close()


@pytest.fixture(scope="module")
def steady_sidecar(tmp_path_factory):
    """A sidecar shared by a module's tests, which leave it intact and check that it still serves."""
    one = processes.launch(tmp_path_factory.mktemp("sidecar"), *WATCHED)
    yield one
    one.process.kill()
    one.process.wait()
