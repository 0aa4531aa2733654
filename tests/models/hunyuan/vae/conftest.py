"""Programs of this folder compile fast and run slowly."""

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def _fast_compilation():
    """A third of the time to compile, for programs that hardly run."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
