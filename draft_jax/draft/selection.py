"""Turns draft maps into block masks of static size."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

from draft_jax.block_mask import BlockMask
from draft_jax.config import (
    DraftConfig,
    mask_capacity,
    static_budget,
    warn_of_few_blocks,
)
from draft_jax.draft import head_chunks
from draft_jax.draft.means import count_dropped
from draft_jax.draft.one_pass import Draft, pool_draft
from draft_jax.draft.pooling import PooledTokens
from draft_jax.draft.scores import (
    axes_of_draft,
    check_draft_inputs,
    scale_of_heads,
    scores_of_draft,
)
from draft_jax.grid import VideoGrid
from pallas_kernels import ranking
from pallas_kernels.common import (
    SUPPORTED_DTYPES,
    AnyArray,
    Order,
    Scale,
    current_device,
    jit_once,
    on_own_shards,
    split_scale,
    to_jax,
    validation,
)
from pallas_kernels.ranking import RankingPath


def select_blocks(
    scores: Float[AnyArray, "B N S S"],
    *,
    grid: VideoGrid,
    config: DraftConfig,
    budget: int | Int[Array | np.ndarray | np.integer, ""] | None = None,
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
    (scores,) = to_jax(jax.lax.stop_gradient(scores))
    num_visual = grid.num_visual_blocks
    if scores.ndim != 4 or scores.shape[2:] != (num_visual, num_visual):
        raise ValueError(
            f"scores has shape {scores.shape}; expected [batch, heads, {num_visual}, "
            f"{num_visual}], one row and column per visual block of {grid}"
        )
    if scores.dtype.name not in SUPPORTED_DTYPES:
        raise TypeError(
            f"scores has dtype {scores.dtype.name}; accepted are "
            f"{', '.join(SUPPORTED_DTYPES)}"
        )
    _check_budget(budget, grid, config)
    warn_of_few_blocks(config.sparsity, grid)
    task = _Task.of(scores, grid, config)
    return _select_in_chunks(task, scores, budget).mask.vouched_for()


class Selected(NamedTuple):
    """What a draft selects.

    Attributes:
      mask: Kept block pairs.
      dropped: `Means.dropped` of this mask; None without compensation.
    """

    mask: BlockMask
    dropped: UInt8[Array, "B N R C"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Task:
    """What the programs of selection are compiled for, beside shapes."""

    grid: VideoGrid
    config: DraftConfig
    path: RankingPath
    max_chunk_bytes: int
    counts_dropped: bool  # beside the mask, where the config compensates

    @classmethod
    def of(
        cls,
        array: Array,
        grid: VideoGrid,
        config: DraftConfig,
        *,
        counts_dropped: bool = False,
    ) -> "_Task":
        """Returns the task of a call on this array, which says the device."""
        path = ranking.choose_path(grid.num_visual_blocks, current_device(array))
        return cls(
            grid=grid,
            config=config,
            path=path,
            max_chunk_bytes=head_chunks.MAX_CHUNK_BYTES,
            counts_dropped=counts_dropped and config.compensation is not None,
        )

    @property
    def results(self) -> tuple[str, ...]:
        """Axes of the arrays of `flat`."""
        lists = ("B N R", "B N M")
        return (*lists, "B N R C") if self.counts_dropped else lists

    def flat(self, found: Selected) -> tuple[Array, ...]:
        """Returns the arrays of what was selected."""
        return tuple(jax.tree.leaves(found))

    def whole(self, row_offsets, block_ids, dropped=None) -> Selected:
        """Inverts `flat`, for the task that vouches for its lists."""
        mask = BlockMask(row_offsets=row_offsets, block_ids=block_ids, grid=self.grid)
        return Selected(mask, dropped)

    def map_heads(
        self, function: Callable[..., Selected], arrays: Any, *shared: Any
    ) -> Selected:
        """Makes the masks of few heads at a time where maps are large."""
        return head_chunks.map_heads(
            function,
            arrays,
            *shared,
            map_size=self.grid.num_visual_blocks**2,
            max_bytes=self.max_chunk_bytes,
        )


@functools.partial(jit_once, static_argnums=0)
def _select_in_chunks(task: _Task, scores, budget) -> Selected:
    def run(scores, budget):
        budget = _clipped(budget, task)
        found = task.map_heads(
            lambda own, budget: _select(own, task, budget), scores, budget
        )
        return task.flat(found)

    run = on_own_shards(
        run,
        operation="select_blocks",
        operands=("scores: B N S S", "budget:"),
        results=task.results,
    )
    return task.whole(*run(scores, budget))


def _clipped(budget: Any, task: _Task) -> Int[Array, ""]:
    most = static_budget(task.config.sparsity, task.grid, task.config)
    if budget is None:
        budget = most
    return jnp.clip(jnp.asarray(budget, jnp.int32), 1, most)


def _check_budget(budget: Any, grid: VideoGrid, config: DraftConfig) -> None:
    """Raises unless the budget is an integer, and within bounds where it is known."""
    if budget is None:
        return
    most = static_budget(config.sparsity, grid, config)
    is_traced = isinstance(budget, jax.core.Tracer)
    value = budget if is_traced else np.asarray(jax.device_get(budget))
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
    scores: Float[Array, "B N S S"], task: _Task, budget: Int[Array, ""]
) -> Selected:
    """Selects the blocks of some heads; see `select_blocks`."""
    grid, config, path = task.grid, task.config, task.path
    forced = _forced_pairs(grid, config)
    per_row = forced.sum(-1, dtype=np.int32)
    match config.selection:
        case "percentile":
            count = jnp.maximum(budget, int(forced.sum()))
            kept = ranking.select_in_maps(scores, count, forced=forced, path=path)
        case "row_topk":
            count = jnp.maximum(budget, per_row)
            kept = ranking.select_in_rows(scores, count, forced=forced, path=path)
        case "top_p":
            least = jnp.asarray(np.maximum(per_row, 1))
            most = jnp.maximum(budget, least)
            kept = ranking.select_to_mass(
                scores, least, most, forced=forced, mass=config.top_p, path=path
            )
    words, first_columns = _add_text_words(kept, grid)
    row_offsets, block_ids = ranking.compress_rows(
        words, first_columns, mask_capacity(grid, config), path=path
    )
    dropped = None
    if task.counts_dropped and config.compensation is not None:
        # From the bits that the lists are made of: no scatter takes them apart again.
        of_tiles = ranking.unpack(kept, grid.num_visual_blocks)
        dropped = count_dropped(of_tiles, grid, config.compensation)
    return task.whole(row_offsets, block_ids, dropped)


def compute_mask(
    q: Float[AnyArray, "B T N D"],
    k: Float[AnyArray, "B T N D"],
    *,
    grid: VideoGrid,
    config: DraftConfig,
    budget: int | Int[Array | np.ndarray | np.integer, ""] | None = None,
    scale: Scale | None = None,
    order: Order = "raster",
    pooled: PooledTokens | None = None,
    v: Float[AnyArray, "B T N D"] | None = None,
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
      v: Values, like q; read by a `config.mask_maker` alone.

    Returns:
      A mask with capacity `mask_capacity(grid, config)`.

    Raises:
      ValueError: As `draft_scores` and `select_blocks`.
      TypeError: As `draft_scores` and `select_blocks`.

    Source: DraftAttention (arXiv 2505.14708).
    """
    q, k = to_jax(q, k)
    check_draft_inputs(q, k, grid, order)
    if v is not None:
        (v,) = to_jax(v)
        validation.check_alike({"q": q, "v": v})
    return unchecked_mask(
        q,
        k,
        v,
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
    v: Float[Array, "B T N D"] | None,
    *,
    grid: VideoGrid,
    config: DraftConfig,
    budget: int | Int[Array | np.ndarray | np.integer, ""] | None,
    scale: Scale | None,
    order: Order,
    pooled: PooledTokens | None,
) -> BlockMask:
    """Computes `compute_mask` for a caller that has checked q, k, v and order."""
    # A gradient of NumPy's arrays hands these through, and they may be pooled.
    arrays = jax.lax.stop_gradient((q, k, v, pooled))
    q, k, v, pooled = jax.tree.map(jnp.asarray, arrays)
    if config.mask_maker is not None:
        warn_of_few_blocks(config.sparsity, grid)
        _check_budget(budget, grid, config)
        scale = jax.lax.stop_gradient(scale)
        return _mask_of_maker(q, k, v, grid, config, budget, scale, order)
    draft = pool_draft(q, k, grid=grid, config=config, order=order, pooled=pooled)
    found = select_from_draft(
        draft, grid=grid, config=config, budget=budget, scale=scale
    )
    return found.mask


def select_from_draft(
    draft: Draft,
    *,
    grid: VideoGrid,
    config: DraftConfig,
    budget: int | Int[Array | np.ndarray | np.integer, ""] | None,
    scale: Scale | None,
    counts_dropped: bool = False,
) -> Selected:
    """Computes `compute_mask` of what was pooled; no gradient flows through it."""
    warn_of_few_blocks(config.sparsity, grid)
    _check_budget(budget, grid, config)
    draft, scale = jax.lax.stop_gradient((draft, scale))
    task = _Task.of(draft.pooled.q_mean, grid, config, counts_dropped=counts_dropped)
    known_scale, scale_array = split_scale(scale)
    found = _draft_in_chunks(task, known_scale, draft, budget, scale_array)
    return found._replace(mask=found.mask.vouched_for())


def _mask_of_maker(q, k, v, grid, config, budget, scale, order) -> BlockMask:
    """Calls the configuration's own maker, and checks what it returns."""
    if budget is None:
        budget = static_budget(config.sparsity, grid, config)
    mask = config.mask_maker(
        q, k, v, grid=grid, config=config, budget=budget, scale=scale, order=order
    )
    expected = (*q.shape[:1], q.shape[2], mask_capacity(grid, config))
    if mask.block_ids.shape != expected or mask.grid != grid:
        raise ValueError(
            f"mask_maker={config.mask_maker!r} has made a mask of shape "
            f"{mask.block_ids.shape} of {mask.grid}; expected {expected}, that is "
            f"[batch, heads, mask_capacity(grid, config)], of {grid}"
        )
    return mask


@functools.partial(jit_once, static_argnums=(0, 1))
def _draft_in_chunks(
    task: _Task, scale: float | None, draft: Draft, budget, scale_array
) -> Selected:
    """Selects from the scores of a draft, a few heads at a time."""

    def of_heads(by_heads: Any, budget: Array, scale_array: Array | None) -> Selected:
        own = jax.tree.map(lambda x: jnp.moveaxis(x, 1, -2), by_heads)
        scores = scores_of_draft(
            own,
            grid=task.grid,
            config=task.config,
            scale=scale_of_heads(scale_array, own) if scale is None else scale,
            max_bytes=task.max_chunk_bytes,
        )
        return _select(scores, task, budget)

    def run(draft, budget, scale_array):
        by_heads = jax.tree.map(lambda x: jnp.moveaxis(x, -2, 1), draft)
        shared = (_clipped(budget, task), scale_array)
        return task.flat(task.map_heads(of_heads, by_heads, *shared))

    run = on_own_shards(
        run,
        operation="compute_mask",
        operands=(axes_of_draft(draft), "budget:", "scale:"),
        results=task.results,
    )
    return task.whole(*run(draft, budget, scale_array))


def _add_text_words(
    kept: UInt32[Array, "B N S W"], grid: VideoGrid
) -> tuple[UInt32[Array, "B N R words"], Int[np.ndarray, " words"]]:
    """Adds rows and columns of text blocks; all their pairs are kept.

    Returns the words and the column of the lowest bit of each. The words of the text
    stand beside those of the video: nothing is shifted into them.
    """
    starts = [
        np.arange(blocks.start, blocks.stop, ranking.WORD_BITS, dtype=np.int32)
        for blocks in (grid.visual_blocks, grid.text_blocks)
    ]
    if not grid.num_text_blocks:
        return kept, starts[0]
    full = [
        ranking.all_set(count)
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
