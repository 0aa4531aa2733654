"""DraftAttention: block-sparse attention guided by a low-resolution draft."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from draft_jax.block_mask import BlockMask
from draft_jax.config import DraftConfig, mask_capacity, warn_of_few_blocks
from draft_jax.correction import correct
from draft_jax.draft.means import means_for, unchecked_means
from draft_jax.draft.one_pass import pool_layer
from draft_jax.draft.pooling import PooledTokens
from draft_jax.draft.selection import select_from_draft, unchecked_mask
from draft_jax.grid import VideoGrid
from draft_jax.schedule import DraftStep
from pallas_kernels import (
    BackendName,
    Means,
    unchecked_block_sparse_attention,
    unchecked_dense_attention,
)
from pallas_kernels.common import (
    AnyArray,
    Order,
    Scale,
    alike,
    to_jax,
    validation,
)


def draft_attention(
    q: Float[AnyArray, "B T N D"],
    k: Float[AnyArray, "B T N D"],
    v: Float[AnyArray, "B T N D"],
    *,
    grid: VideoGrid,
    config: DraftConfig,
    text_lengths: Int[AnyArray, " B"] | None = None,
    order: Order = "raster",
    scale: Scale | None = None,
    backend: BackendName = "auto",
) -> Float[Array, "B T N D"]:
    """Attends within the block pairs that a low-resolution draft ranks highest.

    Batch items and heads have their own masks and do not influence each other.

    It is `compute_mask`, `make_means` where `config.compensation` asks for means, and
    `pallas_kernels.block_sparse_attention`; what `config.correction` asks for is added
    to their output. Call these for a mask, a budget or pooled tokens of your own, or to
    look at the mask; their output has no correction.
    `BlockMask.from_visual` and `BlockMask.from_dense` turn boolean maps into masks.

    Args:
      q: Queries, T = `grid.num_tokens`: visual and text tokens, where `grid` says.
      k: Keys, like q.
      v: Values, like q.
      grid: Geometry of the sequence. Static.
      config: What is computed. Static.
      text_lengths: Valid text tokens of each batch item, the first ones of the text.
        Keys past them are not attended to; outputs of queries past them are zero.
        None means all.
      order: "raster" if the visual tokens of q, k, v and of the result are in frame,
        row, column order; "tiled" if they are permuted by `grid.tile_order`. The
        Hopper kernel reads both in place where the tile's width divides that of the
        frame; elsewhere raster order costs a permutation of q, k, v and the output.
      scale: Factor of the logits; 1 / sqrt(D) by default.
      backend: See `pallas_kernels.block_sparse_attention`.

    Returns:
      The output, like q. NaN and infinity stay within their batch item and head; see
      `check_finite`.

    Raises:
      ValueError: A shape does not fit the grid, an option is unknown, or a length is
        out of range.
      TypeError: A dtype is not supported.

    Source: DraftAttention (arXiv 2505.14708).
    """
    q, k, v = to_jax(q, k, v)
    known_scale, text_lengths = validation.check_attention(
        q, k, v, grid=grid, order=order, scale=scale, text_lengths=text_lengths
    )
    mask, means = _new_mask(
        q,
        k,
        v,
        grid=grid,
        config=config,
        budget=None,
        scale=scale,
        order=order,
        pooled=None,
    )
    return _attend_sparsely(
        q,
        k,
        v,
        mask,
        means,
        grid=grid,
        config=config,
        scale=known_scale,
        text_lengths=text_lengths,
        order=order,
        backend=backend,
    )


def scheduled_attention(
    q: Float[AnyArray, "B T N D"],
    k: Float[AnyArray, "B T N D"],
    v: Float[AnyArray, "B T N D"],
    *,
    grid: VideoGrid,
    config: DraftConfig,
    step: DraftStep,
    mask: BlockMask | None,
    text_lengths: Int[AnyArray, " B"] | None = None,
    order: Order = "raster",
    pooled: PooledTokens | None = None,
    scale: Scale | None = None,
    backend: BackendName = "auto",
) -> tuple[Float[Array, "B T N D"], BlockMask | None]:
    """Runs one layer on one step of a `SparsitySchedule`.

    Dense or sparse, and a new or a reused mask, are chosen by the values of `step`.
    Where they are known (`StepKind` shows how), they choose when the program is traced:
    it has no conditional, and there is one program for each kind of step. Where jit
    traces them (the step is its argument), one program serves all steps. It has two
    conditionals in each layer, for which XLA waits on the host on a GPU. (Under vmap
    over `step` both branches run.) `budget` may be traced either way. Outside jit a
    step of arrays on a device is read, which waits for them; plans hold NumPy's arrays.

    Args:
      q: Queries, T = `grid.num_tokens`.
      k: Keys, like q.
      v: Values, like q.
      grid: Geometry of the sequence. Static.
      config: What a sparse layer computes. Static.
      step: What to do; `step.dense` is a scalar (`DraftStep.for_layer`).
      mask: This layer's mask from the step before, or `initial_mask`. None where no
        mask is kept, such as in dense layers or with mask_refresh=1: each sparse step
        makes a new one, also one whose traced `refresh` is False.
      text_lengths: See `draft_attention`.
      order: See `draft_attention`.
      pooled: See `compute_mask`; used only where a new mask is made.
      scale: Factor of the logits; 1 / sqrt(D) by default.
      backend: See `pallas_kernels.block_sparse_attention`.

    Returns:
      The output, like q, and the mask to pass on the next step; None if mask is None.

    Raises:
      ValueError: As `draft_attention`, or `step.dense` is not a scalar, the mask's
        capacity is not `mask_capacity(grid, config)`, or it is None where a sparse
        step reuses it.
      TypeError: A dtype is not supported.

    Source: DraftAttention (arXiv 2505.14708); its first steps are dense.
    """
    q, k, v = to_jax(q, k, v)
    # Before a conditional, which would not say what is wrong with its branches.
    known_scale, text_lengths = validation.check_attention(
        q, k, v, grid=grid, order=order, scale=scale, text_lengths=text_lengths
    )
    _check_step(step)
    if mask is None:
        _check_nothing_to_reuse(step)
    else:
        _check_mask(mask, q, grid, config)
    warn_of_few_blocks(config.sparsity, grid)
    if any(isinstance(flag, jax.core.Tracer) for flag in (step.dense, step.refresh)):
        # Both branches return the mask: the old one is sharded like a new one.
        names = ("q: B T N D", "k: B T N D", "v: B T N D", "mask: B N R")
        q, k, v, mask = alike((q, k, v, mask), names, operation="scheduled_attention")

    def run_dense(mask: BlockMask | None):
        out = unchecked_dense_attention(
            q, k, v, grid=grid, scale=known_scale, text_lengths=text_lengths
        )
        return out, mask

    def make(_: BlockMask | None):
        return _new_mask(
            q,
            k,
            v,
            grid=grid,
            config=config,
            budget=step.budget,
            scale=scale,
            order=order,
            pooled=pooled,
        )

    def reuse(mask: BlockMask):
        validation.check_lists(mask)
        return mask, _means(k, v, mask, config, order)

    def run_sparse(mask: BlockMask | None):
        if mask is None:
            used, means = make(mask)
        else:
            used, means = _choose(step.refresh, make, reuse, mask)
        out = _attend_sparsely(
            q,
            k,
            v,
            used,
            means,
            grid=grid,
            config=config,
            scale=known_scale,
            text_lengths=text_lengths,
            order=order,
            backend=backend,
        )
        return out, None if mask is None else used

    return _choose(step.dense, run_dense, run_sparse, mask)


def _attend_sparsely(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    mask: BlockMask,
    means: Means | None,
    *,
    grid: VideoGrid,
    config: DraftConfig,
    scale: Scale,
    text_lengths: Int[Array, " B"] | None,
    order: Order,
    backend: BackendName,
) -> Float[Array, "B T N D"]:
    """Attends within a mask, with means for the rest, and corrects what they leave."""
    out = unchecked_block_sparse_attention(
        q,
        k,
        v,
        mask,
        grid=grid,
        order=order,
        scale=scale,
        text_lengths=text_lengths,
        means=means,
        backend=backend,
    )
    return correct(
        out,
        q,
        k,
        v,
        grid=grid,
        config=config,
        scale=scale,
        text_lengths=text_lengths,
        order=order,
    )


def _new_mask(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    *,
    grid: VideoGrid,
    config: DraftConfig,
    budget: int | Int[Array | np.ndarray | np.integer, ""] | None,
    scale: Scale | None,
    order: Order,
    pooled: PooledTokens | None,
) -> tuple[BlockMask, Means | None]:
    """Makes a mask, and what stands for the blocks that it skips."""
    if config.mask_maker is not None or config.compensation is None:
        mask = unchecked_mask(
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
        return mask, _means(k, v, mask, config, order)
    draft, tokens = pool_layer(
        q, k, v, grid=grid, config=config, order=order, pooled=pooled
    )
    mask, dropped = select_from_draft(
        draft,
        grid=grid,
        config=config,
        budget=budget,
        scale=scale,
        counts_dropped=True,
    )
    assert dropped is not None, "it is counted where the config compensates"
    return mask, means_for(tokens, dropped, grid, config.compensation)


def _means(
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    mask: BlockMask,
    config: DraftConfig,
    order: Order,
) -> Means | None:
    """Returns what stands for the blocks that a mask skips, if anything does."""
    if config.compensation is None:
        return None
    return unchecked_means(k, v, mask, config.compensation, order)


def _check_step(step: DraftStep) -> None:
    """Raises unless the step is that of one layer."""
    if step.dense.ndim:
        raise ValueError(
            f"step.dense has shape {step.dense.shape}; expected a scalar: "
            "pass step.for_layer(layer)"
        )


def _check_nothing_to_reuse(step: DraftStep) -> None:
    """Raises if the step is known to be sparse and to reuse a mask."""
    flags = (step.dense, step.refresh)
    if not any(isinstance(flag, jax.core.Tracer) or flag for flag in flags):
        raise ValueError(
            "mask=None, but the step reuses one: step.refresh is False. Pass the mask "
            "that the step before returned, or use a schedule with mask_refresh=1"
        )


def _check_mask(
    mask: BlockMask, q: Float[Array, "B T N D"], grid: VideoGrid, config: DraftConfig
) -> None:
    """Raises unless the mask fits q and the grid, and new masks fit in its place."""
    validation.check_mask(q, mask, grid)
    if mask.capacity != (capacity := mask_capacity(grid, config)):
        raise ValueError(
            f"mask has capacity {mask.capacity}; {grid} and {config} need {capacity}: "
            "start from initial_mask(grid, config, ...)"
        )


def _choose(predicate: Bool[Array | np.ndarray, ""], if_true, if_false, *operands):
    """Chooses like `lax.cond`, but at once where the predicate is known."""
    if isinstance(predicate, jax.core.Tracer):
        return jax.lax.cond(predicate, if_true, if_false, *operands)
    return (if_true if predicate else if_false)(*operands)


def initial_mask(
    grid: VideoGrid, config: DraftConfig, *, batch: int, num_heads: int
) -> BlockMask:
    """Makes a mask to start from, of the capacity that `config` needs.

    Each visual block attends to itself and to the text. Schedules replace it on the
    first sparse step; it only has to be valid.

    Args:
      grid: Geometry of the sequence.
      config: What is selected later.
      batch: Batch size, B.
      num_heads: Attention heads, N.

    Returns:
      A mask with capacity `mask_capacity(grid, config)`.
    """
    own = jnp.eye(grid.num_visual_blocks, dtype=jnp.bool_)[None, None]
    mask = BlockMask.from_visual(own, grid=grid, capacity=mask_capacity(grid, config))
    repeated = jax.tree.map(lambda x: jnp.tile(x, (batch, num_heads, 1)), mask)
    return repeated.vouched_for()
