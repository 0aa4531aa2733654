"""Position ids against a grid, and what users are told of ids that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import VideoGrid, check_positions

GRID = VideoGrid(2, 3, 4, tile=(2, 2), text_length=5)


def ids_of(frames, height, width):
    """Frame, row and column in raster order, by loops."""
    return np.array(
        [
            (frame, row, column)
            for frame in range(frames)
            for row in range(height)
            for column in range(width)
        ]
    )


def with_text(ids, side="after"):
    text = np.full((5, 3), 99)
    return np.concatenate([ids, text] if side == "after" else [text, ids])


RASTER = ids_of(2, 3, 4)
# Tiles of 2 x 2 in frames of 3 x 4, written down by hand for one frame.
TILED_FRAME = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11]
TILED = RASTER[TILED_FRAME + [12 + token for token in TILED_FRAME]]


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("offset", [0, (7, 0, 2), (-1, 3, -5)], ids=str)
@pytest.mark.parametrize("dtype", [np.int32, np.float32], ids=["int", "float"])
def test_ids_that_fit_pass(make, offset, dtype):
    ids = (RASTER + np.array(offset)).astype(dtype)
    check_positions(make(ids), grid=GRID)
    check_positions(make(with_text(ids).astype(dtype)), grid=GRID)
    batch = np.stack([with_text(ids), with_text(ids + np.array(1))]).astype(dtype)
    check_positions(make(batch), grid=GRID)


def test_text_before_and_tiled_order():
    before = VideoGrid(2, 3, 4, tile=(2, 2), text_length=5, text_side="before")
    check_positions(with_text(RASTER, "before"), grid=before)
    check_positions(with_text(TILED, "before"), grid=before, order="tiled")
    check_positions(TILED, grid=GRID, order="tiled")


BY_COLUMNS = RASTER[np.lexsort((RASTER[:, 1], RASTER[:, 2], RASTER[:, 0]))]
BY_FRAME_LAST = RASTER[np.lexsort((RASTER[:, 0], RASTER[:, 2], RASTER[:, 1]))]
ONE_WRONG = RASTER.copy()
ONE_WRONG[17, 2] += 1
WRONG = {  # ids, options, first wrong token, cause
    "grid turned": (ids_of(2, 4, 3), {}, 3, "swapped: use height=4, width=3"),
    "axes turned": (
        RASTER[:, [0, 2, 1]],
        {},
        1,
        r"last axis looks like \(frame, column, row\), not \(frame",
    ),
    "frame last": (RASTER[:, [1, 2, 0]], {}, 1, r"like \(row, column, frame\), not"),
    "column, frame, row": (RASTER[:, [2, 0, 1]], {}, 1, r"\(column, frame, row\)"),
    "tiled": (TILED, {}, 2, "look to be in tiled order: pass order='tiled'"),
    "raster": (RASTER, {"order": "tiled"}, 2, "raster order: pass order='raster'"),
    "by columns": (BY_COLUMNS, {}, 1, "sorted by frame, then column, then row; sort"),
    "by rows": (BY_FRAME_LAST, {}, 1, "sorted by row, then column, then frame"),
    "other sizes": (ids_of(4, 2, 3), {}, 3, "those of 4 frames of 2 x 3 tokens"),
    "text before": (with_text(RASTER, "before"), {}, 1, "use text_side='before'"),
    "one token": (ONE_WRONG, {}, 17, r"from its first token's \[0, 0, 0\]$"),
}


@pytest.mark.parametrize("case", WRONG)
def test_first_wrong_token_and_its_cause_are_named(case):
    ids, options, token, cause = WRONG[case]
    shown = str(ids[token].tolist()).replace("[", r"\[").replace("]", r"\]")
    message = rf"position_ids\[{token}\] is {shown}; .*{cause}"
    with pytest.raises(ValueError, match=message):
        check_positions(ids, grid=GRID, **options)


def test_batch_item_and_expected_place_are_named():
    moved = ONE_WRONG + np.array([3, 1, 0])  # token 17: frame 1, row 1, column 1
    batch = np.stack([with_text(RASTER), with_text(moved)])
    with pytest.raises(
        ValueError,
        match=r"position_ids\[1, 17\] is \[4, 2, 2\]; a token there lies at frame, "
        r"row, column \[4, 2, 1\] of VideoGrid.* first token's \[3, 1, 0\]",
    ):
        check_positions(batch, grid=GRID)


@pytest.mark.usefixtures("without_annotations")
@pytest.mark.parametrize("shape", [(24, 2), (25, 3), (24,), (1, 1, 24, 3)], ids=str)
def test_shapes_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"expected \[tokens, 3\] .* with 29 or 24"):
        check_positions(np.zeros(shape, int), grid=GRID)


def test_traced_ids_and_unknown_orders():
    with pytest.raises(ValueError, match="cannot look into traced position_ids"):
        jax.jit(lambda ids: check_positions(ids, grid=GRID))(RASTER)


@pytest.mark.usefixtures("without_annotations")
def test_unknown_order():
    with pytest.raises(ValueError, match="order='frames' must be one of"):
        check_positions(RASTER, grid=GRID, order="frames")
