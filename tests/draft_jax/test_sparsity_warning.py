"""The warning of a sparsity that a video of few blocks can't have."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import (
    DraftConfig,
    SparsitySchedule,
    SparsityWarning,
    VideoGrid,
    compute_mask,
    constant_step,
    draft_attention,
    initial_mask,
    scheduled_attention,
    select_blocks,
)
from tests.warnings_once import forget_warnings

GRID = VideoGrid(2, 8, 8)  # tiles of 8 x 16: two blocks
CONFIG = DraftConfig.paper(sparsity=0.75)
MESSAGE = (
    r"sparsity=0.75 can't be had: VideoGrid\(.* has 2 visual blocks, .* At least 0\.5 "
    r"of the block pairs are computed, not 0\.25: use smaller tiles, such as "
    r"VideoGrid\(\.\.\., tile=\(4, 8\)\), or ask for at most sparsity=0\.5"
)


@pytest.fixture(autouse=True)
def warn_again():
    forget_warnings()


def attend(q, grid, config):
    return draft_attention(q, q, q, grid=grid, config=config)


def mask_of(q, grid, config):
    return compute_mask(q, q, grid=grid, config=config)


def select(q, grid, config):
    num = grid.num_visual_blocks
    scores = jnp.ones((1, 1, num, num))
    return select_blocks(scores, grid=grid, config=config)


def scheduled(q, grid, config):
    step = constant_step(grid, config)
    mask = initial_mask(grid, config, batch=1, num_heads=1)
    return scheduled_attention(q, q, q, grid=grid, config=config, step=step, mask=mask)


def planned(q, grid, config):
    schedule = SparsitySchedule(sparsity=(config.sparsity,) * 2)
    timesteps = np.array([900, 100])
    dense = DraftConfig.paper(sparsity=0.0)
    return schedule.plan(timesteps, num_layers=1, grid=grid, config=dense)


def warned(function, grid, config):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        function(jnp.ones((1, grid.num_tokens, 1, 4)), grid, config)
    return [w for w in found if w.category is SparsityWarning]


@pytest.mark.parametrize("function", [mask_of, planned])
def test_a_sparsity_that_blocks_are_too_few_for(function):
    """Once, with what results and what to do."""
    with pytest.warns(SparsityWarning, match=MESSAGE):
        function(jnp.ones((1, GRID.num_tokens, 1, 4)), GRID, CONFIG)
    assert not warned(function, GRID, CONFIG)


@pytest.mark.parametrize("function", [attend, mask_of, select, scheduled])
def test_it_is_noticed_under_jit(function):
    q = jax.ShapeDtypeStruct((1, GRID.num_tokens, 1, 4), jnp.float32)
    with pytest.warns(SparsityWarning, match=MESSAGE):
        jax.eval_shape(lambda q: function(q, GRID, CONFIG), q)


def test_it_tells_the_share_that_results():
    """Two rows of two blocks keep one each, where a quarter was asked for."""
    q = jax.random.normal(jax.random.key(0), (1, GRID.num_tokens, 1, 4))
    assert mask_of(q, GRID, DraftConfig.paper(sparsity=0.75)).to_dense().mean() == 0.5


@pytest.mark.parametrize(
    ("grid", "sparsity"),
    [
        (GRID, 0.5),
        (VideoGrid(2, 8, 8, tile=(4, 8)), 0.75),
        (VideoGrid(1, 2, 5, tile=(1, 1)), 0.9),  # 10 blocks; binary 1 - 0.9 is less
    ],
    ids=["asks for less", "smaller tiles", "just enough"],
)
def test_no_warning_of_a_sparsity_that_can_be_had(grid, sparsity):
    assert not warned(planned, grid, DraftConfig.paper(sparsity=sparsity))


def test_a_video_too_small_for_any_tile():
    with pytest.warns(SparsityWarning, match="no tile is small enough, or ask for at"):
        planned(None, VideoGrid(1, 1, 2), DraftConfig.paper(sparsity=0.9))
