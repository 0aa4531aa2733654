"""Tiles cut off by the frame's edge: how they are pooled and how much they count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import DraftConfig, VideoGrid, compute_mask, draft_scores, pool_tokens
from tests.draft_jax import naive_draft

EDGES = VideoGrid(2, 45, 80)  # 5 x 5 tiles and 5 of 5 rows in each frame: S = 60
EVEN = VideoGrid(1, 16, 48)
F32 = {"rtol": 1e-5, "atol": 1e-7}  # measured: 1.0e-6 relative


def tokens_of_tiles(grid, heads=8, dim=8):
    """q and k whose tiles differ, so that the draft has something to choose from."""
    rng = np.random.default_rng(0)
    members = naive_draft.tile_members(grid.frames, grid.height, grid.width, grid.tile)
    q, k = rng.normal(size=(2, 1, grid.num_tokens, heads, dim))
    for tile in members:
        q[:, tile] += rng.normal(size=(1, 1, heads, dim))
        k[:, tile] += rng.normal(size=(1, 1, heads, dim))
    return q.astype(np.float32), k.astype(np.float32)


def test_an_edge_tile_is_the_mean_of_its_own_tokens():
    """Worked by hand: `avg_pool2d(x, 2, ceil_mode=True)` of PyTorch, without padding.

    PyTorch divides by the window's size inside the padded input, here the input
    itself: the last row averages 6, 7 and 8 alone.
    """
    x = jnp.arange(9.0).reshape(1, 9, 1, 1)
    pooled = pool_tokens(x, VideoGrid(1, 3, 3, tile=(2, 2)))
    np.testing.assert_array_equal(pooled.ravel(), [2.0, 3.5, 6.5, 8.0])


@pytest.mark.parametrize("edge_tiles", ["by_tokens", "as_published"])
@pytest.mark.parametrize("grid", [EDGES, EVEN], ids=["edges", "even"])
def test_scores_match_a_loop(grid, edge_tiles):
    q, k = tokens_of_tiles(grid, heads=2)
    config = DraftConfig.paper(edge_tiles=edge_tiles)
    got = draft_scores(jnp.asarray(q), jnp.asarray(k), grid=grid, config=config)
    by_tokens = edge_tiles == "by_tokens"
    want = naive_draft.draft_map(q, k, grid, weights_by_tokens=by_tokens)
    np.testing.assert_allclose(got, want, **F32)


def test_two_tiles_by_hand():
    """Keys of 4 and of 2 tokens, all logits 0: two thirds and one third, or halves."""
    grid = VideoGrid(1, 2, 3, tile=(2, 2))
    x = jnp.zeros((1, 6, 1, 4))
    for edge_tiles, row in (("by_tokens", [2 / 3, 1 / 3]), ("as_published", [0.5] * 2)):
        config = DraftConfig.paper(edge_tiles=edge_tiles)
        got = draft_scores(x, x, grid=grid, config=config)
        np.testing.assert_allclose(got[0, 0], [row, row], rtol=1e-6)


def test_how_many_kept_pairs_differ():
    """At sparsity 0.75 on 2 x 45 x 80, for these tokens; counted by loops too."""
    q, k = tokens_of_tiles(EDGES)
    masks, expected = [], []
    for edge_tiles in ("by_tokens", "as_published"):
        config = DraftConfig.paper(sparsity=0.75, edge_tiles=edge_tiles)
        mask = jax.jit(lambda q, k, c=config: compute_mask(q, k, grid=EDGES, config=c))(
            q, k
        )
        masks.append(np.asarray(mask.to_dense()))
        maps = naive_draft.draft_map(
            q, k, EDGES, weights_by_tokens=edge_tiles == "by_tokens"
        )
        expected.append([naive_draft.select_percentile(m, 900) for m in maps[0]])
    np.testing.assert_array_equal(np.concatenate(masks), expected)
    assert [int(mask.sum()) for mask in masks] == [7200, 7200]
    num_differing = int((masks[0] & ~masks[1]).sum())
    assert num_differing == 599
    # Tiles of 5 rows lose by their number of tokens, and others take their place.
    is_edge = EDGES.block_lengths < EDGES.block_size
    assert masks[0][..., is_edge].sum() < masks[1][..., is_edge].sum()


@pytest.mark.parametrize("selection", ["percentile", "row_topk", "top_p"])
def test_without_edges_both_are_one(selection):
    q, k = map(jnp.asarray, tokens_of_tiles(EVEN))
    masks = [
        compute_mask(
            q,
            k,
            grid=EVEN,
            config=DraftConfig.paper(selection=selection, edge_tiles=name),
        )
        for name in ("by_tokens", "as_published")
    ]
    np.testing.assert_array_equal(*(mask.to_dense() for mask in masks))
