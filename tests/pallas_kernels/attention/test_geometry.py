"""Where blocks lie: checked by reading tokens as the kernel would."""

import numpy as np
import pytest

from draft_jax.grid import VideoGrid
from pallas_kernels.attention.sm90.copies import Boxes, Runs, SingleRows
from pallas_kernels.attention.sm90.geometry import geometry_of
from pallas_kernels.attention.sm90.plan import BLOCK
from pallas_kernels.attention.sm90.row_copies import reciprocal_of
from tests.cases import mostly_nightly

GRIDS = {  # grid, is read by TMA in tiled order, in raster order
    "divisible": (VideoGrid(2, 16, 48), True, True),
    "720p": (VideoGrid(2, 45, 80, text_length=256), True, True),
    "480p": (VideoGrid(2, 30, 52), True, False),
    "text-before": (
        VideoGrid(2, 16, 32, text_length=40, text_side="before"),
        True,
        True,
    ),
    "odd": (VideoGrid(2, 15, 26, text_length=13), False, False),
    "small": (VideoGrid(1, 5, 16), False, False),
    "one-block": (VideoGrid(1, 8, 16), True, True),
    "narrower-than-a-tile": (VideoGrid(2, 13, 8), True, True),
    "wide-tile": (VideoGrid(1, 6, 64, tile=(2, 64)), True, True),
    "tile-of-one-row": (VideoGrid(2, 3, 128, tile=(1, 128)), True, True),
    "narrow-tile": (VideoGrid(1, 32, 8, tile=(32, 4)), True, False),
}


@pytest.mark.parametrize(
    "name", mostly_nightly(GRIDS, ("720p", "480p", "odd", "one-block"))
)
@pytest.mark.parametrize("order", ["tiled", "raster"])
def test_places_hold_the_tokens_of_their_blocks(name, order):
    grid, *by_tma = GRIDS[name]
    geometry = geometry_of(grid, order)
    addresses = geometry.addresses
    assert isinstance(geometry.copies, SingleRows) != by_tma[order == "raster"]
    tokens = np.arange(grid.num_tokens)
    # `memory[i]` is the tiled number of the token that the kernel finds at i.
    memory = tokens if order == "tiled" else grid.raster_order
    for block in range(grid.num_blocks):
        length = int(grid.block_lengths[block])
        width = geometry.widths[geometry.width_of_block[block]]
        row = np.arange(length)
        match geometry.copies:
            case SingleRows():
                found = memory[tokens_by_rows(addresses, block, row)]
            case Boxes(num_boxes=num_boxes):
                found = tokens_of_boxes(memory, geometry, block, length, num_boxes)
            case Runs(run):
                place = 8 * addresses.first_unit[block] + row % run
                place += row // run * 8 * addresses.units_to_next_run[block]
                found = memory[place]
        want = grid.block_starts[block] + np.arange(length)
        assert sorted(found) == want.tolist()
        # The log-sum-exp of the token in row i of the block is at `128 block + i`.
        if not isinstance(geometry.copies, Boxes):
            np.testing.assert_array_equal(found, want)
        elif length == BLOCK:
            in_order = tokens if order == "tiled" else grid.tile_order
            where = geometry.scatter[in_order[found]]
            np.testing.assert_array_equal(where, BLOCK * block + np.arange(BLOCK))
        assert length <= width.longest <= width.tokens <= BLOCK
        assert width.tokens % 16 == 0
        assert width.masks or length == width.tokens


def tokens_by_rows(addresses, block, row):
    """Finds tokens as the kernel's instructions do."""
    assert (row * addresses.reciprocal[block] < 2**31).all()
    run = row * addresses.reciprocal[block] >> 16
    return addresses.first_token[block] + row + run * addresses.gap[block]


@pytest.mark.parametrize(
    "run", mostly_nightly(range(1, BLOCK + 1), (1, 3, 7, 127, 128))
)
def test_reciprocals_divide_rows_exactly(run):
    row = np.arange(BLOCK)
    np.testing.assert_array_equal(row * reciprocal_of(run) >> 16, row // run)


def tokens_of_boxes(memory, geometry, block, length, num_boxes):
    """Reads a block box by box, as its copies do."""
    frames = memory.reshape(geometry.frame_shape)
    rows = length // (8 * num_boxes)
    first = geometry.addresses.first_row[block]
    column = geometry.addresses.first_column[block]
    return np.concatenate(
        [frames[first : first + rows, column + box].ravel() for box in range(num_boxes)]
    )


@pytest.mark.parametrize(
    ("grid", "has_boxes"),
    [
        (VideoGrid(2, 45, 80), True),
        (VideoGrid(2, 45, 80, text_length=256), False),
        (VideoGrid(1, 8, 64, tile=(4, 32)), True),
        (VideoGrid(2, 13, 8), False),  # 40 tokens are not whole runs of 16
        (VideoGrid(1, 32, 16, tile=(16, 8)), False),  # 128 tokens of a consumer's 64
        (VideoGrid(1, 16, 16, text_length=16), False),  # text of a whole run
        (VideoGrid(9, 1, 16), False),  # blocks of one run have no rows to count
    ],
    ids=str,
)
def test_boxes_are_for_videos_without_text(grid, has_boxes):
    assert isinstance(geometry_of(grid, "raster").copies, Boxes) == has_boxes
    assert not isinstance(geometry_of(grid, "tiled").copies, Boxes)


@pytest.mark.parametrize(
    ("grid", "order", "expected"),
    [
        (VideoGrid(2, 16, 48), "tiled", True),
        (VideoGrid(2, 3, 128, tile=(1, 128)), "raster", True),
        (VideoGrid(1, 30, 52), "tiled", False),  # blocks of 96 tokens before others
        (VideoGrid(1, 16, 16, text_length=8), "raster", False),  # runs of 16 tokens
    ],
    ids=str,
)
def test_blocks_that_start_at_multiples_of_their_size(grid, order, expected):
    """Their places are then multiplied, not read."""
    copies = geometry_of(grid, order).copies
    assert isinstance(copies, Runs)
    assert copies.start_at_multiples == expected


def test_widths_of_480p():
    """Tiles of 8 x 16, 6 x 16, 8 x 4 and 6 x 4 tokens."""
    geometry = geometry_of(VideoGrid(1, 30, 52), "tiled")
    assert [(w.tokens, w.masks) for w in geometry.widths] == [
        (128, False),
        (96, False),
        (32, True),
    ]
    assert np.bincount(geometry.width_of_block).tolist() == [9, 3, 4]
