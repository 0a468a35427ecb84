"""Fixtures for all tests: sidecars of the fake engine as real processes."""

import contextlib

import pytest

from tests.sidecar import processes

with contextlib.suppress(ModuleNotFoundError):  # the SGLang environment has no use for it
    import hypothesis

    # No deadline for one example: on a machine that others use too it fails by chance.
    hypothesis.settings.register_profile("shared machine", deadline=None)
    hypothesis.settings.load_profile("shared machine")


@pytest.fixture(scope="session", autouse=True)
def _compiled_once(tmp_path_factory):
    """Tests that run the same programs (the demo's, above all) compile them once: two thirds of their time."""
    try:
        import jax
        from jax.experimental.compilation_cache import compilation_cache
    except ModuleNotFoundError:  # in the engines' environments
        return
    # Of this process alone, not through the environment: one that is killed may leave half an entry.
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    compilation_cache.reset_cache()  # collecting the tests may have compiled something already


@pytest.fixture
def start_sidecar(tmp_path):
    """`start_sidecar(*flags, wait=True)`: a sidecar process that ends with the test."""
    started = []

    def start(*args, wait=True):
        started.append(processes.launch(tmp_path, *args, wait=False))
        if wait:
            started[-1].wait_for_port()
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
