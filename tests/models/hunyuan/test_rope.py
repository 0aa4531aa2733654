"""Rotary tables against loops over the positions of the published code."""

import math

import numpy as np
import pytest

from draft_jax import VideoGrid
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.rope import video_rope


def expected_angles(frames, rows, columns, channels, *, reference):
    """One row for each token in raster order: frame, row and column by turns."""
    places = []
    if reference:
        places += [
            (-1, row, columns + column)
            for row in range(rows)
            for column in range(columns)
        ]
    places += [
        (frame, row, column)
        for frame in range(frames)
        for row in range(rows)
        for column in range(columns)
    ]
    return np.array(
        [
            [
                place[axis] * 256.0 ** (-2 * pair / count)
                for axis, count in enumerate(channels)
                for pair in range(count // 2)
            ]
            for place in places
        ]
    )


@pytest.mark.parametrize("reference", [0, 1], ids=["video", "custom"])
@pytest.mark.parametrize("size", [(2, 4, 8), (3, 5, 7)], ids=str)
def test_angles_are_those_of_the_published_positions(size, reference):
    config = HunyuanConfig(
        dim=24,
        num_heads=2,
        num_double_blocks=1,
        num_single_blocks=1,
        rope_channels=(2, 4, 6),
        reference_frames=reference,
    )
    frames, rows, columns = size
    grid = VideoGrid(frames + reference, rows, columns, tile=(2, 4), text_length=5)
    angles = expected_angles(*size, (2, 4, 6), reference=reference)
    order = grid.tile_order[: grid.num_visual_tokens]
    for got, function in zip(
        video_rope(grid, config), (math.cos, math.sin), strict=True
    ):
        expected = np.vectorize(function)(angles)[order]
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
