"""Rotary position embedding over frames, rows and columns."""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from draft_jax.grid import VideoGrid
from pallas_kernels.common import reorder_tokens


def split_head_dim(head_dim: int) -> tuple[int, int, int]:
    """Returns channels of a head that turn with the frame, the row and the column.

    Rows and columns get `2 * (head_dim // 6)` each and frames the rest: 44, 42, 42
    of 128.
    """
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope_table(
    grid: VideoGrid, head_dim: int, theta: float = 10000.0
) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
    """Returns cosine and sine of each token's rotation angles, in tiled order.

    Frequencies and angles are computed in float64 by NumPy for each axis alone and
    rounded to float32; only these short tables enter the program as constants.

    Args:
      grid: Token grid of the video, without text.
      head_dim: Channels of a head, D; even.
      theta: Base of the frequencies.

    Returns:
      cos and sin, float32, one column per channel pair (half = D / 2).

    Source: Wan2.1 `rope_params`, where the angles are float64 too.
    """
    sizes = (grid.frames, grid.height, grid.width)
    tables = []
    for axis, (size, channels) in enumerate(
        zip(sizes, split_head_dim(head_dim), strict=True)
    ):
        frequencies = theta ** (-np.arange(0, channels, 2) / channels)
        angles = np.outer(np.arange(size), frequencies)
        shape = [1, 1, 1, channels // 2]
        shape[axis] = size
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
