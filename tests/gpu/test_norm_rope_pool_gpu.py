"""Norm, rotation and pooling in one pass, on a Hopper GPU, against float64 loops."""

import functools
import math
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import (
    QKV,
    DraftConfig,
    Product,
    QKNorm,
    VideoGrid,
    compute_mask,
    draft_attention,
    joint_norm_rope_pool,
    norm_rope_pool,
)
from draft_jax.config import static_budget
from draft_jax.draft.pooling import pool_queries_and_keys
from pallas_kernels.common.device import current_device
from pallas_kernels.pooling.sm90 import norm_rope_pool as fused_kernel
from tests import tolerances
from tests.draft_jax import naive_draft
from tests.pallas_kernels.pooling import naive_norm_rope
from tests.warnings_once import forget_warnings

pytestmark = pytest.mark.gpu

NORMS = {"heads": QKNorm(over="heads"), "head": QKNorm(over="head"), "none": None}
BOTH = DraftConfig.paper(pooling="mean+max")


@pytest.fixture(autouse=True)
def hopper():
    good = ((1, 128, 4, 128), "bfloat16", None)
    device = current_device()
    if cause := device.why_not_hopper():
        pytest.skip(cause)
    assert fused_kernel.why_unsupported(*good, device) is None


def random_case(grid, heads, norm, dtype, batch=1, seed=0):
    """Tokens and rotary table in raster order."""
    rng = np.random.default_rng(seed)
    shape = (batch, grid.num_tokens, *heads)
    q, k = (jnp.asarray(3 * rng.normal(size=shape), dtype) for _ in range(2))
    width = heads[1] if norm is None or norm.over == "head" else heads[0] * heads[1]
    scales = tuple(
        jnp.asarray(rng.uniform(0.5, 2, width), jnp.float32) for _ in range(2)
    )
    angles = rng.uniform(0, 7, (grid.num_visual_tokens, heads[1] // 2))
    rope = tuple(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    return q, k, None if norm is None else scales, rope


def run(given, grid, norm, order, text_scales=None, v=None):
    """The public function under jit, on tokens put into `order`; with v, on parts."""
    q, k, scales, rope = given
    arrays = (q, k) if v is None else (q, k, v)
    if order == "tiled":
        arrays = tuple(x[:, grid.tile_order] for x in arrays)
        tiled = grid.tile_order[grid.visual_tokens] - grid.visual_tokens.start
        rope = tuple(x[tiled] for x in rope)
    prepare = norm_rope_pool if v is None else joint_norm_rope_pool
    if v is not None:
        arrays = tuple(
            QKV(*(x[:, tokens] for x in arrays))
            for tokens in (grid.visual_tokens, grid.text_tokens)
        )
    prepare = functools.partial(prepare, grid=grid, config=BOTH, norm=norm, order=order)
    call = jax.jit(
        lambda arrays, scales, text_scales, rope: prepare(
            *arrays, scales=scales, text_scales=text_scales, rope=rope
        )
    )
    lowered = call.lower(arrays, scales, text_scales, rope)
    assert "norm_rope_pool_sm90" in lowered.as_text()
    program = lowered.compile()
    first, second = (program(arrays, scales, text_scales, rope) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert (a == b).all()
    return first


def check(given, grid, norm, order, text_scales=None, v=None):
    q_out, k_out, *v_out, pooled = run(given, grid, norm, order, text_scales, v)
    q, k, scales, (cos, sin) = given
    for i, (x, out, mean, largest) in enumerate(
        (
            (q, q_out, pooled.q_mean, pooled.q_max),
            (k, k_out, pooled.k_mean, pooled.k_max),
        )
    ):
        loops = functools.partial(
            naive_norm_rope.norm_rope,
            np.asarray(x.astype(jnp.float32), np.float64),
            over=None if norm is None else norm.over,
            eps=0.0 if norm is None else norm.eps,
            cos=np.asarray(cos),
            sin=np.asarray(sin),
            visual=grid.visual_tokens,
        )
        expected = loops(scale=None if scales is None else scales[i])
        if text_scales is not None:
            text = grid.text_tokens
            expected[:, text] = loops(scale=text_scales[i])[:, text]
        written = np.asarray(out.astype(jnp.float32), np.float64)
        if order == "tiled":
            written = written[:, grid.raster_order]
        bound = tolerances.NORM_ROPE[x.dtype.name]
        np.testing.assert_allclose(written, expected, **bound)
        visual = written[:, grid.visual_tokens]
        means = naive_draft.pool(visual, grid)
        np.testing.assert_allclose(mean, means, **tolerances.POOLED)
        np.testing.assert_array_equal(largest, naive_draft.pool(visual, grid, np.max))
    if v is not None:
        copied = v[:, grid.tile_order] if order == "tiled" else v
        np.testing.assert_array_equal(v_out[0], copied)


@pytest.mark.parametrize("order", ["raster", "tiled"])
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(
    ("dtype", "heads"),
    [
        ("bfloat16", (24, 128)),
        ("bfloat16", (40, 128)),
        ("float16", (12, 128)),
        ("bfloat16", (16, 64)),
        ("float32", (4, 128)),
    ],
    ids=str,
)
def test_matches_loops(dtype, heads, name, order):
    grid = VideoGrid(1, 15, 26, text_length=139)
    check(random_case(grid, heads, NORMS[name], dtype), grid, NORMS[name], order)


@pytest.mark.parametrize(
    ("dtype", "heads", "name", "order"),
    [
        ("bfloat16", (10, 128), "heads", "tiled"),
        ("bfloat16", (6, 128), "head", "tiled"),
        ("float16", (5, 64), "none", "raster"),
        ("bfloat16", (3, 128), "head", "tiled"),
        ("float32", (3, 64), "heads", "raster"),
        ("bfloat16", (1, 128), "heads", "raster"),
    ],
    ids=str,
)
def test_heads_that_no_load_divides_match_loops(dtype, heads, name, order):
    grid, norm = VideoGrid(1, 15, 26, text_length=139), NORMS[name]
    given = random_case(grid, heads, norm, dtype)
    check(given, grid, norm, order)
    if norm is not None:
        v = random_case(grid, heads, norm, dtype, seed=1)[0]
        check(given, grid, norm, order, given[2], v)


ALL, BIAS = (True, True, True), (False, False, True)


@pytest.mark.parametrize(
    ("dtype", "heads", "name", "parts", "apart"),
    [
        ("bfloat16", (40, 128), "heads", ALL, False),
        ("bfloat16", (40, 128), "heads", BIAS, False),
        ("bfloat16", (24, 128), "head", ALL, True),
        ("float16", (12, 128), "heads", ALL, False),
        ("bfloat16", (10, 128), "none", BIAS, True),
        ("bfloat16", (3, 128), "head", ALL, True),
    ],
    ids=str,
)
def test_products_are_finished(dtype, heads, name, parts, apart):
    """As loops finish them: what is made of both is equal, values to the last bit."""
    grid, norm = VideoGrid(2, 15, 26, text_length=139), NORMS[name]
    _, _, scales, rope = random_case(grid, heads, norm, dtype)
    shape = (2, grid.num_tokens, *heads)
    products = [
        naive_norm_rope.random_product(shape, dtype, parts, i) for i in range(3)
    ]
    arrays = [jnp.asarray(naive_norm_rope.finish(x)) for x in products]
    options = {"grid": grid, "config": BOTH, "norm": norm, "scales": scales}

    @jax.jit
    def run(q, k, v):
        if not apart:
            return norm_rope_pool(q, k, rope=rope, **options)

        def part(x, tokens):
            rows = None if x.rows is None else x.rows[:, tokens]
            return x._replace(values=x.values[:, tokens], rows=rows)

        video, text = (
            QKV(*(part(Product.of(x), tokens) for x in (q, k, v)))
            for tokens in (grid.visual_tokens, grid.text_tokens)
        )
        return joint_norm_rope_pool(video, text, rope=rope, **options)

    *got, pooled = run(*products)
    *expected, same_pooled = run(*arrays)
    for a, b in zip(got[:2], expected[:2], strict=True):
        # Sums of a norm have another order.
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, **tolerances.NORM_ROPE[dtype])
        assert (a == b).mean() > 0.99
    for a, b in zip(got[2:], expected[2:], strict=True):
        np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (a, b)))
    for a, b in zip(*map(jax.tree.leaves, (pooled, same_pooled)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("apart", [False, True], ids=["joined", "apart"])
@pytest.mark.parametrize(
    ("grid", "heads", "name", "dtype", "order", "batch"),
    [
        (
            VideoGrid(1, 13, 20, text_length=256),
            (24, 128),
            "head",
            "bfloat16",
            "tiled",
            1,
        ),
        (
            VideoGrid(1, 13, 20, text_length=256),
            (24, 128),
            "head",
            "float32",
            "tiled",
            1,
        ),
        (
            VideoGrid(1, 9, 20, text_length=70),
            (24, 128),
            "heads",
            "bfloat16",
            "raster",
            2,
        ),
        (
            VideoGrid(2, 9, 17, text_length=141, text_side="before"),
            (8, 128),
            "none",
            "float16",
            "tiled",
            2,
        ),
        (
            VideoGrid(2, 9, 17, text_length=141, text_side="before"),
            (16, 64),
            "head",
            "bfloat16",
            "raster",
            2,
        ),
    ],
    ids=["hunyuan", "float32", "ragged", "no-norm", "before"],
)
def test_text_of_its_own_matches_loops(grid, heads, name, dtype, order, batch, apart):
    """Scales of the text, and arrays of it, in which values are copied."""
    norm = NORMS[name]
    given = random_case(grid, heads, norm, dtype, batch)
    v, _, text_scales, _ = random_case(grid, heads, norm, dtype, batch, seed=1)
    check(given, grid, norm, order, text_scales, v if apart else None)


@pytest.mark.parametrize("seed", range(8))
def test_random_grids_match_loops(seed):
    rng = np.random.default_rng(seed)
    frames, height, width = (int(rng.integers(1, most)) for most in (4, 20, 30))
    text = int(rng.integers(0, 300)) if seed % 2 else 0
    grid = VideoGrid(
        frames,
        height,
        width,
        tile=[(8, 16), (16, 8), (4, 4)][seed % 3],
        text_length=text,
        text_side=["before", "after"][seed // 2 % 2],
    )
    norm = NORMS[["heads", "head", "none"][int(rng.integers(3))]]
    dtype = ["bfloat16", "float16"][int(rng.integers(2))]
    heads = [(8, 128), (20, 128), (32, 64)][int(rng.integers(3))]
    given = random_case(grid, heads, norm, dtype, batch=2, seed=seed)
    check(given, grid, norm, ["raster", "tiled"][int(rng.integers(2))])


@pytest.mark.parametrize(
    ("grid", "heads", "name"),
    [
        (VideoGrid(33, 48, 80, text_length=256), (24, 128), "head"),
        (VideoGrid(21, 48, 80), (40, 128), "heads"),
        (VideoGrid(21, 30, 52), (12, 128), "heads"),
    ],
    ids=["hunyuan", "wan-14b", "wan-1.3b"],
)
def test_full_size_agrees_with_xla(grid, heads, name):
    norm, config = NORMS[name], DraftConfig.paper(sparsity=0.9)
    keys = jax.random.split(jax.random.key(0), 5)
    shape = (1, grid.num_tokens, *heads)
    q, k = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:2])
    width = heads[1] if name == "head" else heads[0] * heads[1]
    scales = tuple(jax.random.uniform(key, (width,)) + 0.5 for key in keys[2:4])
    angles = jax.random.uniform(keys[4], (grid.num_visual_tokens, heads[1] // 2)) * 7

    def prepare(q, k):
        return norm_rope_pool(
            q,
            k,
            grid=grid,
            config=config,
            norm=norm,
            scales=scales,
            rope=(jnp.cos(angles), jnp.sin(angles)),
            order="tiled",
        )

    fused = jax.jit(prepare)(q, k)
    forget_warnings()
    unwanted = mock.patch.object(
        fused_kernel, "why_unsupported", return_value="unwanted"
    )
    with unwanted, pytest.warns(UserWarning, match="unwanted"):
        plain = jax.jit(lambda q, k: prepare(q, k))(q, k)
    for a, b in zip(fused[:2], plain[:2], strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        # Another rounding of a value moves it by one unit in the last place.
        assert (jnp.abs(a - b) <= 2**-7 * jnp.abs(b) + 1e-5).all()
        assert (a == b).mean() > 0.99
    again = pool_queries_and_keys(
        *fused[:2], grid, config=DraftConfig.paper(), order="tiled"
    )
    for a, b in zip(jax.tree.leaves(fused[2]), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, **tolerances.POOLED)
    mask = functools.partial(compute_mask, grid=grid, config=config, order="tiled")
    given = jax.jit(lambda q, k, pooled: mask(q, k, pooled=pooled))(*fused)
    check_best_pairs(given, again, grid, static_budget(0.9, grid, config))


def test_full_size_of_parts_is_that_of_joined_arrays():
    """HunyuanVideo at 768 x 1280, 129 frames: joined by the kernel or before it."""
    grid = VideoGrid(33, 48, 80, text_length=256)
    keys = iter(jax.random.split(jax.random.key(0), 11))
    video, text = (
        QKV(
            *(
                jax.random.normal(next(keys), (1, tokens, 24, 128), jnp.bfloat16)
                for _ in range(3)
            )
        )
        for tokens in (grid.num_visual_tokens, grid.text_length)
    )
    scales, text_scales = (
        tuple(jax.random.uniform(next(keys), (128,)) + 0.5 for _ in range(2))
        for _ in range(2)
    )
    angles = jax.random.uniform(next(keys), (grid.num_visual_tokens, 64)) * 7
    options = {
        "grid": grid,
        "config": DraftConfig.paper(),
        "norm": NORMS["head"],
        "scales": scales,
        "text_scales": text_scales,
        "rope": (jnp.cos(angles), jnp.sin(angles)),
        "order": "tiled",
    }
    *fused, pooled = jax.jit(lambda *parts: joint_norm_rope_pool(*parts, **options))(
        video, text
    )
    joined = [jnp.concatenate(pair, axis=1) for pair in zip(video, text, strict=True)]
    q, k, same_pooled = jax.jit(lambda q, k: norm_rope_pool(q, k, **options))(
        *joined[:2]
    )
    for a, b in zip(fused, (q, k, joined[2]), strict=True):
        assert (a == b).all()
    for a, b in zip(*map(jax.tree.leaves, (pooled, same_pooled)), strict=True):
        assert (a == b).all()


def test_padding_is_cleared_in_place():
    """Behind the kernel, and behind a projection: no whole array is copied."""
    grid = VideoGrid(2, 16, 32, text_length=256)
    rng = np.random.default_rng(0)
    q, k, scales, rope = random_case(grid, (4, 128), NORMS["head"], "bfloat16")
    x, weights = (
        jnp.asarray(rng.normal(size=size), jnp.bfloat16)
        for size in ((1, grid.num_tokens, 512), (512, 512))
    )
    options = {
        "grid": grid,
        "config": DraftConfig.paper(sparsity=0.5),
        "order": "tiled",
    }

    def attend(q, k, x, weights, lengths):
        q, k, _ = norm_rope_pool(
            q, k, norm=NORMS["head"], scales=scales, rope=rope, **options
        )
        v = (x @ weights).reshape(q.shape)
        return draft_attention(q, k, v, text_lengths=lengths, **options)

    lengths = jnp.array([100], jnp.int32)
    program = jax.jit(attend).lower(q, k, x, weights, lengths).compile().as_text()
    assert "dynamic_update_slice" in program
    assert not re.findall(rf"= bf16\[(?:1,)?{grid.num_tokens},\S* copy\(", program)


def check_best_pairs(mask, pooled, grid, budget):
    """A mask keeps the best pairs of float64 scores, but for a margin of rounding."""
    q, k = (np.asarray(x, np.float64)[0] for x in (pooled.q_mean, pooled.k_mean))
    log_lengths = np.log(grid.block_lengths[grid.visual_blocks])
    visual = (grid.visual_blocks, grid.visual_blocks)
    for head in range(q.shape[1]):
        logits = q[:, head] @ k[:, head].T / math.sqrt(q.shape[-1]) + log_lengths
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        one = jax.tree.map(lambda x: x[:, head : head + 1], mask)  # noqa: B023
        kept = np.asarray(one.to_dense())[0, 0][visual]
        # A row without any of the best pairs keeps one more.
        single = kept.sum(-1) == 1
        assert kept.any(-1).all()
        assert budget <= kept.sum() <= budget + single.sum()
        threshold = np.partition(scores.ravel(), -budget)[-budget]
        assert scores[kept & ~single[:, None]].min() >= threshold * (1 - 1e-4)
        assert scores[~kept].max() <= threshold * (1 + 1e-4)
