"""Positions of a sequence's blocks in the arrays that the Hopper kernel reads."""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from pallas_kernels.attention.sm90.copies import (
    BoxAddresses,
    Boxes,
    RowAddresses,
    RunAddresses,
    Runs,
    SingleRows,
)
from pallas_kernels.attention.sm90.plan import BLOCK, ROWS, Width
from pallas_kernels.attention.sm90.row_copies import reciprocal_of
from pallas_kernels.attention.sm90.wgmma import STEP
from pallas_kernels.common.interfaces import BlockGrid, Order
from pallas_kernels.common.lanes import ALIGNMENT

MAX_WIDTHS = 3  # each is a loop of its own in the kernel's code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Positions of blocks, for one order of the tokens.

    Attributes:
      copies: How blocks are copied.
      addresses: Where the copies find them; NumPy arrays.
      frame_shape: Rows of all frames, columns over ALIGNMENT, ALIGNMENT: the shape to
        cut boxes out of; empty where tokens stay one axis.
      stores_short_blocks: A short block is followed by another one's tokens.
      scatter: Place of each token among blocks of full length.
      moves_lse: Whether `scatter` does anything.
      widths: Classes of key blocks, widest first.
      widths_with_text: The same where text may be shorter than its blocks.
      width_of_block: Index of each block's class.
      why_single_rows: Why blocks are copied row by row, and what helps, or None.
    """

    copies: Runs | Boxes | SingleRows
    addresses: RunAddresses | BoxAddresses | RowAddresses
    frame_shape: tuple[int, ...] = ()
    stores_short_blocks: bool
    scatter: np.ndarray
    moves_lse: bool
    widths: tuple[Width, ...]
    widths_with_text: tuple[Width, ...]
    width_of_block: np.ndarray
    why_single_rows: str | None = None


@functools.lru_cache(maxsize=64)
def geometry_of(grid: BlockGrid, order: Order) -> Geometry:
    """Decides how the kernel reads a sequence: in whole blocks, or row by row.

    Swizzled copies start at multiples of 8 tokens. In tiled order tiles of 8 x 16 do so
    where edge tiles have a multiple of 8 tokens, such as on 45 x 80 and 30 x 52. In
    raster order a block is rows of a tile, which must start at multiples of 8 tokens
    too and be as long as the tile is wide: 45 x 80 does, 30 x 52 does not. Without text
    the rows are copied together, in boxes of 8 columns. Other sequences are read and
    written row by row.

    Args:
      grid: Geometry of the blocks.
      order: How the tokens are ordered in memory.

    Returns:
      The way of copying, and where blocks lie for it.
    """
    copies: Runs | Boxes | SingleRows
    addresses: RunAddresses | BoxAddresses | RowAddresses
    runs = _runs(grid, order)
    scatter = _scatter(grid, order)
    if runs.cause is not None:
        copies, addresses = SingleRows(), _row_addresses(grid, order)
        return _geometry(grid, copies, addresses, scatter, why_single_rows=runs.cause)
    if runs.tokens != BLOCK and (found := _boxes(grid, runs)):
        boxes, frame_shape, addresses = found
        scatter = _scatter_in_boxes(scatter, boxes, runs.tokens)
        return _geometry(grid, boxes, addresses, scatter, frame_shape=frame_shape)
    multiples = np.arange(grid.num_blocks) * BLOCK
    at_multiples = runs.tokens == BLOCK and bool((runs.starts == multiples).all())
    copies = Runs(runs.tokens, start_at_multiples=at_multiples)
    addresses = RunAddresses(
        first_unit=(runs.starts // ALIGNMENT).astype(np.int32),
        units_to_next_run=(runs.strides // ALIGNMENT).astype(np.int32),
    )
    return _geometry(grid, copies, addresses, scatter)


def _geometry(grid: BlockGrid, copies, addresses, scatter, **others) -> Geometry:
    """Adds what does not depend on the way of copying."""
    widths, width_of_block = _widths(grid, has_text_lengths=False)
    return Geometry(
        copies=copies,
        addresses=addresses,
        stores_short_blocks=bool((grid.block_lengths < BLOCK).any()),
        scatter=scatter,
        moves_lse=not np.array_equal(scatter, np.arange(grid.num_blocks * BLOCK)),
        widths=widths,
        widths_with_text=_widths(grid, has_text_lengths=True)[0],
        width_of_block=width_of_block,
        **others,
    )


def _scatter(grid: BlockGrid, order: Order) -> np.ndarray:
    """Returns the place of each token among blocks of full length."""
    block = np.repeat(np.arange(grid.num_blocks, dtype=np.int32), grid.block_lengths)
    scatter = block * BLOCK + np.arange(grid.num_tokens) - grid.block_starts[block]
    return scatter[grid.raster_order] if order == "raster" else scatter


def _scatter_in_boxes(scatter: np.ndarray, boxes: Boxes, run: int) -> np.ndarray:
    """Returns the same where the tokens of a block stand box by box."""
    block, row = np.divmod(scatter, BLOCK)
    row, column = np.divmod(row, run)
    box, column = np.divmod(column, ALIGNMENT)
    return block * BLOCK + box * boxes.tokens + row * ALIGNMENT + column


def _boxes(grid: BlockGrid, runs: "_Runs"):
    """Returns boxes, the shape to cut them out of, and blocks' first rows and columns.

    None where there is text, tiles are too tall for a consumer's rows, or blocks are
    not whole runs, as in frames narrower than the tile: runs are then copied singly.
    """
    run = runs.tokens
    boxes = Boxes(rows=BLOCK // run, num_boxes=run // ALIGNMENT)
    row_lengths = np.unique(runs.strides[grid.block_lengths > run])
    if grid.text_length or len(row_lengths) != 1 or boxes.tokens > ROWS:
        return None
    lengths = np.unique(grid.block_lengths)
    if (lengths % run).any() or len(lengths) > 2:  # of whole tiles and of the lowest
        return None
    row_tokens = int(row_lengths[0])
    if grid.num_tokens % row_tokens:
        return None
    columns = row_tokens // ALIGNMENT
    frame_shape = (grid.num_tokens // row_tokens, columns, ALIGNMENT)
    first_row, first_column = np.divmod(runs.starts // ALIGNMENT, columns)
    addresses = BoxAddresses(first_row.astype(np.int32), first_column.astype(np.int32))
    return boxes, frame_shape, addresses


class _Runs(NamedTuple):
    """Blocks as runs of tokens that follow each other in memory, if TMA can copy them.

    Attributes:
      starts: First token of each block.
      strides: Tokens from the start of a run to that of the next, for each block.
      tokens: Length of a run.
      cause: Why TMA cannot copy them, or None.
    """

    starts: np.ndarray
    strides: np.ndarray
    tokens: int
    cause: str | None = None


def _runs(grid: BlockGrid, order: Order) -> _Runs:
    """Cuts blocks into runs, and says why they do not serve where they do not."""
    starts, lengths = grid.block_starts, grid.block_lengths
    runs = _Runs(starts, np.zeros_like(starts), BLOCK)
    if grid.num_tokens < BLOCK:
        return runs._replace(cause=f"it has fewer than {BLOCK} tokens")
    if order == "raster":
        run = grid.tile[1]
        if run % ALIGNMENT or BLOCK % run or (run > ROWS and run != BLOCK):
            return runs._replace(cause=f"its tile is {run} tokens wide")
        first = grid.tile_order[starts]
        second = grid.tile_order[np.minimum(starts + run, grid.num_tokens - 1)]
        runs = _Runs(first, np.where(lengths > run, second - first, run), run)
        if not _are_regular(grid, runs):
            cause = f"its frames cannot be cut into tiles {run} tokens wide"
            return runs._replace(cause=f'{cause}; order="tiled" is faster')
    for tokens in (runs.starts, runs.strides, lengths, np.array(grid.num_tokens)):
        if (tokens % ALIGNMENT).any():
            cause = (
                f"its blocks do not all start and end at multiples of {ALIGNMENT} "
                "tokens; other sizes of frame, tile or text would"
            )
            return runs._replace(cause=cause)
    return runs


def _are_regular(grid: BlockGrid, runs: _Runs) -> bool:
    """Says whether every block is runs of tokens in sequence, at equal distances."""
    block = np.repeat(np.arange(grid.num_blocks), grid.block_lengths)
    run, token = np.divmod(
        np.arange(grid.num_tokens) - grid.block_starts[block], runs.tokens
    )
    token += runs.starts[block] + run * runs.strides[block]
    return bool((token == grid.tile_order).all())


def _row_addresses(grid: BlockGrid, order: Order) -> RowAddresses:
    """Finds each block's first token and its runs, of whatever length."""
    first = grid.block_starts
    tokens = grid.tile_order if order == "raster" else np.arange(grid.num_tokens)
    # A run ends where the next token is not the next one in memory.
    ends = np.flatnonzero(np.append(np.diff(tokens) != 1, True))
    runs = ends[np.searchsorted(ends, first)] + 1 - first
    is_one = runs >= grid.block_lengths
    second = tokens[np.minimum(first + runs, grid.num_tokens - 1)]
    gaps = np.where(is_one, 0, second - tokens[first] - runs)
    runs = np.where(is_one, BLOCK, runs)
    return RowAddresses(
        first_token=tokens[first].astype(np.int32),
        gap=gaps.astype(np.int32),
        reciprocal=reciprocal_of(runs).astype(np.int32),
    )


def _widths(grid: BlockGrid, *, has_text_lengths: bool):
    """Returns the classes of blocks by length, and the class of each block."""
    lengths = grid.block_lengths
    needed = -(-lengths // STEP) * STEP
    tokens = np.unique(needed)[::-1][:MAX_WIDTHS]
    # The narrowest that is wide enough.
    width_of_block = (tokens[None, :] >= needed[:, None]).sum(1) - 1
    is_masked = lengths < tokens[width_of_block]
    if has_text_lengths:
        is_masked[grid.text_blocks] = True
    classes = [width_of_block == index for index in range(len(tokens))]
    widths = tuple(
        Width(
            int(size),
            int(lengths[own].max()),
            int(own.sum()),
            bool(is_masked[own].any()),
        )
        for size, own in zip(tokens, classes, strict=True)
    )
    return widths, width_of_block.astype(np.int32)
