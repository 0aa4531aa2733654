"""The pooling kernel in GPU interpret mode and through lowering, against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from draft_jax.draft.pooling import tiling_of
from draft_jax.grid import VideoGrid
from pallas_kernels.common.device import Device
from pallas_kernels.pooling.sm90 import pool_tiles as kernel
from tests.draft_jax import naive_draft

F32 = {"rtol": 1e-5, "atol": 1e-7}
INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
H100 = Device(platform="gpu", kind="H100", compute_capability=(9, 0))
GRIDS = {
    "divisible": VideoGrid(2, 4, 8, tile=(2, 4)),
    "edges-and-text": VideoGrid(1, 5, 6, tile=(2, 4), text_length=3),
    "text-before": VideoGrid(1, 2, 10, tile=(2, 4), text_length=5, text_side="before"),
}


pytestmark = pytest.mark.usefixtures("no_races")


def random_tokens(grid, batch, dtype, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, grid.num_tokens, 2, 64))
    return jnp.asarray(x, dtype)


@pytest.mark.parametrize("order", ["raster", "tiled"])
@pytest.mark.parametrize("name", GRIDS)
def test_matches_loops(name, order):
    grid = GRIDS[name]
    q, k = (random_tokens(grid, 2, "bfloat16", seed) for seed in (0, 1))
    given = [x if order == "raster" else x[:, grid.tile_order] for x in (q, k)]
    got = kernel.pool_tiles(
        *given,
        tiling_of(grid, order).table,
        reductions=("mean", "max"),
        interpret=INTERPRET,
    )
    for i, x in enumerate((q, k)):
        visual = np.asarray(x, np.float64)[:, grid.visual_tokens]
        means = naive_draft.pool(visual, grid)
        np.testing.assert_allclose(got[2 * i], means, rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(
            got[2 * i + 1], naive_draft.pool(visual, grid, np.max)
        )


def test_mapped_axes_join_the_batch():
    grid = GRIDS["divisible"]
    q, k = random_tokens(grid, 4, "float32", 0), random_tokens(grid, 2, "float32", 1)
    table = tiling_of(grid, "tiled").table
    pool = functools.partial(kernel.pool_tiles, tiles=table, interpret=INTERPRET)
    got = jax.vmap(pool, (0, None))(q.reshape(2, 2, *q.shape[1:]), k)
    want_q, want_k = (
        naive_draft.pool(np.asarray(x, np.float64)[:, grid.raster_order], grid)
        for x in (q, k)
    )
    np.testing.assert_allclose(got[0].reshape(want_q.shape), want_q, **F32)
    np.testing.assert_allclose(got[1], np.stack([want_k] * 2), **F32)


@pytest.mark.parametrize(
    ("dtype", "heads", "width"),
    [("bfloat16", 24, 128), ("float16", 12, 128), ("float32", 3, 128)],
    ids=str,
)
def test_lowers_for_cuda(dtype, heads, width):
    grid = VideoGrid(3, 45, 80, text_length=77)
    q = jax.ShapeDtypeStruct((2, grid.num_tokens, heads, width), dtype)
    pool = functools.partial(
        kernel.pool_tiles,
        tiles=tiling_of(grid, "raster").table,
        reductions=("mean", "max"),
    )
    lowered = jax.jit(pool).trace(q, q).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_causes_are_named():
    shape = (1, 64, 2, 64)
    assert kernel.why_unsupported(shape, jnp.bfloat16, H100) is None
    cpu = kernel.why_unsupported(shape, "float32", Device(platform="cpu"))
    assert "sm_90" in str(cpu)
    odd = jnp.zeros((1, 64, 1, 64))
    with pytest.raises(ValueError, match="must be a multiple of 128"):
        kernel.pool_tiles(odd, odd, tiling_of(GRIDS["divisible"], "tiled").table)
