"""Means and maxima of the tiles of Q and K in one pass, for Hopper (sm_90).

One CTA of one warpgroup pools one chunk of channels of one tile of Q or K. A thread
owns up to 16 bytes of each token and adds them up in registers: nothing is exchanged
between threads. The loads of one row of a tile are issued together, so a
multiprocessor, which holds several CTAs, has enough bytes in flight to keep the memory
busy. A tile is given by its first token and the distance between its rows, so raster
and tiled order, edge tiles and text before the video are the same program. So are
sub-tiles of a tile; of these a CTA may pool those at one place of a few frames.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.common.batching import fold_mapped_axes
from pallas_kernels.common.device import Device
from pallas_kernels.common.interfaces import SUPPORTED_DTYPES
from pallas_kernels.common.validation import why_not_among
from pallas_kernels.pooling.interfaces import Reduction

THREADS = 128  # threads of a warpgroup
BYTES_PER_THREAD = 16  # the widest load
MAX_UNROLLED = 16  # loads of a row issued together


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolPlan:
    """Everything static about one launch."""

    columns: int  # columns of a full tile
    chunk: int  # channels of a CTA
    has_short_rows: bool  # some tile has fewer columns
    reductions: tuple[Reduction, ...]
    frame_stride: int | None = None  # tokens between frames; None: one frame each
    dtype: str = "float32"  # of the results


def pool_tiles(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    tiles: Int[np.ndarray, "S 4"],
    *,
    reductions: tuple[Reduction, ...] = ("mean",),
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "B S N D"], ...]:
    """Reduces the tokens of each tile of q and of k.

    Args:
      q: Queries.
      k: Keys.
      tiles: First token, tokens between two rows, rows and columns of each tile.
      reductions: What to compute.
      interpret: Run on the CPU in GPU interpret mode.

    Returns:
      float32: the reductions of q in the order of `reductions`, then those of k.

    Raises:
      ValueError: The kernel cannot take these inputs on any device.
    """
    plan = _plan_of(q, tiles, reductions)
    run = functools.partial(_run, tiles=tiles, plan=plan, interpret=interpret)
    return fold_mapped_axes(run)(q, k)


def pool_cells(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    cells: Int[np.ndarray, "M 5"],
    *,
    frame_stride: int,
    dtype: str = "float32",
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "B M N D"], Float[Array, "B M N D"]]:
    """Averages the tokens of each cell of two arrays, of queries and keys or others.

    Args:
      q: The one.
      k: The other.
      cells: First token, tokens between two rows, rows, columns and frames of each.
      frame_stride: Tokens between two frames.
      dtype: That of the results; sums are float32.
      interpret: Run on the CPU in GPU interpret mode.

    Returns:
      The means; 0 of cells without a token.

    Raises:
      ValueError: The kernel cannot take these inputs on any device.
    """
    options = {"frame_stride": frame_stride, "dtype": dtype}
    plan = _plan_of(q, cells, ("mean",), **options)
    run = functools.partial(_run, tiles=cells, plan=plan, interpret=interpret)
    return fold_mapped_axes(run)(q, k)


def _plan_of(q, tiles, reductions, **options) -> PoolPlan:
    """Returns the plan of a launch; raises ValueError where there is no kernel."""
    if cause := why_unsupported_shape(q.shape, q.dtype):
        raise ValueError(f"the pooling kernel cannot take these inputs: {cause}")
    columns = int(tiles[:, 3].max())
    return PoolPlan(
        columns=columns,
        chunk=_chunk_of(q.shape[2] * q.shape[3], q.dtype.itemsize),
        has_short_rows=bool((tiles[:, 3] < columns).any()),
        reductions=reductions,
        **options,
    )


def why_unsupported(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, device: Device
) -> str | None:
    """Returns why the kernel cannot pool such arrays on a device, or None if it can."""
    return device.why_not_hopper() or why_unsupported_shape(shape, dtype)


def why_unsupported_shape(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> str | None:
    """Returns why no device can pool arrays of this shape, or None if one can."""
    if cause := why_not_among(SUPPORTED_DTYPES, jnp.dtype(dtype).name):
        return cause
    heads, head_dim = shape[2:]
    if heads * head_dim % THREADS:
        return (
            f"heads times head dimension must be a multiple of {THREADS}, not {heads} "
            f"* {head_dim}: give each device a number of heads that makes it one"
        )
    return None


def _run(q, k, *, tiles, plan: PoolPlan, interpret):
    batch, num_tokens, *heads = q.shape
    channels = heads[0] * heads[1]
    out = jax.ShapeDtypeStruct((batch, len(tiles), channels), jnp.dtype(plan.dtype))
    outs = plgpu.kernel(
        functools.partial(_body, plan=plan),
        out_type=(out,) * (2 * len(plan.reductions)),
        grid=(len(tiles), channels // plan.chunk, 2 * batch),
        grid_names=("tile", "chunk", "item"),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="pool_tiles_sm90",
        interpret=interpret,
    )(
        q.reshape(batch, num_tokens, channels),
        k.reshape(batch, num_tokens, channels),
        jnp.asarray(tiles, jnp.int32),
    )
    return tuple(x.reshape(batch, len(tiles), *heads) for x in outs)


def _body(q_gmem, k_gmem, tiles_gmem, *outs_gmem, plan: PoolPlan):
    tile = lax.axis_index("tile")
    item = lax.axis_index("item")
    channels = pl.ds(lax.axis_index("chunk") * plan.chunk, plan.chunk)
    first, stride, rows, columns = (tiles_gmem[tile, field] for field in range(4))
    num = len(plan.reductions)
    count = rows * columns
    if plan.frame_stride is not None:
        frames = tiles_gmem[tile, 4]
        count = jnp.maximum(count * frames, 1)

    def pool(x_gmem, outs, batch):
        def load(token):
            return x_gmem[batch, token, channels].astype(jnp.float32)

        state = _start(plan)
        if plan.frame_stride is None:
            results = _reduce_tile(load, state, first, stride, rows, columns, plan)
        else:
            results = lax.fori_loop(
                0,
                frames,
                lambda frame, state: _reduce_tile(
                    load,
                    state,
                    first + frame * plan.frame_stride,
                    stride,
                    rows,
                    columns,
                    plan,
                ),
                state,
            )
        for out, name, result in zip(outs, plan.reductions, results, strict=True):
            if name == "mean":
                result = result * (1.0 / count.astype(jnp.float32))
            out[batch, tile, channels] = result.astype(out.dtype)

    batch = lax.div(item, jnp.int32(2))
    is_key = lax.rem(item, jnp.int32(2)) == 1
    pl.when(jnp.logical_not(is_key))(lambda: pool(q_gmem, outs_gmem[:num], batch))
    pl.when(is_key)(lambda: pool(k_gmem, outs_gmem[num:], batch))


def _start(plan: PoolPlan):
    """Returns the reductions of no token."""
    layout = plgpu.Layout.WG_STRIDED((plan.chunk,), vec_size=plan.chunk // THREADS)
    return tuple(
        plgpu.layout_cast(
            jnp.full((plan.chunk,), 0.0 if name == "mean" else -jnp.inf, jnp.float32),
            layout,
        )
        for name in plan.reductions
    )


def _reduce_tile(load, state, first, stride, rows, columns, plan: PoolPlan):
    """Adds the tokens of one tile to sums or maxima."""

    def add_tokens(state, tokens):
        values = [load(token) for token in tokens]  # all loads, then all sums
        for value in values:
            state = tuple(
                old + value if name == "mean" else jnp.maximum(old, value)
                for old, name in zip(state, plan.reductions, strict=True)
            )
        return state

    def add_row(row, state):
        token = first + row * stride
        for start in range(0, plan.columns, MAX_UNROLLED):
            stop = min(start + MAX_UNROLLED, plan.columns)
            state = add_tokens(state, [token + i for i in range(start, stop)])
        return state

    def add_short_row(row, state):
        token = first + row * stride
        return lax.fori_loop(
            0, columns, lambda i, state: add_tokens(state, [token + i]), state
        )

    if not plan.has_short_rows:
        return lax.fori_loop(0, rows, add_row, state)
    return lax.cond(
        columns == plan.columns,
        lambda: lax.fori_loop(0, rows, add_row, state),
        lambda: lax.fori_loop(0, rows, add_short_row, state),
    )


def _chunk_of(channels: int, itemsize: int) -> int:
    """Returns the channels of a CTA: as wide loads as divide all channels evenly."""
    width = BYTES_PER_THREAD // itemsize
    while channels % (THREADS * width):
        width //= 2
    return THREADS * width
