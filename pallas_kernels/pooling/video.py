"""What a layer with means pools of its queries, keys and values, in one pass.

Means for the draft, means that stand for skipped blocks, and the spread of the keys
need the same tokens: the kernel reads each array once. XLA operations do the rest.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

from jaxtyping import Array, Float

from pallas_kernels.common.arrays import AnyArray, to_jax
from pallas_kernels.common.configuration import make_plain, register_configuration
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
from pallas_kernels.pooling import sharded, sm90
from pallas_kernels.pooling.interfaces import VideoResult
from pallas_kernels.pooling.sub_tiles import (
    cell_table,
    channel_variances,
    in_known_order,
    means_of_tiles,
    reduce_sub_tiles,
)
from pallas_kernels.pooling.tiles import pool_sub_tiles


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoPooling:
    """What is pooled of the tokens of a video. Static.

    Attributes:
      means: Cells whose means stand for skipped blocks.
      draft: Parts of the tiles of each frame that a draft pools; None pools none.
      spread: Whether the spread of the keys is computed, and the mean query of each
        tile that it is multiplied by.
      order: How the tokens of the video are ordered.
      start: First token of the video: text may stand before it.

    Raises:
      ValueError: The draft has other frames or tiles, or groups of frames.
    """

    means: SubTiles
    draft: SubTiles | None
    spread: bool
    order: Order
    start: int = 0

    def __post_init__(self) -> None:
        make_plain(self)
        if self.draft is not None:
            own = dataclasses.replace(
                self.means, sub_tile=self.draft.sub_tile, group_frames=1
            )
            if own != self.draft:
                raise ValueError(f"{self.draft=} must be sub-tiles of {self.means=}")

    @property
    def has_parts(self) -> bool:
        """Whether a draft pools more than one part of each tile."""
        return self.draft is not None and self.draft.per_column > 1

    @property
    def is_nested(self) -> bool:
        """Whether the parts of the draft are made of whole cells, or there are none."""
        if self.draft is None:
            return True
        sides = zip(self.means.tile, self.draft.part, self.means.part, strict=True)
        return all(part in (tile, part // cell * cell) for tile, part, cell in sides)


class PooledVideo(NamedTuple):
    """What `pool_video` computes, float32 where nothing else is said.

    Attributes:
      q_parts: Mean query of each part of the draft; None without a draft.
      k_parts: Mean key, like q_parts.
      q_tiles: Mean query of each tile; None without a draft or a spread.
      k_means: Mean key of each cell, in the dtype of the keys; None without values.
      v_means: Mean value, like k_means.
      k_spread: Mean square of k - mean of its cell, by channel, over the tokens of each
        tile of each frame; None where it was not asked for.
    """

    q_parts: Float[Array, "B P N D"] | None = None
    k_parts: Float[Array, "B P N D"] | None = None
    q_tiles: Float[Array, "B S N D"] | None = None
    k_means: Float[Array, "B M N D"] | None = None
    v_means: Float[Array, "B M N D"] | None = None
    k_spread: Float[Array, "B S N D"] | None = None


def pool_video(
    q: Float[AnyArray, "B T N D"],
    k: Float[AnyArray, "B T N D"],
    v: Float[AnyArray, "B T N D"] | None,
    pooling: VideoPooling,
) -> PooledVideo:
    """Pools queries, keys and values; each is read once where a kernel can.

    Where the parts of the draft are not made of whole cells, the draft is pooled first.

    Args:
      q: Queries of the whole sequence; not read without a draft.
      k: Keys, like q.
      v: Values, like q. None leaves the means of k and v out.
      pooling: What is computed. Static.

    Returns:
      What was asked for. Cells and parts without a token are 0. Derivatives are XLA's.
    """
    q, k = to_jax(q, k)
    (v,) = (None,) if v is None else to_jax(v)
    device = current_device(k)
    cause = device.why_not_hopper() or sm90.pool_video.why_unsupported(
        k.shape, k.dtype, pooling.means.group_frames
    )
    if cause is not None and device.platform == "gpu":
        warn_once(f"pooling for means runs on XLA instead of its kernel: {cause}")
    return _pool_video(q, k, v, pooling=pooling, has_kernel=cause is None)


@functools.partial(jit_once, static_argnames=("pooling", "has_kernel"))
def _pool_video(q, k, v, *, pooling: VideoPooling, has_kernel: bool) -> PooledVideo:
    draft = pooling.draft
    if has_kernel and draft is not None and not pooling.is_nested:
        q_parts, k_parts = pool_sub_tiles(
            q, k, draft, order=pooling.order, start=pooling.start
        )
        q_tiles = sharded.means_of_tiles(q_parts, draft) if pooling.spread else None
        alone = dataclasses.replace(pooling, draft=None)
        rest = PooledVideo()
        if v is not None or pooling.spread:
            rest = _pool_video(q, k, v, pooling=alone, has_kernel=True)
        return rest._replace(q_parts=q_parts, k_parts=k_parts, q_tiles=q_tiles)
    task = _Task(pooling=pooling, has_values=v is not None)
    arrays = {"q": q, "k": k, "v": v}
    in_kernel, by_xla = (functools.partial(f, task) for f in (_in_kernel, _by_xla))
    if has_kernel:
        run = kernel_on_own_shards(in_kernel, by_xla, task.axes)
    else:
        run = with_derivatives_on_own_shards(by_xla, task.axes)
    results = run(*(arrays[name] for name in task.results))
    found = PooledVideo(**dict(zip(task.names, results, strict=True)))
    if pooling.spread and draft is not None and not pooling.has_parts:
        return found._replace(q_tiles=found.q_parts)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Task:
    """Which arrays are pooled, and what of each."""

    pooling: VideoPooling
    has_values: bool

    @property
    def results(self) -> dict[str, tuple[VideoResult, ...]]:
        """What is computed of each array, by the names of the kernel's results."""
        asked: dict[VideoResult, bool] = {
            "parts": self.pooling.draft is not None,
            "cells": self.has_values,
            "tiles": self.pooling.has_parts and self.pooling.spread,
            "spread": self.pooling.spread,
        }
        of_arrays: dict[str, tuple[VideoResult, ...]] = {
            "q": ("parts", "tiles"),
            "k": ("parts", "cells", "spread"),
            "v": ("cells",),
        }
        found = {
            array: tuple(result for result in results if asked[result])
            for array, results in of_arrays.items()
        }
        return {array: results for array, results in found.items() if results}

    @property
    def names(self) -> tuple[str, ...]:
        """Fields of `PooledVideo`, in the order in which they are computed."""
        words: dict[VideoResult, str] = {
            "parts": "parts",
            "cells": "means",
            "tiles": "tiles",
        }
        return tuple(
            f"{array}_{words.get(result, result)}"
            for array, results in self.results.items()
            for result in results
        )

    @property
    def axes(self) -> Axes:
        """Axes of all arrays: batch and heads may be sharded."""
        return Axes(
            operation="pool_video",
            operands=tuple(f"{array}: B T N D" for array in self.results),
            results=("B M N D",) * len(self.names),
        )


def _in_kernel(task: _Task, *arrays) -> tuple[Array, ...]:
    """Runs the kernel on the heads of a device, if it takes so many."""
    pooling, means = task.pooling, task.pooling.means
    shape, dtype = arrays[0].shape, arrays[0].dtype
    cause = sm90.pool_video.why_unsupported(shape, dtype, means.group_frames)
    if cause is not None:  # a device has fewer heads than all together
        warn_once(f"pooling for means runs on XLA instead of its kernel: {cause}")
        return _by_xla(task, *arrays)
    part = means.tile if pooling.draft is None else pooling.draft.part
    roles = tuple(
        sm90.pool_video.Role(
            part=means.tile if array == "v" else part,
            cell=part if array == "q" else means.part,
            results=results,
        )
        for array, results in task.results.items()
    )
    whole = dataclasses.replace(means, sub_tile=means.tile, group_frames=1)
    of_frame = math.prod(means.tiles_per_frame)
    tiles = cell_table(whole, pooling.order, pooling.start)[:of_frame, :4]

    return sm90.pool_video.pool_video(arrays, roles, means, tiles, dtype=dtype.name)


def _by_xla(task: _Task, *arrays) -> tuple[Array, ...]:
    pooling, means, draft = task.pooling, task.pooling.means, task.pooling.draft
    in_order: list[Array] = []
    for x, results in zip(arrays, task.results.values(), strict=True):
        tokens, order = in_known_order(x, means, pooling.order, pooling.start)
        found: dict[VideoResult, Array] = {}
        if draft is not None:
            found["parts"] = reduce_sub_tiles(tokens, draft, order=order)
        if "tiles" in results:
            found["tiles"] = means_of_tiles(found["parts"], draft)
        if "cells" in results or "spread" in results:
            of_cells = reduce_sub_tiles(tokens, means, order=order)
            found["cells"] = of_cells.astype(x.dtype)
        if "spread" in results:
            found["spread"] = channel_variances(tokens, of_cells, means, order=order)
        in_order += [found[result] for result in results]
    return tuple(in_order)
