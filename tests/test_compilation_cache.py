"""The cache that all test processes share: half an entry, as a killed process leaves it, changes no number."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture
def directory(tmp_path):
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs

    def use(directory, least_s):
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least_s)
        compilation_cache.reset_cache()

    use(str(tmp_path), 0.0)
    yield tmp_path
    use(*before)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_half_an_entry_is_reported_and_compiled_again(directory, kept):
    def compute():
        return jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T)(jnp.arange(12.0).reshape(3, 4)).tolist()

    whole = compute()
    entries = [path for path in directory.iterdir() if "lambda" in path.name and path.name.endswith("-cache")]
    assert entries
    for path in entries:
        path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    jax.clear_caches()
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        assert compute() == whole
