"""Measures on a device are those of NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.quality.likeness import FLOOR_DB, likeness
from models.media import metrics


def test_measures_are_those_of_the_host():
    rng = np.random.default_rng(0)
    waves = np.sin(np.arange(3 * 24 * 31 * 3).reshape(1, 3, 24, 31, 3) / 40) / 2 + 0.5
    dense = np.repeat(waves, 2, axis=0).astype(np.float32)
    noise = rng.normal(size=dense.shape) * np.reshape([0.2, 0.01], (2, 1, 1, 1, 1))
    videos = np.clip(dense + noise, 0, 1).astype(np.float32)
    found = likeness(jnp.asarray(videos), jnp.asarray(dense))
    for name, values in found.items():
        expected = [
            getattr(metrics, name)(*pair) for pair in zip(videos, dense, strict=True)
        ]
        np.testing.assert_allclose(values, expected, rtol=2e-4, atol=2e-5)


def test_equal_videos_have_the_floor():
    video = jnp.full((1, 2, 16, 16, 3), 0.25)
    found = likeness(video, video)
    assert found["psnr"] == [pytest.approx(FLOOR_DB, abs=1e-3)]
    assert (found["ssim"], found["gmsd"], found["flicker"]) == ([1.0], [0.0], [0.0])
    with pytest.raises(ValueError, match="videos of"):
        likeness(video, video[:, :1])
