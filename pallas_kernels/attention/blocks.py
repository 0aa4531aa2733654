"""Sequences cut into blocks, and walks over the lists of kept blocks.

Rows (batch item, head, query block) are sorted by their number of kept blocks and
walked in groups, so that a group's rows take about equally many steps. Each step
gathers the next few kept key blocks of every row of the group. No row is written by two
groups, so there are no atomics and results are bit-identical from run to run.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.common.configuration import make_plain, register_configuration
from pallas_kernels.common.interfaces import BlockGrid, valid_lengths
from pallas_kernels.common.linear_maps import LinearMap


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkConfig:
    """Amounts computed at once. Fields change only time and rounding."""

    group_tokens: int  # query tokens walked together, in whole blocks
    step_tokens: int  # key tokens gathered per row and step, in whole blocks
    upcast: bool  # multiply in float32 also for narrow inputs

    def __post_init__(self) -> None:
        make_plain(self)

    @classmethod
    def for_platform(cls, platform: str) -> "ChunkConfig":
        """Chooses by measurement on two CPU cores, by occupancy elsewhere.

        On the CPU, groups of 256 to 1,024 and steps of 128 and 256 tokens are within
        10 % of each other; longer steps waste more on the end of short rows. A GPU
        wants hundreds of independent matmuls in flight and its tensor cores.
        """
        if platform == "cpu":
            return cls(group_tokens=512, step_tokens=128, upcast=True)
        return cls(group_tokens=65_536, step_tokens=128, upcast=False)


class Lists(NamedTuple):
    """Blocks that each of L = B * N * R rows walks, in CSR form."""

    start: Int[Array, " L"]  # first entry in ids[head]
    length: Int[Array, " L"]  # entries
    ids: Int[Array, "B*N M"]  # block within the head


def walk(
    lists: Lists,
    *,
    own: tuple[Array, ...],
    others: tuple[Array, ...],
    init: Callable[[Any], Any],
    step: Callable[..., Any],
    finish: Callable[[Any, Any], tuple[Array, ...]],
    num_blocks: int,
    config: ChunkConfig,
) -> tuple[Array, ...]:
    """Runs `step` over each row's list of blocks, a group of rows at a time.

    `own` is read at the row itself, `others` at the blocks it walks, both [L, ...].
    The last of `others` is the blocks' valid length, which becomes a mask of the
    gathered tokens. Results are [L, ...] in the order of the rows.
    """
    num_rows = lists.length.shape[0]
    block_size = others[0].shape[1]
    width = min(max(config.step_tokens // block_size, 1), num_blocks)  # per step
    group_rows = min(max(config.group_tokens // block_size, 1), num_rows)
    num_groups = math.ceil(num_rows / group_rows)
    order = jnp.argsort(-lists.length, stable=True)
    # The last group is filled up with rows that are out of range and have no blocks.
    order = jnp.pad(
        order, (0, num_groups * group_rows - num_rows), constant_values=num_rows
    )
    *other_arrays, other_length = others

    def walk_group(rows):
        in_range = rows < num_rows
        rows = jnp.minimum(rows, num_rows - 1)
        count = jnp.where(in_range, lists.length[rows], 0)
        start, head = lists.start[rows], rows // num_blocks
        own_rows = tuple(_take(x, rows) for x in own)

        def advance(i, carry):
            entry = i * width + jnp.arange(width)
            last = lists.ids.shape[1] - 1
            place = jnp.minimum(start[:, None] + entry, last)  # read, but not live
            ids = lists.ids[head[:, None], place]
            blocks = ids + (head * num_blocks)[:, None]
            gathered = tuple(_take(x, blocks) for x in other_arrays)
            gathered = tuple(
                x.reshape(group_rows, width * block_size, *x.shape[3:])
                for x in gathered
            )
            live = entry < count[:, None]
            length = jnp.where(live, other_length[blocks], 0)
            valid = jnp.arange(block_size) < length[..., None]
            return step(own_rows, gathered, valid.reshape(group_rows, -1), carry)

        num_steps = -(-count.max() // width)
        return finish(
            own_rows, jax.lax.fori_loop(0, num_steps, advance, init(own_rows))
        )

    results = jax.lax.map(walk_group, order.reshape(num_groups, group_rows))
    place = jnp.argsort(order[:num_rows])
    return tuple(
        x.reshape(num_groups * group_rows, *x.shape[2:])[place] for x in results
    )


def _take(x: Array, rows: Int[Array, "..."]) -> Array:
    """x[rows] for rows in range."""
    return x.at[rows].get(mode="promise_in_bounds")


def row_lists(
    row_offsets: Int[Array, "B N offsets"], block_ids: Int[Array, "B N M"]
) -> Lists:
    """Returns the lists of a mask, of all rows one after another."""
    return Lists(
        start=row_offsets[..., :-1].ravel(),
        length=jnp.diff(row_offsets, axis=-1).ravel(),
        ids=block_ids.reshape(-1, block_ids.shape[-1]),
    )


def transpose(lists: Lists, num_blocks: int) -> Lists:
    """Returns the query blocks that keep each key block, in ascending order."""
    num_heads, capacity = lists.ids.shape
    ends = (lists.start + lists.length).reshape(num_heads, num_blocks)
    entry, head = jnp.arange(capacity), jnp.arange(num_heads)[:, None]
    # The row of an entry is the number of rows that end at or before it. (jnp.
    # searchsorted is no program of plain primitives, as `linear_maps` needs them.)
    # Counts have a place for what is not read: checkify stops at an index out of
    # bounds, and has no rule for a scatter under vmap.
    is_end = jnp.zeros((num_heads, capacity + 1), jnp.int32).at[head, ends].add(1)
    rows = jnp.cumsum(is_end[:, :capacity], axis=1)
    columns = jnp.where(entry < ends[:, -1:], lists.ids, num_blocks)
    count = jnp.zeros((num_heads, num_blocks + 1), jnp.int32).at[head, columns].add(1)
    count = count[:, :num_blocks]
    by_column = jnp.argsort(columns, axis=1, stable=True)
    ids = jnp.take_along_axis(rows, by_column, axis=1).astype(jnp.int32)
    start = jnp.cumsum(count, axis=1) - count
    return Lists(start=start.ravel(), length=count.ravel(), ids=ids)


def block_lengths(
    grid: BlockGrid, text_lengths: Int[Array, " B"], num_heads: int
) -> Int[Array, " L"]:
    """Counts the valid tokens of each block, of each batch item and head."""
    lengths = valid_lengths(grid, text_lengths)
    return jnp.repeat(lengths[:, None], num_heads, axis=1).ravel()


def valid_only(x: Float[Array, "L P *D"], lengths: Int[Array, " L"]) -> Array:
    """Replaces tokens past the blocks' lengths, which may be NaN, by zeros.

    A probability of zero would not do: zero times NaN is NaN.
    """
    is_valid = jnp.arange(x.shape[1]) < lengths[:, None]
    return jnp.where(is_valid.reshape(is_valid.shape + (1,) * (x.ndim - 2)), x, 0)


def cut(x: Float[Array, "B T N *D"], grid: BlockGrid) -> Float[Array, "L P *D"]:
    """Cuts a sequence into blocks; short ones are filled up with zeros."""
    (blocks,) = _cutting(grid, x.shape[0])((), (x,))
    return blocks


def join(x: Float[Array, "L P *D"], grid: BlockGrid, batch: int) -> Array:
    """Joins blocks to a sequence [B, T, N, ...]: the inverse and transpose of `cut`."""
    forward = _cutting(grid, batch)
    (sequence,) = LinearMap(apply=forward.transpose, transpose=forward.apply)((), (x,))
    return sequence


def _cutting(grid: BlockGrid, batch: int) -> LinearMap:
    """Returns the map of `cut`, whose transpose needs no scatter."""
    return LinearMap(
        apply=lambda _, linear: (_cut(linear[0], grid),),
        transpose=lambda _, cotangents: (_join(cotangents[0], grid, batch),),
    )


def _cut(x, grid):
    batch, _, num_heads, *rest = x.shape
    num_blocks, block_size = grid.num_blocks, grid.block_size
    if (grid.block_lengths != block_size).any():
        offset = np.arange(block_size)
        token = np.minimum(grid.block_starts[:, None] + offset, grid.num_tokens - 1)
        is_token = (offset < grid.block_lengths[:, None]).ravel()
        is_token = is_token.reshape(-1, *[1] * (x.ndim - 2))
        x = jnp.where(is_token, x[:, token.ravel()], 0)
    x = x.reshape(batch, num_blocks, block_size, num_heads, *rest)
    return jnp.moveaxis(x, 3, 1).reshape(-1, block_size, *rest)


def _join(x, grid, batch):
    num_blocks, block_size = grid.num_blocks, grid.block_size
    x = x.reshape(batch, -1, num_blocks, block_size, *x.shape[2:])
    x = jnp.moveaxis(x, 1, 3)
    x = x.reshape(batch, num_blocks * block_size, *x.shape[3:])
    if (grid.block_lengths == block_size).all():
        return x
    block = np.repeat(np.arange(num_blocks), grid.block_lengths)
    offset = np.arange(grid.num_tokens) - grid.block_starts[block]
    return x[:, block * block_size + offset]
