"""Where the blocks of a sequence lie in the arrays that the Hopper kernel reads."""

import dataclasses
import functools

import numpy as np

from pallas_kernels.attention.sm90.copies import reciprocal_of
from pallas_kernels.attention.sm90.plan import (
    ALIGNMENT,
    BLOCK,
    ROWS,
    Boxes,
    Copies,
    Runs,
    SingleRows,
    Width,
)
from pallas_kernels.attention.sm90.wgmma import STEP
from pallas_kernels.common.interfaces import BlockGrid, Order

MAX_WIDTHS = 3  # each is a loop of its own in the kernel's code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Places of blocks, for one order of the tokens.

    Attributes:
      copies: How blocks are copied, which decides what the next three hold.
      starts: First token of each block over ALIGNMENT; with boxes, its row among the
        rows of all frames; by rows, the token itself.
      strides: Tokens from the start of a run to that of the next, over ALIGNMENT, for
        each block; with boxes, its first column over ALIGNMENT; by rows, tokens from
        the end of a run to the start of the next.
      reciprocals: Of the length of each block's runs, by rows; see `sm90_rows`.
      frame_shape: Rows of all frames, columns over ALIGNMENT, ALIGNMENT; with boxes.
      stores_short_blocks: A short block is followed by another one's tokens.
      scatter: Place of each token among blocks of full length.
      moves_lse: Whether the places, in order, are anything but the tokens.
      widths: Classes of key blocks, widest first.
      widths_with_text: The same where text may be shorter than its blocks.
      width_of_block: Number of each block's class.
    """

    copies: Copies
    starts: np.ndarray
    strides: np.ndarray
    reciprocals: np.ndarray
    frame_shape: tuple[int, ...]
    stores_short_blocks: bool
    scatter: np.ndarray
    moves_lse: bool
    widths: tuple[Width, ...]
    widths_with_text: tuple[Width, ...]
    width_of_block: np.ndarray


@functools.lru_cache(maxsize=64)
def geometry(grid: BlockGrid, order: Order) -> Geometry:
    """Decides how the kernel reads a sequence: in whole blocks, or row by row.

    Swizzled copies start at multiples of 8 tokens. In tiled order that holds for tiles
    of 8 x 16 on every grid whose edge tiles have a multiple of 8 tokens, which takes in
    45 x 80 and 30 x 52. In raster order a block is rows of a tile, which must start at
    multiples of 8 tokens too and be as long as the tile is wide: 45 x 80 does, 30 x 52
    does not. Without text the rows are copied together, in boxes of 8 columns. Other
    sequences are read and written row by row.
    """
    lengths = grid.block_lengths
    multiples = np.arange(grid.num_blocks, dtype=np.int32) * BLOCK
    block = np.repeat(np.arange(grid.num_blocks), lengths)
    scatter = multiples[block] + np.arange(grid.num_tokens)
    scatter -= grid.block_starts[block]
    if order == "raster":
        scatter = scatter[grid.raster_order]
    frame_shape: tuple[int, ...] = ()
    reciprocals = np.zeros(1, np.int32)
    starts, strides, run, cause = _runs(grid, order)
    copies: Copies
    if cause is not None:
        copies = SingleRows(cause)
        starts, strides, reciprocals = _single_rows(grid, order)
    else:
        in_multiples = run == BLOCK and bool((starts == multiples).all())
        copies = Runs(run, start_at_multiples=in_multiples)
        starts, strides = starts // ALIGNMENT, strides // ALIGNMENT
        if run != BLOCK and (found := _boxes(grid, starts, strides, run)):
            boxes, frame_shape, starts, strides = found
            copies = boxes
            block, row = np.divmod(scatter, BLOCK)
            row, column = np.divmod(row, run)
            number, column = np.divmod(column, ALIGNMENT)
            row_in_block = number * boxes.tokens + row * ALIGNMENT + column
            scatter = multiples[block] + row_in_block
    widths, width_of_block = _widths(grid, has_text_lengths=False)
    return Geometry(
        copies=copies,
        starts=starts.astype(np.int32),
        strides=strides.astype(np.int32),
        reciprocals=reciprocals,
        frame_shape=frame_shape,
        stores_short_blocks=bool((lengths < BLOCK).any()),
        scatter=scatter,
        moves_lse=not np.array_equal(scatter, np.arange(grid.num_blocks * BLOCK)),
        widths=widths,
        widths_with_text=_widths(grid, has_text_lengths=True)[0],
        width_of_block=width_of_block,
    )


def _boxes(grid: BlockGrid, starts, strides, run: int):
    """The boxes, the shape to cut them out of, and blocks' first rows and columns.

    None where there is text, tiles are too tall for a consumer's rows, or blocks are
    not whole runs, as in frames narrower than the tile: runs are then copied singly.
    """
    rows = BLOCK // run
    boxes = Boxes(rows, run // ALIGNMENT)
    row_lengths = np.unique(strides[grid.block_lengths > run])
    if grid.text_length or len(row_lengths) != 1 or boxes.tokens > ROWS:
        return None
    lengths = np.unique(grid.block_lengths)
    if (lengths % run).any() or len(lengths) > 2:  # of whole tiles and of the lowest
        return None
    columns = int(row_lengths[0])  # over ALIGNMENT, as starts and strides are
    if grid.num_tokens % (columns * ALIGNMENT):
        return None
    num_rows = grid.num_tokens // (columns * ALIGNMENT)
    first_row, first_column = np.divmod(starts, columns)
    return boxes, (num_rows, columns, ALIGNMENT), first_row, first_column


def _runs(grid: BlockGrid, order: Order):
    """Starts, strides and length of the runs of blocks, and why they do not serve."""
    starts, lengths = grid.block_starts, grid.block_lengths
    strides = np.zeros_like(starts)
    unaligned = (
        f"its blocks do not all start and end at multiples of {ALIGNMENT} tokens; "
        "other sizes of frame, tile or text would"
    )
    if grid.num_tokens < BLOCK:
        return starts, strides, BLOCK, f"it has fewer than {BLOCK} tokens"
    if order == "raster":
        run = grid.tile[1]
        if run % ALIGNMENT or BLOCK % run or (run > ROWS and run != BLOCK):
            return starts, strides, run, f"its tile is {run} tokens wide"
        first = grid.tile_order[starts]
        second = grid.tile_order[np.minimum(starts + run, grid.num_tokens - 1)]
        strides = np.where(lengths > run, second - first, run)
        if not _are_regular(grid, first, strides, run):
            cause = f"its frames cannot be cut into tiles {run} tokens wide"
            return first, strides, run, f'{cause}; order="tiled" is faster'
        starts = first
    else:
        run = BLOCK
    for tokens in (starts, strides, lengths, np.array(grid.num_tokens)):
        if (tokens % ALIGNMENT).any():
            return starts, strides, run, unaligned
    return starts, strides, run, None


def _are_regular(grid: BlockGrid, first, strides, run: int) -> bool:
    """Whether every block is runs of consecutive tokens at equal distances."""
    block = np.repeat(np.arange(grid.num_blocks), grid.block_lengths)
    row = np.arange(grid.num_tokens) - grid.block_starts[block]
    token = first[block] + row // run * strides[block] + row % run
    return bool((token == grid.tile_order).all())


def _single_rows(grid: BlockGrid, order: Order):
    """First token, jump from run to run, and reciprocal of the run, of each block."""
    first = grid.block_starts
    tokens = grid.tile_order if order == "raster" else np.arange(grid.num_tokens)
    # A run ends where the next token is not the next one in memory.
    ends = np.flatnonzero(np.append(np.diff(tokens) != 1, True))
    runs = ends[np.searchsorted(ends, first)] + 1 - first
    is_one = runs >= grid.block_lengths
    second = tokens[np.minimum(first + runs, grid.num_tokens - 1)]
    jumps = np.where(is_one, 0, second - tokens[first] - runs)
    runs = np.where(is_one, BLOCK, runs)
    return tokens[first], jumps, reciprocal_of(runs).astype(np.int32)


def _widths(grid: BlockGrid, *, has_text_lengths: bool):
    """Classes of blocks by length, and the class of each block."""
    lengths = grid.block_lengths
    needed = -(-lengths // STEP) * STEP
    tokens = np.unique(needed)[::-1][:MAX_WIDTHS]
    # The narrowest that is wide enough.
    width_of_block = (tokens[None, :] >= needed[:, None]).sum(1) - 1
    is_masked = lengths < tokens[width_of_block]
    if has_text_lengths:
        is_masked[grid.text_blocks] = True
    classes = [width_of_block == number for number in range(len(tokens))]
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
