"""What a layer pools of its tokens: the draft, the spread and the means, in one pass.

Where `DraftConfig.compensation` asks for means, draft and means take the same keys, so
they are pooled together: `pallas_kernels.pooling.pool_video` reads each array once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from draft_jax.config import DraftConfig, draft_cells, sub_tiles_of
from draft_jax.draft.pooling import (
    PooledTokens,
    check_pooled,
    pool_queries_and_keys,
    reductions_of,
)
from draft_jax.draft.spread import key_differences
from draft_jax.grid import VideoGrid
from pallas_kernels.common import Order
from pallas_kernels.pooling import VideoPooling, means_of_tiles, pool_video


class Draft(NamedTuple):
    """What block pairs are ranked from.

    Attributes:
      pooled: Pooled queries and keys.
      q_tiles: Mean query of each tile, which the spread is multiplied by; None for
        ranking by mass, like spread.
      spread: How far keys are from the means that would stand for them: for "spread"
        the mean square of each channel [B, S, N, D], for "exact_spread" the differences
        of all tokens [B, S, P, N, D].
    """

    pooled: PooledTokens
    q_tiles: Float[Array, "B S N D"] | None = None
    spread: Float[Array, "B S *P N D"] | None = None


class MeanTokens(NamedTuple):
    """Mean keys and values that stand for skipped blocks, in the dtype of the keys."""

    k: Float[Array, "B M N D"]
    v: Float[Array, "B M N D"]


def pool_draft(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    *,
    grid: VideoGrid,
    config: DraftConfig,
    order: Order = "raster",
    pooled: PooledTokens | None = None,
) -> Draft:
    """Pools what a draft is made from, for a caller that has checked q, k and order.

    Args:
      q: Queries of the whole sequence.
      k: Keys, like q.
      grid: Geometry that defines the tiles.
      config: Says how the draft is made and what is ranked.
      order: How the visual tokens are ordered.
      pooled: q and k pooled before; None pools them here.

    Raises:
      ValueError: pooled does not fit q, grid or config.
      TypeError: pooled is not float32.
    """
    if config.compensation is None or config.ranking != "spread":
        draft = Draft(_pooled(q, k, grid, config, order, pooled))
        return _with_differences(draft, k, grid, config, order)
    return _pool_together(q, k, None, grid, config, order, pooled)[0]


def pool_layer(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    *,
    grid: VideoGrid,
    config: DraftConfig,
    order: Order = "raster",
    pooled: PooledTokens | None = None,
) -> tuple[Draft, MeanTokens]:
    """Pools what a draft is made from, and the means for what it will skip.

    The arguments are those of `pool_draft`, and values; the config compensates. No
    gradient flows through the draft.
    """
    # A gradient of NumPy's arrays hands these through.
    q, pooled = jax.tree.map(jnp.asarray, jax.lax.stop_gradient((q, pooled)))
    draft, means = _pool_together(q, k, v, grid, config, order, pooled)
    assert means is not None, "there are values"
    return jax.lax.stop_gradient(draft), means


def _pool_together(
    q, k, v, grid: VideoGrid, config: DraftConfig, order: Order, pooled
) -> tuple[Draft, MeanTokens | None]:
    """Pools the draft and the means in one pass; maxima are pooled apart."""
    compensation = config.compensation
    assert compensation is not None, "called for means only"
    is_joint = pooled is None and reductions_of(config) == ("mean",)
    pooling = VideoPooling(
        means=sub_tiles_of(grid, compensation.sub_tile, compensation.frames),
        draft=draft_cells(grid, config) if is_joint else None,
        spread=config.ranking == "spread",
        order=order,
        start=grid.visual_tokens.start,
    )
    found = pool_video(q, k, v, pooling)
    if found.q_parts is not None and found.k_parts is not None:
        pooled = PooledTokens(q_mean=found.q_parts, k_mean=found.k_parts)
    else:
        pooled = _pooled(q, k, grid, config, order, pooled)
    q_tiles = found.q_tiles
    if pooling.spread and q_tiles is None:
        q_tiles = _mean_queries(pooled, grid, config)
    draft = Draft(pooled, q_tiles, found.k_spread)
    draft = _with_differences(draft, k, grid, config, order)
    if found.k_means is None or found.v_means is None:
        return draft, None
    return draft, MeanTokens(found.k_means, found.v_means)


def _pooled(
    q, k, grid: VideoGrid, config: DraftConfig, order: Order, pooled
) -> PooledTokens:
    """Returns `pooled` if it fits, or pools q and k; see `pool_draft`."""
    if pooled is None:
        pooled = pool_queries_and_keys(q, k, grid, config=config, order=order)
    check_pooled(pooled, q, grid, config)
    return pooled


def _with_differences(
    draft: Draft, k, grid: VideoGrid, config: DraftConfig, order: Order
) -> Draft:
    """Adds the differences of all keys from their means, for "exact_spread"."""
    if config.ranking != "exact_spread":
        return draft
    differences = key_differences(k, grid, config, order)
    q_tiles = _mean_queries(draft.pooled, grid, config)
    return draft._replace(q_tiles=q_tiles, spread=differences)


def _mean_queries(
    pooled: PooledTokens, grid: VideoGrid, config: DraftConfig
) -> Float[Array, "B S N D"]:
    """Returns the mean query of each tile, from those of a draft."""
    if config.draft_tile is None:
        return pooled.q_mean
    return means_of_tiles(pooled.q_mean, draft_cells(grid, config))
