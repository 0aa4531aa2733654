"""Embeddings of timesteps, against both published codes."""

import decimal

import jax.numpy as jnp
import numpy as np
import pytest

from models.diffusion.transformer.embeddings import timestep_embedding


def test_timestep_embedding_is_that_of_wan():
    """Whose code takes float64 throughout."""
    times = np.array([0.0, 1.0, 37.5, 999.0])
    angles = times[:, None] * 10000.0 ** (-np.arange(8) / 8)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    got = timestep_embedding(jnp.float32(times), 16)
    assert got.dtype == jnp.float32
    # Two roundings of a float32 angle near 1000 move it by 6e-5. Measured: 1.5e-5.
    np.testing.assert_allclose(got, expected, rtol=0, atol=6e-5)


def exponential(exponent):
    """The float32 nearest to e to the power of a float32, from 40 decimal digits."""
    with decimal.localcontext(prec=40):
        return np.float32(decimal.Decimal(float(exponent)).exp())


@pytest.mark.parametrize("size", [16, 32, 256])
def test_timestep_embedding_rounds_where_diffusers_does(size):
    half = size // 2
    exponents = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32)
    frequencies = [exponential(exponent / np.float32(half)) for exponent in exponents]
    # The sine of a small angle is the angle, so this shows every bit of a frequency.
    tiny = timestep_embedding(jnp.float32([2.0**-14]), size)[0, half:]
    np.testing.assert_array_equal(2.0**14 * tiny, frequencies)
    times = np.float32([0.0, 1.0, 37.5, 640.25, 999.0, 1000.0])
    angles = (times[:, None] * np.stack(frequencies)).astype(np.float64)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    got = timestep_embedding(jnp.asarray(times), size)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-7)  # measured: 6.0e-8
