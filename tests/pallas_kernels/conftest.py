"""Fixtures of the kernels' tests."""

import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks


@pytest.fixture
def no_races():
    """Any race that interpret mode reports fails a test, even where values agree."""
    yield
    assert not gpu_callbacks.get_races().races_found
