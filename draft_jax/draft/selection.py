"""Turns draft maps into block masks of static size."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, UInt32

from draft_jax.block_mask import BlockMask
from draft_jax.config import DraftConfig, mask_capacity, static_budget
from draft_jax.draft import packed_bits, ranking
from draft_jax.draft.head_chunks import map_heads
from draft_jax.draft.pooling import PooledTokens
from draft_jax.draft.scores import (
    check_draft_inputs,
    pool_draft,
    scores_of_pooled,
)
from draft_jax.grid import VideoGrid
from pallas_kernels.common.interfaces import SUPPORTED_DTYPES, Order
from pallas_kernels.ranking import MASS_UNITS


def select_blocks(
    scores: Float[Array, "B N S S"],
    *,
    grid: VideoGrid,
    config: DraftConfig,
    budget: int | Int[Array | np.ndarray, ""] | None = None,
) -> BlockMask:
    """Chooses the block pairs to attend to, for each batch item and head.

    Ties go to the pair with the lower query block, then the lower key block. Every
    query block keeps at least one visual key block: a row that would be empty keeps
    its best pair beyond the budget. Text blocks are kept with everything, outside
    the budget.

    Args:
      scores: Draft map, larger is more important. NaN ranks last, with minus
        infinity. For "top_p", probabilities, added in units of 2^-30: a score counts
        as a mass of 0 to 1, negative ones and NaN as 0 and larger ones as 1. The rows
        need not sum to 1.
      grid: Geometry that defines the blocks, S = `grid.num_visual_blocks`.
      config: What is selected.
      budget: Pairs to keep: per head for "percentile", per row otherwise; an integer
        from 1 to the one of `config.sparsity`, which is the default. It may be traced:
        then one outside acts like the nearest one inside, because the mask's capacity
        is static. Outside jit an array on a device is waited for, to check its value.

    Returns:
      A mask over all blocks of `grid`, with capacity `mask_capacity(grid, config)`.

    Raises:
      ValueError: The shape of scores does not fit the grid, a concrete budget is not
        within 1 and the default, or budget is not a scalar.
      TypeError: The dtype of scores is not supported, or budget is not an integer.

    Source: DraftAttention (arXiv 2505.14708), sparse mask from the draft map. The
    published code keeps all ties at its threshold and may leave a row empty.
    """
    num_visual = grid.num_visual_blocks
    if scores.ndim != 4 or scores.shape[2:] != (num_visual, num_visual):
        raise ValueError(
            f"scores has shape {scores.shape}; expected [batch, heads, {num_visual}, "
            f"{num_visual}], one row and column per visual block of {grid}"
        )
    most = static_budget(config.sparsity, grid, config)
    if scores.dtype.name not in SUPPORTED_DTYPES:
        raise TypeError(
            f"scores has dtype {scores.dtype.name}; accepted are "
            f"{', '.join(SUPPORTED_DTYPES)}"
        )
    if budget is None:
        budget = most
    _check_budget(budget, most, config)
    budget = jnp.clip(jnp.asarray(budget, jnp.int32), 1, most)
    select = functools.partial(_select, grid=grid, config=config, budget=budget)
    return map_heads(select, scores, map_size=num_visual**2).vouched_for()


def _check_budget(budget: Any, most: int, config: DraftConfig) -> None:
    """Raises unless the budget is an integer, and within bounds where it is known."""
    is_traced = isinstance(budget, jax.core.Tracer)
    value = budget if is_traced else np.asarray(budget)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{budget=} must be an integer, not {value.dtype}")
    if value.shape:
        raise ValueError(f"budget has shape {value.shape}; expected a scalar")
    if not is_traced and not 1 <= value <= most:
        raise ValueError(
            f"budget={value} must be within 1 and {most}, the {config.selection} "
            f"budget at sparsity={config.sparsity}"
        )


def _select(
    scores: Float[Array, "B N S S"],
    *,
    grid: VideoGrid,
    config: DraftConfig,
    budget: Int[Array, ""],
) -> BlockMask:
    """Selects the blocks of some heads; see `select_blocks`."""
    forced = _forced_pairs(grid, config)
    match config.selection:
        case "percentile":
            kept = _select_percentile(_rank_keys(scores, forced), forced, budget)
        case "row_topk":
            kept = _select_row_topk(scores, forced, budget)
        case "top_p":
            kept = _select_top_p(scores, forced, budget, mass=config.top_p)
    words, first_columns = _add_text_words(kept, grid)
    row_offsets, block_ids = packed_bits.lists(
        words, first_columns, mask_capacity(grid, config)
    )
    return BlockMask(row_offsets=row_offsets, block_ids=block_ids, grid=grid)


def compute_mask(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    *,
    grid: VideoGrid,
    config: DraftConfig,
    budget: int | Int[Array | np.ndarray, ""] | None = None,
    scale: float | None = None,
    order: Order = "raster",
    pooled: PooledTokens | None = None,
) -> BlockMask:
    """Drafts the attention map of a video and selects its block pairs.

    No gradient flows through the selection. Where the maps of all heads are large, few
    heads are drafted at a time: see `head_chunks`.

    Args:
      q: Queries of the whole sequence, T = `grid.num_tokens`.
      k: Keys, like q.
      grid: Geometry that defines the blocks.
      config: How the draft is made and what is selected.
      budget: See `select_blocks`.
      scale: Factor of the logits; 1 / sqrt(D) by default.
      order: How the visual tokens of q and k are ordered.
      pooled: See `draft_scores`.

    Returns:
      A mask with capacity `mask_capacity(grid, config)`.

    Raises:
      ValueError: As `draft_scores` and `select_blocks`.
      TypeError: As `draft_scores` and `select_blocks`.

    Source: DraftAttention (arXiv 2505.14708).
    """
    check_draft_inputs(q, k, grid, order)
    return unchecked_mask(
        q,
        k,
        grid=grid,
        config=config,
        budget=budget,
        scale=scale,
        order=order,
        pooled=pooled,
    )


def unchecked_mask(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    *,
    grid: VideoGrid,
    config: DraftConfig,
    budget: int | Int[Array | np.ndarray, ""] | None,
    scale: float | None,
    order: Order,
    pooled: PooledTokens | None,
) -> BlockMask:
    """Computes `compute_mask` for a caller that has checked q, k and order."""
    q, k, pooled = jax.lax.stop_gradient((q, k, pooled))
    pooled = pool_draft(q, k, grid=grid, config=config, order=order, pooled=pooled)

    def of_heads(by_heads: Any) -> BlockMask:
        own = jax.tree.map(lambda x: rearrange(x, "B N S D -> B S N D"), by_heads)
        scores = scores_of_pooled(own, grid=grid, config=config, scale=scale)
        return select_blocks(scores, grid=grid, config=config, budget=budget)

    by_heads = jax.tree.map(lambda x: rearrange(x, "B S N D -> B N S D"), pooled)
    mask = map_heads(of_heads, by_heads, map_size=grid.num_visual_blocks**2)
    return mask.vouched_for()


def _select_percentile(
    keys: UInt32[Array, "B N S S"],
    forced: Bool[np.ndarray, "S S"],
    budget: Int[Array, ""],
) -> UInt32[Array, "B N S W"]:
    """Ranks all pairs of a head together; an empty row then gets its best pair."""
    count = jnp.maximum(budget, int(forced.sum()))
    threshold = ranking.kth_largest_of_map(keys, count)
    of_rows = jnp.broadcast_to(threshold[..., None], keys.shape[:3])
    packed = ranking.pack_rows(keys, of_rows)
    kept = packed.largest_of_map(count)
    is_empty = (kept == 0).all(-1, keepdims=True)
    return jnp.where(is_empty, packed.best_of_row(), kept)


def _select_row_topk(
    scores: Float[Array, "B N S S"],
    forced: Bool[np.ndarray, "S S"],
    budget: Int[Array, ""],
) -> UInt32[Array, "B N S W"]:
    """Ranks the pairs of each row; every row has the same budget."""
    count = jnp.maximum(budget, forced.sum(-1, dtype=np.int32))
    if ranking.has_kernels(scores):
        return ranking.select_in_rows(
            scores, count, count, _words_of(forced), wanted=None
        )
    keys = _rank_keys(scores, forced)
    threshold = ranking.kth_largest_of_row(keys, count)
    return ranking.pack_rows(keys, threshold).largest_of_row(count)


def _select_top_p(
    probabilities: Float[Array, "B N S S"],
    forced: Bool[np.ndarray, "S S"],
    budget: Int[Array, ""],
    *,
    mass: float,
) -> UInt32[Array, "B N S W"]:
    """Keeps pairs of each row, best first, until they hold `mass` or are `budget`."""
    wanted = round(mass * MASS_UNITS)
    least = jnp.asarray(np.maximum(forced.sum(-1, dtype=np.int32), 1))
    most = jnp.maximum(budget, least)
    if ranking.has_kernels(probabilities):
        return ranking.select_in_rows(
            probabilities, least, most, _words_of(forced), wanted=wanted
        )
    return _select_top_p_xla(probabilities, forced, least, most, np.uint32(wanted))


def _select_top_p_xla(
    probabilities: Float[Array, "B N S S"],
    forced: Bool[np.ndarray, "S S"],
    least: Int[Array, " S"],
    most: Int[Array, " S"],
    wanted: np.uint32,
) -> UInt32[Array, "B N S W"]:
    """Selects as `_select_top_p` does, on any device."""
    keys = _rank_keys(probabilities, forced)
    units = jnp.nan_to_num(probabilities.astype(jnp.float32)) * MASS_UNITS
    units = jnp.round(jnp.clip(units, 0.0, MASS_UNITS)).astype(jnp.uint32)

    def at_or_above(key):
        is_in = keys >= key[..., None]
        return is_in.sum(-1, dtype=jnp.int32), _sum_up_to_one(is_in, units)

    def reached(key):
        count, held = at_or_above(key)
        return (count >= least) & ((held >= wanted) | (count >= most))

    threshold = ranking.largest_key(reached, keys.shape[:3])
    is_above = keys > threshold[..., None]
    above = is_above.sum(-1, dtype=jnp.int32)
    held = _sum_up_to_one(is_above, units)
    missing = wanted - jnp.minimum(held, wanted)
    # Pairs at the threshold are equal, so they hold the same mass.
    each = jnp.where(keys == threshold[..., None], units, 0).max(-1)
    num_missing = -(
        -missing.astype(jnp.int32) // jnp.maximum(each, 1).astype(jnp.int32)
    )
    count = jnp.clip(above + num_missing, least, most)
    return ranking.pack_rows(keys, threshold).largest_of_row(count)


def _sum_up_to_one(
    is_in: Bool[Array, "B N S S"], units: UInt32[Array, "B N S S"]
) -> UInt32[Array, "B N S"]:
    """Adds the chosen units of each row, up to MASS_UNITS: sums cannot wrap."""

    def add(a, b):
        return jnp.minimum(a + b, np.uint32(MASS_UNITS))

    chosen = jnp.where(is_in, units, jnp.uint32(0))
    return jax.lax.reduce(chosen, np.uint32(0), add, (chosen.ndim - 1,))


def _add_text_words(
    kept: UInt32[Array, "B N S W"], grid: VideoGrid
) -> tuple[UInt32[Array, "B N R words"], Int[np.ndarray, " words"]]:
    """Adds rows and columns of text blocks; all their pairs are kept.

    Returns the words and the column of the lowest bit of each. The words of the text
    stand beside those of the video: nothing is shifted into them.
    """
    starts = [
        np.arange(blocks.start, blocks.stop, packed_bits.BITS, dtype=np.int32)
        for blocks in (grid.visual_blocks, grid.text_blocks)
    ]
    if not grid.num_text_blocks:
        return kept, starts[0]
    full = [
        packed_bits.full(count)
        for count in (grid.num_visual_blocks, grid.num_text_blocks)
    ]
    text_columns = jnp.broadcast_to(full[1], (*kept.shape[:-1], full[1].size))
    columns = [kept, text_columns]
    is_before = grid.text_side == "before"
    if is_before:
        starts, full, columns = starts[::-1], full[::-1], columns[::-1]
    visual_rows = jnp.concatenate(columns, axis=-1)
    row = np.concatenate(full)
    text_rows = jnp.broadcast_to(row, (*kept.shape[:2], grid.num_text_blocks, row.size))
    rows = [text_rows, visual_rows] if is_before else [visual_rows, text_rows]
    return jnp.concatenate(rows, axis=-2), np.concatenate(starts)


def _rank_keys(
    scores: Float[Array, "B N S S"], forced: Bool[np.ndarray, "S S"]
) -> UInt32[Array, "B N S S"]:
    """Returns keys of the scores; forced pairs rank before all others."""
    keys = ranking.rank_keys(scores)
    return jnp.where(forced, ranking.FIRST, keys) if forced.any() else keys


def _words_of(forced: Bool[np.ndarray, "S S"]) -> UInt32[np.ndarray, "S W"] | None:
    """Returns the bits of the forced pairs, or None if there are none."""
    if not forced.any():
        return None
    size = forced.shape[-1]
    padded = np.pad(forced, ((0, 0), (0, -size % packed_bits.BITS)))
    octets = np.packbits(padded, axis=-1, bitorder="little")
    return octets.view("<u4").astype(np.uint32)


@functools.lru_cache(maxsize=64)
def _forced_pairs(grid: VideoGrid, config: DraftConfig) -> Bool[np.ndarray, "S S"]:
    """Returns the pairs that `keep_own_tile` and `keep_first_frame` keep always."""
    num_visual = grid.num_visual_blocks
    forced = np.zeros((num_visual, num_visual), np.bool_)
    if config.keep_own_tile:
        np.fill_diagonal(forced, True)
    if config.keep_first_frame:
        forced[:, : num_visual // grid.frames] = True
    forced.flags.writeable = False
    return forced
