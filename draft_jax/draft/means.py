"""Means of keys and values that stand for the blocks a mask skips."""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from draft_jax.block_mask import BlockMask
from draft_jax.config import Compensation, sub_tiles_of
from draft_jax.pytree import register_named_tuple
from pallas_kernels import Means
from pallas_kernels.common import (
    AnyArray,
    Order,
    SubTiles,
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
    mean_k, mean_v = pool_sub_tiles(
        k, v, cells, order=order, start=start, dtype=k.dtype.name
    )
    return Means(mean_k, mean_v, dropped_frames(mask, cells), cells)


def dropped_frames(mask: BlockMask, cells: SubTiles) -> UInt8[Array, "B N R C"]:
    """Counts the frames of each column whose tile a query block skips; text skips none.

    Source: the lists of the mask, so it holds for masks of any maker.
    """
    grid = mask.grid
    kept = mask.to_dense()[..., grid.visual_blocks]
    frames, tiles = grid.frames, grid.num_visual_blocks // grid.frames
    size = cells.group_frames
    skipped = ~kept.reshape(*kept.shape[:-1], frames, tiles)
    missing = cells.num_groups * size - frames
    skipped = jnp.pad(skipped, [(0, 0)] * 3 + [(0, missing), (0, 0)])
    skipped = skipped.reshape(*kept.shape[:-1], cells.num_groups, size, tiles)
    dropped = skipped.sum(-2, dtype=jnp.uint8)
    is_visual = np.zeros((grid.num_blocks, 1), np.bool_)
    is_visual[grid.visual_blocks] = True
    dropped = dropped.reshape(*kept.shape[:-1], cells.num_columns)
    return jnp.where(is_visual, dropped, jnp.uint8(0))
