"""Grids of latents, and patches put back, position by position."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import VideoGrid
from models.diffusion.transformer.tokens import latent_grid, unpatchify

PATCH = (2, 1, 3)


@pytest.mark.parametrize("shape", [(4, 5, 9, 7), (8, 4, 5, 9, 7)], ids=len)
def test_grid_of_a_latent(shape):
    grid = latent_grid(shape, patch_size=PATCH, tile=(2, 4))
    assert grid == VideoGrid(2, 5, 3, tile=(2, 4))


@pytest.mark.parametrize(
    ("height", "width", "turns", "tile"),
    [
        (4, 15, True, (2, 4)),
        (4, 12, True, (2, 4)),
        (5, 12, True, (4, 2)),
        (5, 12, False, (2, 4)),
    ],
)
def test_a_tile_is_turned_in_frames_higher_than_wide(height, width, turns, tile):
    """A patch is three columns wide: 5 x 12 are 5 x 4 tokens."""
    shape = (4, height, width, 7)
    grid = latent_grid(shape, patch_size=PATCH, tile=(2, 4), turns_tile=turns)
    assert grid.tile == tile


def test_sizes_that_no_patch_divides_are_refused():
    with pytest.raises(
        ValueError, match=r"\(4, 5, 8\) must be multiples of patch_size"
    ):
        latent_grid((4, 5, 8, 7), patch_size=PATCH, tile=(2, 4))
    with pytest.raises(ValueError, match=r"must be \[batch, frames"):
        latent_grid((4, 5, 9), patch_size=PATCH, tile=(2, 4))


@pytest.mark.parametrize("channels", ["first", "last"])
def test_patches_go_back_to_their_places(channels):
    """A token's values number its position within the patch and the channel."""
    grid, num_channels = VideoGrid(2, 3, 4, tile=(2, 4)), 2
    sides = list(itertools.product(*map(range, PATCH)))
    names = [(*side, c) for side in sides for c in range(num_channels)]
    if channels == "first":
        names = [(*side, c) for c in range(num_channels) for side in sides]
    raster = np.zeros((1, grid.num_tokens, len(names)), np.float32)
    expected = np.zeros((1, 4, 3, 12, num_channels), np.float32)
    for token, place in enumerate(np.ndindex(2, 3, 4)):
        for index, (*offset, channel) in enumerate(names):
            raster[0, token, index] = value = 100 * token + index
            at = (p * side + o for p, side, o in zip(place, PATCH, offset, strict=True))
            expected[0, *at, channel] = value
    tiled = jnp.asarray(raster[:, grid.tile_order])
    got = unpatchify(tiled, grid, patch_size=PATCH, channels=channels)
    np.testing.assert_array_equal(got, expected)
