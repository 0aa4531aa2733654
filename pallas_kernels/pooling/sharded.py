"""Operations on sub-tiles where their arrays are: the functions of `sub_tiles`.

Those are plain XLA operations, for programs that each device runs on its own arrays.
Under vmap over an explicit mesh axis JAX has no rule for some of them.
"""

import functools

from jaxtyping import Array, Float

from pallas_kernels.common.interfaces import Order
from pallas_kernels.common.linear_maps import with_derivatives_on_own_shards
from pallas_kernels.common.sharding import Axes
from pallas_kernels.common.static import jit_once
from pallas_kernels.common.sub_tiles import SubTiles
from pallas_kernels.pooling import sub_tiles as own
from pallas_kernels.pooling.interfaces import Reduction


@functools.partial(jit_once, static_argnames=("sub_tiles", "order", "reduction"))
def reduce_sub_tiles(
    x: Float[Array, "B V N D"],
    sub_tiles: SubTiles,
    *,
    order: Order,
    reduction: Reduction = "mean",
) -> Float[Array, "B M N D"]:
    """Reduces the tokens of each sub-tile over each group of frames.

    Args:
      x: Tokens of the video, without text.
      sub_tiles: What is reduced together. Static.
      order: How the tokens are ordered; "raster" where some tile is cut off. Static.
      reduction: "mean", or "max" for the largest value of each channel. Static.

    Returns:
      float32, in the order of the cells of `sub_tiles`. Cells without a token are 0.

    Raises:
      ValueError: order is "tiled" where some tile is cut off by the frame's edge.
    """
    axes = Axes(
        operation="reduce_sub_tiles", operands=("x: B V N D",), results=("B M N D",)
    )

    def run(x):
        return (own.reduce_sub_tiles(x, sub_tiles, order=order, reduction=reduction),)

    (cells,) = with_derivatives_on_own_shards(run, axes)(x)
    return cells


@functools.partial(jit_once, static_argnames="sub_tiles")
def means_of_tiles(
    x: Float[Array, "B C N D"], sub_tiles: SubTiles
) -> Float[Array, "B S N D"]:
    """Averages the means of the sub-tiles of each tile by their tokens.

    Args:
      x: Means of the cells of `sub_tiles`, in groups of one frame.
      sub_tiles: What the means are taken over. Static.
    """
    axes = Axes(
        operation="means_of_tiles", operands=("x: B C N D",), results=("B S N D",)
    )

    def run(x):
        return (own.means_of_tiles(x, sub_tiles),)

    (tiles,) = with_derivatives_on_own_shards(run, axes)(x)
    return tiles


@functools.partial(jit_once, static_argnames=("sub_tiles", "order"))
def deviations_of_tiles(
    x: Float[Array, "B V N D"],
    means: Float[Array, "B M N D"],
    sub_tiles: SubTiles,
    *,
    order: Order,
) -> Float[Array, "B S P N D"]:
    """Subtracts from each token the mean of its cell, tile by tile of each frame.

    Args:
      x: Tokens of the video, without text.
      means: Their means over the cells of `sub_tiles`, float32.
      sub_tiles: What the means are taken over. Static.
      order: How the tokens are ordered; "raster" where some tile is cut off. Static.

    Returns:
      float32, in any order within a tile; 0 for places without a token.

    Raises:
      ValueError: order is "tiled" where some tile is cut off by the frame's edge.
    """
    axes = Axes(
        operation="deviations_of_tiles",
        operands=("x: B V N D", "means: B M N D"),
        results=("B S P N D",),
    )

    def run(x, means):
        return (own.deviations_of_tiles(x, means, sub_tiles, order=order),)

    (deviations,) = with_derivatives_on_own_shards(run, axes)(x, means)
    return deviations
