"""Norm, rotation and pooling of products that the kernel finishes, against loops."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.device import Device
from pallas_kernels.common.products import Product
from pallas_kernels.pooling import QKV, api, joint_norm_rope_pool, norm_rope_pool
from pallas_kernels.pooling.sm90 import norm_rope_pool as kernel
from tests import tolerances
from tests.pallas_kernels.pooling import cases
from tests.pallas_kernels.pooling.naive_norm_rope import (
    finish,
    norm_rope,
    random_product,
)

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
H100 = Device(platform="gpu", kind="H100", compute_capability=(9, 0))
ALL, BIAS = (True, True, True), (False, False, True)
TILING = cases.TILINGS["whole"]

pytestmark = pytest.mark.usefixtures("no_races")


@pytest.fixture
def interpreted():
    """The kernel runs in interpret mode, as on a Hopper GPU."""
    run = functools.partial(kernel.norm_rope_pool, interpret=INTERPRET)
    with (
        mock.patch.object(api, "current_device", return_value=H100),
        mock.patch.object(kernel, "norm_rope_pool", run),
    ):
        yield


def factors(tiling, heads, norm, seed=0):
    """Scales of a norm and a rotary table."""
    tokens = tiling.tokens.stop - tiling.tokens.start
    return cases.scales_and_rope(np.random.default_rng(seed), tokens, heads, norm)


def check(got, products, tiling, norm, scales, rope):
    """Written queries and keys against loops, pooled ones against what was written."""
    *written, pooled = got
    for i, product in enumerate(products[:2]):
        expected = norm_rope(
            finish(product).astype(np.float64),
            over=None if norm is None else norm.over,
            eps=0.0 if norm is None else norm.eps,
            scale=None if scales is None else scales[i],
            cos=rope[0],
            sin=rope[1],
            visual=tiling.tokens,
        )
        bound = tolerances.NORM_ROPE[product.dtype.name]
        np.testing.assert_allclose(
            np.asarray(written[i], np.float64), expected, **bound
        )
        means = cases.naive_pool(np.asarray(written[i], np.float64), tiling, "mean")
        np.testing.assert_allclose(pooled[i], means, **tolerances.POOLED)


@pytest.mark.parametrize(
    ("dtype", "heads", "name", "parts"),
    [
        ("bfloat16", (4, 64), "heads", ALL),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in [
                ("float16", (4, 128), "head", BIAS),
                ("float32", (5, 64), "none", (True, True, False)),
                ("bfloat16", (10, 128), "heads", ALL),
                ("bfloat16", (1, 64), "heads", ALL),  # several warps have this head
                ("bfloat16", (3, 128), "head", BIAS),
            ]
        ),
    ],
    ids=str,
)
@pytest.mark.usefixtures("interpreted")
def test_matches_loops(dtype, heads, name, parts):
    norm = cases.NORMS[name]
    shape = (1, TILING.tokens.stop + 1, *heads)
    products = [random_product(shape, dtype, parts, seed) for seed in range(2)]
    scales, rope = factors(TILING, heads, norm)
    got = norm_rope_pool(*products, TILING, norm=norm, scales=scales, rope=rope)
    check(got, products, TILING, norm, scales, rope)


@pytest.mark.nightly
@pytest.mark.parametrize("heads", [(4, 64), (6, 128)], ids=str)
@pytest.mark.usefixtures("interpreted")
def test_parts_of_video_and_text_match_loops(heads):
    """Text has a bias alone; values are finished, and copied."""
    tiling, norm = cases.TILINGS["tiled"], cases.NORMS["head"]
    video, text = (
        QKV(*(random_product((2, size, *heads), "bfloat16", parts, 3 * size + i)
              for i in range(3)))
        for size, parts in (
            (tiling.tokens.stop - tiling.start, ALL),
            (tiling.start, BIAS),
        )
    )  # fmt: skip
    scales, rope = factors(tiling, heads, norm)
    got = joint_norm_rope_pool(video, text, tiling, norm=norm, scales=scales, rope=rope)
    joined = [
        Product(jnp.concatenate([finish(y), finish(x)], axis=1))
        for x, y in zip(video, text, strict=True)
    ]
    check((*got[:2], got[3]), joined, tiling, norm, scales, rope)
    np.testing.assert_array_equal(got[2], joined[2].values)


@pytest.mark.nightly
@pytest.mark.usefixtures("interpreted")
def test_mapped_products():
    """Rows are of each item; columns and bias serve all."""
    norm, heads = cases.NORMS["heads"], (4, 64)
    shape = (3, 2, TILING.tokens.stop, *heads)
    flat = random_product((6, *shape[2:]), "bfloat16", ALL)
    stacked = flat._replace(
        values=flat.values.reshape(shape), rows=flat.rows.reshape(shape[:3])
    )
    scales, rope = factors(TILING, heads, norm)

    def run(product):
        return norm_rope_pool(
            product, product, TILING, norm=norm, scales=scales, rope=rope
        )[0]

    got = jax.vmap(run, in_axes=(Product(0, 0, None, None),))(stacked)
    np.testing.assert_array_equal(got.reshape(flat.shape), run(flat))


@pytest.mark.parametrize(
    "on_kernel", [False, pytest.param(True, marks=pytest.mark.nightly)]
)
def test_gradients_pass_through_scales_and_bias(on_kernel, request):
    """They are those of the finished array, by the chain rule."""
    if on_kernel:
        request.getfixturevalue("interpreted")
    norm, heads = cases.NORMS["heads"], (4, 64)
    shape = (1, TILING.tokens.stop, *heads)
    product = random_product(shape, "float32", ALL)
    scales, rope = factors(TILING, heads, norm)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)

    def loss(q):
        written, *_ = norm_rope_pool(
            q, jnp.ones(shape), TILING, norm=norm, scales=scales, rope=rope
        )
        return (written * weights).sum()

    got = jax.grad(loss)(product)
    of_array = np.asarray(jax.grad(loss)(jnp.asarray(finish(product))), np.float64)
    values, rows, columns, _ = (np.asarray(x, np.float64) for x in product)
    rows = rows[:, :, None, None]
    expected = Product(
        of_array * rows * columns,
        (of_array * values * columns).sum((2, 3)),
        (of_array * values * rows).sum((0, 1)),
        of_array.sum((0, 1)),
    )
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["heads", "none"])
def test_the_xla_path_matches_loops(name):
    norm = cases.NORMS[name]
    shape = (2, TILING.tokens.stop + 2, *cases.HEADS)
    products = [random_product(shape, "bfloat16", ALL, seed) for seed in range(2)]
    scales, rope = factors(TILING, cases.HEADS, norm)
    got = norm_rope_pool(*products, TILING, norm=norm, scales=scales, rope=rope)
    check(got, products, TILING, norm, scales, rope)


def test_parts_that_do_not_fit_are_named():
    product = random_product((1, 32, *cases.HEADS), "float32", ALL)
    wrong = product._replace(rows=jnp.ones(32))
    with pytest.raises(ValueError, match=r"k.rows has shape \(32,\)"):
        norm_rope_pool(product, wrong, TILING)


@pytest.mark.parametrize(
    ("heads", "name", "parts"),
    [
        ((4, 64), "heads", ALL),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in [((40, 128), "heads", ALL), ((24, 128), "head", BIAS)]
        ),
    ],
    ids=str,
)
def test_lowers_for_cuda(heads, name, parts):
    """XLA reads and writes no array of the product's size."""
    norm, tokens = cases.NORMS[name], TILING.tokens.stop
    product = jax.eval_shape(
        lambda: random_product((1, tokens, *heads), "bfloat16", parts)
    )
    scales, rope = jax.eval_shape(lambda: factors(TILING, heads, norm))
    run = functools.partial(
        kernel.norm_rope_pool,
        tiles=TILING.table,
        visual_tokens=TILING.tokens,
        norm=norm,
    )
    traced = jax.jit(run).trace((product,) * 2, None, scales, None, rope)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1
    assert f"tensor<1x{tokens}x{heads[0]}x{heads[1]}xf32>" not in text
