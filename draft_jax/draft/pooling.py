"""Pools each tile of each frame into one draft token."""

import dataclasses
import functools
from typing import get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

from draft_jax.config import DraftConfig, draft_cells
from draft_jax.grid import VideoGrid
from draft_jax.pytree import register_dataclass
from pallas_kernels.common import (
    AnyArray,
    Axes,
    Order,
    jit_once,
    reorder_tokens,
    to_jax,
    validation,
    with_derivatives_on_own_shards,
)
from pallas_kernels.pooling import (
    Reduction,
    Tiling,
    pool_sub_tiles,
    pool_tiles,
    reduce_sub_tiles,
    reduce_tiles,
)


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PooledTokens:
    """Queries and keys pooled over the tiles of a video, float32.

    With `DraftConfig.draft_tile` they are pooled over the sub-tiles of each tile, which
    follow each other row by row: S is then their number, and those of edge tiles
    without a token are 0.

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
        """Names the reductions of q, in the order of `names`, then those of k."""
        num = len(names)
        q, k = (dict(zip(names, values[i : i + num], strict=True)) for i in (0, num))
        return cls(
            q_mean=q["mean"], k_mean=k["mean"], q_max=q.get("max"), k_max=k.get("max")
        )

    def pairs(self, config: DraftConfig) -> list[tuple[Array, Array]]:
        """Returns the pooled queries and keys of each map that makes up a draft."""
        pairs = [(self.q_mean, self.k_mean)]
        if "max" in reductions_of(config):
            assert self.q_max is not None, "see check_pooled"
            assert self.k_max is not None, "see check_pooled"
            pairs.append((self.q_max, self.k_max))
        return pairs


def reductions_of(config: DraftConfig) -> tuple[Reduction, ...]:
    """Returns the reductions of each tile that `config.pooling` stands for."""
    return ("mean", "max") if config.pooling == "mean+max" else ("mean",)


def num_draft_tokens(grid: VideoGrid, config: DraftConfig) -> int:
    """Returns how many queries and keys the draft of a video has."""
    if config.draft_tile is None:
        return grid.num_visual_blocks
    return draft_cells(grid, config).num_cells


def check_pooled(
    pooled: PooledTokens, q: Array, grid: VideoGrid, config: DraftConfig
) -> None:
    """Raises unless `pooled` can stand for q and k on this grid."""
    expected = (q.shape[0], num_draft_tokens(grid, config), *q.shape[2:])
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
    x: Float[AnyArray, "B T N D"],
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
    (x,) = to_jax(x)
    validation.check_axes("x", x)
    if x.shape[1] != grid.num_visual_tokens:
        raise ValueError(
            f"x has {x.shape[1]} tokens; {grid} has {grid.num_visual_tokens} visual "
            "tokens (leave the text tokens out)"
        )
    if reduction not in get_args(Reduction):
        raise ValueError(f"{reduction=} must be one of {get_args(Reduction)}")
    validation.check_order(order)
    tiling = dataclasses.replace(tiling_of(grid, order), start=0)
    return reduce_tiles(x, tiling, reduction=reduction)


def pool_queries_and_keys(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    grid: VideoGrid,
    *,
    config: DraftConfig,
    order: Order = "raster",
) -> PooledTokens:
    """Pools the visual tokens of q and k, in one pass where a kernel can.

    On a GPU where it cannot, XLA takes over, slower: that warns once. Maxima of
    sub-tiles are always XLA's.

    Args:
      q: Queries of the whole sequence, T = `grid.num_tokens`.
      k: Keys, like q.
      grid: Geometry that defines the tiles.
      config: `config.pooling` and `config.draft_tile` say what is computed.
      order: How the visual tokens are ordered.

    Returns:
      The reductions of q and of k.

    Raises:
      ValueError: order is unknown.

    Source: DraftAttention (arXiv 2505.14708), low-resolution draft.
    """
    validation.check_order(order)
    reductions = reductions_of(config)
    if config.draft_tile is None:
        pooled = pool_tiles(q, k, tiling_of(grid, order), reductions=reductions)
    elif reductions == ("mean",):
        cells, start = draft_cells(grid, config), grid.visual_tokens.start
        pooled = pool_sub_tiles(q, k, cells, order=order, start=start)
    else:
        pooled = _pool_sub_tiles(q, k, grid, config, order)
    return PooledTokens.from_reductions(reductions, pooled)


@functools.partial(jit_once, static_argnums=(2, 3, 4))
def _pool_sub_tiles(q, k, grid, config, order) -> tuple[Array, ...]:
    cells = draft_cells(grid, config)
    reductions = reductions_of(config)
    axes = Axes(
        operation="pool_sub_tiles",
        operands=("q: B T N D", "k: B T N D"),
        results=("B M N D",) * (2 * len(reductions)),
    )

    def run(q, k):
        pooled = []
        for x in (q, k):
            tokens, known_order = visual_tokens(x, grid, order)
            pooled += [
                reduce_sub_tiles(tokens, cells, order=known_order, reduction=reduction)
                for reduction in reductions
            ]
        return tuple(pooled)

    return with_derivatives_on_own_shards(run, axes)(q, k)


def visual_tokens(
    x: Float[Array, "B T N D"], grid: VideoGrid, order: Order
) -> tuple[Float[Array, "B V N D"], Order]:
    """Returns the visual tokens in an order that sub-tiles can be cut from."""
    if order == "tiled" and tiling_of(grid, order).has_edges:
        # Tiles that are cut off by the frame's edge are not alike.
        x, order = reorder_tokens(x, grid, to="raster", axis=1), "raster"
    return x[:, grid.visual_tokens], order


def tiling_of(grid: VideoGrid, order: Order) -> Tiling:
    """Returns the tiles of a video as the pooling kernels take them."""
    return Tiling(
        frames=grid.frames,
        height=grid.height,
        width=grid.width,
        tile=grid.tile,
        order=order,
        start=grid.visual_tokens.start,
    )
