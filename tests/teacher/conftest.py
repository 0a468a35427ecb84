"""Sidecars of the fake engine as real processes."""

import importlib.util
import pathlib

import pytest

spec = importlib.util.spec_from_file_location("sidecar", pathlib.Path(__file__).with_name("sidecar.py"))
sidecar = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sidecar)


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
