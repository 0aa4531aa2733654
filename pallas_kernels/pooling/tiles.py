"""Pooling of tiles and of sub-tiles.

Each has one kernel for Hopper GPUs and XLA operations for the rest. On a GPU where the
kernel cannot run, a warning says why, once. Derivatives are those of XLA.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.common.arrays import AnyArray, to_jax
from pallas_kernels.common.device import current_device
from pallas_kernels.common.interfaces import Order
from pallas_kernels.common.linear_maps import (
    kernel_on_own_shards,
    with_derivatives_on_own_shards,
)
from pallas_kernels.common.sharding import Axes
from pallas_kernels.common.slow_paths import warn_once
from pallas_kernels.common.static import jit_once
from pallas_kernels.common.sub_tiles import SubTiles
from pallas_kernels.pooling import sm90, xla
from pallas_kernels.pooling.interfaces import Reduction, Tiling
from pallas_kernels.pooling.sub_tiles import (
    cell_table,
    in_known_order,
    reduce_sub_tiles,
)


def pool_tiles(
    q: Float[AnyArray, "B T N D"],
    k: Float[AnyArray, "B T N D"],
    tiling: Tiling,
    *,
    reductions: tuple[Reduction, ...] = ("mean",),
) -> tuple[Float[Array, "B S N D"], ...]:
    """Reduces the tokens of each tile of q and of k, in one pass where a kernel can.

    Args:
      q: Queries of the whole sequence.
      k: Keys, like q.
      tiling: Tiles of the frames. Static.
      reductions: What to compute of each tile: "mean", "max" or both. Static.

    Returns:
      float32: the reductions of q in the order of `reductions`, then those of k. An
      edge tile is reduced over the tokens it really has.
    """
    q, k = to_jax(q, k)
    return _pool_tiles(
        q, k, tiling=tiling, reductions=reductions, has_kernel=_has_kernel(q)
    )


@functools.partial(jit_once, static_argnames=("tiling", "reductions", "has_kernel"))
def _pool_tiles(
    q, k, *, tiling: Tiling, reductions: tuple[Reduction, ...], has_kernel: bool
):
    axes = Axes(
        operation="pool_tiles",
        operands=("q: B T N D", "k: B T N D"),
        results=("B S N D",) * (2 * len(reductions)),
    )

    by_xla = functools.partial(xla.pool_tiles, tiling=tiling, reductions=reductions)

    def in_kernel(q, k):
        return sm90.pool_tiles.pool_tiles(q, k, tiling.table, reductions=reductions)

    return _pool(in_kernel if has_kernel else None, by_xla, axes, q, k)


def _has_kernel(x: Array) -> bool:
    """Returns whether the kernel takes an array where it is; a GPU says why not."""
    device = current_device(x)
    cause = sm90.pool_tiles.why_unsupported(x.shape, x.dtype, device)
    if cause is not None and device.platform == "gpu":
        _warn(cause)
    return cause is None


def _warn(cause: str) -> None:
    warn_once(f"pooling runs on XLA instead of its kernel: {cause}")


def _pool(in_kernel: Callable[..., Any] | None, by_xla, axes: Axes, q, k):
    """Runs the kernel, if there is one, on devices whose part of the heads it takes."""
    if in_kernel is None:
        return with_derivatives_on_own_shards(by_xla, axes)(q, k)

    def run(q, k):
        cause = sm90.pool_tiles.why_unsupported_shape(q.shape, q.dtype)
        if cause is not None:  # a device has fewer heads than all together
            _warn(cause)
            return by_xla(q, k)
        return in_kernel(q, k)

    return kernel_on_own_shards(run, by_xla, axes)(q, k)


@functools.partial(jit_once, static_argnames=("tiling", "reduction"))
def reduce_tiles(
    x: Float[AnyArray, "B T N D"], tiling: Tiling, *, reduction: Reduction = "mean"
) -> Float[Array, "B S N D"]:
    """Reduces the tokens of each tile of one array, as XLA operations.

    Args:
      x: Tokens of the whole sequence.
      tiling: Tiles of the frames. Static.
      reduction: "mean", or "max" for the largest value of each channel. Static.

    Returns:
      float32. Means are taken in float32; an edge tile is reduced over the tokens it
      really has.
    """
    axes = Axes(
        operation="reduce_tiles", operands=("x: B T N D",), results=("B S N D",)
    )

    def reduce(x):
        return (xla.reduce_tiles(x, tiling, reduction=reduction),)

    (tiles,) = with_derivatives_on_own_shards(reduce, axes)(x)
    return tiles


def pool_sub_tiles(
    q: Float[AnyArray, "B T N D"],
    k: Float[AnyArray, "B T N D"],
    sub_tiles: SubTiles,
    *,
    order: Order,
    start: int = 0,
    dtype: str = "float32",
) -> tuple[Float[Array, "B M N D"], Float[Array, "B M N D"]]:
    """Averages the tokens of each cell of two arrays, in one pass where a kernel can.

    Args:
      q: Queries of the whole sequence, or keys.
      k: Keys, or values, like q.
      sub_tiles: What is averaged together. Static.
      order: How the tokens of the video are ordered. Static.
      start: First token of the video: text may stand before it. Static.
      dtype: That of the results; sums are float32. Static.

    Returns:
      The means, in the order of the cells of `sub_tiles`; 0 of cells without a token.
    """
    q, k = to_jax(q, k)
    task = _Cells(sub_tiles=sub_tiles, order=order, start=start, dtype=dtype)
    return _pool_sub_tiles(task, q, k, has_kernel=_has_kernel(q))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Cells:
    """The static arguments of pooling of sub-tiles."""

    sub_tiles: SubTiles
    order: Order
    start: int
    dtype: str


@functools.partial(jit_once, static_argnums=0, static_argnames="has_kernel")
def _pool_sub_tiles(task: _Cells, q, k, *, has_kernel: bool):
    cells = task.sub_tiles

    def in_kernel(q, k):
        return sm90.pool_tiles.pool_cells(
            q,
            k,
            cell_table(cells, task.order, task.start),
            frame_stride=cells.height * cells.width,
            dtype=task.dtype,
        )

    def mean(x):
        tokens, order = in_known_order(x, cells, task.order, task.start)
        return reduce_sub_tiles(tokens, cells, order=order).astype(task.dtype)

    def by_xla(q, k):
        return mean(q), mean(k)

    return _pool(in_kernel if has_kernel else None, by_xla, _AXES_OF_CELLS, q, k)


_AXES_OF_CELLS = Axes(
    operation="pool_sub_tiles",
    operands=("q: B T N D", "k: B T N D"),
    results=("B M N D",) * 2,
)
