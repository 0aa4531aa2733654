"""Bisection on the bits of keys, by digits of either width."""

import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import ranking


@pytest.mark.parametrize("bits", [1, 2])
def test_kth_largest_by_digits(monkeypatch, bits):
    """A CPU takes 1 bit in a pass and a GPU without the kernels 2."""
    monkeypatch.setattr(ranking, "CPU_DIGIT_BITS", bits)
    rng = np.random.default_rng(bits)
    keys = rng.integers(0, 2**32, (2, 3, 5, 7), dtype=np.uint32)
    keys[1] >>= 29  # ties
    for k in (1, 9, 35):
        got = ranking.kth_largest_of_map(jnp.asarray(keys), jnp.int32(k))
        want = np.sort(keys.reshape(2, 3, -1), axis=-1)[..., -k]
        np.testing.assert_array_equal(got, want)
    for k in (1, 4, 7):
        got = ranking.kth_largest_of_row(jnp.asarray(keys), jnp.full(5, k))
        np.testing.assert_array_equal(got, np.sort(keys, axis=-1)[..., -k])
