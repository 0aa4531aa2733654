"""What other libraries are given, and what happens where they are missing."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention
from draft_jax import BlockMask, VideoGrid

GRID = VideoGrid(1, 16, 32)  # four blocks


def test_rows_of_lists():
    dense = np.zeros((1, 2, 4, 4), bool)
    dense[0, 0] = [[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]]
    dense[0, 1, 3, 2] = True
    mask = BlockMask.from_dense(jnp.asarray(dense), grid=GRID, capacity=9)
    counts, indices = attention.rows_of_lists(mask)
    np.testing.assert_array_equal(counts, [[[2, 0, 4, 1], [0, 0, 0, 1]]])
    np.testing.assert_array_equal(
        indices[0, 0], [[0, 2, 0, 0], [0, 0, 0, 0], [0, 1, 2, 3], [3, 0, 0, 0]]
    )
    np.testing.assert_array_equal(indices[0, 1, 3], [2, 0, 0, 0])


@pytest.mark.parametrize("contender", ["fa3", "fa4", "fa4_sparse"])
def test_a_missing_library_is_recorded(monkeypatch, contender):
    monkeypatch.setitem(attention.MODULES, contender, "no_such_package.part")
    result = attention.measure(contender, pytest.fail, 1.0, 0.1)
    assert result == {"error": "no_such_package.part is not installed"}


def test_a_failing_library_is_recorded():
    def make():
        raise ValueError("short blocks")

    result = attention.measure("ours", make, 1.0, 0.1)
    assert result == {"error": "ValueError: short blocks"}
