"""Tiled against whole frames. The model has 2 x 2 pixels to a latent position."""

import numpy as np
import pytest

from models.wan.vae.codec import WanVAECodec
from models.wan.vae.convert import load_wan_vae
from models.wan.vae.tiling import Tiling
from tests import tiny_vae
from tests.fixtures.seeded_arrays import seeded_uniform
from tests.tolerances import VAE_PARITY, VAE_TILING

CASE = "small"
# In latent positions: 48 columns fall in tiles of 28 that share 8.
ROWS, COLUMNS, SIZE, SHARED = 2, 48, 28, 8
TILING = Tiling(size=(60, 60), overlap=(16, 16))
# How far a convolution's input reaches to the side of its output: decoder 11 layers
# at the latent's resolution and 8 at twice that; encoder 9 and 6.
DECODER_REACH, ENCODER_REACH = 15, 12


@pytest.fixture(scope="module")
def codecs():
    """Whole and tiled, with attention between the positions of a frame and without."""
    weights = dict(tiny_vae.make_weights(CASE))
    models = {"attention": tiny_vae.make_model(CASE)}
    for key in weights:
        if "attentions.0.proj" in key:
            weights[key] = np.zeros_like(weights[key])
    models["local"] = load_wan_vae(weights, tiny_vae.make_config(CASE))
    return {
        name: (WanVAECodec(model=model), WanVAECodec(model=model, tiling=TILING))
        for name, model in models.items()
    }


@pytest.fixture(scope="module")
def latents():
    return seeded_uniform("tiles", (1, 2, ROWS, COLUMNS, 3))


@pytest.fixture(scope="module")
def video():
    return seeded_uniform("tiles", (1, 1, 2 * ROWS, 2 * COLUMNS, 3)) / 2


def blend(left, right, shared):
    """Each tile keeps its own value; a line leads from one to the other between."""
    ramp = ((np.arange(shared) + 0.5) / shared)[:, None]
    middle = left[..., -shared:, :] * (1 - ramp) + right[..., :shared, :] * ramp
    parts = (left[..., :-shared, :], middle, right[..., shared:, :])
    return np.concatenate(parts, axis=-2)


@pytest.mark.nightly
def test_overlaps_are_blended(codecs, latents, video):
    whole, tiled = codecs["attention"]
    left, right = (
        np.asarray(whole.decode(part))
        for part in (latents[:, :, :, :SIZE], latents[:, :, :, -SIZE:])
    )
    expected = blend(left, right, 2 * SHARED)
    assert expected.shape == (1, 3, 2 * ROWS, 2 * COLUMNS, 3)
    np.testing.assert_allclose(tiled.decode(latents), expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(tiled.decode(latents), tiled.decode_to_host(latents))

    left, right = (
        np.asarray(whole.encode(part))
        for part in (video[:, :, :, : 2 * SIZE], video[:, :, :, -2 * SIZE :])
    )
    expected = blend(left, right, SHARED)
    np.testing.assert_allclose(tiled.encode(video), expected, rtol=0, atol=1e-6)


@pytest.mark.nightly
def test_overlaps_are_blended_with_averages_too():
    """Two tiles of four latent positions share one, which is four pixels."""
    whole = WanVAECodec(model=tiny_vae.make_model("averages_small"))
    tiled = whole.tiled(16)
    latents = seeded_uniform("tiles", (1, 2, 3, 7, 3))
    video = seeded_uniform("tiles", (1, 3, 12, 28, 3)) / 2
    for name, source, size, shared in (
        ("decode", latents, 4, 4),
        ("encode", video, 16, 1),
    ):
        left, right = (
            np.asarray(getattr(whole, name)(part))
            for part in (source[:, :, :, :size], source[:, :, :, -size:])
        )
        got = getattr(tiled, name)(source)
        np.testing.assert_allclose(got, blend(left, right, shared), rtol=0, atol=1e-6)


@pytest.mark.nightly
def test_without_attention_only_seams_differ(codecs, latents, video):
    """Positions further from the next tile's side than a convolution reaches."""
    whole, tiled = codecs["local"]
    for name, reach, source, scale in (
        ("decode", DECODER_REACH, latents, 2),
        ("encode", ENCODER_REACH, video, 1),
    ):
        got, expected = (
            np.asarray(getattr(codec, name)(source)) for codec in (tiled, whole)
        )
        same = (SIZE - reach) * scale
        for side in (slice(None, same), slice(-same, None)):
            np.testing.assert_allclose(
                got[..., side, :], expected[..., side, :], **VAE_PARITY
            )
        assert np.abs(got - expected).max() > 1e-4


def test_the_change_by_tiles_is_bounded(codecs, latents, video):
    whole, tiled = codecs["attention"]
    for name, source in (("decode", latents), ("encode", video)):
        expected = np.asarray(getattr(whole, name)(source))
        difference = np.linalg.norm(getattr(tiled, name)(source) - expected)
        assert 0 < difference < VAE_TILING[name] * np.linalg.norm(expected)


def test_frames_that_fit_one_tile_are_not_changed(codecs, latents):
    whole, _ = codecs["attention"]
    tiled = WanVAECodec(model=whole.model, tiling=Tiling())
    np.testing.assert_array_equal(tiled.decode(latents), whole.decode(latents))
