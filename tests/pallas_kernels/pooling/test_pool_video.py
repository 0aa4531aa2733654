"""Draft, means and spread in one pass, by the kernel and by XLA, against loops."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from draft_jax.config import sub_tiles_of
from draft_jax.grid import VideoGrid
from pallas_kernels.common.device import Device
from pallas_kernels.pooling import VideoPooling, pool_video, tiles, video
from pallas_kernels.pooling.sm90 import pool_tiles
from pallas_kernels.pooling.sm90 import pool_video as kernel
from tests.cases import mostly_nightly
from tests.draft_jax import naive_draft
from tests.tolerances import POOLED
from tests.warnings_once import forget_warnings

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
H100 = Device(platform="gpu", kind="H100", compute_capability=(9, 0))
CPU = Device(platform="cpu")
TEXT = VideoGrid(3, 5, 7, tile=(3, 5), text_length=3, text_side="before")
EVEN = VideoGrid(4, 4, 8, tile=(4, 4), text_length=2)

pytestmark = pytest.mark.usefixtures("no_races")

# Grid, parts of the draft, cells, frames of a group.
CASES = {
    "even": (EVEN, (2, 4), (2, 2), 2),
    "edges": (TEXT, (3, 4), (2, 2), 2),  # cells without a token, a short group
    "whole tiles": (TEXT, (3, 5), (1, 3), 3),
    "long rows": (VideoGrid(2, 3, 20, tile=(3, 20)), (3, 20), (3, 20), 2),
    "each place": (EVEN, (2, 2), (1, 1), 4),
    "not nested": (TEXT, (1, 2), (2, 3), 2),
}
DRAFTLESS = ("even", "edges")


def pooling_of(name, order, *, has_draft=True, spread=True):
    grid, part, cell, frames = CASES[name]
    return VideoPooling(
        means=sub_tiles_of(grid, cell, frames),
        draft=sub_tiles_of(grid, part) if has_draft else None,
        spread=spread,
        order=order,
        start=grid.visual_tokens.start,
    )


@pytest.fixture(params=["kernel", "xla"])
def device(request):
    """Pools in the kernel, interpreted, or as XLA operations."""
    if request.param == "xla":
        yield CPU
        return
    with (
        mock.patch.object(video, "current_device", return_value=H100),
        mock.patch.object(tiles, "current_device", return_value=H100),
        mock.patch.object(
            kernel,
            "pool_video",
            functools.partial(kernel.pool_video, interpret=INTERPRET),
        ),
        mock.patch.object(
            pool_tiles,
            "pool_cells",
            functools.partial(pool_tiles.pool_cells, interpret=INTERPRET),
        ),
    ):
        yield H100


def random_qkv(grid, order, dtype="float32"):
    """In raster order, and in the order that is asked for."""
    rng = np.random.default_rng(0)
    shape = (1, grid.num_tokens, 2, 64)
    qkv = [jnp.asarray(3.0 + rng.normal(size=shape), dtype) for _ in range(3)]
    return qkv, [x if order == "raster" else x[:, grid.tile_order] for x in qkv]


def loops(q, k, v, name):
    """All results of `pool_video` in float64, from arrays in raster order."""
    grid, part, cell, frames = CASES[name]
    q, k, v = (np.asarray(x, np.float64)[:, grid.visual_tokens] for x in (q, k, v))
    tiles = naive_draft.tile_members(grid.frames, grid.height, grid.width, grid.tile)

    def means(x, members):
        rows = [x[:, own].mean(1) if own else 0 * x[:, 0] for own in members]
        return np.stack(rows, axis=1)

    cells = naive_draft.cell_members(grid, cell, frames)
    rest = k.copy()
    for own in cells:
        if own:
            rest[:, own] -= k[:, own].mean(1, keepdims=True)
    parts = naive_draft.cell_members(grid, part)
    return {
        "q_parts": means(q, parts),
        "k_parts": means(k, parts),
        "q_tiles": means(q, tiles),
        "k_means": means(k, cells),
        "v_means": means(v, cells),
        "k_spread": np.stack([(rest[:, own] ** 2).mean(1) for own in tiles], axis=1),
    }


@pytest.mark.parametrize(
    "case",
    mostly_nightly(
        [(name, order) for name in CASES for order in ("raster", "tiled")],
        quick=[("edges", "tiled")],
    ),
    ids=" ".join,
)
def test_all_results_match_loops(case, device):
    name, order = case
    qkv, given = random_qkv(CASES[name][0], order)
    got = pool_video(*given, pooling_of(name, order))
    want = loops(*qkv, name)
    for field, expected in want.items():
        value = getattr(got, field)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected, err_msg=field, **POOLED)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_means_have_the_dtype_of_the_keys(dtype, device):
    qkv, given = random_qkv(TEXT, "tiled", dtype)
    got = pool_video(*given, pooling_of("edges", "tiled"))
    for field, expected in loops(*qkv, "edges").items():
        value = getattr(got, field)
        is_mean = field.endswith("means")
        assert value.dtype == (dtype if is_mean else "float32")
        bounds = {"rtol": 2**-8} if is_mean else POOLED
        np.testing.assert_allclose(value.astype("float32"), expected, **bounds)


@pytest.mark.nightly
@pytest.mark.parametrize("has_values", [True, False], ids=["values", "no values"])
@pytest.mark.parametrize("has_draft", [True, False], ids=["draft", "no draft"])
@pytest.mark.parametrize("spread", [True, False], ids=["spread", "mass"])
def test_only_what_is_asked_for_is_computed(spread, has_draft, has_values, device):
    if not (spread or has_draft or has_values):
        return
    pooling = pooling_of("edges", "raster", has_draft=has_draft, spread=spread)
    qkv, _ = random_qkv(TEXT, "raster")
    q, k, v = qkv
    got = pool_video(q, k, v if has_values else None, pooling)
    asked = {
        "q_parts": has_draft,
        "k_parts": has_draft,
        "q_tiles": has_draft and spread,
        "k_means": has_values,
        "v_means": has_values,
        "k_spread": spread,
    }
    for field, expected in loops(*qkv, "edges").items():
        value = getattr(got, field)
        assert (value is not None) == asked[field], field
        if value is not None:
            np.testing.assert_allclose(value, expected, err_msg=field, **POOLED)


@pytest.mark.nightly
def test_a_far_mean_costs_the_spread_no_digits(device):
    """Keys of 1,000 with a deviation of 1: sums of squares would lose six digits."""
    qkv, _ = random_qkv(EVEN, "raster")
    q, k, v = qkv
    k = k.astype(jnp.float32) + 1000.0
    got = pool_video(q, k, None, pooling_of("even", "raster", has_draft=False))
    want = loops(q, k, v, "even")["k_spread"]
    np.testing.assert_allclose(got.k_spread, want, rtol=1e-3)


@pytest.mark.nightly
def test_mapped_axes_join_the_batch(device):
    pooling = pooling_of("even", "raster")
    qkv, _ = random_qkv(EVEN, "raster")
    stacked = [jnp.stack([x, 2 * x]) for x in qkv]
    got = jax.vmap(functools.partial(pool_video, pooling=pooling))(*stacked)
    for i in range(2):
        want = loops(*(x[i] for x in stacked), "even")
        for field, expected in want.items():
            np.testing.assert_allclose(getattr(got, field)[i], expected, **POOLED)


@pytest.mark.nightly
def test_derivatives_of_all_results(device):
    """Central differences of the loops in float64, along one direction."""
    qkv, _ = random_qkv(TEXT, "raster")
    rng = np.random.default_rng(1)
    step = [rng.normal(size=x.shape) for x in qkv]
    far, near = (
        loops(*(np.asarray(x) + s * d for x, d in zip(qkv, step, strict=True)), "edges")
        for s in (1e-4, -1e-4)
    )
    factors = {field: rng.normal(size=x.shape) for field, x in far.items()}
    change = sum(((far[f] - near[f]) * factors[f]).sum() for f in far) / 2e-4

    def loss(*qkv):
        got = pool_video(*qkv, pooling_of("edges", "raster"))
        return sum((getattr(got, f) * factors[f]).sum() for f in factors)

    gradients = jax.grad(loss, (0, 1, 2))(*qkv)
    moved = sum((g * s).sum() for g, s in zip(gradients, step, strict=True))
    np.testing.assert_allclose(moved, change, rtol=1e-3)


@pytest.mark.parametrize(
    "case",
    mostly_nightly(
        [("bfloat16", (2, 2), 4), ("float16", (2, 8), 12), ("float32", (8, 16), 1)],
        quick=[("bfloat16", (2, 2), 4)],
    ),
    ids=str,
)
def test_lowers_for_cuda(case):
    dtype, cell, frames = case
    grid = VideoGrid(13, 45, 80, text_length=77)
    x = jax.ShapeDtypeStruct((1, grid.num_tokens, 24, 128), dtype)
    pooling = VideoPooling(
        means=sub_tiles_of(grid, cell, frames),
        draft=sub_tiles_of(grid, (4, 8)) if cell != (8, 16) else None,
        spread=True,
        order="raster",
    )
    with mock.patch.object(video, "current_device", return_value=H100):
        run = jax.jit(functools.partial(pool_video, pooling=pooling))
        lowered = run.trace(x, x, x).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
    ("heads", "frames", "cause"),
    [(1, 2, r"multiple of 128, not 1 \* 64"), (2, 17, "at most 16 frames, not 17")],
    ids=["channels", "frames"],
)
def test_a_gpu_without_the_kernel_warns_once(heads, frames, cause):
    grid = VideoGrid(17, 2, 2, tile=(2, 2))
    pooling = VideoPooling(
        means=sub_tiles_of(grid, (1, 1), frames),
        draft=None,
        spread=True,
        order="raster",
    )
    k = jnp.ones((1, 68, heads, 64))
    forget_warnings()
    with mock.patch.object(video, "current_device", return_value=H100):
        with pytest.warns(UserWarning, match=f"runs on XLA .*{cause}"):
            pool_video(k, k, None, pooling)
        pool_video(k, k, None, pooling)  # a second one would raise


def test_a_draft_of_other_tiles_is_refused():
    pooling = pooling_of("even", "raster")
    with pytest.raises(ValueError, match="must be sub-tiles of"):
        VideoPooling(
            means=pooling.means,
            draft=sub_tiles_of(TEXT, (1, 1)),
            spread=True,
            order="raster",
        )
