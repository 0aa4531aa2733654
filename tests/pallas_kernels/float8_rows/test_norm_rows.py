"""Normed and plain rows in FP8: the kernels, interpreted, against NumPy loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.common.device import current_device
from pallas_kernels.common.products import Product
from pallas_kernels.float8_rows import (
    add_norm_rows,
    layer_norm,
    norm_rows,
    round_rows,
)
from pallas_kernels.float8_rows.sm90 import kernel, rows
from tests.cases import mostly_nightly
from tests.pallas_kernels.float8_rows.loops import (
    INTERPRET,
    check_rows,
    norm_loop,
    round_loop,
)

EPS = 1e-3
# A unit in the last place of bfloat16, of numbers up to 16.
BFLOAT16_SUM = {"rtol": 2**-8, "atol": 1e-5}


def random_rows(shape, dtype, seed=0):
    """Rows that are far from zero mean, and factors and shifts of each item."""
    rng = np.random.default_rng(seed)
    x = rng.normal(3, 2, size=shape).astype(jnp.dtype(dtype))
    size = (shape[0], shape[-1])
    factor, shift = (rng.normal(size=size).astype(np.float32) for _ in range(2))
    return x, factor, shift


CASES = {
    "four-at-once": ((1, 3, 512), "float32"),
    "items": ((2, 2, 1024), "bfloat16"),
    "uneven": ((1, 2, 1536), "float16"),
    "wan": ((1, 2, 5120), "float32"),
    "hunyuan": ((1, 2, 3072), "bfloat16"),
}


@pytest.mark.parametrize("case", mostly_nightly(CASES, ["four-at-once", "items"]))
def test_norm_is_the_loop(case):
    shape, dtype = CASES[case]
    x, factor, shift = random_rows(shape, dtype)
    x[0, 1] = 2  # a row without variance
    values, scale = kernel.norm_rows(
        jnp.asarray(x.reshape(-1, shape[-1])),
        *map(jnp.asarray, (factor, shift)),
        eps=EPS,
        interpret=INTERPRET,
    )
    assert values.dtype == jnp.float8_e4m3fn
    made = norm_loop(x, factor, shift, EPS)
    check_rows(values.reshape(shape), scale.reshape(shape[:2]), made)


def random_sum(shape, dtype, seed=0):
    """Rows, a product to add to them, its gate, and factors and shifts."""
    x, factor, shift = random_rows(shape, dtype, seed)
    rng = np.random.default_rng(seed + 1)
    values = rng.normal(size=shape).astype(jnp.bfloat16)
    rows, columns, bias, gate = (
        rng.normal(size=size).astype(np.float32)
        for size in (shape[:2], shape[2:], shape[2:], factor.shape)
    )
    return x, Product(values, rows, columns, bias), gate, factor, shift


def sum_loop(x, product, gate):
    """Float64, one row after another, rounded to the dtype of x."""
    made = np.zeros_like(x)
    values, rows, columns, bias = (np.asarray(y, np.float64) for y in product)
    for item, token in np.ndindex(x.shape[:2]):
        y = values[item, token] * rows[item, token] * columns + bias
        total = x[item, token].astype(np.float64) + gate[item].astype(np.float64) * y
        made[item, token] = total.astype(x.dtype)
    return made


def check_sum(got, x, product, gate, factor, shift):
    """The sum against loops, and rows against those of the sum that was made."""
    total, values, scale = (np.asarray(y) for y in got)
    assert total.dtype == x.dtype
    expected = sum_loop(x, product, gate).astype(np.float64)
    bound = {"rtol": 1e-5, "atol": 1e-5} if x.dtype == np.float32 else BFLOAT16_SUM
    np.testing.assert_allclose(total.astype(np.float64), expected, **bound)
    check_rows(values, scale, norm_loop(total, factor, shift, EPS))


@pytest.mark.parametrize("case", mostly_nightly(CASES, ["four-at-once"]))
def test_sum_and_norm_are_loops(case):
    shape, dtype = CASES[case]
    arrays = random_sum(shape, dtype)
    x, product, gate, factor, shift = arrays
    flat = (x.reshape(-1, shape[-1]), product.values.reshape(-1, shape[-1]))
    given = (
        *flat,
        product.rows.ravel(),
        gate * product.columns,
        gate * product.bias,
        *(factor, shift),
    )
    total, values, scale = kernel.add_norm_rows(
        *map(jnp.asarray, given), eps=EPS, interpret=INTERPRET
    )
    got = total.reshape(shape), values.reshape(shape), scale.reshape(shape[:2])
    check_sum(got, *arrays)


@pytest.mark.parametrize("dtype", mostly_nightly(rows.DTYPES, ["bfloat16"]))
def test_plain_rows_have_the_bits_of_a_cpu(dtype):
    x = random_rows((1, 3, 1024), dtype)[0][0]
    x[1] = 0
    values, scale = kernel.round_rows(jnp.asarray(x), interpret=INTERPRET)
    codes, scales = round_loop(x)
    np.testing.assert_array_equal(np.asarray(values).view(np.uint8), codes)
    np.testing.assert_array_equal(scale, scales)


@pytest.mark.nightly
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_rows_that_are_not_finite_stay_so(value):
    x, factor, shift = random_rows((1, 3, 512), "float32")
    x[0, 1, 7] = value
    x, factor, shift = map(jnp.asarray, (x[0], factor, shift))
    normed = kernel.norm_rows(x, factor, shift, eps=EPS, interpret=INTERPRET)
    for values, scale in (normed, kernel.round_rows(x, interpret=INTERPRET)):
        with np.errstate(invalid="ignore"):
            stand_for = np.asarray(values, np.float32) * np.asarray(scale)[:, None]
        assert np.isfinite(stand_for[[0, 2]]).all()
        assert not np.isfinite(stand_for[1]).all()


def sum_rows(x, values, rows, factor):
    """One array for each kind of argument, for shapes."""
    of_channels = jnp.ones(x.shape[-1])
    product = Product(values, rows, of_channels, of_channels)
    return add_norm_rows(x, product, factor, factor, factor, eps=EPS)[1:]


FUNCTIONS = {
    "norm": (functools.partial(norm_rows, eps=EPS), ((2, 5, 5120), *[(2, 5120)] * 2)),
    "round": (round_rows, ((2, 5, 3072),)),
    "sum": (sum_rows, ((2, 5, 3072), (2, 5, 3072), (2, 5), (2, 3072))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_lowers_for_cuda(name):
    """Mapped, too: then it is one launch with more rows."""
    function, shapes = FUNCTIONS[name]
    for call, lead in ((function, ()), (jax.vmap(function), (3,))):
        arrays = [jax.ShapeDtypeStruct((*lead, *s), jnp.float32) for s in shapes]
        traced = jax.jit(call).trace(*arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("mosaic_gpu_v2") == 1
        rows = 10 * int(np.prod(lead))
        assert f"tensor<{rows}x{shapes[0][-1]}xi8>" in text


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_stay_on_their_devices(name):
    function, shapes = FUNCTIONS[name]
    mesh = AbstractMesh((2, 5), ("b", "t"), axis_types=(AxisType.Explicit,) * 2)
    specs = {3: P("b", "t", None), 2: P("b", None)}
    arrays = [
        jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, specs[len(shape)])
        )
        for shape in shapes
    ]
    with jax.sharding.use_abstract_mesh(mesh):
        values, scale = jax.eval_shape(function, *arrays)
    assert values.sharding.spec == P("b", "t", None)
    assert scale.sharding.spec == P("b", "t")


def test_what_they_do_not_take_is_named():
    with pytest.raises(ValueError, match=r"norm_rows cannot take x: .*, not 100"):
        norm_rows(jnp.ones((1, 2, 100)), *[jnp.ones((1, 100))] * 2, eps=EPS)
    x, factor = jnp.ones((1, 2, 512)), jnp.ones((1, 512))
    with pytest.raises(ValueError, match=r"product.rows has shape \(2,\)"):
        add_norm_rows(x, Product(x, jnp.ones(2)), None, factor, factor, eps=EPS)
    with pytest.raises(ValueError, match=r"product has shape \(1, 1, 512\); x has"):
        add_norm_rows(x, Product(x[:, :1]), None, factor, factor, eps=EPS)
    with pytest.raises(ValueError, match=r"round_rows cannot take x: .*, not 100"):
        round_rows(jnp.ones((2, 100)))


def test_layer_norm_is_the_loop():
    x, factor, shift = random_rows((1, 2, 24), "float32")
    expected = norm_loop(x, 0 * factor + 1, 0 * shift, EPS)
    np.testing.assert_allclose(layer_norm(x, EPS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case):
    if cause := current_device().why_not_hopper():
        pytest.skip(cause)
    shape, dtype = CASES[case]
    x, factor, shift = random_rows(shape, dtype)
    arrays = tuple(map(jnp.asarray, (x, factor, shift)))
    made = norm_loop(x, factor, shift, EPS)
    check_rows(*norm_rows(*arrays, eps=EPS), made)
    arguments = random_sum(shape, dtype)
    check_sum(add_norm_rows(*jax.tree.map(jnp.asarray, arguments), eps=EPS), *arguments)
    values, scale = (np.asarray(y) for y in round_rows(arrays[0]))
    check_rows(values, scale, x.astype(np.float64))
