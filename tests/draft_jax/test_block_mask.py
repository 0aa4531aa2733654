import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax.block_mask import BlockMask
from draft_jax.grid import VideoGrid
from tests.draft_jax import naive_draft

GRID = VideoGrid(2, 5, 7, tile=(3, 4), text_length=17)  # 8 visual and 2 text blocks


def random_dense(density=0.3, batch=2, heads=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random((batch, heads, GRID.num_blocks, GRID.num_blocks)) < density


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_lists_match_a_loop(density):
    dense = random_dense(density)
    mask = BlockMask.from_dense(jnp.asarray(dense), grid=GRID)
    assert mask.capacity == GRID.num_blocks**2
    for b, n in np.ndindex(2, 3):
        offsets = np.asarray(mask.row_offsets[b, n])
        ids = np.asarray(mask.block_ids[b, n])
        for row, kept in enumerate(dense[b, n]):
            np.testing.assert_array_equal(
                ids[offsets[row] : offsets[row + 1]], np.nonzero(kept)[0]
            )
        assert not ids[offsets[-1] :].any()
    np.testing.assert_array_equal(mask.counts, dense.sum(-1))
    np.testing.assert_array_equal(mask.to_dense(), dense)


@pytest.mark.parametrize("side", ["before", "after"])
def test_density_counts_token_pairs(side):
    grid = VideoGrid(2, 5, 7, tile=(3, 4), text_length=17, text_side=side)
    dense = random_dense(0.4)
    mask = BlockMask.from_dense(jnp.asarray(dense), grid=grid)
    expected = [
        [naive_draft.token_mask(dense[b, n], grid).mean() for n in range(3)]
        for b in range(2)
    ]
    np.testing.assert_allclose(mask.density, expected, rtol=1e-6)


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("side", ["before", "after"])
def test_visual_map_keeps_the_text(side, make):
    grid = VideoGrid(2, 5, 7, tile=(3, 4), text_length=17, text_side=side)
    visual = random_dense()[:, :, :8, :8]
    mask = BlockMask.from_visual(make(visual), grid=grid)
    np.testing.assert_array_equal(mask.to_dense(), naive_draft.add_text(visual, grid))
    traced = jax.jit(lambda x: BlockMask.from_visual(x, grid=grid))(visual)
    np.testing.assert_array_equal(traced.to_dense(), mask.to_dense())


def test_capacity_of_a_visual_map_counts_the_text():
    visual = np.eye(8, dtype=bool)[None, None]  # 8 pairs, 100 - 64 with text
    mask = BlockMask.from_visual(visual, grid=GRID, capacity=44)
    assert mask.capacity == 44
    assert int(mask.to_dense().sum()) == 44
    with pytest.raises(ValueError, match="capacity=43 is too small: a head keeps 44"):
        BlockMask.from_visual(visual, grid=GRID, capacity=43)


def test_full_mask():
    mask = BlockMask.full(grid=GRID, batch=2, num_heads=1)
    assert mask.to_dense().all()
    np.testing.assert_allclose(mask.density, np.ones((2, 1)), rtol=1e-6)


def test_capacity_that_just_fits():
    dense = random_dense()
    most = int(dense.sum((-2, -1)).max())
    mask = BlockMask.from_dense(jnp.asarray(dense), grid=GRID, capacity=most)
    chex.assert_shape(mask.block_ids, (2, 3, most))
    np.testing.assert_array_equal(mask.to_dense(), dense)


def test_too_small_capacity_raises_and_drops_last_rows_under_jit():
    dense = jnp.asarray(random_dense(batch=1, heads=1))
    with pytest.raises(ValueError, match=r"capacity=5 is too small: a head keeps \d+"):
        BlockMask.from_dense(dense, grid=GRID, capacity=5)
    mask = jax.jit(lambda x: BlockMask.from_dense(x, grid=GRID, capacity=5))(dense)
    first_five = np.argwhere(np.asarray(dense[0, 0]))[:5]
    np.testing.assert_array_equal(np.argwhere(mask.to_dense()[0, 0]), first_five)


def test_is_a_pytree_of_two_arrays():
    mask = BlockMask.from_dense(jnp.asarray(random_dense()), grid=GRID)
    assert len(jax.tree.leaves(mask)) == 2
    shapes = jax.tree.map(jnp.shape, mask)
    assert shapes.row_offsets == (2, 3, GRID.num_blocks + 1)
    assert shapes.grid == GRID
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(mask)]
    assert paths == [".row_offsets", ".block_ids"]
    described = jax.eval_shape(lambda m: m, mask)
    assert described.block_ids.dtype == jnp.int32


def test_stacked_masks_scan():
    masks = [
        BlockMask.from_dense(jnp.asarray(random_dense(seed=s)), grid=GRID)
        for s in range(3)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *masks)
    _, counts = jax.lax.scan(lambda c, m: (c, m.counts), 0, stacked)
    np.testing.assert_array_equal(counts, np.stack([m.counts for m in masks]))


@pytest.mark.parametrize(
    ("dense", "capacity", "error", "message"),
    [
        (np.ones((1, 1, 9, 9), bool), None, ValueError, r"expected \[batch, heads, 10"),
        (np.ones((10, 10), bool), None, ValueError, r"dense has shape \(10, 10\)"),
        (np.ones((1, 1, 10, 10)), None, TypeError, "dense has dtype float32; expected"),
        (np.ones((1, 1, 10, 10), bool), 0, ValueError, "capacity=0 must be at least 1"),
    ],
    ids=["blocks", "axes", "dtype", "capacity"],
)
@pytest.mark.usefixtures("without_annotations")
def test_bad_dense_mask(dense, capacity, error, message):
    with pytest.raises(error, match=message):
        BlockMask.from_dense(jnp.asarray(dense), grid=GRID, capacity=capacity)


@pytest.mark.parametrize(
    ("visual", "error", "message"),
    [
        (np.ones((1, 1, 10, 10), bool), ValueError, r"expected \[batch, heads, 8, 8\]"),
        (np.ones((8, 8), bool), ValueError, r"visual has shape \(8, 8\)"),
        (np.ones((1, 1, 8, 8)), TypeError, "visual has dtype float64; expected bool"),
        ([[True]], TypeError, "visual is list; expected a boolean array"),
    ],
    ids=["blocks", "axes", "dtype", "list"],
)
@pytest.mark.usefixtures("without_annotations")
def test_bad_visual_map(visual, error, message):
    with pytest.raises(error, match=message):
        BlockMask.from_visual(visual, grid=GRID)


def test_density_of_a_long_sequence():
    """126,720 tokens have more pairs than int32 can count."""
    grid = VideoGrid(33, 48, 80)
    mask = BlockMask.full(grid=grid, batch=1, num_heads=1)
    np.testing.assert_allclose(mask.density, 1.0, rtol=1e-5)


def test_density_of_one_block():
    mask = BlockMask.full(grid=VideoGrid(1, 8, 16), batch=1, num_heads=2)
    np.testing.assert_array_equal(mask.density, np.ones((1, 2)))
