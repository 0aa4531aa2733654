"""DraftAttention: block-sparse attention guided by a low-resolution draft."""

from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from draft_jax.block_mask import BlockMask
from draft_jax.config import DraftConfig, mask_capacity
from draft_jax.draft.pooling import PooledTokens
from draft_jax.draft.selection import add_text_blocks, compute_mask
from draft_jax.grid import VideoGrid
from draft_jax.schedule import DraftStep
from pallas_kernels import BackendName, block_sparse_attention, dense_attention
from pallas_kernels.common import validation
from pallas_kernels.common.interfaces import Order


@overload
def draft_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    *,
    grid: VideoGrid,
    config: DraftConfig,
    text_lengths: Int[Array, " B"] | None = None,
    order: Order = "raster",
    mask: BlockMask | Bool[Array, "#B #N K K"] | None = None,
    budget: int | Int[Array | np.ndarray, ""] | None = None,
    pooled: PooledTokens | None = None,
    scale: float | None = None,
    backend: BackendName = "auto",
    return_mask: Literal[False] = False,
    check_finite: bool = False,
) -> Float[Array, "B T N D"]: ...


@overload
def draft_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    *,
    grid: VideoGrid,
    config: DraftConfig,
    text_lengths: Int[Array, " B"] | None = None,
    order: Order = "raster",
    mask: BlockMask | Bool[Array, "#B #N K K"] | None = None,
    budget: int | Int[Array | np.ndarray, ""] | None = None,
    pooled: PooledTokens | None = None,
    scale: float | None = None,
    backend: BackendName = "auto",
    return_mask: Literal[True],
    check_finite: bool = False,
) -> tuple[Float[Array, "B T N D"], BlockMask]: ...


def draft_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    *,
    grid: VideoGrid,
    config: DraftConfig,
    text_lengths: Int[Array, " B"] | None = None,
    order: Order = "raster",
    mask: BlockMask | Bool[Array, "#B #N K K"] | None = None,
    budget: int | Int[Array | np.ndarray, ""] | None = None,
    pooled: PooledTokens | None = None,
    scale: float | None = None,
    backend: BackendName = "auto",
    return_mask: bool = False,
    check_finite: bool = False,
) -> Float[Array, "B T N D"] | tuple[Float[Array, "B T N D"], BlockMask]:
    """Attends within the block pairs that a low-resolution draft ranks highest.

    Batch items and heads have their own masks and do not influence each other.

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
      mask: Attend to these pairs instead of drafting. A `BlockMask`, or a boolean map
        per batch item and head (either may be 1) over the visual blocks (text is kept
        with everything) or over all blocks, in tiled order. A query block that keeps
        nothing returns zeros.
      budget: See `select_blocks`.
      pooled: q and k pooled before, such as by `norm_rope_pool`, instead of here.
      scale: Factor of the logits; 1 / sqrt(D) by default.
      backend: See `pallas_kernels.block_sparse_attention`.
      return_mask: Also return the mask that was used.
      check_finite: Raise on NaN or infinity in q, k or v. It waits for the arrays, so
        it is for debugging, and it cannot work under jit: use
        `jax.config.update("jax_debug_nans", True)` there. Unchecked, NaN stays within
        its batch item and head.

    Returns:
      The output, like q. With `return_mask`, also the mask.

    Raises:
      ValueError: A shape does not fit the grid, an option is unknown, a length is out
        of range, or `check_finite` finds a NaN or infinity or traced arrays.
      TypeError: A dtype is not supported, or mask is neither a BlockMask nor boolean.

    Source: DraftAttention (arXiv 2505.14708).
    """
    _check_inputs(q, k, v, grid, order, check_finite)
    if mask is not None and budget is not None:
        raise ValueError(f"{budget=} has no effect when mask is given; leave it out")
    if mask is not None and pooled is not None:
        raise ValueError("pooled has no effect when mask is given; leave it out")
    if mask is None:
        used_mask = compute_mask(
            q,
            k,
            grid=grid,
            config=config,
            budget=budget,
            scale=scale,
            order=order,
            pooled=pooled,
        )
    else:
        used_mask = _as_block_mask(mask, grid, batch=q.shape[0], num_heads=q.shape[2])
    out = block_sparse_attention(
        q,
        k,
        v,
        used_mask,
        grid=grid,
        scale=scale,
        text_lengths=text_lengths,
        order=order,
        backend=backend,
    )
    return (out, used_mask) if return_mask else out


def scheduled_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    *,
    grid: VideoGrid,
    config: DraftConfig,
    step: DraftStep,
    mask: BlockMask,
    text_lengths: Int[Array, " B"] | None = None,
    order: Order = "raster",
    pooled: PooledTokens | None = None,
    scale: float | None = None,
    backend: BackendName = "auto",
) -> tuple[Float[Array, "B T N D"], BlockMask]:
    """One layer on one step of a `SparsitySchedule`.

    Dense or sparse, and a new or a reused mask, are chosen by the values of `step`.
    Where they are known (`StepKind` shows how), they choose when the program is traced:
    it has no conditional, and there is one program for each kind of step. Where jit
    traces them (the step is its argument), one program serves all steps, with two
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
      mask: This layer's mask from the step before, or `initial_mask`.
      text_lengths: See `draft_attention`.
      order: See `draft_attention`.
      pooled: See `draft_attention`; used only where a new mask is made.
      scale: Factor of the logits; 1 / sqrt(D) by default.
      backend: See `pallas_kernels.block_sparse_attention`.

    Returns:
      The output, like q, and the mask to pass on the next step.

    Raises:
      ValueError: As `draft_attention`, or `step.dense` is not a scalar, or the mask's
        capacity is not `mask_capacity(grid, config)`.
      TypeError: A dtype is not supported.

    Source: DraftAttention (arXiv 2505.14708); its first steps are dense.
    """
    _check_inputs(q, k, v, grid, order, False)
    if step.dense.ndim:
        raise ValueError(
            f"step.dense has shape {step.dense.shape}; expected a scalar: "
            "pass step.for_layer(layer)"
        )
    validation.check_mask(q, mask, grid)
    if mask.capacity != (capacity := mask_capacity(grid, config)):
        raise ValueError(
            f"mask has capacity {mask.capacity}; {grid} and {config} need {capacity}: "
            "start from initial_mask(grid, config, ...)"
        )

    def run_dense(mask: BlockMask):
        out = dense_attention(
            q, k, v, grid=grid, scale=scale, text_lengths=text_lengths
        )
        return out, mask

    def run_sparse(mask: BlockMask):
        mask = _choose(
            step.refresh,
            lambda mask: compute_mask(
                q,
                k,
                grid=grid,
                config=config,
                budget=step.budget,
                scale=scale,
                order=order,
                pooled=pooled,
            ),
            lambda mask: mask,
            mask,
        )
        out = block_sparse_attention(
            q,
            k,
            v,
            mask,
            grid=grid,
            scale=scale,
            text_lengths=text_lengths,
            order=order,
            backend=backend,
        )
        return out, mask

    return _choose(step.dense, run_dense, run_sparse, mask)


def _choose(predicate: Bool[Array | np.ndarray, ""], if_true, if_false, *operands):
    """`lax.cond`, decided now where the predicate is known."""
    if isinstance(predicate, jax.core.Tracer):
        return jax.lax.cond(predicate, if_true, if_false, *operands)
    return (if_true if predicate else if_false)(*operands)


def initial_mask(
    grid: VideoGrid, config: DraftConfig, *, batch: int, num_heads: int
) -> BlockMask:
    """A mask to start from, of the capacity that `config` needs.

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
    mask = BlockMask.from_dense(
        add_text_blocks(own, grid), grid=grid, capacity=mask_capacity(grid, config)
    )
    return jax.tree.map(lambda x: jnp.tile(x, (batch, num_heads, 1)), mask)


def _check_inputs(
    q: Array, k: Array, v: Array, grid: VideoGrid, order: str, check_finite: bool
) -> None:
    validation.check_qkv(q, k, v)
    validation.check_tokens(q, grid)
    validation.check_order(order)
    if not check_finite:
        return
    for name, array in (("q", q), ("k", k), ("v", v)):
        if isinstance(array, jax.core.Tracer):
            raise ValueError(
                f"{check_finite=} cannot look into traced {name}: call outside jit, "
                'or use jax.config.update("jax_debug_nans", True)'
            )
        bad = np.argwhere(~np.isfinite(np.asarray(array, np.float32)))
        if len(bad):
            where = ", ".join(str(index) for index in bad[0])
            raise ValueError(
                f"{name}[{where}] is {array[tuple(bad[0])]}, the first of {len(bad)} "
                f"values of {name} that are not finite; all must be"
            )


def _as_block_mask(
    mask: BlockMask | Array, grid: VideoGrid, *, batch: int, num_heads: int
) -> BlockMask:
    """Accepts the masks that users pass."""
    if isinstance(mask, BlockMask):
        return mask
    if not hasattr(mask, "dtype") or mask.dtype != jnp.bool_:
        kind = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(f"mask is {kind}; expected a BlockMask or a boolean array")
    num_visual, num_blocks = grid.num_visual_blocks, grid.num_blocks
    sides = sorted({num_visual, num_blocks})
    if (
        mask.ndim != 4
        or mask.shape[0] not in (1, batch)
        or mask.shape[1] not in (1, num_heads)
        or mask.shape[2] not in sides
        or mask.shape[2] != mask.shape[3]
    ):
        accepted = " or ".join(f"[{batch}, {num_heads}, {n}, {n}]" for n in sides)
        raise ValueError(
            f"mask has shape {mask.shape}; expected {accepted}, the first two sizes "
            f"may be 1: visual blocks or all blocks of {grid}"
        )
    if mask.shape[2] == num_visual:
        mask = add_text_blocks(mask, grid)
    dense = jnp.broadcast_to(mask, (batch, num_heads, num_blocks, num_blocks))
    return BlockMask.from_dense(dense, grid=grid)
