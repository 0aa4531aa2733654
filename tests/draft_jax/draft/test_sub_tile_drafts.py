"""Drafts of sub-tiles, and ranking by spread, against NumPy loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import (
    Compensation,
    DraftConfig,
    PooledTokens,
    VideoGrid,
    compute_mask,
    draft_scores,
    norm_rope_pool,
    select_blocks,
)
from draft_jax.draft import head_chunks
from tests.cases import mostly_nightly
from tests.draft_jax import naive_draft

# Largest error measured against float64 loops: 2.5e-7 of the largest score.
F32 = {"rtol": 1e-5, "atol": 2e-6}
EDGES = VideoGrid(3, 5, 7, tile=(2, 4), text_length=5, text_side="before")
EVEN = VideoGrid(2, 4, 8, tile=(2, 4))
TWO_FRAMES = Compensation(sub_tile=(1, 3), frames=2)


def random_qk(grid, dim=8):
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 2, grid.num_tokens, 2, dim)).astype(np.float32)


def naive_scores(q, k, grid, config):
    """Of all heads: [B, N, S, S]."""
    comp, of_heads = config.compensation, []
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        own = [x[b, grid.visual_tokens, n] for x in (q, k)]
        scores = naive_draft.sub_tile_map(
            *own,
            grid,
            config.draft_tile or grid.tile,
            weights_by_tokens=config.edge_tiles == "by_tokens",
        )
        if config.ranking != "mass":
            is_exact = config.ranking == "exact_spread"
            scores *= naive_draft.spread(
                *own, grid, comp.sub_tile, comp.frames, exact=is_exact
            )
        if config.ranking != "mass" and config.selection == "top_p":
            scores /= scores.sum(-1, keepdims=True)
        of_heads.append(scores)
    return np.reshape(of_heads, (q.shape[0], q.shape[2], *scores.shape))


CONFIGS = {
    "sub-tiles": DraftConfig.paper(draft_tile=(1, 2)),
    "uneven sub-tiles": DraftConfig.paper(draft_tile=(2, 3)),
    "as published": DraftConfig.paper(draft_tile=(1, 2), edge_tiles="as_published"),
    "spread": DraftConfig.paper(ranking="spread", compensation=TWO_FRAMES),
    "sub-tiles and spread": DraftConfig.paper(
        draft_tile=(1, 2), ranking="spread", compensation=TWO_FRAMES, sparsity=0.6
    ),
    "exact spread": DraftConfig.paper(ranking="exact_spread", compensation=TWO_FRAMES),
    "exact spread, top-p": DraftConfig.paper(
        selection="top_p", ranking="exact_spread", compensation=TWO_FRAMES
    ),
}
CASES = [(grid, name) for grid in (EVEN, EDGES) for name in CONFIGS]


@pytest.mark.parametrize(
    "case",
    mostly_nightly(CASES, quick=[(EDGES, "sub-tiles and spread")]),
    ids=lambda case: f"{case[1]}, {'edges' if case[0] is EDGES else 'even'}",
)
def test_scores_match_loops_in_both_orders(case):
    grid, name = case
    config, (q, k) = CONFIGS[name], random_qk(grid)
    scores = functools.partial(draft_scores, grid=grid, config=config)
    got = scores(q, k)
    want = naive_scores(q, k, grid, config)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, **F32)
    tiled = [x[:, grid.tile_order] for x in (q, k)]
    np.testing.assert_allclose(scores(*tiled, order="tiled"), got, rtol=1e-6)


@pytest.mark.parametrize(
    ("tile", "part"),
    [
        ((8, 16), (4, 4)),
        ((4, 8), (2, 2)),
        ((8, 8), (2, 4)),
        ((16, 8), (4, 4)),
        ((5, 7), (3, 2)),
        ((3, 17), (2, 3)),
        ((2, 2), (1, 1)),
    ],
    ids=str,
)
def test_eighths_are_those_of_halved_sides(tile, part):
    """Worked by hand: 5 x 7 becomes 5 x 4 (2 parts), 3 x 4 (4) and 3 x 2 (8)."""
    grid = VideoGrid(2, 16, 32, tile=tile)
    assert DraftConfig().draft_tile_of(grid) == part
    assert DraftConfig.paper().draft_tile_of(grid) == tile
    assert DraftConfig(draft_tile=(3, 1)).draft_tile_of(grid) == (3, 1)


def test_eighths_are_drafts_of_the_parts_that_they_come_to():
    config = CONFIGS["sub-tiles and spread"]
    eighths = dataclasses.replace(config, draft_tile="eighths")
    single = dataclasses.replace(config, draft_tile=(1, 1))  # 2 x 4 tokens of a tile
    q, k = random_qk(EDGES)
    got, want = (draft_scores(q, k, grid=EDGES, config=c) for c in (eighths, single))
    np.testing.assert_array_equal(got, want)
    halves = draft_scores(q, k, grid=EDGES, config=config)
    assert not np.allclose(got, halves, rtol=1e-3)


@pytest.mark.nightly
def test_max_pooling_of_sub_tiles():
    """The mean of two maps, the second one of the largest values of sub-tiles."""
    config = DraftConfig.paper(draft_tile=(1, 2), pooling="mean+max")
    q, k = random_qk(EDGES)
    cells = naive_draft.cell_members(EDGES, (1, 2))
    largest = [
        np.stack(
            [
                x[:, EDGES.visual_tokens][:, cell].max(1, initial=-np.inf)
                if cell
                else np.zeros_like(x[:, 0])
                for cell in cells
            ],
            axis=1,
        )
        for x in (q, k)
    ]
    got = draft_scores(q, k, grid=EDGES, config=config)
    mean = DraftConfig.paper(draft_tile=(1, 2))
    of_mean = draft_scores(q, k, grid=EDGES, config=mean)
    q_max, k_max = (jnp.asarray(x) for x in largest)
    pooled = PooledTokens(q_mean=q_max, k_mean=k_max)
    of_max = draft_scores(q, k, grid=EDGES, config=mean, pooled=pooled)
    np.testing.assert_allclose(got, (of_mean + of_max) / 2, rtol=1e-6, atol=1e-8)


@pytest.mark.nightly
@pytest.mark.parametrize("selection", ["percentile", "row_topk", "top_p"])
@pytest.mark.parametrize("max_bytes", [1, 4 * 12 * 24 * 24])
def test_masks_are_of_the_scores_in_any_chunks(selection, max_bytes, monkeypatch):
    config = DraftConfig.paper(
        selection=selection,
        draft_tile=(1, 2),
        ranking="spread",
        compensation=TWO_FRAMES,
        sparsity=0.6,
    )
    q, k = random_qk(EDGES)
    select = functools.partial(select_blocks, grid=EDGES, config=config)
    want = select(draft_scores(q, k, grid=EDGES, config=config))
    monkeypatch.setattr(head_chunks, "MAX_CHUNK_BYTES", max_bytes)
    got = compute_mask(q, k, grid=EDGES, config=config)
    np.testing.assert_array_equal(got.to_dense(), want.to_dense())
    chunked = select(draft_scores(q, k, grid=EDGES, config=config))
    np.testing.assert_array_equal(chunked.to_dense(), want.to_dense())


@pytest.mark.nightly
def test_the_map_of_sub_tiles_never_exists_as_a_whole(monkeypatch):
    grid = VideoGrid(4, 32, 64, tile=(8, 16))
    config = DraftConfig.paper(draft_tile=(2, 2))
    monkeypatch.setattr(head_chunks, "MAX_CHUNK_BYTES", 2**20)
    q = jax.ShapeDtypeStruct((1, grid.num_tokens, 2, 8), jnp.float32)
    mask = jax.jit(functools.partial(compute_mask, grid=grid, config=config))
    memory = mask.lower(q, q).compile().memory_analysis()
    one_map = (grid.num_tokens // 4) ** 2 * 4
    assert memory.temp_size_in_bytes < 2 * one_map  # of the two heads' two maps


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.nightly
def test_pooled_with_preparation_is_pooled_here(side):
    """A mask from what norm and rotation pooled is that of their results."""
    grid = VideoGrid(2, 5, 7, tile=(2, 4), text_length=5, text_side=side)
    config = CONFIGS["sub-tiles and spread"]
    q, k, pooled = norm_rope_pool(*random_qk(grid), grid=grid, config=config)
    assert pooled.q_mean.shape == (2, 2 * 6 * 4, 2, 8)
    mask = functools.partial(compute_mask, q, k, grid=grid, config=config)
    np.testing.assert_array_equal(
        mask(pooled=pooled).to_dense(), mask(pooled=None).to_dense()
    )
    assert (
        norm_rope_pool(*random_qk(grid), grid=grid, config=config, pool_anyway=False)[2]
        is None
    )


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"draft_tile": (0, 2)}, r"draft_tile=\(0, 2\) must be a tuple of two"),
        ({"draft_tile": (2,)}, "rows, columns"),
        ({"draft_tile": "halves"}, "draft_tile='halves' must be 'eighths', None, or"),
        ({"ranking": "spread"}, r"needs compensation.*compensation=Compensation\(\)"),
        ({"ranking": "best"}, r"ranking='best' must be one of .*'spread'"),
        ({"compensation": (2, 8)}, "must be a Compensation or None"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("without_jaxtyping")
def test_configs_are_checked(fields, text):
    with pytest.raises(ValueError, match=text):
        DraftConfig.paper(**fields)


@pytest.mark.parametrize("fields", [{"sub_tile": (2, 0)}, {"frames": 0}], ids=str)
def test_compensation_is_checked(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"{name}=.* must be"):
        Compensation(**fields)
