"""Samples, batches, tiles of the command line, and inputs that do not fit."""

import jax
import numpy as np
import pytest

from models.diffusion.interfaces import Codec
from models.hunyuan.vae.codec import HunyuanVAECodec, Posterior
from models.hunyuan.vae.tiling import HunyuanTiling
from tests import tiny_hunyuan_vae

CASE = "small"
# Of the cases' stride, 4 in each direction.
TILING = HunyuanTiling(size=(16, 16, 16), step=(12, 12, 12))


@pytest.fixture(scope="module")
def codec():
    return HunyuanVAECodec(model=tiny_hunyuan_vae.make_model(CASE), tiling=TILING)


def test_it_is_a_codec_on_the_originals_tiles(codec):
    assert isinstance(codec, Codec)
    plain = HunyuanVAECodec(model=codec.model)
    assert plain.tiling == HunyuanTiling.original()
    assert (codec.stride, codec.channels) == ((4, 4, 4), 3)


def test_samples_lie_around_the_mean():
    mean = np.full((1, 20, 20, 20, 2), 3.0, np.float32)
    posterior = Posterior(mean, np.log(np.full_like(mean, 4.0)))
    got = np.asarray(posterior.sample(jax.random.key(0)))
    other = np.asarray(posterior.sample(jax.random.key(1)))
    # 16,000 numbers: their mean is known to 0.016, their deviation to 0.011.
    assert abs(got.mean() - 3.0) < 0.07
    assert abs(got.std() - 2.0) < 0.05
    assert np.abs(got - other).max() > 1.0


@pytest.mark.nightly
def test_encode_is_the_mean_and_sample_is_not(codec):
    _, video = tiny_hunyuan_vae.make_arrays(CASE)
    video = video[:1]
    mean, key = np.asarray(codec.encode(video)), jax.random.key(0)
    np.testing.assert_array_equal(codec.encode(video), mean)
    sample = np.asarray(codec.sample(video, key))
    np.testing.assert_array_equal(codec.sample(video, key), sample)
    noise = np.asarray(jax.random.normal(key, mean.shape))
    deviation = np.exp(np.asarray(codec.posterior(video).log_variance) / 2)
    expected = mean + 0.476986 * deviation * noise
    np.testing.assert_allclose(sample, expected, rtol=0, atol=1e-5)


def test_log_variances_are_clipped(codec, monkeypatch):
    moments = np.float32([[[[[1, 2, 3, -99, 0.5, 99]]]]])
    monkeypatch.setattr(HunyuanVAECodec, "_encode", lambda *_: iter((moments,)))
    posterior = codec.posterior(np.zeros((1, 1, 4, 4, 3), np.float32))
    np.testing.assert_array_equal(posterior.mean.ravel(), [1, 2, 3])
    np.testing.assert_array_equal(posterior.log_variance.ravel(), [-30, 0.5, 20])


@pytest.mark.nightly
def test_batch_items_do_not_influence_each_other(codec):
    latents, _ = tiny_hunyuan_vae.make_arrays(CASE)
    before = np.asarray(codec.decode(latents))
    latents = latents.copy()
    latents[0] = -3 * latents[0]
    after = np.asarray(codec.decode(latents))
    np.testing.assert_array_equal(after[1], before[1])
    assert np.abs(after[0] - before[0]).max() > 0.1


def test_tiles_of_the_command_line(codec):
    """A quarter is shared; frames keep their tiles."""
    tiled = codec.tiled(32).tiling
    assert (tiled.size, tiled.step) == ((16, 32, 32), (12, 24, 24))
    whole = HunyuanVAECodec(model=codec.model, tiling=None).tiled(32).tiling
    assert (whole.size, whole.step) == ((64, 32, 32), (48, 24, 24))
    for pixels in (0, -16, 24):
        with pytest.raises(ValueError, match=f"{pixels} pixels must be a positive mul"):
            codec.tiled(pixels)


def test_tiles_that_do_not_fit_the_stride(codec):
    with pytest.raises(ValueError, match="must be multiples of"):
        HunyuanVAECodec(model=codec.model, tiling=HunyuanTiling(step=(48, 192, 190)))


@pytest.mark.parametrize(
    ("method", "shape", "dtype", "error", "message"),
    [
        ("decode", (5, 5, 4, 3), "float32", ValueError, r"\(5, 5, 4, 3\); expected"),
        ("decode_to_host", (1, 2, 5, 4, 16), "float32", ValueError, "columns, 3]"),
        ("decode_chunks", (1, 2, 5, 4, 3), "int32", TypeError, "latents are of int32"),
        ("encode", (1, 4, 8, 8, 3), "float32", ValueError, "frames=4 must be 1 more"),
        ("posterior", (1, 5, 9, 8, 3), "float32", ValueError, "height=9 must be"),
    ],
    ids=str,
)
def test_arrays_that_do_not_fit(
    codec, method, shape, dtype, error, message, without_jaxtyping
):
    with pytest.raises(error, match=message):
        getattr(codec, method)(np.zeros(shape, dtype))
