"""Fixtures for all tests: sidecars of the fake engine as real processes."""

import contextlib

import pytest

from tests.teacher import sidecar

with contextlib.suppress(ModuleNotFoundError):  # the SGLang environment has no use for it
    import hypothesis

    # No deadline for one example: on a machine that others use too it fails by chance.
    hypothesis.settings.register_profile("shared machine", deadline=None)
    hypothesis.settings.load_profile("shared machine")


@pytest.fixture
def start_sidecar(tmp_path):
    """`start_sidecar(*flags, wait=True)`: a sidecar process that ends with the test."""
    started = []

    def start(*args, wait=True):
        started.append(sidecar.launch(tmp_path, *args, wait=False))
        if wait:
            started[-1].wait_for_port()
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
