"""The backend "hopper": block-sparse attention on H100 and H200.

The forward pass is the kernel of `block_sparse_attention_sm90`; gradients are the XLA
backend's, from the kernel's output and log-sum-exp.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import xla
from pallas_kernels.attention.sm90 import plan as sm90
from pallas_kernels.attention.sm90.geometry import Geometry, geometry
from pallas_kernels.attention.sm90.kernel import (
    Work,
    attend_blocks,
    attend_blocks_again,
)
from pallas_kernels.attention.sm90.partition_lists import partition_lists
from pallas_kernels.common.batching import fold_mapped_axes
from pallas_kernels.common.interfaces import (
    Backend,
    BlockGrid,
    BlockLists,
    Order,
    Problem,
    valid_lengths,
)

SUPPORTED_DTYPES = ("bfloat16", "float16")
SUPPORTED_HEAD_DIMS = (64, 128)
NUM_MULTIPROCESSORS = 132  # of an H100 or H200 SXM, where no GPU can be asked


def hopper_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    mask: BlockLists,
    *,
    grid: BlockGrid,
    scale: float,
    text_lengths: Int[Array, " B"] | None,
    order: Order = "tiled",
    config: sm90.KernelConfig | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B N T"]]:
    """Attention over kept blocks on a Hopper GPU, differentiable in reverse mode.

    Args:
      q: Queries, bfloat16 or float16.
      k: Keys.
      v: Values.
      mask: Kept block pairs.
      grid: Geometry of the blocks.
      scale: Factor on the logits.
      text_lengths: Valid text tokens of each batch item; None means all.
      order: How the tokens are ordered; they are read and written in place.
      config: Buffers and scheduling; chosen by head dimension when None.
      interpret: Run the kernel on the CPU in GPU interpret mode.

    Returns:
      The output in q's dtype and the float32 log-sum-exp [B, N, T]; zeros and -inf
      for queries without a valid key.

    Raises:
      ValueError: The dtype, head dimension or block size is not supported, or the
        config needs too much shared memory.
    """
    if cause := why_unsupported_shape(q.dtype.name, q.shape[-1], grid.block_size):
        raise ValueError(f"the Hopper kernel cannot take these inputs: {cause}")
    if config is None:
        config = sm90.KernelConfig.for_head_dim(q.shape[-1])
    needed = sm90.smem_bytes(config, q.shape[-1], q.dtype.itemsize)
    if needed > sm90.MAX_SMEM_BYTES:
        raise ValueError(
            f"{config.num_slots=} needs {needed} bytes of shared memory; "
            f"{sm90.MAX_SMEM_BYTES} are available"
        )
    has_lengths = text_lengths is not None
    if text_lengths is None:
        text_lengths = jnp.full(q.shape[0], grid.text_length, jnp.int32)
    static = _Static(grid, order, float(scale), has_lengths, config, interpret)
    return _attention(static, q, k, v, mask.row_offsets, mask.block_ids, text_lengths)


class _Static(NamedTuple):
    grid: BlockGrid
    order: Order
    scale: float
    has_text_lengths: bool
    config: sm90.KernelConfig
    interpret: plgpu.InterpretGPUParams | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q, k, v, row_offsets, block_ids, text_lengths):
    outputs, _ = _forward(static, q, k, v, row_offsets, block_ids, text_lengths)
    return outputs


def _forward(static: _Static, *arrays):
    out, lse = fold_mapped_axes(functools.partial(_run, static))(*arrays)
    return (out, lse), (*arrays, out, lse)


def _backward(static: _Static, residuals, cotangents):
    grid = static.grid
    if static.order == "tiled":
        return xla.attention_gradients(
            residuals, cotangents, grid=grid, scale=static.scale
        )
    q, k, v, row_offsets, block_ids, text_lengths, out, lse = residuals
    d_out, d_lse = cotangents
    q, k, v, out, d_out = (x[:, grid.tile_order] for x in (q, k, v, out, d_out))
    lse, d_lse = (x[:, :, grid.tile_order] for x in (lse, d_lse))
    gradients = xla.attention_gradients(
        (q, k, v, row_offsets, block_ids, text_lengths, out, lse),
        (d_out, d_lse),
        grid=grid,
        scale=static.scale,
    )
    of_tokens = (
        jnp.take(x, grid.raster_order, axis=1) for x in gradients[:3] if x is not None
    )
    return *of_tokens, *gradients[3:]


_attention.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=0)
def _run(static: _Static, q, k, v, row_offsets, block_ids, text_lengths):
    grid = static.grid
    batch, _, num_heads, _ = q.shape
    num_lists, num_blocks = batch * num_heads, grid.num_blocks
    places = geometry(grid, static.order)  # type: ignore[arg-type]  # hashable
    plan = _plan(static, places, q.shape, q.dtype)
    shape = q.shape
    if isinstance(plan.copies, sm90.Boxes):
        q, k, v = (x.reshape(batch, *places.frame_shape, *shape[2:]) for x in (q, k, v))
    row_offsets = row_offsets.reshape(num_lists, num_blocks + 1)
    block_ids = block_ids.reshape(num_lists, -1)
    width_ends = jnp.zeros((1, 1, 1), jnp.int32)  # not read where there is one width
    if len(plan.widths) > 1:
        block_ids, width_ends = partition_lists(
            row_offsets,
            block_ids,
            places.width_of_block,
            num_classes=len(plan.widths),
            interpret=static.interpret,
        )
    work = Work(
        row_offsets=row_offsets,
        block_ids=block_ids,
        width_ends=width_ends,
        full_list=jnp.asarray(np.argsort(places.width_of_block, stable=True), "int32"),
        order=tile_order(jnp.diff(row_offsets), _num_multiprocessors()),
        num_tiles=jnp.full(1, num_lists * num_blocks, jnp.int32),
        starts=jnp.asarray(places.starts),
        strides=jnp.asarray(places.strides),
        lengths=jnp.asarray(grid.block_lengths),
        valid=valid_lengths(grid, text_lengths),
        reciprocals=jnp.asarray(places.reciprocals),
    )
    out, lse = attend_blocks(q, k, v, work, plan=plan, interpret=static.interpret)
    if plan.config.lazy:
        out, lse = repair(q, k, v, work, out, lse, plan, static.interpret)
    out = out.reshape(shape)
    lse = lse.reshape(batch, num_heads, num_blocks * sm90.BLOCK)
    if places.moves_lse:
        lse = lse[:, :, places.scatter]
    return out, lse


def _plan(static: _Static, places: Geometry, shape, dtype) -> sm90.Plan:
    batch, _, num_heads, head_dim = shape
    num_blocks = static.grid.num_blocks
    num_tiles = batch * num_heads * num_blocks
    by_rows = isinstance(places.copies, sm90.SingleRows)
    return sm90.Plan(
        config=static.config,
        num_blocks=num_blocks,
        num_heads=num_heads,
        head_dim=head_dim,
        num_ctas=num_tiles,
        persistent=False,
        pairs=static.config.pairs and num_tiles % 2 == 0 and not by_rows,
        is_dense=False,
        scale=static.scale,
        copies=places.copies,
        widths=places.widths_with_text if static.has_text_lengths else places.widths,
        masks_queries=static.has_text_lengths,
        has_short_blocks=places.stores_short_blocks,
        grows=dtype == jnp.float16,
        emulate_wgmma=static.interpret is not None,
    )


def repair(q, k, v, work: Work, out, lse, plan: sm90.Plan, interpret):
    """Computes query blocks whose sums overflowed again, with exact maxima.

    That takes logits 44 nats above all of the first kept block, or a first block
    without keys and logits far from 0, or NaN in the inputs. Where there are none,
    which is the usual case, the second kernel ends as soon as it has read that.
    """
    failed = ~(lse < jnp.inf).all(axis=-1).ravel()
    tiles = jnp.arange(failed.size, dtype=jnp.int32)
    # What has not failed goes to places past the end, each to its own.
    place = jnp.where(failed, jnp.cumsum(failed) - 1, failed.size + tiles)
    tiles = jnp.zeros_like(tiles).at[place].set(tiles, mode="drop", unique_indices=True)
    plan = dataclasses.replace(
        plan,
        config=dataclasses.replace(plan.config, lazy=False),
        num_ctas=min(_num_multiprocessors(), failed.size),
        persistent=True,
        pairs=False,
    )
    work = work._replace(order=tiles, num_tiles=failed.sum(dtype=jnp.int32)[None])
    return attend_blocks_again(q, k, v, work, out, lse, plan=plan, interpret=interpret)


def tile_order(counts: Int[Array, "L R"], num_slots: int) -> Int[Array, " L*R"]:
    """Order in which the card takes query blocks, `num_slots` at a time.

    CTAs share K and V in L2, which holds less than one head's: so they should walk
    the same head's keys, and be at about the same place in their lists.

    - Rows that keep every block come first, of all heads: they take many times as long
      as others, and would be what the card ends with.
    - The others follow head by head, longest lists first: a CTA that starts late has
      less to do, so those of a head draw level.
    - A head does not end with a full wave of CTAs: the rest of the wave goes to the
      shortest lists of the next head, which end at the same time. So both heads' other
      waves begin together.
    """
    num_blocks = counts.shape[1]
    is_full = counts == num_blocks
    num_others = num_blocks - is_full.sum(1, dtype=jnp.int32)
    # How many other lists could run in the time of those before each head's.
    entries = counts.sum(dtype=jnp.float32, where=~is_full)
    length = jnp.maximum(entries / jnp.maximum(num_others.sum(), 1), 1.0)
    time_of_full = is_full.sum(dtype=jnp.float32) * num_blocks / length
    waiting = time_of_full.astype(jnp.int32)
    before = waiting + jnp.cumsum(num_others) - num_others
    shared = jnp.minimum(-before % num_slots, num_others)

    # Which head each place belongs to, and which of its rows that are full, or not.
    place = jnp.arange(counts.size, dtype=jnp.int32)
    num_full = num_blocks - num_others
    head_of_full, full = _divide(place, num_full)
    head_of_other, other = _divide(place - num_full.sum(), num_others)
    # Longest first, but for the shortest, which share a wave with the head before.
    skipped, first = shared[head_of_other], num_full[head_of_other]
    other += jnp.where(other < skipped, num_blocks, first) - skipped

    is_for_full = place < num_full.sum()
    head = jnp.where(is_for_full, head_of_full, head_of_other)
    by_length = jnp.argsort(-counts, axis=1, stable=True).astype(jnp.int32)
    rows = by_length[head, jnp.where(is_for_full, full, other)]
    return head * num_blocks + rows


def _divide(place: Int[Array, " P"], sizes: Int[Array, " L"]):
    """Which group each place is in, and where there; groups follow each other."""
    ends = jnp.cumsum(sizes)
    group = (ends <= place[:, None]).sum(1, dtype=jnp.int32)
    group = jnp.minimum(group, len(sizes) - 1)  # places past the end are not used
    return group, place - (ends - sizes)[group]


def _num_multiprocessors() -> int:
    if jax.default_backend() != "gpu":
        return NUM_MULTIPROCESSORS
    return jax.local_devices()[0].core_count


def why_unsupported_shape(dtype: str, head_dim: int, block_size: int) -> str | None:
    """Why the kernel cannot take such inputs on any device, or None if it can."""
    if dtype not in SUPPORTED_DTYPES:
        return f"it takes {' and '.join(SUPPORTED_DTYPES)}, not {dtype}"
    if head_dim not in SUPPORTED_HEAD_DIMS:
        accepted = " and ".join(map(str, SUPPORTED_HEAD_DIMS))
        return f"it takes a head dimension of {accepted}, not {head_dim}"
    if block_size != sm90.BLOCK:
        return (
            f"it takes blocks of {sm90.BLOCK} tokens, such as tile (8, 16), not "
            f"{block_size}"
        )
    return None


def _why_unsupported(problem: Problem) -> str | None:
    return problem.device.why_not_hopper() or why_unsupported_shape(
        problem.dtype, problem.head_dim, problem.grid.block_size
    )


def _why_slow(problem: Problem) -> str | None:
    copies = geometry(problem.grid, problem.order).copies  # type: ignore[arg-type]
    if not isinstance(copies, sm90.SingleRows):
        return None
    if problem.grid.num_tokens < sm90.BLOCK:
        return None  # a few tokens take no time either way
    return f"its blocks are copied row by row: {copies.because}"


BACKEND = Backend(
    name="hopper",
    function=hopper_attention,
    why_unsupported=_why_unsupported,
    why_slow=_why_slow,
    takes_raster=True,
)
