"""Selection by the kernels on a Hopper GPU, in all modes, exactly as by sorting.

python -m pytest tests/gpu/test_selection_gpu.py --require-gpu
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import DraftConfig, PooledTokens, VideoGrid, compute_mask, select_blocks
from draft_jax.config import static_budget
from draft_jax.draft import head_chunks
from pallas_kernels import SlowBackendWarning
from pallas_kernels.common.device import current_device
from pallas_kernels.ranking.sm90 import backend
from pallas_kernels.ranking.sm90.maps import MAX_COLUMNS
from pallas_kernels.ranking.sm90.rows import WARP_COLUMNS
from tests.draft_jax import naive_draft
from tests.draft_jax.draft import sorted_selection
from tests.pallas_kernels.ranking import row_selection
from tests.pallas_kernels.ranking.row_selection import check_mask, check_rows, softmax
from tests.warnings_once import forget_warnings

pytestmark = pytest.mark.gpu

GRIDS = {
    "hunyuan": VideoGrid(33, 48, 80),  # S = 990
    "text-before": VideoGrid(7, 45, 80, text_length=200, text_side="before"),
    "edges-text-after": VideoGrid(3, 41, 77, text_length=77),  # S = 90
    "warpgroups": VideoGrid(11, 90, 160),  # S = 1,320
}
SELECTIONS = ("percentile", "row_topk", "top_p")
MAPS = (
    "softmax",
    "equal",
    "denormals",
    "minus_infinity",
    "few_values",
    "huge",
    "any_bits",
)
FORCED = {"keep_own_tile": True, "keep_first_frame": True}


@pytest.fixture(autouse=True)
def hopper():
    device = current_device()
    if cause := device.why_not_hopper():
        pytest.skip(cause)
    assert backend.why_unsupported(990, device) is None


def expected_map(scores, grid, config, budget):
    size = grid.num_visual_blocks
    forced = np.eye(size, dtype=bool) & config.keep_own_tile
    forced[:, : size // grid.frames] |= config.keep_first_frame
    reference = getattr(sorted_selection, config.selection)
    mass = (config.top_p,) if config.selection == "top_p" else ()
    return naive_draft.add_text(reference(scores, forced, budget, *mass), grid)


def maps_of_all_kinds(heads, size, rng):
    """An item of each kind, so that one program does for all: [kinds, heads, *size]."""
    return np.stack([getattr(row_selection, k)(rng, (heads, *size)) for k in MAPS])


@functools.cache
def selection_program(grid, config):
    return jax.jit(functools.partial(select_blocks, grid=grid, config=config))


@pytest.mark.parametrize("wanted", [None, round(0.7 * 2**30)], ids=["count", "mass"])
@pytest.mark.parametrize("forced_share", [0, 0.02], ids=["free", "forced"])
@pytest.mark.parametrize(
    "columns", [1, 31, 32, 33, 127, 129, 1023, 1024, 1025, 4100, 8191, 8192]
)
def test_rows_of_all_lengths(columns, forced_share, wanted):
    """7 rows a map, which is no multiple of the four of a warpgroup."""
    rng = np.random.default_rng(columns)
    scores = maps_of_all_kinds(1, (7, columns), rng)[:, 0]
    forced = rng.random((7, columns)) < forced_share
    budget = rng.integers(1, columns + 1, 7).astype(np.int32)
    least = np.maximum(forced.sum(-1), 1).astype(np.int32)
    most = np.maximum(budget, least)
    if wanted is None:
        want = sorted_selection.row_topk(scores, forced, most)
        check_rows(scores, most, most, forced, want, None)
    else:
        want = sorted_selection.top_p(scores, forced, most, 0.7)
        check_rows(scores, least, most, forced, want, wanted)


@pytest.mark.parametrize("forced", [{}, FORCED], ids=["free", "forced"])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("name", GRIDS)
def test_masks_agree_with_a_sort(name, selection, forced):
    """A batch of maps of all kinds, and a traced budget below the most."""
    grid = GRIDS[name]
    config = DraftConfig.paper(sparsity=0.9, selection=selection, **forced)
    size = grid.num_visual_blocks
    rng = np.random.default_rng(size)
    heads = 1 if size > 500 else 2
    scores = maps_of_all_kinds(heads, (size, size), rng)
    budget = max(1, static_budget(0.9, grid, config) // 2)
    select = selection_program(grid, config)
    mask = select(jnp.asarray(scores), budget=jnp.asarray(budget))
    check_mask(mask, expected_map(scores, grid, config, budget))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_thousand_maps(selection):
    """1,000 of each kind in one program; every fifth has a new budget."""
    grid = GRIDS["edges-text-after"]
    config = DraftConfig.paper(sparsity=0.8, selection=selection, keep_own_tile=True)
    select = selection_program(grid, config)
    most = static_budget(0.8, grid, config)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        scores = maps_of_all_kinds(200, (90, 90), rng)
        budget = int(rng.integers(1, most + 1))
        mask = select(jnp.asarray(scores), budget=jnp.asarray(budget))
        check_mask(mask, expected_map(scores, grid, config, budget))
    assert select._cache_size() == 1


@pytest.mark.parametrize("selection", SELECTIONS)
def test_mapped_axes(selection):
    grid = GRIDS["edges-text-after"]
    config = DraftConfig.paper(sparsity=0.8, selection=selection, **FORCED)
    scores = softmax(np.random.default_rng(0), (3, 2, 2, 90, 90))
    budgets = static_budget(0.8, grid, config) - np.arange(3, dtype=np.int32)
    select = functools.partial(select_blocks, grid=grid, config=config)
    mask = jax.jit(jax.vmap(lambda x, n: select(x, budget=n)))(
        jnp.asarray(scores), jnp.asarray(budgets)
    )
    for i in range(3):
        item = dataclasses.replace(
            mask, row_offsets=mask.row_offsets[i], block_ids=mask.block_ids[i]
        )
        check_mask(item, expected_map(scores[i], grid, config, budgets[i]))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_longest_rows(selection):
    """S = 8,192, one head, text beside it: some rows against a sort of each."""
    grid = VideoGrid(8, 64, 128, tile=(1, 8), text_length=24)
    config = DraftConfig.paper(sparsity=0.9, selection=selection)
    size = grid.num_visual_blocks
    assert size == MAX_COLUMNS
    scores = softmax(np.random.default_rng(0), (1, 1, size, size))
    select = jax.jit(functools.partial(select_blocks, grid=grid, config=config))
    mask = select(jnp.asarray(scores))
    chosen = np.random.default_rng(1).integers(0, size, 100)
    free = np.zeros((100, size), bool)
    budget = static_budget(0.9, grid, config)
    if selection == "percentile":
        flat = scores.ravel()
        kth = np.partition(flat, -budget)[-budget]
        kept = flat > kth
        kept[np.flatnonzero(flat == kth)[: budget - kept.sum()]] = True
        want = kept.reshape(size, size)[chosen]
    else:
        mass = (config.top_p,) if selection == "top_p" else ()
        reference = getattr(sorted_selection, selection)
        want = reference(scores[0, 0, chosen], free, budget, *mass)
    offsets, ids = np.asarray(mask.row_offsets)[0, 0], np.asarray(mask.block_ids)[0, 0]
    for row, kept in zip(chosen, want, strict=True):
        visual = ids[offsets[row] : offsets[row + 1]]
        text = np.arange(grid.text_blocks.start, grid.text_blocks.stop)
        np.testing.assert_array_equal(visual, [*np.flatnonzero(kept), *text])


@pytest.mark.parametrize("selection", SELECTIONS)
def test_heads_in_chunks(monkeypatch, selection):
    """Pooled values are whole numbers, so that logits are exact in any order of sums.

    A product of fewer heads may add in another order; with other values logits would
    round otherwise, and pairs at the threshold change places.
    """
    grid = GRIDS["edges-text-after"]
    config = DraftConfig.paper(sparsity=0.8, selection=selection)
    rng = np.random.default_rng(0)
    shape = (2, grid.num_visual_blocks, 6, 64)
    pooled = PooledTokens(
        **{
            name: jnp.asarray(rng.integers(-64, 65, shape), jnp.float32)
            for name in ("q_mean", "k_mean")
        }
    )
    q = jnp.zeros((2, grid.num_tokens, 6, 64), jnp.bfloat16)

    def mask_of(pooled):
        return compute_mask(
            q, q, grid=grid, config=config, scale=2.0**-13, pooled=pooled
        )

    whole = jax.jit(mask_of)(pooled)
    monkeypatch.setattr(head_chunks, "MAX_CHUNK_BYTES", 4 * 4 * 90 * 90)
    cut = jax.jit(lambda pooled: mask_of(pooled))(pooled)
    jax.tree.map(np.testing.assert_array_equal, whole, cut)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_heads_in_chunks_of_the_same_scores(monkeypatch, selection):
    grid = GRIDS["edges-text-after"]
    config = DraftConfig.paper(sparsity=0.8, selection=selection)
    monkeypatch.setattr(head_chunks, "MAX_CHUNK_BYTES", 4 * 4 * 90 * 90)
    scores = softmax(np.random.default_rng(0), (2, 6, 90, 90))
    budget = static_budget(0.8, grid, config)
    mask = jax.jit(lambda x: select_blocks(x, grid=grid, config=config))(scores)
    check_mask(mask, expected_map(scores, grid, config, budget))


def test_rows_beyond_the_kernels_warn():
    grid = VideoGrid(1, 1, MAX_COLUMNS + 1, tile=(1, 1))
    config = DraftConfig.paper(sparsity=0.999, selection="row_topk")
    size = grid.num_visual_blocks
    shape = jax.ShapeDtypeStruct((1, 1, size, size), jnp.float32)
    forget_warnings()
    with pytest.warns(SlowBackendWarning, match="XLA .* at most 8192 keys, not 8193"):
        selection_program(grid, config).lower(shape)


def test_both_kinds_of_teams_are_tested():
    assert GRIDS["hunyuan"].num_visual_blocks <= WARP_COLUMNS
    assert GRIDS["warpgroups"].num_visual_blocks > WARP_COLUMNS
