"""Pools each tile of each frame into one draft token."""

import dataclasses
import functools
import math
from typing import get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from draft_jax.config import DraftConfig
from draft_jax.grid import IntVector, VideoGrid
from draft_jax.pytree import register_dataclass
from pallas_kernels.common.device import current_device
from pallas_kernels.common.interfaces import Order
from pallas_kernels.common.slow_paths import warn_once
from pallas_kernels.common.validation import check_order
from pallas_kernels.pooling.sm90 import pool_tiles as pool_tiles_sm90
from pallas_kernels.pooling.sm90.pool_tiles import Reduction


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PooledTokens:
    """Queries and keys pooled over the tiles of a video, float32.

    Attributes:
      q_mean: Mean of the queries of each tile.
      k_mean: Mean of the keys.
      q_max: Largest query of each channel, for `DraftConfig.pooling` "mean+max".
      k_max: Largest key of each channel.
    """

    q_mean: Float[Array, "B S N D"]
    k_mean: Float[Array, "B S N D"]
    q_max: Float[Array, "B S N D"] | None = None
    k_max: Float[Array, "B S N D"] | None = None

    @classmethod
    def from_reductions(
        cls, names: tuple[Reduction, ...], values: tuple[Array, ...]
    ) -> "PooledTokens":
        """From the reductions of q in the order of `names`, then those of k."""
        num = len(names)
        q, k = (dict(zip(names, values[i : i + num], strict=True)) for i in (0, num))
        return cls(
            q_mean=q["mean"], k_mean=k["mean"], q_max=q.get("max"), k_max=k.get("max")
        )

    def pairs(self, config: DraftConfig) -> list[tuple[Array, Array]]:
        """Pooled queries and keys of each map that a draft is made of."""
        pairs = [(self.q_mean, self.k_mean)]
        if "max" in reductions_of(config):
            assert self.q_max is not None, "see check_pooled"
            assert self.k_max is not None, "see check_pooled"
            pairs.append((self.q_max, self.k_max))
        return pairs


def reductions_of(config: DraftConfig) -> tuple[Reduction, ...]:
    """What `config.pooling` computes of each tile."""
    return ("mean", "max") if config.pooling == "mean+max" else ("mean",)


def check_pooled(
    pooled: PooledTokens, q: Array, grid: VideoGrid, config: DraftConfig
) -> None:
    """Raises unless `pooled` can stand for q and k on this grid."""
    expected = (q.shape[0], grid.num_visual_blocks, *q.shape[2:])
    for reduction in reductions_of(config):
        for name in (f"q_{reduction}", f"k_{reduction}"):
            value = getattr(pooled, name)
            if value is None:
                raise ValueError(
                    f"pooled.{name} is None, but {config.pooling=} needs it: pool "
                    "with the same config"
                )
            if value.shape != expected:
                raise ValueError(
                    f"pooled.{name} has shape {value.shape}; expected [batch, tiles, "
                    f"heads, head_dim] = {expected}"
                )
            if value.dtype != jnp.float32:
                raise TypeError(
                    f"pooled.{name} has dtype {value.dtype.name}; expected float32"
                )


def pool_tokens(
    x: Float[Array, "B T N D"],
    grid: VideoGrid,
    *,
    order: Order = "raster",
    reduction: Reduction = "mean",
) -> Float[Array, "B S N D"]:
    """Averages each (rows, columns) tile of every frame into one draft token.

    Args:
      x: Visual tokens, T = F * H * W. No text tokens.
      grid: Latent grid after patchifying, in tokens, with its tile size.
      order: How the tokens of x are ordered.
      reduction: "mean", or "max" for the largest value of each channel.

    Returns:
      float32, S = F * ceil(H / rows) * ceil(W / columns). Means are taken in
      float32; an edge tile is pooled over the tokens it really has.

    Raises:
      ValueError: T differs from F * H * W, or order or reduction is not one of the
        names above.

    Source: DraftAttention (arXiv 2505.14708), low-resolution draft.
    """
    if x.shape[1] != grid.num_visual_tokens:
        raise ValueError(
            f"x has {x.shape[1]} tokens; {grid} has {grid.num_visual_tokens} visual "
            "tokens (leave the text tokens out)"
        )
    if reduction not in get_args(Reduction):
        raise ValueError(f"{reduction=} must be one of {get_args(Reduction)}")
    check_order(order)
    padding = 0.0 if reduction == "mean" else -math.inf
    by_tile = _tiles_of_raster if order == "raster" else _tiles_of_tiled
    tiles, token_axes = by_tile(x, grid, padding)
    draft_shape = (x.shape[0], grid.num_visual_blocks, *x.shape[2:])
    if reduction == "max":
        return tiles.max(token_axes).astype(jnp.float32).reshape(draft_shape)
    sums = tiles.sum(token_axes, dtype=jnp.float32).reshape(draft_shape)
    lengths = grid.block_lengths[grid.visual_blocks].astype(np.float32)
    return sums / lengths[:, None, None]


def pool_queries_and_keys(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    grid: VideoGrid,
    *,
    order: Order = "raster",
    reductions: tuple[Reduction, ...] = ("mean",),
) -> PooledTokens:
    """Pools the visual tokens of q and k, in one pass where a kernel can.

    On a GPU where it cannot, XLA takes over, slower: that warns once.

    Args:
      q: Queries of the whole sequence, T = `grid.num_tokens`.
      k: Keys, like q.
      grid: Geometry that defines the tiles.
      order: How the visual tokens are ordered.
      reductions: What to compute, with "mean" among it; see `pool_tokens`.

    Returns:
      The reductions of q and of k.

    Raises:
      ValueError: order is unknown.

    Source: DraftAttention (arXiv 2505.14708), low-resolution draft.
    """
    check_order(order)
    device = current_device(q)
    cause = pool_tiles_sm90.why_unsupported(q.shape, q.dtype, device)
    if cause is None:
        tiles = tile_table(grid, order)
        pooled = pool_tiles_sm90.pool_tiles(q, k, tiles, reductions=reductions)
    else:
        if device.platform == "gpu":
            warn_once(f"pooling runs on XLA instead of its kernel: {cause}")
        pooled = tuple(
            pool_tokens(x[:, grid.visual_tokens], grid, order=order, reduction=name)
            for x in (q, k)
            for name in reductions
        )
    return PooledTokens.from_reductions(reductions, pooled)


@functools.lru_cache(maxsize=64)
def tile_table(grid: VideoGrid, order: Order) -> Int[np.ndarray, "S 4"]:
    """First token, tokens between rows, rows and columns of each tile of the video."""
    rows, columns = grid.tile
    tile_rows, tile_columns = grid.tiles_per_frame
    frame, row, column = np.indices((grid.frames, tile_rows, tile_columns))
    own_rows = np.minimum(rows, grid.height - row * rows)
    own_columns = np.minimum(columns, grid.width - column * columns)
    if order == "raster":
        token = (frame * grid.height + row * rows) * grid.width + column * columns
        first = (token + grid.visual_tokens.start).ravel()
        stride = np.full_like(own_columns, grid.width)
    else:
        first = grid.block_starts[grid.visual_blocks]
        stride = own_columns
    fields = (first, stride.ravel(), own_rows.ravel(), own_columns.ravel())
    table = np.stack(fields, axis=-1).astype(np.int32)
    table.flags.writeable = False
    return table


def _tiles_of_raster(
    x: Array, grid: VideoGrid, padding: float
) -> tuple[Array, tuple[int, ...]]:
    """Splits rows and columns into tiles; edges are filled with `padding`."""
    batch, _, *heads = x.shape
    x = x.reshape(batch, grid.frames, grid.height, grid.width, *heads)
    tile_rows, tile_columns = grid.tiles_per_frame
    rows, columns = grid.tile
    widths = [(0, 0)] * x.ndim
    widths[2] = (0, tile_rows * rows - grid.height)
    widths[3] = (0, tile_columns * columns - grid.width)
    if grid_has_edges(grid):
        x = jnp.pad(x, widths, constant_values=padding)
    x = x.reshape(batch, grid.frames, tile_rows, rows, tile_columns, columns, *heads)
    return x, (3, 5)


def _tiles_of_tiled(
    x: Array, grid: VideoGrid, padding: float
) -> tuple[Array, tuple[int, ...]]:
    """Splits tokens into blocks; short blocks are filled with `padding`."""
    if grid_has_edges(grid):
        # A gather, not a segment sum: scatter-adds on a GPU run in any order, and a
        # last-bit difference between two calls could flip a tie in the selection.
        x = x.at[:, _token_of_slot(grid)].get(mode="fill", fill_value=padding)
    blocks = (x.shape[0], grid.num_visual_blocks, grid.block_size)
    return x.reshape(*blocks, *x.shape[2:]), (2,)


def grid_has_edges(grid: VideoGrid) -> bool:
    """Whether some tile of the video is shorter than a full block."""
    rows, columns = grid.tile
    return bool(grid.height % rows or grid.width % columns)


@functools.lru_cache(maxsize=64)
def _token_of_slot(grid: VideoGrid) -> IntVector:
    """Visual token in each slot of S full blocks; T for the slots without one."""
    lengths = grid.block_lengths[grid.visual_blocks]
    starts = np.cumsum(lengths) - lengths
    slots = np.arange(grid.block_size)
    tokens = np.where(
        slots < lengths[:, None], starts[:, None] + slots, grid.num_visual_tokens
    )
    tokens = tokens.ravel().astype(np.int32)
    tokens.flags.writeable = False
    return tokens
