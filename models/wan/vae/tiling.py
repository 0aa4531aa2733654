"""Spatial tiles with blended overlaps, for frames that do not fit at once."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pallas_kernels.common import make_plain, register_configuration


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Cuts frames in tiles that are encoded or decoded on their own.

    Saves memory and changes the result: attention and convolutions see their tile
    only. Overlaps are blended linearly. All tiles of a frame have one size, so that
    one compilation serves all. (In diffusers' `enable_tiling`, whose default sizes
    these are, tiles are larger, but the last of a row or column.)

    Args:
      size: Most rows and columns of a tile, in pixels; multiples of the codec's
        stride.
      overlap: Least rows and columns that neighbours share, in pixels; likewise
        multiples, at most a third of `size`, so that no third tile takes part.

    Raises:
      ValueError: `size` or `overlap` is not as said.
    """

    size: tuple[int, int] = (256, 256)
    overlap: tuple[int, int] = (64, 64)

    def __post_init__(self) -> None:
        make_plain(self)
        for name, least in (("size", 1), ("overlap", 0)):
            value = getattr(self, name)
            if len(value) != 2 or not all(
                isinstance(length, int) and length >= least for length in value
            ):
                raise ValueError(f"{name}={value!r} must be two integers >= {least}")
        if any(3 * o > s for o, s in zip(self.overlap, self.size, strict=True)):
            raise ValueError(f"{self.overlap=} must be at most a third of {self.size=}")

    def tiles(self, rows: int, columns: int, stride: int) -> "Iterator[Tile]":
        """Yields the tiles of a latent frame, in raster order.

        Args:
          rows: Rows of the latent.
          columns: Columns of the latent.
          stride: Pixels behind one latent position, in each direction.
        """
        row_intervals, column_intervals = (
            split_axis(length, size // stride, overlap // stride)
            for length, size, overlap in zip(
                (rows, columns), self.size, self.overlap, strict=True
            )
        )
        for row in row_intervals:
            for column in column_intervals:
                yield Tile(row, column)


class Interval(NamedTuple):
    """The part of an axis that a tile covers, in latent positions.

    Attributes:
      start: First position.
      size: Count of positions.
      before: Positions shared with the tile before.
      after: Positions shared with the tile after.
    """

    start: int
    size: int
    before: int
    after: int

    def range(self, scale: int) -> slice:
        """Returns the interval in positions of which a latent one has `scale`."""
        return slice(self.start * scale, (self.start + self.size) * scale)

    def weights(self, scale: int) -> Float[np.ndarray, " size"]:
        """Returns ones, linear ramps where tiles overlap; `scale` as in `range`."""
        inside = (np.arange(self.size * scale) + 0.5) / scale
        weights = np.ones(len(inside))
        if self.before:
            weights = np.minimum(weights, inside / self.before)
        if self.after:
            weights = np.minimum(weights, inside[::-1] / self.after)
        return weights


class Tile(NamedTuple):
    """One tile of a frame.

    The methods' `scale` is how many positions a latent one has: 1 for latents, the
    codec's stride for pixels.
    """

    rows: Interval
    columns: Interval

    def cut(self, frames: np.ndarray, scale: int) -> np.ndarray:
        """Returns a view of the tile's part of frames [B, T, rows, columns, ...]."""
        return frames[:, :, self.rows.range(scale), self.columns.range(scale)]

    def weights(self, scale: int) -> Float[np.ndarray, "rows columns 1"]:
        """Returns the tile's weight at each position; all tiles add up to one."""
        weights = np.outer(self.rows.weights(scale), self.columns.weights(scale))
        return weights[:, :, None].astype(np.float32)


def split_axis(length: int, size: int, overlap: int) -> list[Interval]:
    """Returns the fewest evenly spaced intervals of one size that cover an axis.

    Args:
      length: Length of the axis.
      size: Most positions of an interval.
      overlap: Least positions that neighbours share, at most a third of `size`.
    """
    if length <= size:
        return [Interval(0, length, 0, 0)]
    count = -(-(length - overlap) // (size - overlap))
    size = -(-(length + (count - 1) * overlap) // count)
    starts = [index * (length - size) // (count - 1) for index in range(count)]
    shared = [0, *(a + size - b for a, b in itertools.pairwise(starts)), 0]
    return [
        Interval(start, size, before, after)
        for start, (before, after) in zip(
            starts, itertools.pairwise(shared), strict=True
        )
    ]
