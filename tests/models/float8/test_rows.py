"""Rounding to FP8 against loops over numbers, and e4m3 as its definition says."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from models.float8.rows import ScaledRows, quantise_rows, widen_rows
from tests.pallas_kernels.float8_rows.loops import round_loop

E4M3 = ml_dtypes.float8_e4m3fn


def make_rows(dtype):
    """Sizes of all magnitudes, a row of zeros, one of nearly nothing, and one of ties.

    The largest of the last is 448, so its values are halves of steps of e4m3.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 64)) * np.exp(3 * rng.normal(size=(6, 64)))
    x[1], x[2], x[3] = 0, 1e-38, -1e30 * np.abs(x[3])
    x[4] = np.concatenate([np.arange(33) / 1024, 8.5 + np.arange(30), [448]])
    return x.astype(dtype)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_bits_are_those_of_a_loop(dtype, compiled):
    x = make_rows(dtype)
    codes, scales = round_loop(x)
    got = (jax.jit(quantise_rows) if compiled else quantise_rows)(jnp.asarray(x))
    np.testing.assert_array_equal(np.asarray(got.values).view(np.uint8), codes)
    np.testing.assert_array_equal(got.scale, scales)


def test_leading_axes_are_rows_of_their_own():
    x = make_rows(np.float32)
    got = quantise_rows(jnp.asarray(x.reshape(2, 3, 64)))
    codes, scales = round_loop(x)
    np.testing.assert_array_equal(
        np.asarray(got.values).view(np.uint8), codes.reshape(2, 3, 64)
    )
    np.testing.assert_array_equal(got.scale, scales.reshape(2, 3))


def test_errors_are_at_most_half_a_step():
    """Of three bits of fraction, or of the smallest step at the row's scale."""
    x = np.random.default_rng(1).normal(size=(20, 200)).astype(np.float32)
    got = np.asarray(widen_rows(quantise_rows(jnp.asarray(x))))
    smallest = np.abs(x).max(axis=1, keepdims=True) / 448 * 2.0**-9
    bound = np.maximum(np.abs(x) * 2.0**-4, smallest / 2)
    assert (np.abs(got - x) <= bound * (1 + 1e-5)).all()
    assert (np.abs(got - x) > bound / 2).any()  # the bound says something


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(value):
    x = np.ones((3, 8), np.float32)
    x[1, 2] = value
    got = np.asarray(widen_rows(quantise_rows(jnp.asarray(x))))
    assert not np.isfinite(got[1]).all()
    np.testing.assert_array_equal(got[[0, 2]], 1)


def test_rows_stand_for_values_times_scales():
    values = jnp.asarray([[1.0, -2.0], [448.0, 0.5]], E4M3)
    rows = ScaledRows(values, jnp.asarray([0.5, 3.0]))
    np.testing.assert_array_equal(widen_rows(rows), [[0.5, -1.0], [1344.0, 1.5]])
