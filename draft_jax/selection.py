"""Turns draft maps into block masks of static size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from draft_jax.block_mask import BlockMask
from draft_jax.config import DraftConfig, mask_capacity, static_budget
from draft_jax.draft_scores import draft_scores
from draft_jax.grid import VideoGrid
from draft_jax.pooling import Order


def select_blocks(
    scores: Float[Array, "B N S S"],
    *,
    grid: VideoGrid,
    config: DraftConfig,
    budget: int | Int[Array, ""] | None = None,
) -> BlockMask:
    """Chooses the block pairs to attend to, for each batch item and head.

    Ties go to the pair with the lower query block, then the lower key block. Every
    query block keeps at least one visual key block: a row that would be empty keeps
    its best pair beyond the budget. Text blocks are kept with everything, outside
    the budget.

    Args:
      scores: Draft map, larger is more important. For "top_p", probabilities: the
        rows sum to 1. NaN ranks last.
      grid: Geometry that defines the blocks, S = `grid.num_visual_blocks`.
      config: What is selected.
      budget: Pairs to keep: per head for "percentile", per row otherwise. The one of
        `config.sparsity` by default. It may be traced, and larger ones than the
        default are cut to it because the mask's capacity is static.

    Returns:
      A mask over all blocks of `grid`, with capacity `mask_capacity(grid, config)`.

    Raises:
      ValueError: The shape of scores does not fit the grid, or a concrete budget is
        not within 1 and the default.

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
    if budget is None:
        budget = most
    if isinstance(budget, (int, np.integer)) and not 1 <= budget <= most:
        raise ValueError(
            f"{budget=} must be within 1 and {most}, the {config.selection} budget "
            f"at sparsity={config.sparsity}"
        )
    budget = jnp.clip(jnp.asarray(budget, jnp.int32), 1, most)
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    forced = _forced_pairs(grid, config)
    match config.selection:
        case "percentile":
            kept = _select_percentile(scores, forced, budget)
        case "row_topk":
            kept = _select_row_topk(scores, forced, budget)
        case "top_p":
            kept = _select_top_p(scores, forced, budget, mass=config.top_p)
    return BlockMask.from_dense(
        add_text_blocks(_fill_empty_rows(kept, scores), grid),
        grid=grid,
        capacity=mask_capacity(grid, config),
    )


def compute_mask(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    *,
    grid: VideoGrid,
    config: DraftConfig,
    budget: int | Int[Array, ""] | None = None,
    scale: float | None = None,
    order: Order = "raster",
) -> BlockMask:
    """Drafts the attention map of a video and selects its block pairs.

    No gradient flows through the selection.

    Args:
      q: Queries of the whole sequence, T = `grid.num_tokens`.
      k: Keys, like q.
      grid: Geometry that defines the blocks.
      config: How the draft is made and what is selected.
      budget: See `select_blocks`.
      scale: Factor of the logits; 1 / sqrt(D) by default.
      order: How the visual tokens of q and k are ordered.

    Returns:
      A mask with capacity `mask_capacity(grid, config)`.

    Raises:
      ValueError: As `draft_scores` and `select_blocks`.

    Source: DraftAttention (arXiv 2505.14708).
    """
    q, k = jax.lax.stop_gradient((q, k))
    scores = draft_scores(q, k, grid=grid, config=config, scale=scale, order=order)
    return select_blocks(scores, grid=grid, config=config, budget=budget)


def add_text_blocks(
    kept: Bool[Array, "B N S S"], grid: VideoGrid
) -> Bool[Array, "B N R R"]:
    """Extends a map of visual pairs to all blocks; pairs with text are kept."""
    before = grid.visual_blocks.start
    after = grid.num_blocks - grid.visual_blocks.stop
    margin = (before, after)
    return jnp.pad(kept, ((0, 0), (0, 0), margin, margin), constant_values=True)


def keep_largest(
    values: Float[Array, "*rows C"], count: Int[Array, "*#rows"]
) -> Bool[Array, "*rows C"]:
    """Marks the `count` largest entries of each row; ties go to the lower index.

    Args:
      values: Entries to rank; none is NaN.
      count: How many to mark, 1 to C; may be traced.

    Returns:
      Exactly `count` True entries per row.
    """
    threshold = kth_largest(values, count)[..., None]
    above = values > threshold
    tied = values == threshold
    num_above = above.sum(-1, keepdims=True, dtype=jnp.int32)
    tie_number = jnp.cumsum(tied, axis=-1, dtype=jnp.int32)
    return above | (tied & (tie_number <= count[..., None] - num_above))


def kth_largest(
    values: Float[Array, "*rows C"], k: Int[Array, "*#rows"]
) -> Float[Array, "*rows"]:
    """The k-th largest entry of each row, k from 1.

    Selection needs nothing else from a ranking, so a faster algorithm (a radix
    select on a GPU) replaces this one function.
    """
    ascending = jnp.sort(values, axis=-1)
    index = jnp.broadcast_to(values.shape[-1] - k, values.shape[:-1])
    return jnp.take_along_axis(ascending, index[..., None], axis=-1)[..., 0]


def _select_percentile(
    scores: Float[Array, "B N S S"],
    forced: Bool[np.ndarray, "S S"],
    budget: Int[Array, ""],
) -> Bool[Array, "B N S S"]:
    """Ranks all pairs of a head together."""
    flat = _ranked(scores, forced).reshape(*scores.shape[:2], -1)
    count = jnp.maximum(budget, int(forced.sum()))
    return keep_largest(flat, count[None, None]).reshape(scores.shape)


def _select_row_topk(
    scores: Float[Array, "B N S S"],
    forced: Bool[np.ndarray, "S S"],
    budget: Int[Array, ""],
) -> Bool[Array, "B N S S"]:
    """Ranks the pairs of each row; every row has the same budget."""
    count = jnp.maximum(budget, forced.sum(-1, dtype=np.int32))
    return keep_largest(_ranked(scores, forced), count[None, None])


def _select_top_p(
    scores: Float[Array, "B N S S"],
    forced: Bool[np.ndarray, "S S"],
    budget: Int[Array, ""],
    *,
    mass: float,
) -> Bool[Array, "B N S S"]:
    """Keeps pairs of each row, best first, until they hold `mass` or are `budget`."""
    # A stable sort of the negated scores puts tied pairs in index order.
    order = jnp.argsort(-_ranked(scores, forced), axis=-1, stable=True)
    probabilities = jnp.take_along_axis(scores, order, axis=-1)
    mass_up_to = jnp.cumsum(probabilities, axis=-1)
    mass_before = jnp.pad(mass_up_to[..., :-1], [(0, 0)] * 3 + [(1, 0)])
    position = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    num_forced = forced.sum(-1, dtype=np.int32)[:, None]
    wanted = (mass_before < mass) & (position < budget)
    kept = wanted | (position < num_forced) | (position == 0)
    return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)


def _ranked(
    scores: Float[Array, "B N S S"], forced: Bool[np.ndarray, "S S"]
) -> Float[Array, "B N S S"]:
    """Puts the forced pairs before all others."""
    return jnp.where(forced, jnp.inf, scores) if forced.any() else scores


def _fill_empty_rows(
    kept: Bool[Array, "B N S S"], scores: Float[Array, "B N S S"]
) -> Bool[Array, "B N S S"]:
    """Gives each empty row its best pair; ties go to the lower key block."""
    best = jnp.argmax(scores, axis=-1)[..., None]
    is_best = jnp.arange(scores.shape[-1], dtype=best.dtype) == best
    return kept | (is_best & ~kept.any(-1, keepdims=True))


@functools.lru_cache(maxsize=64)
def _forced_pairs(grid: VideoGrid, config: DraftConfig) -> Bool[np.ndarray, "S S"]:
    """Pairs that `keep_own_tile` and `keep_first_frame` always keep."""
    num_visual = grid.num_visual_blocks
    forced = np.zeros((num_visual, num_visual), np.bool_)
    if config.keep_own_tile:
        np.fill_diagonal(forced, True)
    if config.keep_first_frame:
        forced[:, : num_visual // grid.frames] = True
    forced.flags.writeable = False
    return forced
