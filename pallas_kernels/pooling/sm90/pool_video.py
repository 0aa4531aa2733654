"""Parts, cells and spread of the tiles of Q, K and V in one pass, for Hopper (sm_90).

One CTA of one warpgroup takes one chunk of channels of one array, and of this the tiles
at one place of a group of frames. A thread owns the same few channels of each token and
keeps all sums in registers: nothing is exchanged between threads.

    part   of a tile, of one frame: what the draft pools; it is made of whole cells
    cell   of a part, over all frames of the group: what means are taken over
    tile   of one frame: what the mean query and the spread of the keys are taken of

The spread is the mean square of k - mean of its cell. It is summed frame by frame in
two terms, neither of which cancels: the squares about the cell's mean in that frame,
from tokens that are in registers, and that mean's distance from the cell's, squared.

A token is found from the tile's first one and the distance between its rows, so raster
and tiled order, edge tiles and text before the video are one program. Where cells are
cut off, places without a token repeat one of the cell that exists, with weight 0.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.common.batching import fold_mapped_axes
from pallas_kernels.common.sub_tiles import SubTiles
from pallas_kernels.pooling.interfaces import VideoResult
from pallas_kernels.pooling.sm90.pool_tiles import why_unsupported_shape

THREADS = 128  # threads of a warpgroup
BYTES_PER_THREAD = 16  # the widest load
MAX_LOADS = 16  # loads issued together
# Frames times channels of a thread, which holds three sums of each: 128 registers at 4
# frames and 4 channels. 178 at 8 channels leave two CTAs on a multiprocessor, not four.
MAX_SUMS = 16
MIN_CHANNELS = 2  # of a thread, for more frames
MAX_FRAMES = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Role:
    """What is computed of one array."""

    part: tuple[int, int]  # rows and columns; made of whole cells, or the whole tile
    cell: tuple[int, int]  # rows and columns, no larger than the part
    results: tuple[VideoResult, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoPlan:
    """Everything static about one launch."""

    video: SubTiles  # its frames, tiles and groups; its sub-tiles are not read
    roles: tuple[Role, ...]
    chunk: int  # channels of a CTA
    dtype: str  # of the means of cells

    @property
    def tiles(self) -> int:
        """Tiles of one frame."""
        return math.prod(self.video.tiles_per_frame)

    @property
    def has_short_group(self) -> bool:
        """Whether the last group has fewer frames."""
        return bool(self.video.frames % self.video.group_frames)

    def is_cut(self, role: Role) -> bool:
        """Whether some cell of a role has fewer tokens than others."""
        pairs = zip(self.video.tile, role.cell, strict=True)
        return self.video.has_edges or any(tile % cell for tile, cell in pairs)

    def count(self, role: Role, result: VideoResult) -> int:
        """Returns how many results of a kind a video has."""
        of_video = self.video.num_tiles
        if result == "parts":
            return of_video * num_pieces(self.video.tile, role.part)
        if result == "cells":
            return self.video.num_columns * num_pieces(self.video.tile, role.cell)
        return of_video


class Place(NamedTuple):
    """Where the tokens of a CTA stand, and where its results go: scalars."""

    first: Array  # token of the first frame
    stride: Array  # tokens from a row to the next
    rows: Array
    columns: Array
    frames: Array  # of the group
    first_frame: Array
    tile: Array  # of its frame
    column: Array  # tile of its group
    batch: Array
    channels: Any


def num_pieces(tile: tuple[int, int], piece: tuple[int, int]) -> int:
    """Returns how many pieces a full tile is cut into."""
    return math.prod(pieces(tile, piece))


def pieces(tile: tuple[int, int], piece: tuple[int, int]) -> tuple[int, int]:
    """Returns the rows and columns of pieces of a full tile."""
    (rows, columns), (own_rows, own_columns) = tile, piece
    return -(-rows // own_rows), -(-columns // own_columns)


def why_unsupported(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, group_frames: int
) -> str | None:
    """Returns why the kernel cannot pool such arrays on any device, or None."""
    if cause := why_unsupported_shape(shape, dtype):
        return cause
    if group_frames > MAX_FRAMES:
        return f"it takes groups of at most {MAX_FRAMES} frames, not {group_frames}"
    return None


def pool_video(
    arrays: tuple[Float[Array, "B T N D"], ...],
    roles: tuple[Role, ...],
    video: SubTiles,
    tiles: Int[np.ndarray, "tiles 4"],
    *,
    dtype: str,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "B results N D"], ...]:
    """Pools the tiles of some arrays.

    Args:
      arrays: Tokens of whole sequences.
      roles: What to compute of each.
      video: Tiles, and groups of frames.
      tiles: First token, tokens between two rows, rows and columns of each tile of the
        first frame.
      dtype: That of the means of cells; all else is float32.
      interpret: Run on the CPU in GPU interpret mode.

    Returns:
      The results of the first array in the order of its role, then those of the next.

    Raises:
      ValueError: The kernel cannot take these inputs on any device.
    """
    shape, own_dtype = arrays[0].shape, arrays[0].dtype
    if cause := why_unsupported(shape, own_dtype, video.group_frames):
        raise ValueError(f"the kernel for pooling cannot take these inputs: {cause}")
    channels = shape[2] * shape[3]
    chunk = _chunk_of(channels, own_dtype.itemsize, video.group_frames)
    plan = VideoPlan(video=video, roles=roles, chunk=chunk, dtype=dtype)
    run = functools.partial(_run, tiles=tiles, plan=plan, interpret=interpret)
    return fold_mapped_axes(run)(*arrays)


def _chunk_of(channels: int, itemsize: int, frames: int) -> int:
    """Returns the channels of a CTA: as wide loads as registers and heads allow."""
    width = BYTES_PER_THREAD // itemsize
    while channels % (THREADS * width) or (
        width > MIN_CHANNELS and width * frames > MAX_SUMS
    ):
        width //= 2
    return THREADS * width


def _run(*arrays, tiles, plan: VideoPlan, interpret):
    batch, num_tokens, *heads = arrays[0].shape
    channels = heads[0] * heads[1]
    outs = [
        jax.ShapeDtypeStruct(
            (batch, plan.count(role, result), channels),
            jnp.dtype(plan.dtype if result == "cells" else "float32"),
        )
        for role in plan.roles
        for result in role.results
    ]
    results = plgpu.kernel(
        functools.partial(_body, plan=plan),
        out_type=tuple(outs),
        grid=(plan.video.num_columns, channels // plan.chunk, len(arrays) * batch),
        grid_names=("column", "chunk", "item"),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="pool_video_sm90",
        interpret=interpret,
    )(
        *(x.reshape(batch, num_tokens, channels) for x in arrays),
        jnp.asarray(tiles, jnp.int32),
    )
    return tuple(x.reshape(*x.shape[:2], *heads) for x in results)


def _body(*refs, plan: VideoPlan):
    num = len(plan.roles)
    arrays, tiles_gmem, outs = refs[:num], refs[num], list(refs[num + 1 :])
    item = lax.axis_index("item")
    place = _place(tiles_gmem, lax.div(item, jnp.int32(num)), plan)
    for index, (x_gmem, role) in enumerate(zip(arrays, plan.roles, strict=True)):
        own, outs = outs[: len(role.results)], outs[len(role.results) :]
        named = dict(zip(role.results, own, strict=True))
        pool = functools.partial(_pool, x_gmem, named, place, role, plan)
        pl.when(lax.rem(item, jnp.int32(num)) == index)(pool)


def _place(tiles_gmem, batch, plan: VideoPlan) -> Place:
    video, column = plan.video, lax.axis_index("column")
    tile = lax.rem(column, jnp.int32(plan.tiles))
    first_frame = lax.div(column, jnp.int32(plan.tiles)) * video.group_frames
    first, stride, rows, columns = (tiles_gmem[tile, field] for field in range(4))
    return Place(
        first=first + first_frame * (video.height * video.width),
        stride=stride,
        rows=rows,
        columns=columns,
        frames=jnp.minimum(video.group_frames, video.frames - first_frame),
        first_frame=first_frame,
        tile=tile,
        column=column,
        batch=batch,
        channels=pl.ds(lax.axis_index("chunk") * plan.chunk, plan.chunk),
    )


def _pool(x_gmem, outs, place: Place, role: Role, plan: VideoPlan) -> None:
    """Pools the tiles of one CTA."""
    rows, columns = pieces(plan.video.tile, role.part)
    cells = pieces(role.part, role.cell)
    of_tiles = "tiles" in outs or "spread" in outs

    def pool_part(part, tile_sums):
        i, j = lax.div(part, jnp.int32(columns)), lax.rem(part, jnp.int32(columns))

        def pool_cell(cell, sums):
            row = i * cells[0] + lax.div(cell, jnp.int32(cells[1]))
            column = j * cells[1] + lax.rem(cell, jnp.int32(cells[1]))
            return _pool_cell(x_gmem, outs, place, (row, column), sums, role, plan)

        part_sums = _zeros(plan) if "parts" in outs else ()
        part_sums, tile_sums = lax.fori_loop(
            0, cells[0] * cells[1], pool_cell, (part_sums, tile_sums)
        )
        if "parts" in outs:
            size = _size(place, (i, j), role.part)
            first = place.tile * (rows * columns) + part
            stride = plan.tiles * (rows * columns)
            _store_frames(outs["parts"], first, stride, part_sums, size, place, plan)
        return tile_sums

    tile_sums = _zeros(plan) if of_tiles else ()
    tile_sums = lax.fori_loop(0, rows * columns, pool_part, tile_sums)
    for result in ("tiles", "spread"):
        if result in outs:
            size = place.rows * place.columns
            out = outs[result]
            _store_frames(out, place.tile, plan.tiles, tile_sums, size, place, plan)


def _pool_cell(x_gmem, outs, place: Place, index, sums, role: Role, plan: VideoPlan):
    """Adds one cell to the sums of its part and of its tile; stores its mean."""
    row, column = index
    grid = pieces(plan.video.tile, role.cell)
    place_of_mean = place.column * (grid[0] * grid[1]) + row * grid[1] + column

    def store(mean):
        if "cells" in outs:
            out = outs["cells"]
            out[place.batch, place_of_mean, place.channels] = mean.astype(out.dtype)

    def pool(part_sums, tile_sums):
        cell = _Cell.at(x_gmem, place, index, role, plan)
        part_sums, tile_sums, mean = cell.add_frames(part_sums, tile_sums, outs)
        store(mean)
        return part_sums, tile_sums

    if not plan.is_cut(role):
        return pool(*sums)
    size = _size(place, index, role.cell)
    exists = jnp.logical_and(row < grid[0], column < grid[1])
    is_empty = jnp.logical_and(exists, size == 0)
    pl.when(is_empty)(lambda: store(_zero(plan)))
    return lax.cond(size > 0, lambda: pool(*sums), lambda: sums)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Cell:
    """The tokens of one cell."""

    load: Callable[..., Array]  # of a frame of the group, a row and a column
    weight: Callable[..., Array] | None  # of a row and a column; None: all are there
    size: Array | int  # tokens of one frame
    frames: Array  # of the group
    shape: tuple[int, int]  # rows and columns of a full cell
    plan: VideoPlan

    @classmethod
    def at(cls, x_gmem, place: Place, index, role: Role, plan: VideoPlan) -> "_Cell":
        """Returns the cell at a row and a column of cells; it has a token."""
        first_row, first_column = (
            own * side for own, side in zip(index, role.cell, strict=True)
        )
        is_cut = plan.is_cut(role)
        last_row, last_column = place.rows - 1, place.columns - 1
        frame_stride = plan.video.height * plan.video.width

        def load(frame: int, row, column):
            row, column = first_row + row, first_column + column
            if is_cut:
                row = jnp.minimum(row, last_row)
                column = jnp.minimum(column, last_column)
            last_frame = place.frames - 1 if plan.has_short_group else frame
            first = place.first + jnp.minimum(frame, last_frame) * frame_stride
            token = first + row * place.stride + column
            return x_gmem[place.batch, token, place.channels]

        def weight(row, column):
            is_there = jnp.logical_and(
                first_row + row <= last_row, first_column + column <= last_column
            )
            return is_there.astype(jnp.float32)

        return cls(
            load=load,
            weight=weight if is_cut else None,
            size=_size(place, index, role.cell) if is_cut else math.prod(role.cell),
            frames=place.frames,
            shape=role.cell,
            plan=plan,
        )

    def add_frames(self, part_sums, tile_sums, outs):
        """Returns the sums of part and tile with this cell, and its mean."""
        frames = self.plan.video.group_frames
        ahead = max(1, MAX_LOADS // math.prod(self.shape))  # frames loaded together
        inverse = _inverse(self.size)
        part_sums, tile_sums = list(part_sums), list(tile_sums)
        total, means = _zero(self.plan), []
        for start in range(0, frames, ahead):
            own = range(start, min(start + ahead, frames))
            loaded = [self._load(frame) for frame in own]  # all loads, then all sums
            for frame, tokens_of_frame in zip(own, loaded, strict=True):
                visit = functools.partial(self._visit, frame, tokens_of_frame)
                sums = visit(_add, _zero(self.plan))
                if "parts" in outs:
                    part_sums[frame] = part_sums[frame] + sums
                if "tiles" in outs:
                    tile_sums[frame] = tile_sums[frame] + sums
                if "spread" in outs:
                    means.append(sums * inverse)
                    squares = functools.partial(_add_square, means[-1])
                    tile_sums[frame] = visit(squares, tile_sums[frame])
                total = total + self._in_group(frame, sums)
        mean = total * _inverse(self.size * self.frames)
        for frame, own_mean in enumerate(means):
            rest = own_mean - mean
            tile_sums[frame] = tile_sums[frame] + rest * rest * _float(self.size)
        return tuple(part_sums), tuple(tile_sums), mean

    def _in_group(self, frame: int, sums):
        """Returns the sums of a frame, or 0 past the end of a short group."""
        if not frame or not self.plan.has_short_group:
            return sums
        return sums * (frame < self.frames).astype(jnp.float32)

    def _load(self, frame: int):
        """Loads a frame of a small cell; None leaves that to the walk over it."""
        if math.prod(self.shape) > MAX_LOADS:
            return None
        return [self._row(frame, row) for row in range(self.shape[0])]

    def _row(self, frame: int, row):
        return [self.load(frame, row, column) for column in range(self.shape[1])]

    def _visit(self, frame: int, loaded, add, state):
        """Walks over the tokens of a frame: `add` takes state, token and weight."""

        def visit_row(row, values, state):
            for column, value in enumerate(values):
                weight = None if self.weight is None else self.weight(row, column)
                state = add(state, value.astype(jnp.float32), weight)
            return state

        if loaded is None:
            return lax.fori_loop(
                0,
                self.shape[0],
                lambda row, state: visit_row(row, self._row(frame, row), state),
                state,
            )
        for row, values in enumerate(loaded):
            state = visit_row(row, values, state)
        return state


def _add(state, value, weight):
    return state + (value if weight is None else value * weight)


def _add_square(mean, state, value, weight):
    rest = value - mean
    return state + (rest * rest if weight is None else rest * rest * weight)


def _size(place: Place, index, piece: tuple[int, int]):
    """Returns the tokens of a piece in one frame, from its row and column in a tile."""
    sides = (
        jnp.clip(own - i * side, 0, side)
        for own, i, side in zip((place.rows, place.columns), index, piece, strict=True)
    )
    rows, columns = sides
    return rows * columns


def _store_frames(out, first, stride, sums, size, place: Place, plan: VideoPlan):
    """Stores the means of each frame of the group."""
    inverse = _inverse(jnp.maximum(size, 1))
    for frame, own in enumerate(sums):

        def store(frame=frame, own=own):
            index = first + (place.first_frame + frame) * stride
            out[place.batch, index, place.channels] = own * inverse

        if frame and plan.has_short_group:
            pl.when(frame < place.frames)(store)
        else:
            store()


def _inverse(count):
    return 1.0 / _float(count)


def _float(count):
    return jnp.asarray(count, jnp.float32)


def _zero(plan: VideoPlan):
    layout = plgpu.Layout.WG_STRIDED((plan.chunk,), vec_size=plan.chunk // THREADS)
    return plgpu.layout_cast(jnp.zeros((plan.chunk,), jnp.float32), layout)


def _zeros(plan: VideoPlan):
    return (_zero(plan),) * plan.video.group_frames
