"""Rotary tables against rotations of complex numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import VideoGrid
from models.diffusion.transformer.rope import rope_table
from pallas_kernels.pooling.xla import rotate_pairs

# Against float64; measured on CPU: 2e-6.
F32 = {"rtol": 0, "atol": 5e-6}


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape)


@pytest.mark.parametrize("theta", [10000.0, 256.0])
@pytest.mark.parametrize(
    "starts", [None, (-1, 0, 6)], ids=["from-zero", "before-the-video"]
)
def test_rope_matches_complex_rotation(starts, theta):
    """Token by token in raster order, as Wan2.1's rope_apply multiplies."""
    frames, height, width, dim = 3, 4, 6, 16
    first = starts or (0, 0, 0)
    x = normal(1, frames * height * width, 2, dim)
    expected = np.empty_like(x)
    for token, position in enumerate(np.ndindex(frames, height, width)):
        angles = [
            (place + start) * theta ** (-2 * i / channels)
            for place, start, channels in zip(position, first, (8, 4, 4), strict=True)
            for i in range(channels // 2)
        ]
        pairs = x[0, token, :, 0::2] + 1j * x[0, token, :, 1::2]
        turned = pairs * np.exp(1j * np.array(angles))
        expected[0, token, :, 0::2] = turned.real
        expected[0, token, :, 1::2] = turned.imag
    grid = VideoGrid(frames, height, width, tile=(2, 4))
    positions = None
    if starts is not None:
        sizes = (frames, height, width)
        positions = [
            range(start, start + size)
            for start, size in zip(starts, sizes, strict=True)
        ]
    cos, sin = rope_table(grid, (8, 4, 4), theta=theta, positions=positions)
    assert cos.dtype == sin.dtype == jnp.float32
    tiled = jnp.float32(x[:, grid.tile_order])
    got = rotate_pairs(tiled, cos, sin)[:, grid.raster_order]
    np.testing.assert_allclose(got, expected, **F32)
