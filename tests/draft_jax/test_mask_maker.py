"""Masks of a maker of the caller's own, through every call that makes masks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import (
    BlockMask,
    Compensation,
    DraftConfig,
    VideoGrid,
    compute_mask,
    constant_step,
    draft_attention,
    initial_mask,
    make_means,
    mask_capacity,
    scheduled_attention,
)
from pallas_kernels import block_sparse_attention

GRID = VideoGrid(2, 4, 8, tile=(2, 4), text_length=3)
TILES = GRID.num_visual_blocks


@dataclasses.dataclass(frozen=True)
class FirstTiles:
    """Keeps the first tiles of each row, as many as the budget says."""

    needs_values: bool = False

    def __call__(self, q, k, v, *, grid, config, budget, scale, order):
        assert (v is not None) or not self.needs_values
        kept = jnp.broadcast_to(jnp.arange(TILES) < budget, (TILES, TILES))
        return BlockMask.from_visual(
            jnp.broadcast_to(kept, (q.shape[0], q.shape[2], TILES, TILES)),
            grid=grid,
            capacity=mask_capacity(grid, config),
        )


@dataclasses.dataclass(frozen=True)
class WrongCapacity:
    """Makes masks of another capacity than asked for."""

    def __call__(self, q, k, v, *, grid, config, budget, scale, order):
        return BlockMask.full(grid=grid, batch=q.shape[0], num_heads=q.shape[2])


def config_of(maker, **changes):
    return DraftConfig.paper(
        selection="row_topk", sparsity=0.5, mask_maker=maker, **changes
    )


def qkv():
    values = np.random.default_rng(0).normal(size=(3, 1, GRID.num_tokens, 2, 8))
    return jnp.asarray(values, jnp.float32)


def first_tiles(budget):
    """The mask of `FirstTiles` by hand: text, at the end, is kept."""
    dense = np.ones((1, 2, GRID.num_blocks, GRID.num_blocks), np.bool_)
    dense[..., :TILES, budget:TILES] = False
    return dense


def test_all_calls_take_the_makers_mask_and_budget():
    q, k, v = qkv()
    config = config_of(FirstTiles(needs_values=True))
    budget = TILES // 2
    mask = compute_mask(q, k, grid=GRID, config=config, v=v)
    np.testing.assert_array_equal(mask.to_dense(), first_tiles(budget))
    expected = block_sparse_attention(q, k, v, mask, grid=GRID, order="raster")
    out = draft_attention(q, k, v, grid=GRID, config=config)
    np.testing.assert_array_equal(out, expected)
    # A budget that a program is given, and a mask that is handed on.
    step = dataclasses.replace(
        constant_step(GRID, config), budget=np.asarray(2, np.int32)
    )
    old = initial_mask(GRID, config, batch=1, num_heads=2)
    _, mask = jax.jit(
        lambda step: scheduled_attention(
            q, k, v, grid=GRID, config=config, step=step, mask=old
        )
    )(step)
    np.testing.assert_array_equal(mask.to_dense(), first_tiles(2))


@pytest.mark.nightly
def test_means_stand_for_what_a_maker_skips():
    q, k, v = qkv()
    compensation = Compensation(sub_tile=(1, 2), frames=2)
    config = config_of(FirstTiles(), compensation=compensation)
    mask = BlockMask.from_dense(jnp.asarray(first_tiles(TILES // 2)), grid=GRID)
    means = make_means(k, v, mask, compensation=compensation)
    expected = block_sparse_attention(
        q, k, v, mask, grid=GRID, order="raster", means=means
    )
    out = draft_attention(q, k, v, grid=GRID, config=config)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_wrong_makers_and_masks_are_refused():
    q, k, _ = qkv()
    with pytest.raises(ValueError, match="has made a mask of shape"):
        compute_mask(q, k, grid=GRID, config=config_of(WrongCapacity()))


@pytest.mark.usefixtures("without_jaxtyping")  # which refuse it before
@pytest.mark.parametrize("maker", [3, FirstTiles], ids=["number", "class"])
def test_what_is_no_maker_is_refused(maker):
    with pytest.raises(ValueError, match="must be a MaskMaker or None"):
        config_of(maker)


def test_a_maker_that_cannot_be_hashed_is_refused():
    @dataclasses.dataclass  # not frozen, so without a hash
    class Loose:
        def __call__(self, q, k, v, *, grid, config, budget, scale, order): ...

    with pytest.raises(ValueError, match="must be hashable"):
        config_of(Loose())
