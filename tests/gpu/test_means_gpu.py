"""Means for skipped blocks on a Hopper GPU: kernel, scores of sub-tiles, pooling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import (
    Compensation,
    DraftConfig,
    VideoGrid,
    compute_mask,
    draft_attention,
    make_means,
)
from draft_jax.config import sub_tiles_of
from pallas_kernels import SubTiles, block_sparse_attention_with_lse
from pallas_kernels.attention.reference import oracle_attention
from pallas_kernels.common.device import current_device
from pallas_kernels.pooling import VideoPooling, pool_sub_tiles, pool_video, video
from pallas_kernels.pooling import tiles as pooling_tiles
from pallas_kernels.tile_scores import Parts, reference, tile_scores
from tests.pallas_kernels.attention.reference import compress, random_mask, random_qkv
from tests.pallas_kernels.tile_scores.cases import growing_logits
from tests.tolerances import (
    GPU_ATTENTION,
    GPU_LSE,
    GPU_RELATIVE,
    POOLED,
    TILE_SCORES_BFLOAT16,
    TILE_SCORES_OF_EXACT_LOGITS,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def hopper():
    if cause := current_device().why_not_hopper():
        pytest.skip(cause)


# Grid, sub-tile, frames, head dimension, dtype, text lengths. The oracle holds the
# whole map, several times: grids are small, for other tests share the GPU.
CASES = {
    "divisible": (VideoGrid(5, 16, 32), (2, 2), 4, 128, "bfloat16", None),
    "eighths": (VideoGrid(9, 16, 32), (4, 4), 2, 64, "bfloat16", None),
    "each-place": (VideoGrid(5, 16, 32), (1, 1), 5, 128, "float16", None),
    "edges": (VideoGrid(3, 21, 48), (2, 4), 2, 128, "bfloat16", None),
    "edges-and-ragged-text": (
        VideoGrid(3, 21, 48, text_length=40),
        (2, 2),
        2,
        64,
        "float16",
        (40, 7),
    ),
    "by-rows": (VideoGrid(3, 30, 52), (2, 4), 3, 128, "bfloat16", None),
    # 30 means of a tile, filled up to 32.
    "filled-up": (VideoGrid(3, 22, 40, tile=(6, 20)), (2, 2), 2, 128, "bfloat16", None),
}


@pytest.mark.parametrize("order", ["raster", "tiled"])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernel_agrees_with_the_oracle(name, density, order):
    grid, sub_tile, frames, head_dim, dtype, lengths = CASES[name]
    qkv = random_qkv(grid, head_dim=head_dim, dtype=dtype)
    dense = random_mask(grid, density=density)
    dense[:, :, grid.text_blocks] = dense[..., grid.text_blocks] = True
    mask = compress(dense, grid)
    compensation = Compensation(sub_tile=sub_tile, frames=frames)
    means = make_means(*qkv[1:], mask, compensation=compensation, order="tiled")
    text_lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    given = qkv if order == "tiled" else [x[:, grid.raster_order] for x in qkv]
    attend = functools.partial(
        block_sparse_attention_with_lse,
        grid=grid,
        order=order,
        means=means,
        text_lengths=text_lengths,
        backend="hopper",
    )
    out, lse = attend(*given, mask)
    again, _ = attend(*given, mask)
    np.testing.assert_array_equal(out, again)
    if order == "raster":
        out, lse = out[:, grid.tile_order], lse[:, :, grid.tile_order]
    with jax.default_matmul_precision("highest"):
        want, want_lse = oracle_attention(
            *(x.astype(jnp.float32) for x in qkv),
            mask,
            grid=grid,
            scale=head_dim**-0.5,
            text_lengths=text_lengths,
            means=means._replace(
                k=means.k.astype(jnp.float32), v=means.v.astype(jnp.float32)
            ),
        )
    got = np.asarray(out, np.float32)
    np.testing.assert_allclose(got, want, **GPU_ATTENTION[dtype])
    np.testing.assert_allclose(lse, want_lse, **GPU_LSE)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < GPU_RELATIVE[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_means_far_above_the_kept_keys(dtype):
    """Sums overflow, so the second launch computes every block again."""
    grid = VideoGrid(5, 16, 32)
    q, k, v = random_qkv(grid, head_dim=64, dtype=dtype)
    q = q.at[..., 0].set(1.0)
    dense = np.broadcast_to(np.eye(grid.num_blocks, dtype=bool), (2, 2, 20, 20))
    mask = compress(dense, grid)
    compensation = Compensation(sub_tile=(2, 2), frames=5)
    means = make_means(k, v, mask, compensation=compensation, order="tiled")
    means = means._replace(k=means.k.at[..., 0].set(480.0))
    options = {"grid": grid, "scale": 0.125, "means": means}
    out, lse = block_sparse_attention_with_lse(
        q, k, v, mask, order="tiled", backend="hopper", **options
    )
    with jax.default_matmul_precision("highest"):
        want, want_lse = oracle_attention(q, k, v, mask, text_lengths=None, **options)
    got, want = (np.asarray(x, np.float32) for x in (out, want))
    np.testing.assert_allclose(got, want, **GPU_ATTENTION[dtype])
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5)


@pytest.mark.parametrize("per_tile", [2, 4, 8, 16])
@pytest.mark.parametrize("is_uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize(
    ("tiles", "head_dim", "heads"), [(990, 128, 2), (61, 64, 160)], ids=str
)
def test_scores_keep_what_float32_keeps(tiles, head_dim, heads, is_uneven, per_tile):
    """With 160 heads CTAs have more than one query block each."""
    rng = np.random.default_rng(0)
    num = tiles * per_tile
    counts = rng.integers(1, 9, num) if is_uneven else np.ones(num)
    shares = np.repeat(1 / counts.reshape(tiles, -1).sum(1), per_tile) * counts
    parts = Parts(
        per_tile=per_tile,
        query_weights=tuple(shares.tolist()),
        key_weights=tuple(counts.astype(float).tolist()),
    )
    size = (1, num, heads, head_dim)
    q, k = (jnp.asarray(rng.normal(size=size), jnp.float32) for _ in range(2))
    got = np.asarray(tile_scores(2 * q, k, parts))
    np.testing.assert_allclose(got.sum(-1), 1.0, rtol=1e-4)
    others = num_kept = 0
    for head in range(heads):
        own = slice(head, head + 1)
        want = reference.tile_scores(
            2 * q[:, :, own], k[:, :, own], parts, scale=head_dim**-0.5
        )[0, 0]
        rtol = 4 * TILE_SCORES_BFLOAT16["rtol"]
        np.testing.assert_allclose(got[0, head], want, rtol=rtol, atol=1e-8)
        kept = [set(np.argsort(-x, None)[: x.size // 10]) for x in (got[0, head], want)]
        others, num_kept = others + len(kept[0] - kept[1]), num_kept + len(kept[0])
    assert others <= 0.01 * num_kept


def test_scores_follow_logits_that_grow():
    """Beyond what float32 holds; products are exact."""
    q, k, parts, scale = growing_logits()
    got = tile_scores(q, k, parts, scale=scale)
    want = reference.tile_scores(q, k, parts, scale=scale)
    np.testing.assert_allclose(got, want, **TILE_SCORES_OF_EXACT_LOGITS)


@pytest.mark.parametrize("order", ["raster", "tiled"])
@pytest.mark.parametrize(("sub_tile", "frames"), [((2, 2), 4), ((4, 4), 1)], ids=str)
@pytest.mark.parametrize("text", [0, 77])
def test_pooling_agrees_with_xla(sub_tile, frames, order, text):
    grid = VideoGrid(7, 45, 80, text_length=text, text_side="before")
    cells = SubTiles(
        frames=7,
        height=45,
        width=80,
        tile=grid.tile,
        sub_tile=sub_tile,
        group_frames=frames,
    )
    q, k, _ = random_qkv(grid, head_dim=128, dtype="bfloat16")
    options = {"order": order, "start": grid.visual_tokens.start}
    got = pool_sub_tiles(q, k, cells, **options)
    task = pooling_tiles._Cells(sub_tiles=cells, dtype="float32", **options)
    want = pooling_tiles._pool_sub_tiles(task, q, k, has_kernel=False)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, **POOLED)


# Draft, cells, frames.
VIDEO_POOLINGS = {
    "16th": ((4, 4), (2, 2), 4),
    "32nd": ((4, 4), (2, 4), 4),
    "large cells": ((8, 16), (4, 16), 3),
    "many frames": ((2, 4), (1, 2), 12),
    "not nested": ((4, 4), (2, 8), 4),
}


@pytest.mark.parametrize("order", ["raster", "tiled"])
@pytest.mark.parametrize("height", [45, 48])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", VIDEO_POOLINGS)
def test_pooling_in_one_pass_agrees_with_xla(name, dtype, height, order):
    draft, cell, frames = VIDEO_POOLINGS[name]
    grid = VideoGrid(14, height, 80, text_length=77, text_side="before")
    pooling = VideoPooling(
        means=sub_tiles_of(grid, cell, frames),
        draft=sub_tiles_of(grid, draft),
        spread=True,
        order=order,
        start=grid.visual_tokens.start,
    )
    qkv = random_qkv(grid, head_dim=128, dtype=dtype)
    got = pool_video(*qkv, pooling)
    run = functools.partial(video._pool_video, pooling=pooling, has_kernel=False)
    want = run(*(x.astype(jnp.float32) for x in qkv))
    for field in got._fields:
        value = np.asarray(getattr(got, field), np.float32)
        is_mean = field.endswith("means") and dtype != "float32"
        bounds = {"rtol": 2**-8, "atol": 1e-5} if is_mean else POOLED
        expected = getattr(want, field)
        np.testing.assert_allclose(value, expected, err_msg=field, **bounds)


def test_a_layer_with_means():
    """All of it on kernels, against XLA on the same mask."""
    grid = VideoGrid(9, 48, 80)
    config = DraftConfig.paper(
        sparsity=0.9,
        selection="row_topk",
        draft_tile=(4, 4),
        compensation=Compensation(sub_tile=(2, 2), frames=4),
        ranking="spread",
    )
    qkv = random_qkv(grid, batch=1, head_dim=128, dtype="bfloat16")
    out = draft_attention(*qkv, grid=grid, config=config, backend="hopper")
    mask = compute_mask(*qkv[:2], grid=grid, config=config)
    means = make_means(*qkv[1:], mask, compensation=config.compensation)
    want, _ = block_sparse_attention_with_lse(
        *qkv, mask, grid=grid, order="raster", means=means, backend="xla"
    )
    np.testing.assert_allclose(
        np.asarray(out, np.float32),
        np.asarray(want, np.float32),
        **GPU_ATTENTION["bfloat16"],
    )
