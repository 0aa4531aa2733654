"""The draft: a low-resolution attention map of the video."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from draft_jax.config import DraftConfig, sub_tiles_of
from draft_jax.draft import head_chunks
from draft_jax.draft.pooling import (
    PooledTokens,
    check_pooled,
    pool_queries_and_keys,
)
from draft_jax.draft.spread import key_spread, weigh_by_spread
from draft_jax.grid import VideoGrid
from pallas_kernels.common import (
    AnyArray,
    Order,
    Scale,
    SubTiles,
    jit_once,
    over_explicit_axes,
    split_scale,
    to_jax,
    validation,
)
from pallas_kernels.tile_scores import Parts, tile_scores


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

    With `config.draft_tile` the softmax is over sub-tiles; probabilities are added over
    those of the key tile and averaged over those of the query tile, by their tokens.
    With another `config.ranking` than "mass" the result is what that ranks by.

    Args:
      q: Queries of the whole sequence, T = `grid.num_tokens`; text is left out.
      k: Keys, like q.
      grid: Geometry that defines the tiles.
      config: Says how the draft is made and what is ranked.
      scale: Factor of the logits; 1 / sqrt(D) by default.
      order: How the visual tokens of q and k are ordered.
      pooled: q and k pooled before, such as by `norm_rope_pool`; q is then not read,
        and k only for ranking by spread. None pools them here.

    Returns:
      float32 probabilities; each row sums to 1. Ranked by spread, they are weighted.

    Raises:
      ValueError: q or k is not [B, T, N, D] of `grid.num_tokens` tokens, or they
        differ. Or order is unknown, or pooled does not fit.
      TypeError: q's dtype is not supported, k has another, or pooled is not float32.

    Source: DraftAttention (arXiv 2505.14708), draft attention map.
    """
    q, k = to_jax(q, k)
    check_draft_inputs(q, k, grid, order)
    pooled = pool_draft(q, k, grid=grid, config=config, order=order, pooled=pooled)
    draft = Draft(pooled=pooled, spread=key_spread(k, grid, config, order))
    known_scale, scale_array = split_scale(scale)
    return _scores(
        draft,
        scale_array,
        grid=grid,
        config=config,
        scale=known_scale,
        max_bytes=head_chunks.MAX_CHUNK_BYTES,
    )


class Draft(NamedTuple):
    """What block pairs are ranked from.

    Attributes:
      pooled: Pooled queries and keys.
      spread: What `key_spread` returns of the keys.
    """

    pooled: PooledTokens
    spread: Float[Array, "B S *P N D"] | None


@functools.partial(jit_once, static_argnames=("grid", "config", "scale", "max_bytes"))
def _scores(draft, scale_array, *, grid, config, scale, max_bytes):
    def run(draft, scale_array):
        known = scale_array if scale is None else scale
        return scores_of_draft(
            draft, grid=grid, config=config, scale=known, max_bytes=max_bytes
        )

    return over_explicit_axes(
        run,
        operation="draft_scores",
        operands=(axes_of_draft(draft), "scale:"),
        results="B N S S",
    )(draft, scale_array)


def axes_of_draft(draft: Draft) -> Any:
    """Returns the axes of the arrays of a draft, as `common.sharding` takes them."""
    axes_of_token = 0 if draft.spread is None else draft.spread.ndim - 4
    inner = " ".join(f"P{i}" for i in range(axes_of_token))
    return Draft("pooled: B S N D", f"spread: B S {inner} N D")  # type: ignore[arg-type]


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
        pooled = pool_queries_and_keys(q, k, grid, config=config, order=order)
    check_pooled(pooled, q, grid, config)
    return pooled


def scores_of_draft(
    draft: Draft,
    *,
    grid: VideoGrid,
    config: DraftConfig,
    scale: Scale | None = None,
    max_bytes: int,
) -> Float[Array, "B N S S"]:
    """Returns what pairs of tiles are ranked by; see `draft_scores`.

    Args:
      draft: Pooled queries and keys, of any heads, and the spread of the keys.
      grid: Geometry that defines the tiles.
      config: Says how the draft is made and what is ranked.
      scale: Factor of the logits; 1 / sqrt(D) by default.
      max_bytes: Most bytes of a map of sub-tiles that is held at once.
    """
    pooled, spread = draft
    if scale is None:
        scale = 1.0 / math.sqrt(pooled.q_mean.shape[-1])
    of_pair = functools.partial(
        _tile_map if config.draft_tile is None else _sub_tile_map,
        grid=grid,
        config=config,
        scale=scale,
        max_bytes=max_bytes,
    )
    maps = [of_pair(*pair) for pair in pooled.pairs(config)]
    mass = maps[0] if len(maps) == 1 else 0.5 * (maps[0] + maps[1])
    if spread is None:
        return mass
    q_mean = pooled.q_mean
    if config.draft_tile is not None:
        q_mean = _tile_means(q_mean, _draft_cells(grid, config))
    return weigh_by_spread(mass, q_mean, spread, grid=grid, config=config)


def _tile_map(
    draft_q: Array, draft_k: Array, *, grid, config, scale, max_bytes
) -> Float[Array, "B N S S"]:
    """Returns the probabilities between whole tiles."""
    del max_bytes  # the map is the result
    logits = _products(draft_q, draft_k) * scale + _log_weights(grid, config)
    return jax.nn.softmax(logits, axis=-1)


def _sub_tile_map(
    draft_q: Float[Array, "B C N D"],
    draft_k: Float[Array, "B C N D"],
    *,
    grid: VideoGrid,
    config: DraftConfig,
    scale: Scale,
    max_bytes: int,
) -> Float[Array, "B N S S"]:
    """Returns the probabilities between tiles, from those of their sub-tiles."""
    parts = _parts_of(grid, config)
    return tile_scores(draft_q, draft_k, parts, scale=scale, max_bytes=max_bytes)


@functools.lru_cache(maxsize=64)
def _parts_of(grid: VideoGrid, config: DraftConfig) -> Parts:
    """Returns what the sub-tiles of a draft count: as queries their share of a tile."""
    cells = _draft_cells(grid, config)
    shares = cells.tokens / np.repeat(cells.tokens_of_tile, cells.per_column)
    by_tokens = config.edge_tiles == "by_tokens"
    counts = cells.tokens if by_tokens else np.sign(cells.tokens)
    return Parts(
        per_tile=cells.per_column,
        query_weights=tuple(shares.tolist()),
        key_weights=tuple(counts.astype(float).tolist()),
    )


def _draft_cells(grid: VideoGrid, config: DraftConfig) -> SubTiles:
    assert config.draft_tile is not None, "called with sub-tiles only"
    return sub_tiles_of(grid, config.draft_tile)


def _tile_means(x: Float[Array, "B C N D"], cells: SubTiles) -> Float[Array, "B S N D"]:
    """Averages the means of the sub-tiles of each tile by their tokens."""
    shares = cells.tokens.reshape(-1, cells.per_column) / cells.tokens_of_tile[:, None]
    parts = rearrange(x, "b (s j) n d -> b s j n d", j=cells.per_column)
    return (parts * shares.astype(np.float32)[:, :, None, None]).sum(2)


def _products(q: Float[Array, "B Q N D"], k: Float[Array, "B K N D"]) -> Array:
    # Maps are small, and TF32 would reorder scores that are close together.
    logits = jnp.einsum("bqnd,bknd->bnqk", q, k, precision=jax.lax.Precision.HIGHEST)
    # Apart from what follows, or XLA runs cuBLAS and then copies the whole map.
    return jax.lax.optimization_barrier(logits)


def _log_weights(grid: VideoGrid, config: DraftConfig) -> Float[np.ndarray, " #S"]:
    """Returns what is added to the logits of each key tile."""
    if config.edge_tiles == "as_published":
        return np.zeros(1, np.float32)
    return np.log(grid.block_lengths[grid.visual_blocks].astype(np.float32))
