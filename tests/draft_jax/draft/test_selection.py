import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax.config import (
    DraftConfig,
    kept_pairs_budget,
    mask_capacity,
    static_budget,
)
from draft_jax.draft.selection import select_blocks as select_blocks_eagerly
from draft_jax.grid import VideoGrid
from tests.draft_jax import naive_draft

# One program per case: eager calls would compile every operation for itself.
select_blocks = jax.jit(select_blocks_eagerly, static_argnames=("grid", "config"))

GRIDS = [
    VideoGrid(3, 5, 7, tile=(2, 4)),  # S = 18, 6 per frame
    VideoGrid(2, 4, 8, tile=(2, 4), text_length=19),  # S = 8, 3 text blocks
    VideoGrid(1, 6, 12, tile=(2, 4), text_length=8, text_side="before"),  # S = 9
]
FORCED = [
    {},
    {"keep_own_tile": True},
    {"keep_first_frame": True},
    {"keep_own_tile": True, "keep_first_frame": True},
]


# All that is forced on one grid, all grids with everything forced.
grids_and_forced = pytest.mark.parametrize(
    ("grid", "forced"),
    [(GRIDS[0], forced) for forced in FORCED]
    + [(grid, FORCED[-1]) for grid in GRIDS[1:]],
    ids=str,
)


def softmax_scores(grid, seed=0, sharpness=2.0, batch=2, heads=2):
    rng = np.random.default_rng(seed)
    size = grid.num_visual_blocks
    logits = rng.normal(size=(batch, heads, size, size)) * sharpness
    scores = np.exp(logits)
    return (scores / scores.sum(-1, keepdims=True)).astype(np.float32)


def forced_map(grid, keep_own_tile=False, keep_first_frame=False):
    size = grid.num_visual_blocks
    forced = np.eye(size, dtype=bool) & keep_own_tile
    forced[:, : size // grid.frames] |= keep_first_frame
    return forced


def kept_visual(mask):
    visual = mask.grid.visual_blocks
    return np.asarray(mask.to_dense())[:, :, visual, visual]


@pytest.mark.parametrize(
    ("sparsity", "size", "expected"),
    [
        (0.75, 252, 15_876),
        (0.9, 990, 98_010),  # the published code keeps 98,011
        (0.75, 630, 99_225),
        (0.7, 10, 30),  # (1 - 0.7) * 100 is 30.000000000000004
        (0.9, 10, 10),  # (1 - 0.9) * 100 is 9.999999999999998
        (0.3, 3, 7),  # 6.3
        (0.0, 5, 25),
        (0.999, 3, 1),
    ],
)
def test_budget_is_exact(sparsity, size, expected):
    assert kept_pairs_budget(sparsity, size) == expected


@grids_and_forced
def test_percentile_matches_a_sorted_list(grid, forced):
    config = DraftConfig.paper(sparsity=0.8, **forced)
    scores = softmax_scores(grid)
    budget = math.ceil(round(0.2 * grid.num_visual_blocks**2, 6))
    mask = select_blocks(jnp.asarray(scores), grid=grid, config=config)
    expected = np.stack(
        [
            [
                naive_draft.select_percentile(s, budget, forced_map(grid, **forced))
                for s in item
            ]
            for item in scores
        ]
    )
    np.testing.assert_array_equal(kept_visual(mask), expected)
    np.testing.assert_array_equal(mask.to_dense(), naive_draft.add_text(expected, grid))
    assert mask.capacity == mask_capacity(grid, config)


@grids_and_forced
def test_row_topk_matches_a_sorted_list(grid, forced):
    config = DraftConfig.paper(selection="row_topk", sparsity=0.8, **forced)
    scores = softmax_scores(grid)
    budget = math.ceil(round(0.2 * grid.num_visual_blocks, 6))
    mask = select_blocks(jnp.asarray(scores), grid=grid, config=config)
    expected = [
        [
            naive_draft.select_row_topk(s, budget, forced_map(grid, **forced))
            for s in item
        ]
        for item in scores
    ]
    np.testing.assert_array_equal(kept_visual(mask), expected)
    if not forced:
        assert (kept_visual(mask).sum(-1) == budget).all()


@pytest.mark.parametrize("sharpness", [0.5, 4.0])
@pytest.mark.parametrize("forced", FORCED, ids=lambda f: "+".join(f) or "free")
def test_top_p_matches_a_sorted_list(forced, sharpness):
    grid = GRIDS[0]
    config = DraftConfig.paper(selection="top_p", sparsity=0.5, top_p=0.8, **forced)
    scores = softmax_scores(grid, sharpness=sharpness)
    mask = select_blocks(jnp.asarray(scores), grid=grid, config=config)
    expected = [
        [naive_draft.select_top_p(s, 9, 0.8, forced_map(grid, **forced)) for s in item]
        for item in scores
    ]
    np.testing.assert_array_equal(kept_visual(mask), expected)


def test_top_p_is_the_smallest_set_with_a_static_maximum():
    grid = VideoGrid(1, 2, 4, tile=(1, 2))  # S = 4
    rows = [
        [0.5, 0.3, 0.15, 0.05],  # two reach 0.75
        [0.25, 0.25, 0.25, 0.25],  # three reach 0.75, the lower indices
        [0.01, 0.01, 0.97, 0.01],
        [0.0, 0.75, 0.25, 0.0],  # exactly 0.75
    ]
    scores = jnp.asarray([[rows]], jnp.float32)
    config = DraftConfig.paper(selection="top_p", top_p=0.75, sparsity=0.0)
    counts = select_blocks(scores, grid=grid, config=config).counts
    np.testing.assert_array_equal(counts[0, 0], [2, 3, 1, 1])
    config = DraftConfig.paper(selection="top_p", top_p=0.75, sparsity=0.5)
    mask = select_blocks(scores, grid=grid, config=config)
    np.testing.assert_array_equal(mask.counts[0, 0], [2, 2, 1, 1])
    assert mask.capacity == 4 * 2


def test_top_p_of_one_keeps_everything():
    grid = GRIDS[0]
    config = DraftConfig.paper(selection="top_p", top_p=1.0, sparsity=0.0)
    scores = jnp.full((1, 1, 18, 18), 1 / 18)
    assert kept_visual(select_blocks(scores, grid=grid, config=config)).all()


@pytest.mark.parametrize("selection", ["percentile", "row_topk", "top_p"])
def test_ties_go_to_the_lower_flat_index(selection):
    grid = VideoGrid(1, 2, 4, tile=(1, 2))
    config = DraftConfig.paper(selection=selection, sparsity=0.5, top_p=1.0)
    scores = jnp.full((1, 1, 4, 4), 0.25)
    kept = kept_visual(select_blocks(scores, grid=grid, config=config))[0, 0]
    if selection == "percentile":  # rows 2 and 3 would be empty: one pair each
        expected = [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0]]
    else:
        expected = [[1, 1, 0, 0]] * 4
    np.testing.assert_array_equal(kept, np.array(expected, bool))


def test_many_ties_match_a_sorted_list():
    grid = GRIDS[0]
    scores = np.random.default_rng(1).integers(0, 4, (1, 2, 18, 18)) / 4
    scores = scores.astype(np.float32)
    config = DraftConfig.paper(sparsity=0.0)
    for budget in (18 * 18, 200, 81, 17, 1):
        mask = select_blocks(
            jnp.asarray(scores), grid=grid, config=config, budget=jnp.asarray(budget)
        )
        expected = [naive_draft.select_percentile(s, budget) for s in scores[0]]
        np.testing.assert_array_equal(kept_visual(mask)[0], expected)


def test_an_empty_row_keeps_its_best_pair_beyond_the_budget():
    grid = VideoGrid(1, 2, 4, tile=(1, 2))
    scores = np.full((4, 4), 0.1, np.float32)
    scores[0] = 0.9
    scores[2, 3] = 0.2
    config = DraftConfig.paper(sparsity=0.75)
    mask = select_blocks(jnp.asarray(scores[None, None]), grid=grid, config=config)
    expected = [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]
    np.testing.assert_array_equal(kept_visual(mask)[0, 0], np.array(expected, bool))
    # This is the worst case the capacity is made for.
    assert mask.capacity == 7 == int(mask.row_offsets[0, 0, -1])


@pytest.mark.parametrize("selection", ["percentile", "row_topk", "top_p"])
@pytest.mark.parametrize("forced", FORCED, ids=lambda f: "+".join(f) or "free")
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_capacity_holds_the_worst_case(grid, forced, selection):
    """One row has all high scores, so that the most rows are left without a pair."""
    config = DraftConfig.paper(sparsity=0.85, selection=selection, **forced)
    size = grid.num_visual_blocks
    always = forced_map(grid, **forced)
    budget = static_budget(0.85, grid, config)
    scores = np.zeros((size, size))
    scores[-(budget // size + 1) :] = 1 / size
    if selection == "percentile":
        kept = naive_draft.select_percentile(scores, budget, always)
    elif selection == "row_topk":
        kept = naive_draft.select_row_topk(scores, budget, always)
    else:
        kept = naive_draft.select_top_p(scores + 1e-9, budget, 0.9, always)
    num_kept = naive_draft.add_text(kept, grid).sum()
    assert num_kept <= mask_capacity(grid, config)
    if not forced and selection != "top_p":
        assert num_kept == mask_capacity(grid, config)


@pytest.mark.nightly
@pytest.mark.parametrize("selection", ["percentile", "row_topk", "top_p"])
def test_traced_budget_equals_a_sparser_config_without_recompiling(selection):
    grid = GRIDS[0]
    scores = jnp.asarray(softmax_scores(grid, sharpness=0.3))
    config = DraftConfig.paper(selection=selection, sparsity=0.5)
    select = jax.jit(
        lambda scores, budget: select_blocks_eagerly(
            scores, grid=grid, config=config, budget=budget
        )
    )
    for sparsity in (0.5, 0.95):
        budget = static_budget(sparsity, grid, config)
        got = select(scores, jnp.asarray(budget, jnp.int32))
        sparser = DraftConfig.paper(selection=selection, sparsity=sparsity)
        expected = select_blocks(scores, grid=grid, config=sparser)
        np.testing.assert_array_equal(got.to_dense(), expected.to_dense())
    assert select._cache_size() == 1


def test_traced_budget_above_the_static_one_is_cut():
    grid = GRIDS[0]
    scores = jnp.asarray(softmax_scores(grid))
    config = DraftConfig.paper(sparsity=0.5)
    got = select_blocks(scores, grid=grid, config=config, budget=jnp.asarray(10**6))
    expected = select_blocks(scores, grid=grid, config=config)
    np.testing.assert_array_equal(got.to_dense(), expected.to_dense())


def test_nan_scores_rank_last_and_stay_in_their_head():
    grid = GRIDS[0]
    scores = softmax_scores(grid)
    clean = select_blocks(jnp.asarray(scores), grid=grid, config=DraftConfig.paper())
    scores[0, 1, 3] = np.nan
    mask = select_blocks(jnp.asarray(scores), grid=grid, config=DraftConfig.paper())
    got, expected = kept_visual(mask), kept_visual(clean)
    np.testing.assert_array_equal(got[1], expected[1])
    np.testing.assert_array_equal(got[0, 0], expected[0, 0])
    assert got[0, 1].any(-1).all()
    assert got[0, 1, 3].sum() == 1


def test_sparsity_zero_keeps_every_pair():
    for selection in ("percentile", "row_topk"):
        config = DraftConfig.paper(selection=selection, sparsity=0.0)
        scores = jnp.asarray(softmax_scores(GRIDS[1]))
        assert select_blocks(scores, grid=GRIDS[1], config=config).to_dense().all()
