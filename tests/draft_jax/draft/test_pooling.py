"""Pooling and the draft map against loops."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draft_jax.config import DraftConfig
from draft_jax.draft.pooling import pool_tokens
from draft_jax.draft.scores import draft_scores
from draft_jax.grid import VideoGrid
from tests.draft_jax import naive_draft

# Largest error measured: 2.4e-7 in pooled values, 9e-8 in probabilities.
F32 = {"rtol": 1e-6, "atol": 1e-6}

GRIDS = [
    VideoGrid(3, 16, 32),
    VideoGrid(1, 8, 16),
    VideoGrid(2, 13, 21, tile=(4, 8)),
    VideoGrid(1, 49, 33),
    VideoGrid(2, 3, 5),  # smaller than one tile
    VideoGrid(2, 6, 7, tile=(2, 3), text_length=5),
    VideoGrid(2, 6, 7, tile=(2, 3), text_length=5, text_side="before"),
]


def random_tokens(grid, seed=0, dtype=np.float32, dim=8):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, grid.num_tokens, 3, dim)).astype(dtype)


@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("order", ["raster", "tiled"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_pool_tokens_matches_a_loop(grid, order, reduction):
    x = random_tokens(grid)
    expected = naive_draft.pool(
        x[:, grid.visual_tokens], grid, {"mean": np.mean, "max": np.max}[reduction]
    )
    if order == "tiled":
        x = x[:, grid.tile_order]
    x = jnp.asarray(x)[:, grid.visual_tokens]
    got = pool_tokens(x, grid, order=order, reduction=reduction)
    np.testing.assert_allclose(got, expected, **F32)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)),
    tile=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    order=st.sampled_from(["raster", "tiled"]),
    reduction=st.sampled_from(["mean", "max"]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_grid_pools_like_a_loop(shape, tile, order, reduction, seed):
    grid = VideoGrid(*shape, tile=tile)
    x = random_tokens(grid, seed)
    expected = naive_draft.pool(x, grid, {"mean": np.mean, "max": np.max}[reduction])
    x = x[:, grid.tile_order] if order == "tiled" else x
    got = pool_tokens(jnp.asarray(x), grid, order=order, reduction=reduction)
    np.testing.assert_allclose(got, expected, **F32)


def test_sums_are_taken_in_float32():
    """128 ones after a large value vanish in bfloat16, not in float32."""
    grid = VideoGrid(1, 8, 16)
    x = np.ones((1, 128, 1, 1), np.float32)
    x[0, 0] = 1024.0
    got = pool_tokens(jnp.asarray(x, jnp.bfloat16), grid)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [[[[(1024 + 127) / 128]]]], rtol=1e-6)


@pytest.mark.parametrize("order", ["raster", "tiled"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_draft_scores_match_a_loop(grid, order):
    q, k = random_tokens(grid, 1), random_tokens(grid, 2)
    visual = [x[:, grid.visual_tokens] for x in (q, k)]
    expected = naive_draft.draft_map(*visual, grid)
    if order == "tiled":
        q, k = q[:, grid.tile_order], k[:, grid.tile_order]
    got = draft_scores(
        jnp.asarray(q),
        jnp.asarray(k),
        grid=grid,
        config=DraftConfig.paper(),
        order=order,
    )
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, **F32)


def test_mean_and_max_draft_is_the_average_of_both_maps():
    grid = GRIDS[2]
    q, k = random_tokens(grid, 1), random_tokens(grid, 2)
    maps = [naive_draft.draft_map(q, k, grid, reduce) for reduce in (np.mean, np.max)]
    got = draft_scores(
        jnp.asarray(q),
        jnp.asarray(k),
        grid=grid,
        config=DraftConfig.paper(pooling="mean+max"),
    )
    np.testing.assert_allclose(got, (maps[0] + maps[1]) / 2, **F32)


def test_identical_tokens_make_the_draft_exact():
    """With one value per tile, the draft is full attention summed over key tiles."""
    grid = VideoGrid(2, 5, 6, tile=(2, 4))
    rng = np.random.default_rng(3)
    members = naive_draft.tile_members(2, 5, 6, (2, 4))
    q, k = np.zeros((2, 1, 60, 1, 4), np.float32)
    for tile in members:
        q[:, tile] = rng.normal(size=4)
        k[:, tile] = rng.normal(size=4)
    logits = q[0, :, 0] @ k[0, :, 0].T / 2
    full = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = [[full[i[0], j].sum() for j in members] for i in members]
    got = draft_scores(
        jnp.asarray(q), jnp.asarray(k), grid=grid, config=DraftConfig.paper()
    )
    np.testing.assert_allclose(got[0, 0], expected, **F32)


def test_scale_multiplies_the_logits():
    grid = GRIDS[0]
    q, k = jnp.asarray(random_tokens(grid, 1)), jnp.asarray(random_tokens(grid, 2))
    got = draft_scores(q, k, grid=grid, config=DraftConfig.paper(), scale=1.0)
    expected = draft_scores(q * 8**0.5, k, grid=grid, config=DraftConfig.paper())
    np.testing.assert_allclose(got, expected, **F32)


def test_large_logits_do_not_overflow():
    grid = GRIDS[0]
    q = jnp.asarray(random_tokens(grid) * 1e4)
    got = draft_scores(q, q, grid=grid, config=DraftConfig.paper(pooling="mean+max"))
    np.testing.assert_allclose(got.sum(-1), 1.0, rtol=1e-5)
