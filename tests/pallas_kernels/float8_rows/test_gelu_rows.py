"""GELU between two products in FP8: the kernel, interpreted, against NumPy loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.device import current_device
from pallas_kernels.common.products import Product
from pallas_kernels.float8_rows import gelu_rows, gelu_tanh, why_not_in_kernel
from pallas_kernels.float8_rows.sm90 import gelu
from tests.cases import mostly_nightly
from tests.pallas_kernels.float8_rows.loops import INTERPRET, check_rows, gelu_loop


def random_product(lead, channels, dtype, seed=0):
    """A product, scales of its rows and columns, and a bias; one row is of zeros."""
    rng = np.random.default_rng(seed)
    product = rng.normal(size=(*lead, channels)).astype(jnp.dtype(dtype))
    rows, columns = (
        rng.uniform(0.5, 2, size).astype(np.float32) for size in (lead, channels)
    )
    bias = rng.normal(size=channels).astype(np.float32)
    return product, rows, columns, bias


CASES = {
    "four-at-once": (512, "bfloat16"),
    "eight-at-once": (1024, "float16"),
    "wan": (13824, "bfloat16"),
}


@pytest.mark.parametrize("case", mostly_nightly(CASES, ["four-at-once"]))
def test_kernel_is_the_loop(case, monkeypatch):
    """On one multiprocessor: its two CTAs take four and three rows, in two slots."""
    monkeypatch.setattr(gelu, "num_multiprocessors", lambda: 1)
    channels, dtype = CASES[case]
    arrays = random_product((7,), channels, dtype)
    arrays[0][2] = 0
    values, scale = gelu.gelu_rows(*map(jnp.asarray, arrays), interpret=INTERPRET)
    assert values.dtype == jnp.float8_e4m3fn
    check_rows(values, scale, gelu_loop(*arrays))


@pytest.mark.nightly
def test_rows_that_are_not_finite_stay_so():
    product, rows, columns, bias = random_product((3,), 512, "bfloat16")
    product[1, 7], product[2, 5] = np.inf, np.nan
    values, scale = gelu.gelu_rows(
        *map(jnp.asarray, (product, rows, columns, bias)), interpret=INTERPRET
    )
    with np.errstate(invalid="ignore"):
        stand_for = np.asarray(values, np.float32) * np.asarray(scale)[:, None]
    assert np.isfinite(stand_for[0]).all()
    assert not np.isfinite(stand_for[1:]).any()


@pytest.mark.parametrize(
    ("channels", "dtype", "text"),
    [
        (768, "bfloat16", "a multiple of 512 channels up to 16384, not 768"),
        (16896, "bfloat16", "not 16896"),
        (1024, "float8_e4m3fn", "float32, bfloat16 and float16, not float8"),
    ],
    ids=["uneven", "too-many", "dtype"],
)
def test_what_it_does_not_take_is_named(channels, dtype, text):
    values, *parts = random_product((2,), channels, "bfloat16")
    with pytest.raises(ValueError, match=f"gelu_rows cannot take product: .*{text}"):
        gelu_rows(Product(jnp.asarray(values, dtype), *map(jnp.asarray, parts)))


def test_it_says_where_it_does_not_run():
    assert "Hopper" in why_not_in_kernel((2, 512), "bfloat16", current_device())


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [512, 12288, 13824])
def test_on_a_gpu(channels):
    if cause := current_device().why_not_hopper():
        pytest.skip(cause)
    arrays = random_product((2, 3), channels, "bfloat16")
    made = gelu_loop(*arrays)
    product = Product(*map(jnp.asarray, arrays))
    check_rows(*gelu_rows(product), made)
    # Mapped, it is one launch with more rows.
    mapped = jax.vmap(gelu_rows, in_axes=(Product(0, 0, None, None),))(product)
    for a, b in zip(mapped, gelu_rows(product), strict=True):
        np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (a, b)))


def test_gelu_is_the_tanh_approximation():
    x = np.linspace(-6, 6, 25).astype(np.float32)
    ones = functools.partial(np.ones, dtype=np.float32)
    made = gelu_loop(x[None], ones(1), ones(25), 0 * ones(25))
    np.testing.assert_allclose(gelu_tanh(x), made[0], rtol=1e-5, atol=1e-6)


def test_gelu_of_bfloat16_is_rounded_once():
    x = jnp.linspace(-6, 6, 129).astype(jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    made = 0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
    got = np.asarray(gelu_tanh(x).astype(jnp.float32))
    np.testing.assert_allclose(got, made, rtol=2**-8, atol=1e-6)
