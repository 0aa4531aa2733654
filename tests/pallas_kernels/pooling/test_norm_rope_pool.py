"""The kernel that norms, rotates and pools, in GPU interpret mode, against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from draft_jax.draft.pooling import tiling_of
from draft_jax.grid import VideoGrid
from pallas_kernels.common.device import Device
from pallas_kernels.pooling import QKNorm
from pallas_kernels.pooling.sm90 import emulated
from pallas_kernels.pooling.sm90 import norm_rope_pool as kernel
from tests import tolerances
from tests.draft_jax import naive_draft
from tests.pallas_kernels.pooling import cases, naive_norm_rope

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
H100 = Device(platform="gpu", kind="H100", compute_capability=(9, 0))
NORMS = {"heads": QKNorm(over="heads"), "head": QKNorm(over="head", eps=1e-5)}
NORMS["none"] = None
GRIDS = {
    "divisible": VideoGrid(1, 4, 8, tile=(2, 4)),
    "edges-and-text": VideoGrid(1, 3, 6, tile=(2, 4), text_length=3),
    "text-before": VideoGrid(1, 2, 5, tile=(2, 4), text_length=5, text_side="before"),
}


pytestmark = pytest.mark.usefixtures("no_races")


def random_case(grid, heads, *, norm, dtype, batch=1, seed=0):
    """q, k, scales and rotary table; the tokens of q and k in raster order."""
    rng = np.random.default_rng(seed)
    shape = (batch, grid.num_tokens, *heads)
    q, k = (jnp.asarray(3 * rng.normal(size=shape), dtype) for _ in range(2))
    return q, k, *cases.scales_and_rope(rng, grid.num_visual_tokens, heads, norm)


def check(got, given, grid, order, norm, text_scales=None):
    """Written arrays against loops, pooled ones against what was written."""
    q, k, scales, rope = given
    cos, sin = (None, None) if rope is None else rope
    for i, x in enumerate((q, k)):
        loops = functools.partial(
            naive_norm_rope.norm_rope,
            np.asarray(x, np.float64),
            over=None if norm is None else norm.over,
            eps=0.0 if norm is None else norm.eps,
            cos=cos,
            sin=sin,
            visual=grid.visual_tokens,
        )
        expected = loops(scale=None if scales is None else scales[i])
        if text_scales is not None:
            text = grid.text_tokens
            expected[:, text] = loops(scale=text_scales[i])[:, text]
        written = np.asarray(got[0][i], np.float64)
        if order == "tiled":
            written = written[:, grid.raster_order]
        bound = tolerances.NORM_ROPE[x.dtype.name]
        np.testing.assert_allclose(written, expected, **bound)
        visual = written[:, grid.visual_tokens]
        pooled = got[1][2 * i : 2 + 2 * i]
        np.testing.assert_allclose(
            pooled[0], naive_draft.pool(visual, grid), **tolerances.POOLED
        )
        np.testing.assert_array_equal(pooled[1], naive_draft.pool(visual, grid, np.max))


def run(given, grid, order, norm, *, v=None, text_scales=None, mean_squares=None):
    """Runs the kernel: with v, on arrays of the video and of the text."""
    q, k, scales, rope = given
    arrays, text = (q, k) if v is None else (q, k, v), None
    if order == "tiled":
        arrays = tuple(x[:, grid.tile_order] for x in arrays)
        first = grid.visual_tokens.start
        tiled = grid.tile_order[grid.visual_tokens] - first
        rope = None if rope is None else tuple(x[tiled] for x in rope)
        if mean_squares is not None:
            mean_squares = tuple(x[:, grid.tile_order] for x in mean_squares)
    if v is not None:
        arrays, text = (
            tuple(x[:, tokens] for x in arrays)
            for tokens in (grid.visual_tokens, grid.text_tokens)
        )
    return kernel.norm_rope_pool(
        arrays,
        text,
        scales,
        text_scales,
        rope,
        tiling_of(grid, order).table,
        grid.visual_tokens,
        norm=norm,
        mean_squares=mean_squares,
        reductions=("mean", "max"),
        interpret=INTERPRET,
    )


@pytest.mark.parametrize(
    ("name", "order", "norm", "dtype", "heads"),
    [
        ("edges-and-text", "raster", "heads", "bfloat16", (4, 128)),
        ("edges-and-text", "tiled", "none", "float16", (8, 64)),
        ("text-before", "raster", "heads", "float32", (5, 64)),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in [
                ("divisible", "tiled", "heads", "bfloat16", (8, 64)),
                ("divisible", "raster", "head", "float16", (8, 128)),
                ("edges-and-text", "tiled", "head", "bfloat16", (4, 128)),
                ("text-before", "tiled", "heads", "float16", (8, 64)),
                ("text-before", "raster", "head", "bfloat16", (32, 64)),
                # Loads of a warpgroup do not divide these numbers of heads.
                ("divisible", "tiled", "heads", "float32", (3, 64)),
                ("text-before", "tiled", "head", "bfloat16", (3, 128)),
                ("edges-and-text", "raster", "head", "float16", (5, 64)),
                ("divisible", "raster", "heads", "bfloat16", (5, 128)),
                ("edges-and-text", "tiled", "heads", "bfloat16", (6, 64)),
                ("text-before", "raster", "none", "float32", (6, 128)),
                ("divisible", "raster", "none", "bfloat16", (10, 64)),
                ("edges-and-text", "tiled", "heads", "float16", (10, 128)),
                ("edges-and-text", "raster", "head", "bfloat16", (26, 128)),
                ("edges-and-text", "raster", "heads", "bfloat16", (1, 128)),
                ("divisible", "tiled", "head", "bfloat16", (3, 32)),
            ]
        ),
    ],
    ids=str,
)
def test_matches_loops(name, order, norm, dtype, heads):
    grid, norm = GRIDS[name], NORMS[norm]
    given = random_case(grid, heads, norm=norm, dtype=dtype)
    check(run(given, grid, order, norm), given, grid, order, norm)


def test_without_rotation():
    grid, norm = GRIDS["edges-and-text"], NORMS["heads"]
    q, k, scales, _ = random_case(grid, (4, 64), norm=norm, dtype="bfloat16", batch=2)
    given = (q, k, scales, None)
    check(run(given, grid, "raster", norm), given, grid, "raster", norm)


JOINT = {
    "edges-and-text": GRIDS["edges-and-text"],
    "text-before": GRIDS["text-before"],
    "long-text": VideoGrid(1, 2, 4, tile=(2, 4), text_length=131),
    "long-text-before": VideoGrid(
        1, 3, 4, tile=(2, 4), text_length=130, text_side="before"
    ),
}


@pytest.mark.parametrize(
    ("name", "order", "norm", "dtype", "heads", "batch"),
    [
        ("edges-and-text", "tiled", "head", "bfloat16", (4, 128), 2),
        ("text-before", "raster", "none", "float32", (4, 64), 1),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in [
                ("edges-and-text", "raster", "heads", "float16", (8, 64), 1),
                ("text-before", "tiled", "head", "float32", (4, 64), 2),
                ("edges-and-text", "tiled", "head", "bfloat16", (3, 128), 2),
                ("text-before", "raster", "head", "bfloat16", (6, 128), 1),
                ("edges-and-text", "raster", "heads", "float16", (10, 64), 1),
                ("long-text", "tiled", "head", "bfloat16", (4, 128), 1),
                ("long-text-before", "raster", "heads", "bfloat16", (8, 64), 2),
            ]
        ),
    ],
    ids=str,
)
def test_text_of_its_own_matches_loops(name, order, norm, dtype, heads, batch):
    """Video and text apart, with scales of their own; values are copied."""
    grid, norm = JOINT[name], NORMS[norm]
    given = random_case(grid, heads, norm=norm, dtype=dtype, batch=batch)
    other = random_case(grid, heads, norm=norm, dtype=dtype, batch=batch, seed=1)
    v, text_scales = other[0], other[2]
    got = run(given, grid, order, norm, v=v, text_scales=text_scales)
    check(got, given, grid, order, norm, text_scales)
    expected = v[:, grid.tile_order] if order == "tiled" else v
    np.testing.assert_array_equal(got[0][2], expected)


@pytest.mark.nightly
def test_text_of_its_own_without_rotation_and_pooling():
    grid, norm = GRIDS["text-before"], NORMS["head"]
    q, k, scales, _ = random_case(grid, (4, 64), norm=norm, dtype="float32", batch=2)
    video, text = (
        tuple(x[:, tokens] for x in (q, k, k))
        for tokens in (grid.visual_tokens, grid.text_tokens)
    )
    written, pooled = kernel.norm_rope_pool(
        video,
        text,
        scales,
        None,
        None,
        tiling_of(grid, "raster").table,
        grid.visual_tokens,
        norm=norm,
        reductions=(),
        interpret=INTERPRET,
    )
    assert pooled == ()
    for x, got, scale in zip((q, k), written[:2], scales, strict=True):
        expected = naive_norm_rope.norm_rope(
            np.asarray(x, np.float64),
            over="head",
            eps=norm.eps,
            scale=scale,
            cos=None,
            sin=None,
            visual=grid.visual_tokens,
        )
        np.testing.assert_allclose(got, expected, **tolerances.NORM_ROPE["float32"])
    np.testing.assert_array_equal(written[2], k)


@pytest.mark.nightly
@pytest.mark.parametrize("apart", [False, True], ids=["joined", "apart"])
def test_text_with_or_without_scales_of_its_own(apart):
    """The same scales given twice are those of all; one array or two are alike."""
    grid, norm = GRIDS["text-before"], NORMS["heads"]
    given = random_case(grid, (4, 64), norm=norm, dtype="float32")
    v = given[1] if apart else None
    got = run(given, grid, "raster", norm, v=v, text_scales=given[2])
    check(got, given, grid, "raster", norm)
    other = random_case(grid, (4, 64), norm=norm, dtype="float32", seed=1)[2]
    got = run(given, grid, "raster", norm, v=v, text_scales=other)
    check(got, given, grid, "raster", norm, other)
    got = run(given, grid, "raster", norm, v=v)
    check(got, given, grid, "raster", norm)


@pytest.mark.nightly
@pytest.mark.parametrize("mapped_scales", [False, True], ids=["shared", "mapped"])
def test_mapped_axes(mapped_scales):
    grid, norm = VideoGrid(1, 2, 4, tile=(2, 2)), NORMS["head"]
    q, k, scales, rope = random_case(grid, (4, 64), norm=norm, dtype="float32", batch=2)
    both = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), scales)
    call = functools.partial(
        kernel.norm_rope_pool,
        text=None,
        text_scales=None,
        rope=rope,
        tiles=tiling_of(grid, "tiled").table,
        visual_tokens=grid.visual_tokens,
        norm=norm,
        interpret=INTERPRET,
    )
    axes = (0, None, 0 if mapped_scales else None)
    scales_of = both if mapped_scales else scales
    got = jax.vmap(lambda q, k, scales: call((q, k), scales=scales), axes)(
        q[:, None], k[:1], scales_of
    )
    for i in range(2):
        own = jax.tree.map(lambda x, i=i: x[i], both) if mapped_scales else scales
        expected = call((q[i : i + 1], k[:1]), scales=own)
        for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
            np.testing.assert_array_equal(a[i], b)


@pytest.mark.parametrize(
    ("dtype", "heads", "norm", "text_side", "apart"),
    [
        ("bfloat16", (24, 128), "head", "after", False),
        ("bfloat16", (24, 128), "head", "after", True),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in (
                ("bfloat16", (40, 128), "heads", None, False),
                ("float16", (12, 128), "heads", "before", False),
                ("float16", (12, 128), "heads", "before", True),
                ("float32", (4, 64), "none", None, False),
                ("float32", (4, 64), "none", "after", True),
                ("bfloat16", (3, 128), "head", "after", True),
                ("bfloat16", (3, 64), "heads", None, False),
                ("bfloat16", (10, 128), "heads", None, False),
                ("bfloat16", (1, 64), "heads", None, False),
                ("bfloat16", (3, 32), "heads", None, False),
            )
        ),
    ],
    ids=str,
)
def test_lowers_for_cuda(dtype, heads, norm, text_side, apart):
    text = {"text_length": 200, "text_side": text_side} if text_side else {}
    grid, norm = VideoGrid(3, 45, 80, **text), NORMS[norm]
    given = jax.eval_shape(lambda: random_shapes(grid, heads, norm, dtype, apart))
    lowered = (
        jax.jit(
            functools.partial(
                kernel.norm_rope_pool,
                tiles=tiling_of(grid, "raster").table,
                visual_tokens=grid.visual_tokens,
                norm=norm,
                reductions=("mean", "max"),
            )
        )
        .trace(*given)
        .lower(lowering_platforms=("cuda",))
    )
    assert "mosaic_gpu" in lowered.as_text()


def random_shapes(grid, heads, norm, dtype, apart):
    width = heads[1] if norm is None or norm.over == "head" else heads[0] * heads[1]
    scale, table = jnp.zeros(width), jnp.zeros((grid.num_visual_tokens, heads[1] // 2))
    scales = None if norm is None else (scale, scale)
    if not apart:
        q = jnp.zeros((2, grid.num_tokens, *heads), dtype)
        return (q, q), None, scales, None, (table, table)
    video, text = (
        jnp.zeros((2, tokens, *heads), dtype)
        for tokens in (grid.num_visual_tokens, grid.text_length)
    )
    return (video,) * 3, (text,) * 3, scales, scales, (table, table)


def test_causes_are_named():
    norm = NORMS["heads"]
    good = (1, 64, 40, 128)
    assert kernel.why_unsupported(good, "bfloat16", norm, H100) is None
    cpu = Device(platform="cpu")
    assert "sm_90" in str(kernel.why_unsupported(good, "bfloat16", norm, cpu))
    for shape, dtype, message in (
        (good, "float64", "float16, not float64"),
        ((1, 64, 1, 32), "bfloat16", "1 heads of 32 channels cannot be divided"),
        ((1, 64, 4, 96), "bfloat16", "4 heads of 96 channels cannot be divided"),
        (
            (1, 64, 64, 128),
            "bfloat16",
            "64 heads of 128 channels in one CTA do not fit",
        ),
    ):
        assert message in str(kernel.why_unsupported(shape, dtype, norm, H100))
    with pytest.raises(ValueError, match="4 heads of 96 channels"):
        run(
            random_case(GRIDS["divisible"], (4, 96), norm=norm, dtype="float32"),
            GRIDS["divisible"],
            "raster",
            norm,
        )


@pytest.mark.parametrize("head_dim", [64, 128])
def test_any_number_of_heads_is_taken(head_dim):
    """The groups of a CTA are its heads, and CTAs divide all heads."""
    for num_heads in range(1, 49):
        shape = (1, 64, num_heads, head_dim)
        for norm in NORMS.values():
            assert kernel.why_unsupported(shape, "bfloat16", norm, H100) is None
            has_squares = norm is not None and norm.over == "heads"
            for has_mean_squares in {False, has_squares}:
                plan = kernel.make_plan(
                    num_heads,
                    head_dim,
                    "bfloat16",
                    norm=norm,
                    has_mean_squares=has_mean_squares,
                    has_parts=(False,) * 3,
                    has_text_scales=False,
                    has_rope=True,
                    reductions=("mean",),
                    num_tiles=1,
                    num_units=1,
                    visual_start=0,
                    num_arrays=2,
                    text_start=None,
                    ahead=None,
                    ops=emulated,
                )
                starts = [group.start for group in plan.groups]
                taken = [
                    x
                    for start in starts
                    for x in range(start, start + plan.heads_at_once)
                ]
                assert set(taken) == set(range(plan.heads))
                assert len(taken) == plan.heads + plan.repeated_heads
                assert num_heads % plan.heads == 0


@pytest.mark.usefixtures("without_jaxtyping")
def test_an_unknown_norm_is_named():
    with pytest.raises(ValueError, match="must be 'heads' or 'head'"):
        QKNorm(over="rows")


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("order", "own", "head_dim"),
    [("raster", 4, 64), ("tiled", 4, 64), ("raster", 3, 128), ("tiled", 5, 64)],
    ids=str,
)
def test_some_heads_with_mean_squares_of_all(order, own, head_dim):
    """Each half of the heads becomes what it is among all of them."""
    grid, norm = GRIDS["edges-and-text"], NORMS["heads"]
    given = random_case(grid, (2 * own, head_dim), norm=norm, dtype="bfloat16", batch=2)
    q, k, scales, rope = given
    halves = []
    for heads in (slice(0, own), slice(own, 2 * own)):
        factors = tuple(s.reshape(-1, head_dim)[heads].ravel() for s in scales)
        part = (q[:, :, heads], k[:, :, heads], factors, rope)
        squares = tuple(
            jnp.asarray(np.square(np.asarray(x, np.float64)).mean((2, 3)), jnp.float32)
            for x in (q, k)
        )
        halves.append(run(part, grid, order, norm, mean_squares=squares))
    got = jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), *halves)
    check(got, given, grid, order, norm)
