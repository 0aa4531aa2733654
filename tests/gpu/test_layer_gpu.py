"""What surrounds the sparse kernel, on a Hopper GPU, at full size and exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import DraftConfig, VideoGrid, select_blocks
from draft_jax.config import static_budget
from draft_jax.draft.pooling import tiling_of
from pallas_kernels.common.device import current_device
from pallas_kernels.pooling.sm90 import pool_tiles as pooling_kernel
from pallas_kernels.ranking.sm90 import backend
from tests.draft_jax import naive_draft
from tests.draft_jax.draft import sorted_selection

pytestmark = pytest.mark.gpu

GRIDS = {
    "hunyuan": VideoGrid(33, 48, 80),  # S = 990
    "odd-and-text": VideoGrid(7, 45, 80, text_length=200, text_side="before"),
    "large": VideoGrid(21, 90, 160),  # S = 2,520
}


@pytest.fixture(autouse=True)
def hopper():
    device = current_device()
    if cause := device.why_not_hopper():
        pytest.skip(cause)
    assert backend.why_unsupported(990, device) is None


def maps(kind, size, heads, rng):
    shape = (1, heads, size, size)
    if kind == "bits":
        return rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)
    if kind == "equal":
        return np.full(shape, 1 / size, np.float32)
    if kind == "denormals":
        return rng.integers(0, 1000, shape, dtype=np.uint32).view(np.float32)
    if kind == "huge":
        return rng.choice([0.5, 1.0, 3e38, np.inf], shape).astype(np.float32)
    if kind == "minus_infinity":
        return np.full(shape, -np.inf, np.float32)
    logits = rng.normal(size=shape) * np.linspace(1e-4, 8, heads)[:, None, None]
    weights = np.exp(logits)
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("selection", ["percentile", "row_topk", "top_p"])
@pytest.mark.parametrize(
    "kind", ["softmax", "bits", "equal", "denormals", "huge", "minus_infinity"]
)
@pytest.mark.parametrize("name", GRIDS)
def test_selection_agrees_with_a_sort(name, kind, selection):
    grid = GRIDS[name]
    config = DraftConfig.paper(sparsity=0.9, selection=selection)
    size = grid.num_visual_blocks
    scores = maps(kind, size, 3, np.random.default_rng(0))
    forced = np.zeros((size, size), bool)
    budget = static_budget(0.9, grid, config)
    if selection == "top_p":
        expected = sorted_selection.top_p(scores, forced, budget, config.top_p)
    else:
        expected = getattr(sorted_selection, selection)(scores, forced, budget)
    expected = naive_draft.add_text(expected, grid)
    select = jax.jit(lambda x: select_blocks(x, grid=grid, config=config))
    mask = select(jnp.asarray(scores))
    offsets, ids = np.asarray(mask.row_offsets), np.asarray(mask.block_ids)
    np.testing.assert_array_equal(np.diff(offsets, axis=-1), expected.sum(-1))
    used = np.arange(ids.shape[-1]) < offsets[..., -1:]
    np.testing.assert_array_equal(ids[used], np.nonzero(expected)[-1])
    assert not ids[~used].any()
    again = select(jnp.asarray(scores))
    np.testing.assert_array_equal(again.block_ids, ids)


@pytest.mark.parametrize("order", ["raster", "tiled"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "grid",
    [
        VideoGrid(3, 48, 80),
        VideoGrid(2, 45, 77, text_length=61, text_side="before"),
        VideoGrid(2, 30, 52, tile=(16, 8), text_length=9),
    ],
    ids=str,
)
def test_pooling_matches_loops(grid, dtype, order):
    rng = np.random.default_rng(0)
    shape = (2, grid.num_tokens, 3, 128)
    q, k = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    given = [x if order == "raster" else x[:, grid.tile_order] for x in (q, k)]
    table = tiling_of(grid, order).table
    got = jax.jit(
        lambda q, k: pooling_kernel.pool_tiles(q, k, table, reductions=("mean", "max"))
    )(*given)
    for i, x in enumerate((q, k)):
        visual = np.asarray(x.astype(jnp.float32), np.float64)[:, grid.visual_tokens]
        means = naive_draft.pool(visual, grid)
        np.testing.assert_allclose(got[2 * i], means, rtol=1e-5, atol=1e-6)
        largest = naive_draft.pool(visual, grid, np.max)
        np.testing.assert_array_equal(got[2 * i + 1], largest)
