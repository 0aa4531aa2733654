"""Bisection on the bits of keys, by digits of either width, and who needs it."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax.draft import ranking
from pallas_kernels import SlowBackendWarning
from pallas_kernels.common.device import Device
from tests.warnings_once import forget_warnings


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


@pytest.mark.parametrize(
    ("columns", "capability", "cause"),
    [
        (8192, (9, 0), None),
        (8193, (9, 0), "rows of at most 8192 keys, not 8193"),
        (90, (8, 0), r"Hopper GPU \(sm_90\), not gpu X100"),
        (90, None, "Hopper"),
    ],
    ids=str,
)
def test_a_gpu_without_kernels_warns_once(monkeypatch, columns, capability, cause):
    device = Device(platform="gpu", kind="X100", compute_capability=capability)
    monkeypatch.setattr(ranking, "current_device", lambda *arrays: device)
    keys = jnp.zeros((1, 1, 1, columns), jnp.uint32)
    forget_warnings()
    if cause is None:
        assert ranking.has_kernels(keys)
        return
    with pytest.warns(SlowBackendWarning, match=f"selection runs on XLA.*{cause}"):
        assert not ranking.has_kernels(keys)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not ranking.has_kernels(keys)


def test_a_cpu_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not ranking.has_kernels(jnp.zeros((1, 1, 1, 9), jnp.uint32))
