"""Fixtures for all tests: sidecars of the fake engine as real processes."""

import contextlib
import os

# Compiling for XLA takes most of the time: without its optimizations a third. `make test-full` runs with them.
if os.environ.get("JDISTILL_SOAK") != "1":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import pytest

from tests import shapes

with contextlib.suppress(ModuleNotFoundError):  # the engines' environments have neither jax nor beartype
    shapes.install()  # before a test module imports what is to be checked

from tests.sidecar import processes

with contextlib.suppress(ModuleNotFoundError):  # the SGLang environment has no use for it
    import hypothesis

    # No deadline for one example: on a machine that others use too it fails by chance.
    hypothesis.settings.register_profile("shared machine", deadline=None)
    hypothesis.settings.load_profile("shared machine")


def pytest_itemcollected(item):
    """Groups tests for `--dist loadgroup`: by their mark, by file where they share its fixtures, else by function."""
    if item.get_closest_marker("xdist_group"):
        return
    scopes = {definitions[-1].scope for definitions in item._fixtureinfo.name2fixturedefs.values()}
    shares = scopes & {"class", "module", "package"}
    group = item.path.name if shares else f"{item.path.name}::{getattr(item, 'originalname', item.name)}"
    item.add_marker(pytest.mark.xdist_group(f"{item.path.parent.name}/{group}"))


def pytest_collection_modifyitems(items):
    """Skips what only `make test-full` runs."""
    if os.environ.get("JDISTILL_SOAK") == "1":
        return
    for item in items:
        if item.get_closest_marker("full"):
            item.add_marker(pytest.mark.skip(reason="takes too long for `make test`: make test-full runs it"))


@pytest.fixture(scope="session", autouse=True)
def _compiled_once(tmp_path_factory):
    """Compiles each program once per run: all workers, trainers and sidecars share one cache, in pytest's directory.

    JAX 0.10 writes an entry in place, so that a process that is killed, or one that reads too early, may leave or find
    half of it. That costs a compilation and changes no number: half an entry cannot be decompressed, which JAX reports
    as a warning (ignored in pyproject.toml) before it compiles. tests/test_compilation_cache.py holds this.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    directory = root / "compiled"
    directory.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(directory))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        with contextlib.suppress(ModuleNotFoundError):  # in the engines' environments
            import jax
            from jax.experimental.compilation_cache import compilation_cache

            # JAX may have read its environment before this fixture ran, and compiled while tests were collected.
            jax.config.update("jax_compilation_cache_dir", str(directory))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
            compilation_cache.reset_cache()
        yield


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
