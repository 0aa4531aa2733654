"""Means of sub-tiles over groups of frames, by the kernel and by XLA, against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from draft_jax.grid import VideoGrid
from pallas_kernels import SubTiles
from pallas_kernels.pooling import pool_sub_tiles, tiles
from pallas_kernels.pooling.sm90 import pool_tiles as kernel
from pallas_kernels.pooling.sub_tiles import cell_table
from tests.cases import mostly_nightly
from tests.tolerances import POOLED

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)

pytestmark = pytest.mark.usefixtures("no_races")

# Grid, sub-tile, frames of a group. The last group of three has fewer frames.
CASES = {
    "divisible": (VideoGrid(2, 4, 8, tile=(2, 4)), (1, 2), 2),
    "edges": (
        VideoGrid(3, 5, 6, tile=(3, 4), text_length=3, text_side="before"),
        (2, 2),
        2,
    ),
    "whole-tiles": (VideoGrid(2, 3, 5, tile=(2, 4), text_length=2), (2, 4), 1),
}


def cells_of(grid, sub_tile, frames):
    return SubTiles(
        frames=grid.frames,
        height=grid.height,
        width=grid.width,
        tile=grid.tile,
        sub_tile=sub_tile,
        group_frames=frames,
    )


def loops(x, grid, sub_tile, frames):
    """Cell by cell, of a whole sequence in raster order."""
    x = np.asarray(x, np.float64)[:, grid.visual_tokens]
    x = x.reshape(x.shape[0], grid.frames, grid.height, grid.width, *x.shape[2:])
    rows, columns = grid.tile
    means = []
    for first in range(0, grid.frames, frames):
        for top in range(0, grid.height, rows):
            for left in range(0, grid.width, columns):
                tile = x[:, first : first + frames, top : top + rows]
                tile = tile[:, :, :, left : left + columns]
                for i in range(0, rows, sub_tile[0]):
                    for j in range(0, columns, sub_tile[1]):
                        own = tile[:, :, i : i + sub_tile[0], j : j + sub_tile[1]]
                        own = own.reshape(own.shape[0], -1, *own.shape[4:])
                        empty = np.zeros_like(own.sum(1))
                        means.append(own.mean(1) if own.shape[1] else empty)
    return np.stack(means, axis=1)


def inputs(grid, order, dtype="float32"):
    """Two arrays in raster order, and in the order that is asked for."""
    rng = np.random.default_rng(0)
    shape = (2, grid.num_tokens, 2, 64)
    pair = [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2)]
    return pair, [x if order == "raster" else x[:, grid.tile_order] for x in pair]


@pytest.mark.parametrize("order", mostly_nightly(("raster", "tiled"), ("tiled",)))
@pytest.mark.parametrize("name", mostly_nightly(CASES, ("edges",)))
def test_kernel_matches_loops(name, order):
    grid, sub_tile, frames = CASES[name]
    pair, given = inputs(grid, order, "bfloat16")
    got = kernel.pool_cells(
        *given,
        cell_table(cells_of(*CASES[name]), order, grid.visual_tokens.start),
        frame_stride=grid.height * grid.width,
        interpret=INTERPRET,
    )
    for x, means in zip(pair, got, strict=True):
        np.testing.assert_allclose(means, loops(x, grid, sub_tile, frames), **POOLED)


@pytest.mark.parametrize("order", ["raster", "tiled"])
@pytest.mark.parametrize("name", mostly_nightly(CASES, ("edges",)))
def test_xla_matches_loops(name, order):
    grid, sub_tile, frames = CASES[name]
    pair, given = inputs(grid, order)
    cells, start = cells_of(*CASES[name]), grid.visual_tokens.start
    got = pool_sub_tiles(*given, cells, order=order, start=start)
    for x, means in zip(pair, got, strict=True):
        np.testing.assert_allclose(means, loops(x, grid, sub_tile, frames), **POOLED)


def test_results_have_the_dtype_that_is_asked_for():
    grid, sub_tile, frames = CASES["divisible"]
    pair, _ = inputs(grid, "raster", "bfloat16")
    cells = cells_of(*CASES["divisible"])
    got = pool_sub_tiles(*pair, cells, order="raster", dtype="bfloat16")
    for x, means in zip(pair, got, strict=True):
        assert means.dtype == "bfloat16"
        want = loops(x, grid, sub_tile, frames)
        np.testing.assert_allclose(means.astype("float32"), want, rtol=2**-8, atol=1e-6)


@pytest.mark.nightly
def test_derivatives_of_the_kernel_spread_over_the_tokens(monkeypatch):
    grid, sub_tile, frames = CASES["edges"]
    cells = cells_of(*CASES["edges"])
    in_interpret = functools.partial(kernel.pool_cells, interpret=INTERPRET)
    monkeypatch.setattr(kernel, "pool_cells", in_interpret)
    pair, given = inputs(grid, "tiled")
    start = grid.visual_tokens.start
    task = tiles._Cells(sub_tiles=cells, order="tiled", start=start, dtype="float32")
    factors = np.random.default_rng(1).normal(size=(2, cells.num_cells, 2, 64))

    def loss(q, k):
        means = tiles._pool_sub_tiles(task, q, k, has_kernel=True)
        return sum((mean * factors).sum() for mean in means)

    got = jax.grad(loss, (0, 1))(*given)
    step = np.random.default_rng(2).normal(size=pair[0].shape)
    change = (loops(step, grid, sub_tile, frames) * factors).sum()
    for gradient in got:
        moved = (np.asarray(gradient) * step[:, grid.tile_order]).sum()
        np.testing.assert_allclose(moved, change, rtol=1e-4)


@pytest.mark.parametrize("order", mostly_nightly(("raster", "tiled"), ("tiled",)))
def test_lowers_for_cuda(order):
    grid = VideoGrid(6, 45, 80, text_length=77)
    q = jax.ShapeDtypeStruct((1, grid.num_tokens, 24, 128), jnp.bfloat16)
    pool = functools.partial(
        kernel.pool_cells,
        cells=cell_table(cells_of(grid, (2, 2), 4), order, 0),
        frame_stride=45 * 80,
        dtype="bfloat16",
    )
    lowered = jax.jit(pool).trace(q, q).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
