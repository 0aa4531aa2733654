"""Selection agrees exactly with a sort, on 1,000 maps of each kind, in all modes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import DraftConfig, VideoGrid, select_blocks
from draft_jax.config import static_budget
from tests.cases import mostly_nightly
from tests.draft_jax import naive_draft
from tests.draft_jax.draft import sorted_selection

GRID = VideoGrid(2, 12, 40, tile=(4, 8), text_length=40)  # S = 30, a word and less
WIDE = VideoGrid(1, 12, 240, tile=(4, 8), text_length=9, text_side="before")  # S = 90
BATCH, HEADS = 25, 40  # 1,000 maps
SHARPNESS = np.logspace(-3, 2, BATCH * HEADS).reshape(BATCH, HEADS, 1, 1)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def random_maps(shape, rng):
    """Softmax maps from nearly flat ones to nearly one-hot ones."""
    return softmax(rng.normal(size=shape) * SHARPNESS[: shape[0], : shape[1]])


def few_values(shape, rng):
    """Ties everywhere, among them -0 and 0 and both infinities."""
    values = np.array([-np.inf, -1.5, -0.0, 0.0, 0.25, 0.25, 1.0, np.inf], np.float32)
    return values[rng.integers(0, rng.integers(1, 9), shape)]


def huge(shape, rng):
    """Rows whose sums pass any integer: top_p counts each score as 1 at most."""
    return rng.choice([0.4, 0.5, 1.0, 4.0, 3e38, np.inf], shape).astype(np.float32)


def any_bits(shape, rng):
    """Every pattern of bits: NaN of both signs, denormals, the largest numbers."""
    return rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)


def denormals(shape, rng):
    """Numbers that some units take for 0."""
    return rng.integers(0, 40, shape, dtype=np.uint32).view(np.float32)


def neighbours(shape, rng):
    """Numbers that differ in the last bits."""
    near = np.float32(1 / 90).view(np.uint32) + rng.integers(0, 9, shape)
    return near.astype(np.uint32).view(np.float32)


MAPS = [random_maps, few_values, huge, any_bits, denormals, neighbours]
CONFIGS = [
    DraftConfig.paper(sparsity=0.9),
    DraftConfig.paper(sparsity=0.75, keep_own_tile=True, keep_first_frame=True),
    DraftConfig.paper(sparsity=0.9, selection="row_topk"),
    DraftConfig.paper(sparsity=0.6, selection="row_topk", keep_own_tile=True),
    DraftConfig.paper(sparsity=0.5, selection="top_p", top_p=0.8),
    DraftConfig.paper(
        sparsity=0.7, selection="top_p", keep_own_tile=True, keep_first_frame=True
    ),
]


def forced_pairs(grid, config):
    size = grid.num_visual_blocks
    forced = np.eye(size, dtype=bool) & config.keep_own_tile
    forced[:, : size // grid.frames] |= config.keep_first_frame
    return forced


def expected_map(scores, grid, config, budget):
    forced = forced_pairs(grid, config)
    if config.selection == "percentile":
        kept = sorted_selection.percentile(scores, forced, budget)
    elif config.selection == "row_topk":
        kept = sorted_selection.row_topk(scores, forced, budget)
    else:
        kept = sorted_selection.top_p(scores, forced, budget, config.top_p)
    return naive_draft.add_text(kept, grid)


@functools.cache
def selection(grid, config):
    """One program for all maps of a shape: a new budget does not recompile."""
    return jax.jit(functools.partial(select_blocks, grid=grid, config=config))


def check(scores, grid, config, budget):
    select = selection(grid, config)
    mask = select(jnp.asarray(scores), budget=jnp.asarray(budget, jnp.int32))
    expected = expected_map(scores, grid, config, budget)
    offsets, ids = np.asarray(mask.row_offsets), np.asarray(mask.block_ids)
    counts = expected.sum(-1)
    np.testing.assert_array_equal(np.diff(offsets, axis=-1), counts)
    used = np.arange(ids.shape[-1]) < offsets[..., -1:]
    # Row-major order of the map is that of the lists: ascending within each row.
    np.testing.assert_array_equal(ids[used], np.nonzero(expected)[-1])
    assert not ids[~used].any()
    assert select._cache_size() == 1


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.selection)
@pytest.mark.parametrize(
    "maps",
    mostly_nightly(MAPS, [few_values]),
    ids=lambda f: f.__name__,
)
def test_a_thousand_maps(maps, config):
    rng = np.random.default_rng(0)
    size = GRID.num_visual_blocks
    scores = maps((BATCH, HEADS, size, size), rng)
    most = static_budget(config.sparsity, GRID, config)
    for budget in (most, rng.integers(1, most)):
        check(scores, GRID, config, int(budget))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.selection)
def test_rows_of_several_words(config):
    rng = np.random.default_rng(1)
    scores = random_maps((2, 3, 90, 90), rng)
    check(scores, WIDE, config, static_budget(config.sparsity, WIDE, config))


@pytest.mark.parametrize("config", CONFIGS[::2], ids=lambda c: c.selection)
@pytest.mark.parametrize("value", [0.0, -np.inf, np.nan, 1e-45, 0.25, 1.0, 3e38])
def test_equal_scores_keep_the_first_pairs(value, config):
    scores = np.full((BATCH, HEADS, 30, 30), value, np.float32)
    budget = 37 if config.selection == "percentile" else 3
    check(scores, GRID, config, budget)


def test_top_p_of_a_row_that_sums_to_more_than_four():
    """By hand: the first pair holds all of the mass; it came to 0 in 32 bits."""
    scores = np.full((1, 1, 30, 30), 0.1, np.float32)
    scores[..., :6] = [1, 1, 1, 1, 0.5, 0.4]
    mask = select_blocks(jnp.asarray(scores), grid=GRID, config=CONFIGS[4])
    visual = np.asarray(mask.to_dense())[0, 0, :30, :30]
    np.testing.assert_array_equal(np.argwhere(visual), [[i, 0] for i in range(30)])


@pytest.mark.parametrize("config", CONFIGS[4:], ids=["free", "forced"])
def test_top_p_of_rows_that_are_not_plain_probabilities(config):
    """NaN and negative scores hold nothing; one pair may hold everything."""
    rng = np.random.default_rng(2)
    scores = random_maps((BATCH, HEADS, 30, 30), rng)
    scores[rng.random(scores.shape) < 0.1] = np.nan
    scores[rng.random(scores.shape) < 0.1] = -np.inf
    scores[rng.random(scores.shape) < 0.1] = -0.0
    scores[:, ::3, ::2] = 0
    scores[:, ::3, ::2, 17] = 1
    check(scores, GRID, config, static_budget(config.sparsity, GRID, config))
