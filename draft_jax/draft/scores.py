"""The draft: a low-resolution attention map of the video."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from draft_jax.config import DraftConfig, draft_cells
from draft_jax.draft import head_chunks
from draft_jax.draft.one_pass import Draft, pool_draft
from draft_jax.draft.pooling import PooledTokens
from draft_jax.draft.spread import weigh_by_spread
from draft_jax.grid import VideoGrid
from pallas_kernels.common import (
    AnyArray,
    Axes,
    Order,
    Scale,
    SubTiles,
    jit_once,
    split_scale,
    to_jax,
    validation,
    with_derivatives_on_own_shards,
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
    draft = pool_draft(q, k, grid=grid, config=config, order=order, pooled=pooled)
    known_scale, scale_array = split_scale(scale)
    return _scores(
        draft,
        scale_array,
        grid=grid,
        config=config,
        scale=known_scale,
        max_bytes=head_chunks.MAX_CHUNK_BYTES,
    )


@functools.partial(jit_once, static_argnames=("grid", "config", "scale", "max_bytes"))
def _scores(draft, scale_array, *, grid, config, scale, max_bytes):
    arrays = (draft, scale_of_heads(scale_array, draft))
    leaves, tree = jax.tree.flatten(arrays)
    operands = jax.tree.broadcast((axes_of_draft(draft), "scale: B N"), arrays)
    axes = Axes(
        operation="draft_scores",
        operands=tuple(jax.tree.leaves(operands)),
        results=("B N S S",),
    )

    def run(*leaves):
        draft, scales = jax.tree.unflatten(tree, leaves)
        known = scales if scale is None else scale
        scores = scores_of_draft(
            draft, grid=grid, config=config, scale=known, max_bytes=max_bytes
        )
        return (scores,)

    (scores,) = with_derivatives_on_own_shards(run, axes)(*leaves)
    return scores


def scale_of_heads(scale: Array | None, draft: Draft) -> Float[Array, "B N"] | None:
    """Returns a traced scale once for each head; None where it is known.

    Its gradients are added up where all heads are seen.
    """
    if scale is None:
        return None
    return jnp.broadcast_to(scale, draft.pooled.q_mean.shape[::2])


def axes_of_draft(draft: Draft) -> Any:
    """Returns the axes of the arrays of a draft, as `common.sharding` takes them."""
    axes_of_token = 0 if draft.spread is None else draft.spread.ndim - 4
    inner = " ".join(f"P{i}" for i in range(axes_of_token))
    names = ("pooled: B S N D", "q_tiles: B S N D", f"spread: B S {inner} N D")
    return Draft(*names)  # type: ignore[arg-type]


def check_draft_inputs(
    q: Float[Array, "B T N D"], k: Float[Array, "B T N D"], grid: VideoGrid, order: str
) -> None:
    """Raises unless q and k fit each other and the grid, and the order is known."""
    validation.check_qk(q, k)
    validation.check_tokens(q, grid)
    validation.check_order(order)


def scores_of_draft(
    draft: Draft,
    *,
    grid: VideoGrid,
    config: DraftConfig,
    scale: float | Float[Array, "B N"] | None = None,
    max_bytes: int,
) -> Float[Array, "B N S S"]:
    """Returns what pairs of tiles are ranked by; see `draft_scores`.

    Args:
      draft: What pairs are ranked from, of any heads.
      grid: Geometry that defines the tiles.
      config: Says how the draft is made and what is ranked.
      scale: Factor of the logits, one or one for each head; 1 / sqrt(D) by default.
      max_bytes: Most bytes of a map of sub-tiles that is held at once.
    """
    if scale is None:
        scale = 1.0 / math.sqrt(draft.pooled.q_mean.shape[-1])
    of_pair = functools.partial(
        _tile_map if config.draft_tile is None else _sub_tile_map,
        grid=grid,
        config=config,
        scale=scale,
        max_bytes=max_bytes,
    )
    maps = [of_pair(*pair) for pair in draft.pooled.pairs(config)]
    mass = maps[0] if len(maps) == 1 else 0.5 * (maps[0] + maps[1])
    if draft.spread is None:
        return mass
    assert draft.q_tiles is not None, "it stands beside the spread"
    return weigh_by_spread(mass, draft.q_tiles, draft.spread, grid=grid, config=config)


def _tile_map(
    draft_q: Array, draft_k: Array, *, grid, config, scale, max_bytes
) -> Float[Array, "B N S S"]:
    """Returns the probabilities between whole tiles."""
    del max_bytes  # the map is the result
    factor = scale[:, :, None, None] if isinstance(scale, jax.Array) else scale
    logits = _products(draft_q, draft_k) * factor + _log_weights(grid, config)
    return jax.nn.softmax(logits, axis=-1)


def _sub_tile_map(
    draft_q: Float[Array, "B C N D"],
    draft_k: Float[Array, "B C N D"],
    *,
    grid: VideoGrid,
    config: DraftConfig,
    scale: float | Float[Array, "B N"],
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
    return draft_cells(grid, config)


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
