"""The draft: a low-resolution attention map of the video."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from draft_jax.config import DraftConfig
from draft_jax.draft.pooling import (
    PooledTokens,
    check_pooled,
    pool_queries_and_keys,
    reductions_of,
)
from draft_jax.grid import VideoGrid
from pallas_kernels.common import (
    AnyArray,
    Order,
    Scale,
    jit_once,
    split_scale,
    to_jax,
    validation,
)


def draft_scores(
    q: Float[AnyArray, "B T N D"],
    k: Float[AnyArray, "B T N D"],
    *,
    grid: VideoGrid,
    config: DraftConfig,
    scale: Scale | None = None,
    order: Order = "raster",
    pooled: PooledTokens | None = None,
) -> Float[Array, "B N S S"]:
    """Computes attention probabilities between the tiles of a video.

    Pools queries and keys per tile and takes the softmax over the pooled video keys.
    A key tile counts by its tokens: the logarithm of its length is added to its
    logits, which changes nothing where the tile divides the frame. With
    `config.edge_tiles="as_published"` it is not.

    Args:
      q: Queries of the whole sequence, T = `grid.num_tokens`; text is left out.
      k: Keys, like q.
      grid: Geometry that defines the tiles.
      config: `config.pooling` and `config.edge_tiles` are read.
      scale: Factor of the logits; 1 / sqrt(D) by default.
      order: How the visual tokens of q and k are ordered.
      pooled: q and k pooled before, such as by `norm_rope_pool`; q and k are then not
        read. None pools them here.

    Returns:
      float32 probabilities; each row sums to 1.

    Raises:
      ValueError: q or k is not [B, T, N, D] of `grid.num_tokens` tokens, or they
        differ. Or order is unknown, or pooled does not fit.
      TypeError: q's dtype is not supported, k has another, or pooled is not float32.

    Source: DraftAttention (arXiv 2505.14708), draft attention map.
    """
    q, k = to_jax(q, k)
    check_draft_inputs(q, k, grid, order)
    pooled = pool_draft(q, k, grid=grid, config=config, order=order, pooled=pooled)
    known_scale, scale_array = split_scale(scale)
    return _scores(pooled, scale_array, grid=grid, config=config, scale=known_scale)


@functools.partial(jit_once, static_argnames=("grid", "config", "scale"))
def _scores(pooled, scale_array, *, grid, config, scale):
    scale = scale_array if scale is None else scale
    return scores_of_pooled(pooled, grid=grid, config=config, scale=scale)


def check_draft_inputs(
    q: Float[Array, "B T N D"], k: Float[Array, "B T N D"], grid: VideoGrid, order: str
) -> None:
    """Raises unless q and k fit each other and the grid, and the order is known."""
    validation.check_qk(q, k)
    validation.check_tokens(q, grid)
    validation.check_order(order)


def pool_draft(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    *,
    grid: VideoGrid,
    config: DraftConfig,
    order: Order = "raster",
    pooled: PooledTokens | None = None,
) -> PooledTokens:
    """Pools queries and keys as `config.pooling` says; see `draft_scores`.

    The caller has checked q, k and order.

    Raises:
      ValueError: pooled does not fit q, grid or config.
      TypeError: pooled is not float32.
    """
    if pooled is None:
        pooled = pool_queries_and_keys(
            q, k, grid, order=order, reductions=reductions_of(config)
        )
    check_pooled(pooled, q, grid, config)
    return pooled


def scores_of_pooled(
    pooled: PooledTokens,
    *,
    grid: VideoGrid,
    config: DraftConfig,
    scale: Scale | None = None,
) -> Float[Array, "B N S S"]:
    """Returns the map of pooled queries and keys; see `draft_scores`.

    Args:
      pooled: Pooled queries and keys, of any heads.
      grid: Geometry that defines the tiles.
      config: `config.pooling` and `config.edge_tiles` are read.
      scale: Factor of the logits; 1 / sqrt(D) by default.
    """
    if scale is None:
        scale = 1.0 / math.sqrt(pooled.q_mean.shape[-1])
    log_weights = _log_weights(grid, config)
    maps = []
    for draft_q, draft_k in pooled.pairs(config):
        # The map is small, and TF32 would reorder scores that are close together.
        logits = jnp.einsum(
            "bqnd,bknd->bnqk", draft_q, draft_k, precision=jax.lax.Precision.HIGHEST
        )
        # Apart from what follows, or XLA runs cuBLAS and then copies the whole map.
        logits = jax.lax.optimization_barrier(logits)
        maps.append(jax.nn.softmax(logits * scale + log_weights, axis=-1))
    return maps[0] if len(maps) == 1 else 0.5 * (maps[0] + maps[1])


def _log_weights(grid: VideoGrid, config: DraftConfig) -> Float[np.ndarray, " #S"]:
    """Returns what is added to the logits of each key tile."""
    if config.edge_tiles == "as_published":
        return np.zeros(1, np.float32)
    return np.log(grid.block_lengths[grid.visual_blocks].astype(np.float32))
