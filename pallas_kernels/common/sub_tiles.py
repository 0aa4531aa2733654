"""Sub-tiles of the tiles of a video, and means over them and over a few frames."""

import dataclasses
import functools
import math

import numpy as np
from jaxtyping import Int

from pallas_kernels.common.configuration import make_plain, register_configuration


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class SubTiles:
    """The tiles of a video, cut into sub-tiles, each taken over a group of frames.

    A *column* is a tile of a frame over one group of frames; it has J sub-tiles. Cells
    are numbered by (group, tile, sub-tile): cell `m` belongs to column `m // J`, and
    column `c` to group `c // tiles`. Tiles and sub-tiles are counted row by row.
    Sub-tiles at the end of a tile may be smaller, and those of an edge tile may have no
    token. The last group may have fewer frames. Hashable: a static argument of jit.

    Attributes:
      frames: Frames, F.
      height: Token rows of a frame, H.
      width: Token columns of a frame, W.
      tile: Rows and columns of one tile.
      sub_tile: Rows and columns of one sub-tile; a larger one is the whole tile.
      group_frames: Consecutive frames of a group.

    Raises:
      ValueError: A size is not positive, or a group has more than 255 frames.
    """

    frames: int
    height: int
    width: int
    tile: tuple[int, int]
    sub_tile: tuple[int, int]
    group_frames: int = 1

    def __post_init__(self) -> None:
        make_plain(self)
        if min(self.sub_tile) < 1:
            raise ValueError(f"sub_tile={self.sub_tile} must have two positive sides")
        if not 1 <= self.group_frames <= 255:
            raise ValueError(f"group_frames={self.group_frames} must be in 1 to 255")

    @property
    def tiles_per_frame(self) -> tuple[int, int]:
        """Rows and columns of tiles in one frame, smaller edge tiles included."""
        rows, columns = self.tile
        return -(-self.height // rows), -(-self.width // columns)

    @property
    def part(self) -> tuple[int, int]:
        """Rows and columns of a full sub-tile, which is no larger than the tile."""
        (rows, columns), (sub_rows, sub_columns) = self.tile, self.sub_tile
        return min(rows, sub_rows), min(columns, sub_columns)

    @property
    def sub_tiles_per_tile(self) -> tuple[int, int]:
        """Rows and columns of sub-tiles in one tile."""
        (rows, columns), (sub_rows, sub_columns) = self.tile, self.part
        return -(-rows // sub_rows), -(-columns // sub_columns)

    @property
    def per_column(self) -> int:
        """Sub-tiles of a tile, J: cells of a column."""
        return math.prod(self.sub_tiles_per_tile)

    @property
    def num_groups(self) -> int:
        """Groups of frames."""
        return -(-self.frames // self.group_frames)

    @property
    def num_columns(self) -> int:
        """Tiles of all groups of frames, C."""
        return self.num_groups * math.prod(self.tiles_per_frame)

    @property
    def num_cells(self) -> int:
        """Sub-tiles of all groups of frames, M = C * J."""
        return self.num_columns * self.per_column

    @property
    def num_tiles(self) -> int:
        """Tiles of all frames, S."""
        return self.frames * math.prod(self.tiles_per_frame)

    @property
    def num_tokens(self) -> int:
        """Tokens of the video, F * H * W."""
        return self.frames * self.height * self.width

    @property
    def has_edges(self) -> bool:
        """Whether some tile is smaller than a full one."""
        rows, columns = self.tile
        return bool(self.height % rows or self.width % columns)

    @property
    def tokens_per_frame(self) -> Int[np.ndarray, " M"]:
        """Tokens of each cell in one frame; 0 for those of edge tiles that have none.

        int32, read-only.
        """
        return _tables(self)[0]

    @property
    def tokens_of_tile(self) -> Int[np.ndarray, " S"]:
        """Tokens of each tile of each frame."""
        tiles = math.prod(self.tiles_per_frame)
        of_tile = self.tokens_per_frame.reshape(-1, self.per_column).sum(-1)
        return np.tile(of_tile[:tiles], self.frames)

    @property
    def column_of_tile(self) -> Int[np.ndarray, " S"]:
        """Column that each tile of each frame belongs to."""
        frame, tile = np.divmod(
            np.arange(self.num_tiles), math.prod(self.tiles_per_frame)
        )
        return frame // self.group_frames * math.prod(self.tiles_per_frame) + tile

    @property
    def frames_of_column(self) -> Int[np.ndarray, " C"]:
        """Frames of each column's group; the last group may have fewer. Read-only."""
        return _tables(self)[1]

    @property
    def tokens(self) -> Int[np.ndarray, " M"]:
        """Tokens of each cell in all frames of its group."""
        return self.tokens_per_frame * np.repeat(self.frames_of_column, self.per_column)


@functools.lru_cache(maxsize=64)
def _tables(sub_tiles: SubTiles) -> tuple[np.ndarray, np.ndarray]:
    """Builds the tables once; they are shared, hence read-only."""
    sides = []
    for axis, size in enumerate((sub_tiles.height, sub_tiles.width)):
        tile, part = sub_tiles.tile[axis], sub_tiles.sub_tile[axis]
        start = np.arange(sub_tiles.sub_tiles_per_tile[axis]) * part
        tile_start = np.arange(sub_tiles.tiles_per_frame[axis])[:, None] * tile
        end = np.minimum(np.minimum(start + part, tile), size - tile_start)
        sides.append(np.maximum(end - start, 0))  # [tiles, sub-tiles]
    of_frame = np.einsum("ij,kl->ikjl", *sides).ravel()
    tokens = np.tile(of_frame, sub_tiles.num_groups).astype(np.int32)
    first = np.arange(sub_tiles.num_groups) * sub_tiles.group_frames
    frames = np.minimum(sub_tiles.group_frames, sub_tiles.frames - first)
    frames = np.repeat(frames, math.prod(sub_tiles.tiles_per_frame)).astype(np.int32)
    for table in (tokens, frames):
        table.flags.writeable = False
    return tokens, frames
