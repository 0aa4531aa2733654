import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draft_jax.grid import VideoGrid
from tests.draft_jax import naive_draft

sizes = st.integers(1, 20)
grids = st.builds(
    VideoGrid,
    st.integers(1, 4),
    sizes,
    sizes,
    tile=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    text_length=st.integers(0, 40),
    text_side=st.sampled_from(["before", "after"]),
)


@given(grid=grids)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_tile_order_is_a_bijection_that_walks_over_the_tiles(grid):
    members = naive_draft.block_members(grid)
    np.testing.assert_array_equal(grid.tile_order, list(itertools.chain(*members)))
    np.testing.assert_array_equal(np.sort(grid.tile_order), np.arange(grid.num_tokens))
    identity = np.arange(grid.num_tokens)
    np.testing.assert_array_equal(grid.tile_order[grid.raster_order], identity)
    np.testing.assert_array_equal(grid.raster_order[grid.tile_order], identity)


@given(grid=grids)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_blocks_cover_the_sequence_without_gaps(grid):
    lengths = [len(block) for block in naive_draft.block_members(grid)]
    np.testing.assert_array_equal(grid.block_lengths, lengths)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    np.testing.assert_array_equal(grid.block_starts, starts)
    assert grid.num_blocks == len(lengths)
    assert grid.num_tokens == sum(lengths)
    assert grid.has_short_blocks == (min(lengths) < grid.tile[0] * grid.tile[1])


@given(grid=grids)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_text_keeps_its_place(grid):
    np.testing.assert_array_equal(
        grid.tile_order[grid.text_tokens],
        np.arange(grid.num_tokens)[grid.text_tokens],
    )
    both = {*range(*grid.text_tokens.indices(grid.num_tokens))} | {
        *range(*grid.visual_tokens.indices(grid.num_tokens))
    }
    assert both == set(range(grid.num_tokens))


@pytest.mark.parametrize(
    ("shape", "text", "tokens", "tiles", "blocks"),
    [
        ((33, 48, 80), 256, 126_976, 990, 992),  # HunyuanVideo 768x1280x129
        ((21, 48, 80), 0, 80_640, 630, 630),  # Wan 768x1280x81
        ((21, 32, 48), 0, 32_256, 252, 252),  # Wan 512x768x81
        ((34, 48, 80), 831, 131_391, 1_020, 1_027),  # HunyuanCustom, 6.5 text blocks
        ((21, 45, 80), 0, 75_600, 21 * 6 * 5, 630),  # Wan 720x1280x81
        ((21, 30, 52), 0, 32_760, 21 * 4 * 4, 336),  # Wan 480x832x81
        ((1, 49, 33), 0, 1_617, 7 * 3, 21),  # asked for in public
    ],
    ids=str,
)
def test_sizes_of_published_videos(shape, text, tokens, tiles, blocks):
    grid = VideoGrid(*shape, text_length=text)
    assert grid.num_tokens == tokens
    assert grid.num_visual_blocks == tiles
    assert grid.num_blocks == blocks == len(grid.block_lengths)


def test_published_reorder_of_one_row_of_tiles():
    """The published code's pattern for 8 x 80 tokens: five runs of 8 x 16."""
    expected = [
        b * 80 + c * 16 + i for c in range(5) for b in range(8) for i in range(16)
    ]
    grid = VideoGrid(1, 8, 80)
    np.testing.assert_array_equal(grid.tile_order, expected)


def test_geometry_is_cached_and_read_only():
    first, second = (VideoGrid(2, 9, 17).tile_order for _ in range(2))
    assert first is second
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1


def test_hash_and_equality_follow_the_fields():
    assert hash(VideoGrid(2, 9, 17)) == hash(VideoGrid(2, 9, 17))
    assert VideoGrid(2, 9, 17) != VideoGrid(2, 9, 17, text_length=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 0}, "frames=0 must be a positive integer"),
        ({"height": -1}, "height=-1 must be a positive integer"),
        ({"width": 2.0}, "width=2.0 must be a positive integer"),
        ({"frames": True}, "frames=True must be a positive integer"),
        ({"tile": (8,)}, r"tile=\(8,\) must be a tuple of two positive integers"),
        ({"tile": (0, 16)}, r"tile=\(0, 16\) must be a tuple of two positive"),
        ({"text_length": -1}, "text_length=-1 must be an integer >= 0"),
        ({"text_side": "none"}, "text_side='none' must be 'before' or 'after'"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("without_annotations")
def test_bad_grid(arguments, message):
    with pytest.raises(ValueError, match=message):
        VideoGrid(**{"frames": 1, "height": 2, "width": 3, **arguments})
