"""Tokens of a latent: their grid, and patches put back into their places."""

import math
from typing import Literal

from einops import rearrange
from jaxtyping import Array, Float

from draft_jax import VideoGrid
from pallas_kernels.common import reorder_tokens


def latent_grid(
    latent_shape: tuple[int, ...],
    *,
    patch_size: tuple[int, int, int],
    tile: tuple[int, int],
    turns_tile: bool = False,
) -> VideoGrid:
    """Returns the token grid of latents of a shape, without text.

    Args:
      latent_shape: Axes [B, F, H, W, C] or [F, H, W, C].
      patch_size: Latent frames, rows and columns merged into one token.
      tile: Rows and columns of tokens in one attention block.
      turns_tile: Exchange them in frames higher than wide.

    Raises:
      ValueError: A size is not a multiple of the patch.
    """
    if len(latent_shape) not in (4, 5):
        raise ValueError(
            f"{latent_shape=} must be [batch, frames, height, width, channels]; "
            "batch may be left out"
        )
    sizes = latent_shape[-4:-1]
    if any(size % side for size, side in zip(sizes, patch_size, strict=True)):
        raise ValueError(
            f"latent frames, height and width {sizes} must be multiples of "
            f"{patch_size=}"
        )
    frames, height, width = (
        size // side for size, side in zip(sizes, patch_size, strict=True)
    )
    if turns_tile and height > width:
        tile = tile[::-1]
    return VideoGrid(frames, height, width, tile=tile)


def num_tokens(
    latent_shape: tuple[int, int, int, int], patch_size: tuple[int, int, int]
) -> int:
    """Returns the number of tokens of a latent [F, H, W, C] whose sizes suit it."""
    sizes = zip(latent_shape[:3], patch_size, strict=True)
    return math.prod(size // side for size, side in sizes)


def unpatchify(
    patches: Float[Array, "B T values"],
    grid: VideoGrid,
    *,
    patch_size: tuple[int, int, int],
    channels: Literal["first", "last"],
) -> Float[Array, "B F H W C"]:
    """Puts tokens in tiled order back to raster order and cuts them into positions.

    Args:
      patches: The values of each token's patch.
      grid: The tokens, without text.
      patch_size: Latent frames, rows and columns of a patch.
      channels: Whether a token's values are ordered by channels first, and by the
        patch's positions within a channel, or by positions first.
    """
    patches = reorder_tokens(patches, grid, to="raster", axis=1)
    frames, rows, columns = patch_size
    values = "frames rows columns"
    values = f"C {values}" if channels == "first" else f"{values} C"
    return rearrange(
        patches,
        f"B (F H W) ({values}) -> B (F frames) (H rows) (W columns) C",
        F=grid.frames,
        H=grid.height,
        W=grid.width,
        frames=frames,
        rows=rows,
        columns=columns,
    )
