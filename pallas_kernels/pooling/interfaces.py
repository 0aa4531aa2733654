"""What the pooling operations take: arrays by name, tiles, reductions, norms."""

import dataclasses
import functools
import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from pallas_kernels.common.arrays import AnyArray
from pallas_kernels.common.configuration import make_plain, register_configuration
from pallas_kernels.common.interfaces import Order
from pallas_kernels.common.products import Product
from pallas_kernels.common.validation import check_order

Reduction = Literal["mean", "max"]
VideoResult = Literal["parts", "cells", "tiles", "spread"]  # see sm90/pool_video.py
Scales = tuple[Float[AnyArray, " C"], Float[AnyArray, " C"]]
Rope = tuple[Float[AnyArray, "V half"], Float[AnyArray, "V half"]]
MeanSquares = tuple[Float[AnyArray, "B T"], Float[AnyArray, "B T"]]
Projected = Float[AnyArray, "B T N D"] | Product  # finished, or to be finished


class QKV(NamedTuple):
    """Queries, keys and values of the same tokens, as projected.

    Attributes:
      q: Queries.
      k: Keys.
      v: Values.
    """

    q: Projected
    k: Projected
    v: Projected


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """The tiles of the frames of a sequence, and where their tokens stand.

    Tiles at the bottom and right edge of a frame may be smaller. They are numbered
    frame by frame, row by row. Hashable, so it serves as a static jit argument.

    Attributes:
      frames: Frames, F.
      height: Token rows of a frame, H.
      width: Token columns of a frame, W.
      tile: Rows and columns of one tile.
      order: "raster" for tokens frame by frame and row by row, "tiled" for tile by
        tile.
      start: First token of the frames in the sequence: text may stand before them.

    Raises:
      ValueError: order is unknown.
    """

    frames: int
    height: int
    width: int
    tile: tuple[int, int]
    order: Order
    start: int = 0

    def __post_init__(self) -> None:
        make_plain(self)
        check_order(self.order)

    @property
    def tokens(self) -> slice:
        """Positions of the frames' tokens in the sequence."""
        return slice(self.start, self.start + self.frames * self.height * self.width)

    @property
    def tile_size(self) -> int:
        """Tokens of a full tile, P."""
        return math.prod(self.tile)

    @property
    def tiles_per_frame(self) -> tuple[int, int]:
        """Rows and columns of tiles in one frame, smaller edge tiles included."""
        rows, columns = self.tile
        return -(-self.height // rows), -(-self.width // columns)

    @property
    def num_tiles(self) -> int:
        """Tiles of all frames, S."""
        return self.frames * math.prod(self.tiles_per_frame)

    @property
    def has_edges(self) -> bool:
        """Whether some tile is smaller than a full one."""
        rows, columns = self.tile
        return bool(self.height % rows or self.width % columns)

    @property
    def lengths(self) -> Int[np.ndarray, " S"]:
        """Tokens of each tile."""
        return self.table[:, 2] * self.table[:, 3]

    @property
    def table(self) -> Int[np.ndarray, "S 4"]:
        """First token, tokens between two rows, rows and columns of each tile.

        Tokens are counted from the start of the sequence. Read-only.
        """
        return _table(self)


@functools.lru_cache(maxsize=64)
def _table(tiling: Tiling) -> Int[np.ndarray, "S 4"]:
    """Builds the table of a tiling once; it is shared, hence read-only."""
    rows, columns = tiling.tile
    frame, row, column = np.indices((tiling.frames, *tiling.tiles_per_frame))
    own_rows = np.minimum(rows, tiling.height - row * rows).ravel()
    own_columns = np.minimum(columns, tiling.width - column * columns).ravel()
    if tiling.order == "raster":
        token = (frame * tiling.height + row * rows) * tiling.width + column * columns
        first = token.ravel()
        stride = np.full_like(own_columns, tiling.width)
    else:
        lengths = own_rows * own_columns
        first = np.cumsum(lengths) - lengths
        stride = own_columns
    fields = (first + tiling.start, stride, own_rows, own_columns)
    table = np.stack(fields, axis=-1).astype(np.int32)
    table.flags.writeable = False
    return table


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class QKNorm:
    """The RMS norm that queries and keys go through; statistics are float32.

    Attributes:
      over: "heads" for one root mean square of all channels of a token (Wan), "head"
        for one of each head (HunyuanVideo).
      eps: Added to the mean square.

    Raises:
      ValueError: over is neither of these, or eps is negative.
    """

    over: Literal["heads", "head"]
    eps: float = 1e-6

    def __post_init__(self) -> None:
        make_plain(self)
        if self.over not in ("heads", "head"):
            raise ValueError(f"{self.over=} must be 'heads' or 'head'")
        if not self.eps >= 0.0:
            raise ValueError(f"{self.eps=} must not be negative")
