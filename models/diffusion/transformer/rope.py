"""Rotary position embedding over frames, rows and columns."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from draft_jax.grid import VideoGrid
from pallas_kernels.common import reorder_tokens

RopeTable = tuple[Float[Array, "T half"], Float[Array, "T half"]]


def rope_table(
    grid: VideoGrid,
    channels: tuple[int, int, int],
    *,
    theta: float,
    positions: Sequence[Sequence[int]] | None = None,
) -> RopeTable:
    """Returns cosine and sine of each token's rotation angles, in tiled order.

    Frequencies and angles are computed in float64 by NumPy for each axis alone and
    rounded to float32; only these short tables enter the program as constants.

    Args:
      grid: Token grid of the video, without text.
      channels: Channels of a head that turn with the frame, the row and the column;
        even.
      theta: Base of the frequencies.
      positions: Position of each frame, of each row and of each column; None counts
        each from 0.

    Returns:
      cos and sin, float32, one column per channel pair (half = D / 2).

    Source: Wan2.1 `rope_params`, where the angles are float64 too.
    """
    sizes = (grid.frames, grid.height, grid.width)
    if positions is None:
        positions = [range(size) for size in sizes]
    tables = []
    for axis, (places, count) in enumerate(zip(positions, channels, strict=True)):
        frequencies = theta ** (-np.arange(0, count, 2) / count)
        angles = np.outer(np.asarray(places), frequencies)
        shape = [1, 1, 1, count // 2]
        shape[axis] = sizes[axis]
        tables.append(angles.reshape(shape))

    def assemble(function) -> Float[Array, "T half"]:
        parts = [
            jnp.broadcast_to(
                jnp.asarray(function(table), jnp.float32), (*sizes, table.shape[-1])
            )
            for table in tables
        ]
        raster = jnp.concatenate(parts, axis=-1)
        raster = rearrange(raster, "F H W half -> (F H W) half")
        return reorder_tokens(raster, grid, to="tiled", axis=0)

    return assemble(np.cos), assemble(np.sin)
