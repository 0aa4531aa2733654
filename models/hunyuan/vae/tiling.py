"""Tiles in space and time with blended overlaps, as HunyuanVideo's own code has them.

An axis longer than a tile is cut from its start on. All tiles have one size, but for
the last ones, which end where the axis ends. A tile is blended into the overlap with
the one above, then with the one to the left, then, rows and columns joined, with the
one before in time. Each neighbour holds blended values by then, for the original blends
in place. The result is therefore not a sum of tiles with weights.

Source: HunyuanVideo `hyvideo/vae/autoencoder_kl_causal_3d.py`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models.diffusion.video_autoencoder.codec import cut
from models.diffusion.video_autoencoder.sizes import Stride
from pallas_kernels.common import make_plain, register_configuration

Rows = tuple[tuple[Array, ...], ...]  # tiles of some frames, in raster order


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class HunyuanTiling:
    """Sizes of tiles, in pixels.

    Tiles bound the memory and change the result: norms, attention and convolutions see
    their tile only.

    Args:
      size: Frames, rows and columns of a tile. A tile in time has one frame more: the
        first, which in all tiles but the first is dropped. Each a multiple of the
        codec's stride.
      step: Frames, rows and columns from one tile to the next, likewise multiples.
        What tiles share beyond that is blended.

    Raises:
      ValueError: They are no three positive integers, or a step is larger than a tile.
    """

    size: tuple[int, int, int] = (64, 256, 256)
    step: tuple[int, int, int] = (48, 192, 192)

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("size", "step"):
            value = getattr(self, name)
            if len(value) != 3 or not all(
                isinstance(length, int) and length >= 1 for length in value
            ):
                raise ValueError(f"{name}={value!r} must be three positive integers")
        if any(step > size for size, step in zip(self.size, self.step, strict=True)):
            raise ValueError(f"{self.step=} must be at most {self.size=}")

    @classmethod
    def original(cls) -> "HunyuanTiling":
        """Returns the tiles of HunyuanVideo's own code."""
        return cls()

    @classmethod
    def diffusers(cls) -> "HunyuanTiling":
        """Returns the tiles of diffusers after `enable_tiling()`: shorter in time."""
        return cls(size=(16, 256, 256), step=(12, 192, 192))

    def divided(self, stride: Stride) -> "HunyuanTiling":
        """Returns the same tiles in latent positions.

        Args:
          stride: Pixels behind one latent position, in each direction.

        Raises:
          ValueError: A size or step is not a multiple of the stride.
        """
        for name in ("size", "step"):
            value = getattr(self, name)
            if any(length % by for length, by in zip(value, stride, strict=True)):
                raise ValueError(f"tiling.{name}={value} must be multiples of {stride}")
        time, height, width = stride
        size, step = (
            (frames // time, rows // height, columns // width)
            for frames, rows, columns in (self.size, self.step)
        )
        return HunyuanTiling(size=size, step=step)

    @property
    def overlap(self) -> tuple[int, int, int]:
        """Frames, rows and columns that neighbours share."""
        frames, rows, columns = (
            size - step for size, step in zip(self.size, self.step, strict=True)
        )
        return frames, rows, columns


def run_tiles(
    run: Callable[[Array | np.ndarray], Array],
    source: Float[Array | np.ndarray, "B T H W C"],
    tiles: HunyuanTiling,
    results: HunyuanTiling,
) -> Iterator[Float[Array, "B t h w c"]]:
    """Runs each tile, and yields the blended frames of each tile in time.

    Args:
      run: Encodes or decodes a tile.
      source: What is cut.
      tiles: Sizes of tiles in positions of the source.
      results: Sizes of the same tiles in positions of the result.
    """
    frames = source.shape[1]
    size, step = tiles.size[0], tiles.step[0]
    if frames <= size:
        yield _run_frames(run, source, tiles, results)
        return
    before = None
    for start in range(0, frames, step):
        length = min(size + 1, frames - start)
        if start and length == 1:
            return  # the frame that is dropped: nothing would be left
        tile = _run_frames(run, cut(source, (start,), (length,)), tiles, results)
        kept, before = _join_frames(before, tile, results)
        yield kept


def _run_frames(
    run: Callable[[Array | np.ndarray], Array],
    source: Float[Array | np.ndarray, "B T H W C"],
    tiles: HunyuanTiling,
    results: HunyuanTiling,
) -> Array:
    """Runs the tiles of some frames, and blends them."""
    _, frames, *sides, _ = source.shape
    (_, *size), (_, *step) = tiles.size, tiles.step
    if all(side <= most for side, most in zip(sides, size, strict=True)):
        return run(source)
    # If one side is too long, the other one is cut with the step, too.
    rows, columns = (
        [(start, min(most, side - start)) for start in range(0, side, next_one)]
        for side, most, next_one in zip(sides, size, step, strict=True)
    )
    return _join_tiles(
        tuple(
            tuple(
                run(cut(source, (0, y, x), (frames, height, width)))
                for x, width in columns
            )
            for y, height in rows
        ),
        results,
    )


@functools.partial(jax.jit, static_argnums=1)
def _join_tiles(tiles: Rows, sizes: HunyuanTiling) -> Array:
    """Blends the tiles of some frames, and joins them."""
    (_, height, width), (_, rows_shared, columns_shared) = sizes.step, sizes.overlap
    above: list[Array] = []
    joined = []
    for row in tiles:
        blended: list[Array] = []
        for column, tile in enumerate(row):
            if above:
                tile = _blend(above[column], tile, rows_shared, axis=2)
            if blended:
                tile = _blend(blended[-1], tile, columns_shared, axis=3)
            blended.append(tile)
        parts = [tile[:, :, :height, :width] for tile in blended]
        joined.append(jnp.concatenate(parts, axis=3))
        above = blended
    return jnp.concatenate(joined, axis=2)


@functools.partial(jax.jit, static_argnums=2)
def _join_frames(
    before: Array | None, tile: Array, sizes: HunyuanTiling
) -> tuple[Array, Array]:
    """Blends a tile in time with the one before.

    Args:
      before: The end of the blended tile before; None for the first.
      tile: The tile.
      sizes: Sizes of tiles.

    Returns:
      The tile's frames that the next does not replace, and its end, for the next.
    """
    step, shared = sizes.step[0], sizes.overlap[0]
    if before is None:
        step += 1
    else:
        tile = _blend(before, tile[:, 1:], shared, axis=1)
    end = max(tile.shape[1] - shared, 0)
    return tile[:, :step], tile[:, end:]


def _blend(before: Array, tile: Array, most: int, axis: int) -> Array:
    """Replaces a tile's start by a line from the end of the tile before to it."""
    shared = min(before.shape[axis], tile.shape[axis], most)
    if not shared:
        return tile
    share = jnp.arange(shared, dtype=jnp.float32) / shared
    share = jnp.expand_dims(share, tuple(i for i in range(tile.ndim) if i != axis))
    length = before.shape[axis]
    end = jax.lax.slice_in_dim(before, length - shared, length, axis=axis)
    start = jax.lax.slice_in_dim(tile, 0, shared, axis=axis)
    rest = jax.lax.slice_in_dim(tile, shared, tile.shape[axis], axis=axis)
    return jnp.concatenate([end * (1 - share) + start * share, rest], axis=axis)
