"""The token grid of a video latent, its tiles, and the order they are stored in.

Tokens lie on a grid of frames, rows and columns. Raster order is frame-major, then
row, then column. Tiled order stores each tile of one frame contiguously, so that a
tile is one block of a block-sparse attention kernel. Text tokens precede or follow
the visual tokens and keep their order; they are cut into blocks of the tile's size.
"""

import dataclasses
import functools
from typing import Literal

import numpy as np
from jaxtyping import Int

from pallas_kernels.common import make_plain, register_configuration

IntVector = Int[np.ndarray, " L"]


@register_configuration
@dataclasses.dataclass(frozen=True)
class VideoGrid:
    """Static geometry of one sequence: a video latent and, optionally, text.

    Every size is allowed. Where the tile does not divide the frame, tiles at the
    bottom and right edge are shorter blocks; no token is added, dropped, or shared
    between frames. Instances are hashable, and pytrees without leaves: jit takes them
    as any argument, static. NumPy's integers become Python's, lists tuples.

    Args:
      frames: Latent frames after patchifying, F.
      height: Token rows of a frame after patchifying, H.
      width: Token columns of a frame after patchifying, W.
      tile: Rows and columns of one tile. Their product is the block size P.
      text_length: Text tokens in the sequence, padding included. 0 for none.
      text_side: Whether the text stands before or after the visual tokens.

    Raises:
      ValueError: A size is not a positive integer, text_length is negative, or
        text_side is not "before" or "after".

    Source: DraftAttention (arXiv 2505.14708), token reordering; the edge tiles
    follow `ceil_mode=True` of the published code's `avg_pool2d`.
    """

    frames: int
    height: int
    width: int
    _: dataclasses.KW_ONLY
    tile: tuple[int, int] = (8, 16)
    text_length: int = 0
    text_side: Literal["before", "after"] = "after"

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("frames", "height", "width"):
            if not _is_int(value := getattr(self, name)) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if (
            not isinstance(self.tile, tuple)
            or len(self.tile) != 2
            or not all(_is_int(side) and side >= 1 for side in self.tile)
        ):
            raise ValueError(
                f"tile={self.tile!r} must be a tuple of two positive integers "
                "(rows, columns)"
            )
        if not _is_int(self.text_length) or self.text_length < 0:
            raise ValueError(
                f"text_length={self.text_length!r} must be an integer >= 0"
            )
        if self.text_side not in ("before", "after"):
            raise ValueError(
                f"text_side={self.text_side!r} must be 'before' or 'after'; "
                "say text_length=0 for no text"
            )

    @property
    def block_size(self) -> int:
        """Tokens in a full block, P = tile rows x tile columns."""
        return self.tile[0] * self.tile[1]

    @property
    def num_visual_tokens(self) -> int:
        """Number of visual tokens, F x H x W."""
        return self.frames * self.height * self.width

    @property
    def num_tokens(self) -> int:
        """Length of the sequence, T: visual and text tokens."""
        return self.num_visual_tokens + self.text_length

    @property
    def tiles_per_frame(self) -> tuple[int, int]:
        """Rows and columns of tiles in one frame, shorter edge tiles included."""
        rows, columns = self.tile
        return -(-self.height // rows), -(-self.width // columns)

    @property
    def num_visual_blocks(self) -> int:
        """Number of tiles in the video, S: also the number of draft tokens."""
        tile_rows, tile_columns = self.tiles_per_frame
        return self.frames * tile_rows * tile_columns

    @property
    def num_text_blocks(self) -> int:
        """Number of blocks the text is cut into; the last one may be shorter."""
        return -(-self.text_length // self.block_size)

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the whole sequence, text included."""
        return self.num_visual_blocks + self.num_text_blocks

    @property
    def visual_tokens(self) -> slice:
        """Slice of the sequence that holds the visual tokens, in either order."""
        start = self.text_length if self.text_side == "before" else 0
        return slice(start, start + self.num_visual_tokens)

    @property
    def text_tokens(self) -> slice:
        """Slice of the sequence that holds the text tokens, in either order."""
        start = 0 if self.text_side == "before" else self.num_visual_tokens
        return slice(start, start + self.text_length)

    @property
    def visual_blocks(self) -> slice:
        """Slice of the list of blocks that holds the visual blocks."""
        start = self.num_text_blocks if self.text_side == "before" else 0
        return slice(start, start + self.num_visual_blocks)

    @property
    def text_blocks(self) -> slice:
        """Slice of the list of blocks that holds the text blocks."""
        start = 0 if self.text_side == "before" else self.num_visual_blocks
        return slice(start, start + self.num_text_blocks)

    @property
    def tile_order(self) -> IntVector:
        """Raster position of each token of the tiled sequence.

        `tiled = raster[tile_order]`. int32 of length `num_tokens`; text tokens
        keep their place. Read-only.
        """
        return _geometry(self).tile_order

    @property
    def raster_order(self) -> IntVector:
        """Tiled position of each token of the raster sequence.

        `raster = tiled[raster_order]`, the inverse of `tile_order`. Read-only.
        """
        return _geometry(self).raster_order

    @property
    def block_starts(self) -> IntVector:
        """First token of each block in tiled order, int32 of length `num_blocks`."""
        return _geometry(self).block_starts

    @property
    def block_lengths(self) -> IntVector:
        """Tokens in each block, 1 to `block_size`, int32 of length `num_blocks`."""
        return _geometry(self).block_lengths

    @property
    def has_short_blocks(self) -> bool:
        """Whether any block, of the video or the text, is shorter than P."""
        return bool((self.block_lengths < self.block_size).any())


@dataclasses.dataclass(frozen=True, eq=False)
class _Geometry:
    tile_order: np.ndarray
    raster_order: np.ndarray
    block_starts: np.ndarray
    block_lengths: np.ndarray


@functools.lru_cache(maxsize=64)
def _geometry(grid: VideoGrid) -> _Geometry:
    """Builds the arrays of a grid once; they are shared, hence read-only."""
    visual_order = _visual_tile_order(grid) + grid.visual_tokens.start
    text_order = np.arange(grid.text_tokens.start, grid.text_tokens.stop)
    visual_lengths = _visual_block_lengths(grid)
    text_lengths = _chunk_lengths(grid.text_length, grid.block_size)
    if grid.text_side == "before":
        tile_order = np.concatenate([text_order, visual_order])
        block_lengths = np.concatenate([text_lengths, visual_lengths])
    else:
        tile_order = np.concatenate([visual_order, text_order])
        block_lengths = np.concatenate([visual_lengths, text_lengths])
    block_starts = np.cumsum(block_lengths) - block_lengths
    return _Geometry(
        tile_order=_freeze(tile_order),
        raster_order=_freeze(np.argsort(tile_order)),
        block_starts=_freeze(block_starts),
        block_lengths=_freeze(block_lengths),
    )


def _visual_tile_order(grid: VideoGrid) -> np.ndarray:
    """Sorts raster positions by (frame, tile row, tile column, row, column)."""
    rows, columns = grid.tile
    frame, row, column = np.indices((grid.frames, grid.height, grid.width))
    # The last key is the most significant one; positions break the ties, because
    # lexsort is stable and raster order is row-major inside a tile.
    keys = (column // columns, row // rows, frame)
    return np.lexsort([key.ravel() for key in keys])


def _visual_block_lengths(grid: VideoGrid) -> np.ndarray:
    rows = _chunk_lengths(grid.height, grid.tile[0])
    columns = _chunk_lengths(grid.width, grid.tile[1])
    return np.tile(np.outer(rows, columns).ravel(), grid.frames)


def _chunk_lengths(total: int, chunk: int) -> np.ndarray:
    """Returns the lengths of the chunks of `total`; only the last is shorter."""
    starts = np.arange(0, total, chunk)
    return np.minimum(chunk, total - starts)


def _freeze(array: np.ndarray) -> np.ndarray:
    array = array.astype(np.int32)
    array.flags.writeable = False
    return array


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
