"""Means over the sub-tiles of a video and groups of frames, as XLA operations."""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from jaxtyping import Array, Float, Int

from pallas_kernels.common.interfaces import Order
from pallas_kernels.common.static import jit_once
from pallas_kernels.common.sub_tiles import SubTiles
from pallas_kernels.pooling.interfaces import Reduction

# Axes of a split video: groups `g` of frames `t`; rows and columns of tiles `th tw`, of
# sub-tiles `jr jc` in each, and of tokens `sr sc` in those.
_AXES = {
    "raster": "b g t th jr sr tw jc sc n d",
    "tiled": "b g t th tw jr sr jc sc n d",
}
_CELLS = "b (g th tw jr jc) n d"


@functools.lru_cache(maxsize=64)
def cell_table(sub_tiles: SubTiles, order: Order, start: int) -> Int[np.ndarray, "M 5"]:
    """Returns where the tokens of each cell stand in a sequence.

    Args:
      sub_tiles: What the cells are.
      order: How the tokens of the video are ordered.
      start: First token of the video: text may stand before it.

    Returns:
      Of each cell the first token in its group's first frame, tokens from a row to the
      next, rows, columns and frames. Read-only.
    """
    (tile_rows, tile_columns), (part_rows, part_columns) = (
        sub_tiles.tile,
        sub_tiles.part,
    )
    height, width = sub_tiles.height, sub_tiles.width
    shape = (*sub_tiles.tiles_per_frame, *sub_tiles.sub_tiles_per_tile)
    group, i, j, top, left = np.indices((sub_tiles.num_groups, *shape))
    top, left = top * part_rows, left * part_columns
    own_rows = np.minimum(tile_rows, height - i * tile_rows)
    own_columns = np.minimum(tile_columns, width - j * tile_columns)
    rows = np.clip(own_rows - top, 0, part_rows)
    columns = np.clip(own_columns - left, 0, part_columns)
    first = i * tile_rows * width
    if order == "raster":
        stride = np.full_like(top, width)
        first = first + top * width + j * tile_columns + left
    else:
        stride = own_columns
        first = first + own_rows * j * tile_columns + top * own_columns + left
    first_frame = group * sub_tiles.group_frames
    first = start + first_frame * height * width + first
    first = np.where(rows * columns > 0, first, start)
    frames = np.minimum(sub_tiles.group_frames, sub_tiles.frames - first_frame)
    fields = [x.ravel() for x in (first, stride, rows, columns, frames)]
    table = np.stack(fields, axis=-1).astype(np.int32)
    table.flags.writeable = False
    return table


@functools.lru_cache(maxsize=64)
def raster_order(sub_tiles: SubTiles) -> Int[np.ndarray, " V"]:
    """Returns the place of each token of raster order in tiled order. Read-only."""
    whole_tiles = dataclasses.replace(
        sub_tiles, sub_tile=sub_tiles.tile, group_frames=1
    )
    parts = []
    for first, stride, rows, columns, _ in cell_table(whole_tiles, "raster", 0):
        tokens = first + np.arange(rows)[:, None] * stride + np.arange(columns)
        parts.append(tokens.ravel())
    order = np.argsort(np.concatenate(parts)).astype(np.int32)
    order.flags.writeable = False
    return order


def in_known_order(
    x: Float[Array, "B T N D"], sub_tiles: SubTiles, order: Order, start: int
) -> tuple[Float[Array, "B V N D"], Order]:
    """Returns the tokens of the video in an order that sub-tiles can be cut from.

    Args:
      x: Tokens of the whole sequence.
      sub_tiles: Says the tiles.
      order: How the tokens of the video are ordered.
      start: First token of the video.
    """
    if order == "tiled" and sub_tiles.has_edges:
        # Tiles that are cut off by the frame's edge are not alike.
        return x[:, start + raster_order(sub_tiles)], "raster"
    return x[:, start : start + sub_tiles.num_tokens], order


@functools.partial(jit_once, static_argnames=("sub_tiles", "order", "reduction"))
def reduce_sub_tiles(
    x: Float[Array, "B V N D"],
    sub_tiles: SubTiles,
    *,
    order: Order,
    reduction: Reduction = "mean",
) -> Float[Array, "B M N D"]:
    """Reduces the tokens of each sub-tile; see `sharded.reduce_sub_tiles`."""
    pattern = f"{_AXES[order]} -> {_CELLS}"
    if reduction == "max":
        parts = _split(x, sub_tiles, order, padding=-math.inf)
        largest = reduce(parts, pattern, "max").astype(jnp.float32)
        return jnp.where((sub_tiles.tokens > 0)[:, None, None], largest, 0)
    parts = _split(x, sub_tiles, order).astype(jnp.float32)
    tokens = np.maximum(sub_tiles.tokens, 1).astype(np.float32)
    return reduce(parts, pattern, "sum") / tokens[:, None, None]


@functools.partial(jit_once, static_argnames="sub_tiles")
def means_of_tiles(
    x: Float[Array, "B C N D"], sub_tiles: SubTiles
) -> Float[Array, "B S N D"]:
    """Averages the means of the sub-tiles; see `sharded.means_of_tiles`."""
    of_tile = sub_tiles.tokens.reshape(-1, sub_tiles.per_column)
    shares = of_tile / sub_tiles.tokens_of_tile[:, None]
    parts = rearrange(x, "b (s j) n d -> b s j n d", j=sub_tiles.per_column)
    return (parts * shares.astype(np.float32)[:, :, None, None]).sum(2)


@functools.partial(jit_once, static_argnames=("sub_tiles", "order"))
def channel_variances(
    x: Float[Array, "B V N D"],
    means: Float[Array, "B M N D"],
    sub_tiles: SubTiles,
    *,
    order: Order,
) -> Float[Array, "B S N D"]:
    """Computes how far the tokens of each tile are from their means, by channel.

    Args:
      x: Tokens of the video, without text.
      means: Their means over the cells of `sub_tiles`, float32.
      sub_tiles: What the means are taken over. Static.
      order: How the tokens are ordered; "raster" where some tile is cut off. Static.

    Returns:
      Mean square of the differences over the tokens of each tile of each frame.

    Raises:
      ValueError: order is "tiled" where some tile is cut off by the frame's edge.
    """
    rest = _deviations(x, means, sub_tiles, order=order)
    squares = reduce(jnp.square(rest), f"{_AXES[order]} -> b (g t th tw) n d", "sum")
    return squares / sub_tiles.tokens_of_tile.astype(np.float32)[:, None, None]


@functools.partial(jit_once, static_argnames=("sub_tiles", "order"))
def deviations_of_tiles(
    x: Float[Array, "B V N D"],
    means: Float[Array, "B M N D"],
    sub_tiles: SubTiles,
    *,
    order: Order,
) -> Float[Array, "B S P N D"]:
    """Subtracts the means of cells; see `sharded.deviations_of_tiles`."""
    rest = _deviations(x, means, sub_tiles, order=order)
    tiles = f"{_AXES[order]} -> b (g t th tw) (jr jc sr sc) n d"
    return rearrange(rest, tiles)


def _deviations(
    x: Float[Array, "B V N D"],
    means: Float[Array, "B M N D"],
    sub_tiles: SubTiles,
    *,
    order: Order,
) -> Float[Array, "..."]:
    """Subtracts from each token the mean of its cell; split as `_AXES` says.

    Frame by frame, so that a last group of fewer frames needs no padding: XLA would
    write all differences to memory for it.
    """
    frames, group_frames = sub_tiles.frames, sub_tiles.group_frames
    frame_cells = dataclasses.replace(sub_tiles, group_frames=1)
    groups = rearrange(means, "b (g c) n d -> b g c n d", g=sub_tiles.num_groups)
    own_means = jnp.repeat(groups, group_frames, axis=1)[:, :frames]
    sizes: dict[str, int] = {}
    for axes, sides in (
        (("th", "tw"), sub_tiles.tiles_per_frame),
        (("jr", "jc"), sub_tiles.sub_tiles_per_tile),
    ):
        sizes |= dict(zip(axes, sides, strict=True))
    spread = _AXES[order].replace(" t ", " 1 ").replace("sr", "1").replace("sc", "1")
    cells = _CELLS.replace("(g th tw jr jc)", "g (th tw jr jc)")
    own_means = rearrange(own_means, f"{cells} -> {spread}", **sizes)
    rest = _split(x, frame_cells, order).astype(jnp.float32) - own_means
    if (frame_cells.tokens_per_frame == math.prod(frame_cells.part)).all():
        return rest
    ones = jnp.ones((1, x.shape[1], 1, 1), jnp.float32)
    return jnp.where(_split(ones, frame_cells, order) > 0, rest, 0)


def _split(
    x: Float[Array, "B V N D"],
    sub_tiles: SubTiles,
    order: Order,
    *,
    padding: float = 0.0,
) -> Float[Array, "..."]:
    """Splits the axis of tokens as `_AXES` says; what has no token is padding."""
    if order == "tiled" and sub_tiles.has_edges:
        raise ValueError(f"{order=} must be 'raster': {sub_tiles} has cut-off tiles")
    (rows, columns), (tile_rows, tile_columns) = (
        sub_tiles.tile,
        sub_tiles.tiles_per_frame,
    )
    sizes = {"th": tile_rows, "tw": tile_columns, "r": rows, "c": columns}
    if order == "raster":
        sides = {"f": sub_tiles.frames, "h": sub_tiles.height}
        x = rearrange(x, "b (f h w) n d -> b f h w n d", **sides)
        missing = {
            2: tile_rows * rows - sub_tiles.height,
            3: tile_columns * columns - sub_tiles.width,
        }
        x = _padded(x, missing, padding)
        x = rearrange(x, "b f (th r) (tw c) n d -> b f th r tw c n d", **sizes)
        row_axis = 3
    else:
        x = rearrange(x, "b (f th tw r c) n d -> b f th tw r c n d", **sizes)
        row_axis = 4
    (parts, parts_across), part = sub_tiles.sub_tiles_per_tile, sub_tiles.part
    missing = {
        1: -sub_tiles.frames % sub_tiles.group_frames,
        row_axis: parts * part[0] - rows,
        5: parts_across * part[1] - columns,
    }
    x = _padded(x, missing, padding)
    whole = _AXES[order].replace("g t", "(g t)").replace("jc sc", "(jc sc)")
    return rearrange(
        x,
        f"{whole.replace('jr sr', '(jr sr)')} -> {_AXES[order]}",
        t=sub_tiles.group_frames,
        sr=part[0],
        sc=part[1],
    )


def _padded(x: Array, missing: dict[int, int], padding: float) -> Array:
    """Appends padding to axes, as much as each is missing."""
    if not any(missing.values()):
        return x
    widths = [(0, missing.get(axis, 0)) for axis in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=padding)
