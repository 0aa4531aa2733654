"""The backend "hopper": block-sparse attention on H100 and H200.

The forward pass is the kernel of `kernel`; derivatives are those of the XLA backend,
from the kernel's output and log-sum-exp.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.blocks import ChunkConfig
from pallas_kernels.attention.derivatives import Attention, attend
from pallas_kernels.attention.means import Means
from pallas_kernels.attention.sm90 import schedule
from pallas_kernels.attention.sm90.cta import Work
from pallas_kernels.attention.sm90.geometry import Geometry, geometry_of
from pallas_kernels.attention.sm90.kernel import attend_blocks
from pallas_kernels.attention.sm90.means import mean_blocks
from pallas_kernels.attention.sm90.means import plan_of as mean_plan
from pallas_kernels.attention.sm90.partition_lists import partition_lists
from pallas_kernels.attention.sm90.plan import (
    BLOCK,
    MAX_SMEM_BYTES,
    KernelConfig,
    Plan,
    smem_bytes,
)
from pallas_kernels.attention.sm90.repair import repair
from pallas_kernels.common import device
from pallas_kernels.common.batching import fold_mapped_axes
from pallas_kernels.common.device import current_device
from pallas_kernels.common.interfaces import (
    Backend,
    BlockGrid,
    BlockLists,
    Order,
    Problem,
    clear_padding,
    valid_lengths,
)
from pallas_kernels.common.linear_maps import sealed
from pallas_kernels.common.static import fold_scale
from pallas_kernels.common.sub_tiles import SubTiles
from pallas_kernels.common.validation import why_not_among

SUPPORTED_DTYPES = ("bfloat16", "float16")
SUPPORTED_HEAD_DIMS = (64, 128)


def hopper_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    mask: BlockLists,
    *,
    grid: BlockGrid,
    scale: float | Float[Array, ""],
    text_lengths: Int[Array, " B"] | None,
    order: Order,
    means: Means | None = None,
    config: KernelConfig | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B N T"]]:
    """Computes attention over kept blocks on a Hopper GPU.

    It is differentiable in both modes; derivatives run on XLA.

    Args:
      q: Queries, bfloat16 or float16.
      k: Keys.
      v: Values.
      mask: Kept block pairs.
      grid: Geometry of the blocks.
      scale: Factor on the logits; an array is multiplied into q: see `fold_scale`.
      text_lengths: Valid text tokens of each batch item; None means all.
      order: How the tokens are ordered; they are read and written in place.
      means: What stands for the blocks that each query block skips, or None.
      config: Buffers and scheduling; chosen by head dimension when None.
      interpret: Run the kernel on the CPU in GPU interpret mode.

    Returns:
      The output in q's dtype and the float32 log-sum-exp [B, N, T]; zeros and -inf
      for queries without a valid key.

    Raises:
      ValueError: The dtype, head dimension or block size is not supported, or the
        config needs too much shared memory.
    """
    cause = why_unsupported_shape(q.dtype.name, q.shape[-1], grid.block_size)
    if cause is not None:
        raise ValueError(f"the Hopper kernel cannot take these inputs: {cause}")
    if config is None:
        config = KernelConfig.for_head_dim(q.shape[-1])
    needed = smem_bytes(config, q.shape[-1], q.dtype.itemsize)
    if needed > MAX_SMEM_BYTES:
        raise ValueError(
            f"{config.num_slots=} needs {needed} bytes of shared memory; "
            f"{MAX_SMEM_BYTES} are available"
        )
    return _attend(
        q,
        k,
        v,
        mask,
        grid=grid,
        scale=scale,
        text_lengths=text_lengths,
        order=order,
        means=means,
        config=config,
        interpret=interpret,
    )


def _attend(
    q,
    k,
    v,
    mask,
    *,
    grid,
    scale,
    text_lengths,
    order,
    means: Means | None = None,
    config=None,
    interpret=None,
):
    """Computes `hopper_attention` for inputs that the kernel takes."""
    if config is None:
        config = KernelConfig.for_head_dim(q.shape[-1])
    q, scale = fold_scale(q, scale)
    has_lengths = text_lengths is not None
    if text_lengths is None:
        text_lengths = jnp.full(q.shape[0], grid.text_length, jnp.int32)
    sub_tiles = None if means is None else means.sub_tiles
    static = _Static(grid, order, scale, has_lengths, sub_tiles, config, interpret)
    attention = Attention(
        forward=functools.partial(_forward, static),
        grid=grid,
        order=order,
        scale=static.scale,
        config=ChunkConfig.for_platform(current_device(q).platform),
        sub_tiles=sub_tiles,
    )
    arrays = (q, k, v, mask.row_offsets, mask.block_ids, text_lengths)
    return attend(attention, *arrays, *(() if means is None else means[:3]))


class _Static(NamedTuple):
    grid: BlockGrid
    order: Order
    scale: float
    has_text_lengths: bool
    sub_tiles: SubTiles | None  # of the means, or None without
    config: KernelConfig
    interpret: plgpu.InterpretGPUParams | None


def _forward(static: _Static, q, k, v, row_offsets, block_ids, text_lengths, *means):
    if static.has_text_lengths:
        # The kernel skips padded keys by their logits. A value that is NaN would pass,
        # and a query's NaN would make its whole block's sums untrusted.
        q, v = (clear_padding(x, static.grid, text_lengths) for x in (q, v))
    run = fold_mapped_axes(functools.partial(_run, static))
    return sealed(run, q, k, v, row_offsets, block_ids, text_lengths, *means)


@functools.partial(jax.jit, static_argnums=0)
def _run(static: _Static, q, k, v, row_offsets, block_ids, text_lengths, *means):
    grid, shape = static.grid, q.shape
    batch, _, num_heads, _ = shape
    num_blocks = grid.num_blocks
    geometry = geometry_of(grid, static.order)  # type: ignore[arg-type]  # hashable
    plan = _plan(static, geometry, shape, q.dtype)
    if geometry.frame_shape:
        q, k, v = (
            x.reshape(batch, *geometry.frame_shape, *shape[2:]) for x in (q, k, v)
        )
    row_offsets = row_offsets.reshape(batch * num_heads, num_blocks + 1)
    block_ids = block_ids.reshape(batch * num_heads, -1)
    work = _work(static, geometry, plan, row_offsets, block_ids, text_lengths)
    if static.sub_tiles is not None:
        counts = jnp.diff(row_offsets)
        mean_k, mean_v, dropped = means
        given = Means(mean_k, mean_v, dropped, static.sub_tiles)
        blocks = mean_blocks(given, counts, geometry.copies)
        work = work._replace(means=blocks)
    out, lse = attend_blocks(q, k, v, work, plan=plan, interpret=static.interpret)
    if not plan.config.exact_softmax:
        out, lse = repair(
            q, k, v, work, out, lse, plan=plan, interpret=static.interpret
        )
    lse = lse.reshape(batch, num_heads, num_blocks * BLOCK)
    if geometry.moves_lse:
        lse = lse[:, :, geometry.scatter]
    return out.reshape(shape), lse


def _work(
    static: _Static, geometry: Geometry, plan: Plan, row_offsets, block_ids, lengths
) -> Work:
    width_ends = jnp.zeros((1, 1, 1), jnp.int32)  # not read where there is one width
    if len(plan.widths) > 1:
        block_ids, width_ends = partition_lists(
            row_offsets,
            block_ids,
            geometry.width_of_block,
            num_classes=len(plan.widths),
            interpret=static.interpret,
        )
    counts = jnp.diff(row_offsets)
    num_behind = 0 if plan.means is None else plan.means.num_blocks
    full_list = np.argsort(geometry.width_of_block, stable=True)
    return Work(
        row_offsets=row_offsets,
        block_ids=block_ids,
        width_ends=width_ends,
        full_list=jnp.asarray(full_list, jnp.int32),
        launch_order=schedule.launch_order(
            counts, device.num_multiprocessors(), num_behind
        ),
        num_query_blocks=jnp.full(1, counts.size, jnp.int32),
        addresses=jax.tree.map(jnp.asarray, geometry.addresses),
        lengths=jnp.asarray(static.grid.block_lengths),
        valid=valid_lengths(static.grid, lengths),
    )


def _plan(static: _Static, geometry: Geometry, shape, dtype) -> Plan:
    batch, _, num_heads, head_dim = shape
    num_blocks = static.grid.num_blocks
    num_query_blocks = batch * num_heads * num_blocks
    has_text_lengths = static.has_text_lengths
    return Plan(
        config=static.config,
        num_blocks=num_blocks,
        num_key_blocks=num_blocks,
        num_heads=num_heads,
        head_dim=head_dim,
        num_ctas=num_query_blocks,
        persistent=False,
        pairs=num_query_blocks % 2 == 0 and geometry.copies.uses_tma,
        is_dense=False,
        scale=static.scale,
        copies=geometry.copies,
        widths=geometry.widths_with_text if has_text_lengths else geometry.widths,
        masks_queries=has_text_lengths,
        has_short_blocks=geometry.stores_short_blocks,
        grows=dtype == jnp.float16,
        interpreted=static.interpret is not None,
        means=None if static.sub_tiles is None else mean_plan(static.sub_tiles),
    )


def why_unsupported_shape(dtype: str, head_dim: int, block_size: int) -> str | None:
    """Returns why the kernel cannot take such inputs on any device, or None."""
    if cause := why_not_among(SUPPORTED_DTYPES, dtype):
        return cause
    if cause := why_not_among(SUPPORTED_HEAD_DIMS, head_dim, "a head dimension of {}"):
        return cause
    # A query block costs what one of BLOCK tokens does, however few it has.
    if not BLOCK // 2 < block_size <= BLOCK:
        return (
            f"it takes blocks of {BLOCK // 2 + 1} to {BLOCK} tokens, such as tile "
            f"(8, 16), not {block_size}"
        )
    return None


def _why_unsupported(problem: Problem) -> str | None:
    if cause := problem.device.why_not_hopper():
        return cause
    return why_unsupported_shape(
        problem.dtype, problem.head_dim, problem.grid.block_size
    )


def _why_slow(problem: Problem) -> str | None:
    cause = geometry_of(problem.grid, problem.order).why_single_rows  # type: ignore[arg-type]
    if cause is None or problem.grid.num_tokens < BLOCK:
        return None  # a few tokens take no time either way
    return f"its blocks are copied row by row: {cause}"


BACKEND = Backend(
    name="hopper",
    function=lambda *arrays, device, **options: _attend(*arrays, **options),
    why_unsupported=_why_unsupported,
    why_slow=_why_slow,
    takes_raster=True,
)
