"""Patterns of published methods against loops over pairs of blocks."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.quality import patterns
from benchmarks.quality.patterns import (
    even_sliding_tiles,
    head_bands,
    radial,
    radial_bands,
    sampled_errors,
    sliding_tiles,
    sliding_windows,
    spatial_temporal_heads,
)
from benchmarks.quality.rankings import (
    MassPerRow,
    chance,
    masses_of_tiles,
    true_masses,
)
from draft_jax import (
    DraftConfig,
    VideoGrid,
    compute_mask,
    draft_scores,
    kept_pairs_budget,
)

GRID = VideoGrid(5, 6, 9, tile=(2, 3), text_length=4)  # 5 x 3 x 3 tiles
TILES = list(itertools.product(range(5), range(3), range(3)))
SIZE = len(TILES)
SPARSITIES = (0.3, 0.6, 0.9)


def qkv(grid=GRID, heads=2):
    shape = (3, 1, grid.num_tokens, heads, 8)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def visual_mask(maker, sparsity, selection="percentile", v=None, budget=None):
    q, k, values = qkv()
    config = DraftConfig.paper(selection=selection, sparsity=sparsity, mask_maker=maker)
    mask = compute_mask(q, k, grid=GRID, config=config, v=values, budget=budget)
    dense = np.asarray(mask.to_dense())
    assert dense[..., GRID.text_blocks].all()
    return dense[..., GRID.visual_blocks, GRID.visual_blocks]


def window_pairs(window):
    """Pairs of a sliding window, moved inwards at the border, one by one."""
    kept = np.zeros((SIZE, SIZE), np.bool_)
    sizes = (5, 3, 3)
    for (i, query), (j, key) in itertools.product(enumerate(TILES), enumerate(TILES)):
        inside = []
        for q, k, size, side in zip(query, key, sizes, window, strict=True):
            start = min(max(q - side // 2, 0), size - side)
            inside.append(start <= k < start + side)
        kept[i, j] = all(inside)
    return kept


def test_sliding_windows_are_those_of_a_loop():
    windows = sliding_windows(GRID)
    sizes = itertools.product((1, 3, 5), (1, 3), (1, 3))
    assert sorted(map(tuple, windows.sides.tolist())) == sorted(sizes)
    for sides, count in zip(windows.sides, windows.counts, strict=True):
        kept = windows.kept(sides)
        np.testing.assert_array_equal(kept, window_pairs(sides.tolist()))
        assert kept.sum() == count == SIZE * sides.prod()
    assert (np.diff(windows.counts) >= 0).all()


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_budget_takes_the_largest_window_within(sparsity):
    kept = visual_mask(even_sliding_tiles, sparsity)
    budget = kept_pairs_budget(sparsity, SIZE)
    counts = sliding_windows(GRID).counts
    assert (kept.sum((-1, -2)) == counts[counts <= budget].max()).all()


def test_candidates_are_windows_that_no_other_one_holds():
    """Of 45 pairs in a row 10 hold 9: these, and the 5 frames of one tile."""
    windows = sliding_windows(GRID)
    maps, is_known = windows.candidates(10 * SIZE)
    found = np.asarray(maps)[np.asarray(is_known)]
    expected = [window_pairs(sides) for sides in ((1, 3, 3), (3, 1, 3), (3, 3, 1))]
    expected.append(window_pairs((5, 1, 1)))
    assert len(found) == len(expected)
    for kept in expected:
        assert any((kept == one).all() for one in found)
    least, is_known = windows.candidates(1)
    assert np.asarray(is_known).tolist()[:2] == [True, False]
    np.testing.assert_array_equal(least[0], np.eye(SIZE, dtype=bool))


def test_each_head_takes_its_own_window():
    """Heads that tell frames, or places, want windows along the others."""
    q, k, v = frames_and_places()
    grid = VideoGrid(5, 6, 9, tile=(2, 3))
    config = DraftConfig.paper(sparsity=0.75, mask_maker=sliding_tiles)
    mask = compute_mask(q, k, grid=grid, config=config, order="tiled", v=v)
    in_frames, in_places = np.asarray(mask.to_dense())[0]
    np.testing.assert_array_equal(in_frames, window_pairs((1, 3, 3)))
    np.testing.assert_array_equal(in_places, window_pairs((5, 1, 1)))


def frames_and_places():
    """A head whose tokens attend to their frame, and one to their place."""
    frames = np.repeat(np.arange(5), 54)
    places = np.tile(np.repeat(np.arange(9), 6), 5)  # tiled order
    one_hot = np.stack([np.eye(9)[frames], np.eye(9)[places]], 1)[None]
    q = k = jnp.asarray(12 * one_hot, jnp.float32)
    v = jnp.asarray(np.random.default_rng(0).normal(size=q.shape), jnp.float32)
    return q, k, v


def radial_pairs(factor, with_sink):
    """Bands of the paper's rule, pair by pair, in tiles of a frame."""
    kept = np.zeros((SIZE, SIZE), np.bool_)
    for (i, query), (j, key) in itertools.product(enumerate(TILES), enumerate(TILES)):
        apart = abs(query[0] - key[0])
        beside = abs(3 * query[1] + query[2] - 3 * key[1] - key[2])
        width = factor * 9 / 2 ** math.floor(math.log2(max(apart, 1)))
        if width >= 1:
            kept[i, j] = beside < width
        else:
            kept[i, j] = beside == 0 and apart % math.ceil(1 / width) == 0
        kept[i, j] |= with_sink and key[0] == 0
    return kept


def test_radial_bands_are_those_of_a_loop():
    bands = radial_bands(GRID)
    for with_sink, own in ((True, bands.with_sink), (False, bands.without)):
        for place in range(0, len(own.counts), 5):
            (factor,) = own.settings[place]
            expected = radial_pairs(float(factor), with_sink)
            assert own.counts[place] == expected.sum()
            np.testing.assert_array_equal(own.keeps(np, own.settings[place]), expected)
    assert bands.without.counts[0] == SIZE  # its own tile only: any budget has room
    assert bands.without.counts[-1] == SIZE**2


def test_first_frame_is_kept_where_it_is_at_most_half():
    """It is a fifth of all pairs: two fifths have room for it, 0.39 have none."""
    wide, narrow = visual_mask(radial, 0.6), visual_mask(radial, 0.61)
    assert wide[..., :9].all()
    assert not narrow[..., 9:, :9].all()
    for kept, sparsity in ((wide, 0.6), (narrow, 0.61)):
        assert (kept.sum((-1, -2)) <= kept_pairs_budget(sparsity, SIZE)).all()


def band_pairs(width, temporal, with_sink):
    kept = np.zeros((SIZE, SIZE), np.bool_)
    for (i, query), (j, key) in itertools.product(enumerate(TILES), enumerate(TILES)):
        if temporal:
            place = [5 * (3 * row + column) + f for f, row, column in (query, key)]
        else:
            place = [9 * f + 3 * row + column for f, row, column in (query, key)]
        kept[i, j] = abs(place[0] - place[1]) < width or (with_sink and key[0] == 0)
    return kept


def test_bands_of_heads_are_those_of_a_loop():
    for temporal, both in zip((False, True), head_bands(GRID), strict=True):
        for with_sink, own in ((True, both.with_sink), (False, both.without)):
            for place in range(0, len(own.counts), 7):
                expected = band_pairs(own.settings[place][0], temporal, with_sink)
                np.testing.assert_array_equal(
                    own.keeps(np, own.settings[place]), expected
                )
                assert own.counts[place] == expected.sum()


def naive_errors(q, k, v, maps, rows, block_of):
    """Mean squared error of some rows of attention, a row and head at a time."""
    q, k, v = (np.asarray(x[0], np.float64) for x in (q, k, v))
    errors = np.zeros((len(maps), q.shape[1]))
    for (m, kept), head in itertools.product(enumerate(maps), range(q.shape[1])):
        for row in rows:
            logits = k[:, head] @ q[row, head] / math.sqrt(q.shape[-1])
            weights = np.exp(logits)
            full = weights @ v[:, head] / weights.sum()
            seen = [b >= SIZE or kept[block_of[row], b] for b in block_of]
            weights = weights * np.array(seen)
            sparse = weights @ v[:, head] / weights.sum()
            errors[m, head] += ((sparse - full) ** 2).mean() / len(rows)
    return errors


@pytest.mark.parametrize("order", ["tiled", "raster"])
def test_sampled_errors_are_those_of_a_loop(order, monkeypatch):
    monkeypatch.setattr(patterns, "SAMPLED_QUERIES", 6)
    q, k, v = qkv()
    maps = np.stack([band_pairs(4, False, False), band_pairs(4, True, False)])
    got = sampled_errors(q, k, v, jnp.asarray(maps), grid=GRID, scale=None, order=order)
    rows = np.random.default_rng(0).choice(GRID.num_visual_tokens, 6, replace=False)
    block_of = [block for block, n in enumerate(GRID.block_lengths) for _ in range(n)]
    if order == "raster":
        block_of = [block_of[place] for place in GRID.raster_order]
    expected = naive_errors(q, k, v, maps, rows, block_of)
    np.testing.assert_allclose(got[:, 0], expected, rtol=1e-4)


def test_each_head_takes_its_own_pattern():
    """A head that tells frames apart is spatial, one that tells places temporal."""
    q, k, v = frames_and_places()
    grid = VideoGrid(5, 6, 9, tile=(2, 3))
    config = DraftConfig.paper(sparsity=0.4, mask_maker=spatial_temporal_heads)
    mask = compute_mask(q, k, grid=grid, config=config, order="tiled", v=v)
    spatial, temporal = np.asarray(mask.to_dense())[0]
    for frame in range(1, 5):
        own = slice(9 * frame, 9 * frame + 9)
        assert spatial[own, own].all()
        assert not temporal[own, own].all()
    same_place = np.arange(45) % 9 == 4
    pairs = np.ix_(same_place, same_place)
    assert temporal[pairs].all()
    assert not spatial[pairs].all()


def test_values_are_asked_for():
    q, k, _ = qkv()
    config = DraftConfig.paper(mask_maker=spatial_temporal_heads)
    with pytest.raises(ValueError, match="pass the values"):
        compute_mask(q, k, grid=GRID, config=config)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "maker",
    [sliding_tiles, even_sliding_tiles, radial, spatial_temporal_heads],
    ids=lambda maker: maker.__name__,
)
def test_a_budget_that_is_traced_gives_the_same_mask(maker):
    q, k, v = qkv()
    config = DraftConfig.paper(sparsity=0.3, mask_maker=maker)
    traced = jax.jit(
        lambda budget: compute_mask(
            q, k, grid=GRID, config=config, v=v, budget=budget
        ).to_dense()
    )
    for budget in (100, 500):
        mask = compute_mask(q, k, grid=GRID, config=config, v=v, budget=budget)
        np.testing.assert_array_equal(traced(jnp.int32(budget)), mask.to_dense())


@pytest.mark.parametrize("order", ["tiled", "raster"])
def test_true_masses_keep_the_heaviest_blocks_of_each_row(order):
    q, k, _ = qkv()
    config = DraftConfig.paper(
        selection="row_topk", sparsity=0.8, mask_maker=true_masses
    )
    mask = compute_mask(q, k, grid=GRID, config=config, order=order)
    kept = np.asarray(mask.to_dense())[0]
    if order == "raster":
        q, k = (x[:, GRID.tile_order] for x in (q, k))
    starts = np.cumsum([0, *GRID.block_lengths])
    for head in range(2):
        logits = np.asarray(q[0, :, head] @ k[0, :, head].T, np.float64) / math.sqrt(8)
        weights = np.exp(logits)
        weights /= weights.sum(1, keepdims=True)
        for row in range(SIZE):
            rows = weights[starts[row] : starts[row + 1]]
            masses = [rows[:, starts[c] : starts[c + 1]].sum() for c in range(SIZE)]
            best = np.argsort(masses)[-9:]  # 20 % of 45
            assert set(np.flatnonzero(kept[head, row, :SIZE])) == set(best.tolist())


def test_chance_has_equal_rows_that_follow_from_the_queries():
    first = visual_mask(chance, 0.8, "row_topk")
    np.testing.assert_array_equal(first, visual_mask(chance, 0.8, "row_topk"))
    assert (first.sum(-1) == 9).all()
    assert not np.array_equal(first[0, 0], first[0, 1])
    q, k, _ = qkv()
    config = DraftConfig.paper(selection="row_topk", sparsity=0.8, mask_maker=chance)
    other = compute_mask(2 * q, k, grid=GRID, config=config).to_dense()
    assert not np.array_equal(first, other[..., GRID.visual_blocks, GRID.visual_blocks])


@pytest.mark.parametrize(
    "grid",
    [VideoGrid(3, 8, 8, tile=(4, 8)), GRID],
    ids=["by the kernel's rule", "text"],
)
def test_masses_of_tiles_are_those_of_full_attention(grid):
    """In tiled order; the kernel's sums are of 16 tokens each."""
    q, k, _ = qkv(grid)
    starts = np.cumsum([0, *grid.block_lengths])
    size = grid.num_visual_blocks
    logits = np.einsum("bqnd,bknd->bnqk", q, k).astype(np.float64) / math.sqrt(8)
    weights = np.exp(logits)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.add.reduceat(np.add.reduceat(weights, starts[:-1], 2), starts[:-1], 3)
    got = masses_of_tiles(q, k, grid)
    np.testing.assert_allclose(got, expected[..., :size, :size], rtol=2e-5)


def test_mass_per_row_keeps_the_fewest_blocks_that_reach_it():
    q, k, _ = qkv()
    densities, masses = (0.2, 0.6), (0.3, 0.9)
    maker = MassPerRow(densities=densities, masses=masses)
    config = DraftConfig.paper(selection="row_topk", sparsity=0.0, mask_maker=maker)
    scores = np.asarray(draft_scores(q, k, grid=GRID, config=DraftConfig.paper()))
    for density, mass in zip(densities, masses, strict=True):
        budget = math.ceil(density * SIZE)
        mask = compute_mask(q, k, grid=GRID, config=config, budget=budget)
        kept = np.asarray(mask.to_dense())[..., GRID.visual_blocks, GRID.visual_blocks]
        for row, chosen in zip(
            scores.reshape(-1, SIZE), kept.reshape(-1, SIZE), strict=True
        ):
            falling = np.argsort(-row)
            count = int(np.searchsorted(np.cumsum(row[falling]), mass)) + 1
            assert set(np.flatnonzero(chosen)) == set(falling[:count].tolist())
