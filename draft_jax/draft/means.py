"""Means of keys and values that stand for the blocks a mask skips."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

from draft_jax.block_mask import BlockMask
from draft_jax.config import Compensation, sub_tiles_of
from draft_jax.draft.one_pass import MeanTokens
from draft_jax.grid import VideoGrid
from draft_jax.pytree import register_named_tuple
from pallas_kernels import Means
from pallas_kernels.common import (
    AnyArray,
    Order,
    jit_once,
    to_jax,
    validation,
)
from pallas_kernels.pooling import pool_sub_tiles

register_named_tuple(Means)


def make_means(
    k: Float[AnyArray, "B T N D"],
    v: Float[AnyArray, "B T N D"],
    mask: BlockMask,
    *,
    compensation: Compensation,
    order: Order = "raster",
) -> Means:
    """Makes the means that stand for the blocks a mask skips.

    They are those of `draft_attention` with this compensation, for masks of your own:
    `pallas_kernels.block_sparse_attention` takes them. Gradients flow to k and v.

    Args:
      k: Keys of the whole sequence, T = `mask.grid.num_tokens`.
      v: Values, like k.
      mask: Kept block pairs.
      compensation: What each mean is taken over. Static.
      order: How the visual tokens are ordered.

    Returns:
      Means in the dtype of k. All frames of a group count in its means, also those
      whose block is kept.

    Raises:
      ValueError: The shape of k or v does not fit the mask's grid, or the order is
        unknown.
      TypeError: k's dtype is not supported, or v has another.
    """
    k, v = to_jax(k, v)
    validation.check_alike({"k": k, "v": v})
    validation.check_tokens(k, mask.grid, "k")
    validation.check_order(order)
    return unchecked_means(k, v, mask, compensation, order)


@functools.partial(jit_once, static_argnums=(3, 4))
def unchecked_means(
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    mask: BlockMask,
    compensation: Compensation,
    order: Order,
) -> Means:
    """Computes `make_means` for a caller that has checked arguments."""
    grid = mask.grid
    cells = sub_tiles_of(grid, compensation.sub_tile, compensation.frames)
    start = grid.visual_tokens.start
    tokens = MeanTokens(
        *pool_sub_tiles(k, v, cells, order=order, start=start, dtype=k.dtype.name)
    )
    dropped = dropped_frames(mask, compensation)
    return means_for(tokens, dropped, grid, compensation)


def means_for(
    tokens: MeanTokens,
    dropped: UInt8[Array, "B N R C"],
    grid: VideoGrid,
    compensation: Compensation,
) -> Means:
    """Returns means with what they stand for: see `dropped_frames`."""
    cells = sub_tiles_of(grid, compensation.sub_tile, compensation.frames)
    return Means(tokens.k, tokens.v, dropped, cells)


def dropped_frames(
    mask: BlockMask, compensation: Compensation
) -> UInt8[Array, "B N R C"]:
    """Counts the frames of each column whose tile a query block skips; text skips none.

    Source: the lists of the mask, so it holds for masks of any maker.
    """
    visual = mask.grid.visual_blocks
    kept = mask.to_dense()[:, :, visual, visual]
    return count_dropped(kept, mask.grid, compensation)


def count_dropped(
    kept: Bool[Array, "B N S S"], grid: VideoGrid, compensation: Compensation
) -> UInt8[Array, "B N R C"]:
    """Computes `dropped_frames` of the pairs of tiles that are kept."""
    cells = sub_tiles_of(grid, compensation.sub_tile, compensation.frames)
    frames, tiles = grid.frames, grid.num_visual_blocks // grid.frames
    size = cells.group_frames
    skipped = ~kept.reshape(*kept.shape[:-1], frames, tiles)
    missing = cells.num_groups * size - frames
    skipped = jnp.pad(skipped, [(0, 0)] * 3 + [(0, missing), (0, 0)])
    skipped = skipped.reshape(*kept.shape[:-1], cells.num_groups, size, tiles)
    dropped = skipped.sum(-2, dtype=jnp.uint8)
    dropped = dropped.reshape(*kept.shape[:-1], cells.num_columns)
    first = grid.visual_blocks.start
    text = (first, grid.num_blocks - grid.visual_blocks.stop)
    return jnp.pad(dropped, [(0, 0), (0, 0), text, (0, 0)])
