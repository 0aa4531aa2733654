"""The selection kernels lower for CUDA without a GPU; tests/gpu checks their results.

They are written in PTX, which interpret mode cannot run: see test_rank_interpret.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ranking.sm90 import maps
from pallas_kernels.ranking.sm90.rows import select_in_rows

LISTS, SIZE = 24, 990
WORDS = -(-SIZE // 32)
U32 = jnp.uint32


def lower(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.as_text()


@pytest.mark.parametrize("digit", maps.DIGITS, ids=str)
def test_count_digits_lowers(digit):
    text = lower(
        lambda keys, prefix: maps.count_digits(keys, prefix, digit),
        ((LISTS, SIZE, SIZE), U32),
        ((LISTS,), U32),
    )
    assert "mosaic_gpu" in text


def test_pack_rows_lowers():
    text = lower(maps.pack_rows, ((LISTS, SIZE, SIZE), U32), ((LISTS, SIZE), U32))
    assert "mosaic_gpu" in text


def test_write_lists_lowers():
    total = SIZE * WORDS
    columns = np.tile(np.arange(WORDS, dtype=np.int32) * 32, SIZE)
    text = lower(
        lambda words, starts, totals: maps.write_lists(
            words, starts, totals, columns, 100_000
        ),
        ((LISTS, total), U32),
        ((LISTS, total), jnp.int32),
        ((LISTS,), jnp.int32),
    )
    assert "mosaic_gpu" in text


@pytest.mark.parametrize("has_forced", [False, True], ids=["free", "forced"])
@pytest.mark.parametrize("wanted", [None, 9 << 26], ids=["count", "mass"])
@pytest.mark.parametrize("columns", [1, 990, 1025, 8192])
def test_select_in_rows_lowers(columns, wanted, has_forced):
    """One warp for a row, and a warpgroup for a row."""
    rows = 5
    forced = np.zeros((rows, -(-columns // 32)), np.uint32) if has_forced else None
    text = lower(
        lambda scores, least, most: select_in_rows(
            scores, least, most, forced, wanted=wanted
        ),
        ((LISTS, rows, columns), jnp.float32),
        ((LISTS, rows), jnp.int32),
        ((LISTS, rows), jnp.int32),
    )
    assert "mosaic_gpu" in text
