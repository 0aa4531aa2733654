"""Masks and attention of the published code for HunyuanVideo and HunyuanCustom."""

import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import DraftConfig, VideoGrid, compute_mask, draft_attention
from draft_jax.config import kept_pairs_budget
from pallas_kernels import dense_attention
from tests import tolerances
from tests.draft_jax import published_hunyuan as published

SPARSITY = 0.9
# One sample: text of whole blocks. Two samples, of prompt and negative prompt: the
# first frame is the reference, and text ends within a block, as 831 tokens do.
VIDEO = published.Sizes(frames=3, rows=4, columns=8, tile=(2, 4), text=16)
CUSTOM = published.Sizes(frames=4, rows=4, columns=12, tile=(2, 4), text=13)
CASES = [
    pytest.param(VIDEO, (11,), id="video"),
    pytest.param(VIDEO, (5,), id="video-one-text-block"),
    pytest.param(VIDEO, (16,), id="video-no-padding"),
    pytest.param(CUSTOM, (4, 11), id="custom"),
]
HEADS, DIM = 2, 8


def grid_of(sizes):
    return VideoGrid(
        sizes.frames,
        sizes.rows,
        sizes.columns,
        tile=sizes.tile,
        text_length=sizes.text,
    )


def random_qkv(sizes, batch, seed=0):
    rng = np.random.default_rng(seed)
    shape = (3, batch, sizes.sample, HEADS, DIM)
    return rng.normal(size=shape).astype(np.float32)


def qkv_of_similar_tiles(sizes, batch, seed=0):
    """Random tokens that add their tile's own: no tile's row of a map stays empty."""
    q, k, v = random_qkv(sizes, batch, seed)
    rng = np.random.default_rng(seed + 1)
    old = published.reorder(sizes)[: sizes.visual]
    for start in range(0, sizes.visual, sizes.block):
        own = 3 * rng.normal(size=(batch, 1, HEADS, DIM)).astype(np.float32)
        own /= np.linalg.norm(own, axis=-1, keepdims=True) / 4
        q[:, old[start : start + sizes.block]] += own
        k[:, old[start : start + sizes.block]] += own
    return q, k, v


def config_of(sizes):
    """A config that keeps as many pairs as the published code does at `SPARSITY`."""
    num_pairs = grid_of(sizes).num_visual_blocks ** 2
    return DraftConfig.paper(sparsity=published.exact_sparsity(num_pairs, SPARSITY))


def mask_of(q, k, sizes, config):
    mask = compute_mask(q, k, grid=grid_of(sizes), config=config)
    return np.asarray(mask.to_dense())


@pytest.mark.parametrize(("sizes", "valid"), CASES)
def test_masks_are_those_of_the_published_code(sizes, valid):
    q, k, _ = qkv_of_similar_tiles(sizes, len(valid))
    masks, maps = published.block_masks(q, k, sizes, SPARSITY)
    first_segments = masks[::2]
    assert not published.best_of_empty_rows(first_segments, maps).any()
    np.testing.assert_array_equal(
        mask_of(q, k, sizes, config_of(sizes)), first_segments
    )


@pytest.mark.parametrize(("sizes", "valid"), [CASES[0], CASES[-1]])
def test_empty_rows_keep_their_best_tile(sizes, valid):
    """The published code leaves them the text alone; see docs/differences.md."""
    q, k, _ = random_qkv(sizes, len(valid))
    masks, maps = published.block_masks(q, k, sizes, SPARSITY)
    best = published.best_of_empty_rows(masks[::2], maps)
    assert best.any()
    np.testing.assert_array_equal(
        mask_of(q, k, sizes, config_of(sizes)), masks[::2] | best
    )


@pytest.mark.parametrize(("sizes", "valid"), [CASES[0], CASES[-1]])
def test_the_same_sparsity_keeps_all_but_the_weakest_pair(sizes, valid):
    q, k, _ = qkv_of_similar_tiles(sizes, len(valid))
    masks, maps = published.block_masks(q, k, sizes, SPARSITY)
    expected, num_tiles = masks[::2].copy(), maps.shape[-1]
    for b, n in np.ndindex(maps.shape[:2]):
        kept = masks[2 * b, n, :num_tiles, :num_tiles]
        weakest = np.argmin(np.where(kept, maps[b, n], np.inf))
        expected[b, n][np.unravel_index(weakest, kept.shape)] = False
    expected |= published.best_of_empty_rows(expected, maps)
    got = mask_of(q, k, sizes, DraftConfig.paper(sparsity=SPARSITY))
    np.testing.assert_array_equal(got, expected)


def check_rows_that_count(got, expected, sizes, valid):
    """Rows of padding differ by design: here they are zero."""
    for sample, count in enumerate(valid):
        rows = slice(sizes.visual + count)
        np.testing.assert_allclose(
            got[sample, rows], expected[sample, rows], **tolerances.ATTENTION["float32"]
        )
        assert not np.any(got[sample, rows.stop :])


@pytest.mark.parametrize(("sizes", "valid"), CASES)
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_attention_is_that_of_the_published_code(kind, sizes, valid):
    q, k, v = qkv_of_similar_tiles(sizes, len(valid))
    masks, attend = None, dense_attention
    if kind == "sparse":
        masks, _ = published.block_masks(q, k, sizes, SPARSITY)
        attend = functools.partial(draft_attention, config=config_of(sizes))
    got = attend(
        q, k, v, grid=grid_of(sizes), text_lengths=jnp.asarray(valid, jnp.int32)
    )
    expected = published.attention(q, k, v, masks, sizes, valid)
    check_rows_that_count(np.asarray(got), expected, sizes, valid)


@pytest.mark.parametrize(
    ("frames", "text", "kept"),
    [(33, 256, 98_011), (34, 831, 104_041)],
    ids=["video", "custom"],
)
def test_full_size(frames, text, kept):
    """768x1280, 129 frames: order of tokens, number of blocks and of kept pairs."""
    sizes = published.Sizes(frames=frames, rows=48, columns=80, tile=(8, 16), text=text)
    grid = grid_of(sizes)
    assert grid.num_blocks == sizes.num_blocks
    np.testing.assert_array_equal(grid.tile_order, published.reorder(sizes))
    num_pairs = math.prod(grid.tiles_per_frame) ** 2 * frames**2
    assert published.num_kept(num_pairs, SPARSITY) == kept
    assert kept_pairs_budget(SPARSITY, grid.num_visual_blocks) == kept - 1
