"""Tiles that the autoencoder runs on where nothing is said."""

import argparse
import warnings

import jax

from models.diffusion.interfaces import Codec
from models.loading import change_codec

DEFAULT_TILE = 256  # pixels


def check_tile(pixels: int) -> None:
    """Raises ValueError unless tiles may have so many rows and columns."""
    if pixels < 0 or pixels % 32:
        raise ValueError(
            f"--vae-tile {pixels} must be a positive multiple of 32, or 0 for whole "
            "frames"
        )


def with_tiles(codec: Codec, arguments: argparse.Namespace) -> Codec:
    """Returns a codec on the tiles of a command.

    On a GPU whole frames take more memory than the steps of a model: by default they
    are cut there, with a note, unless the codec has tiles of its own.
    """
    if arguments.vae_tile is not None:
        return change_codec(codec, tile=arguments.vae_tile)
    is_whole = getattr(codec, "tiling", codec) is None
    if is_whole and _cuts_by_default():
        warnings.warn(
            f"the autoencoder runs on tiles of {DEFAULT_TILE} pixels to save memory; "
            "larger frames differ a little from whole ones: --vae-tile 0 is for those",
            stacklevel=1,
        )
        return change_codec(codec, tile=DEFAULT_TILE)
    return codec


def smaller_tile(arguments: argparse.Namespace) -> int:
    """Returns the tile to try where the memory did not suffice."""
    tile = arguments.vae_tile
    if tile is None:
        tile = DEFAULT_TILE if _cuts_by_default() else 0
    return max(32, tile // 64 * 32) if tile else DEFAULT_TILE


def _cuts_by_default() -> bool:
    return jax.default_backend() != "cpu"
