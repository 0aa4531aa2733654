"""Against diffusers' AutoencoderKLHunyuanVideo; see make_hunyuan_vae_fixtures."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from models.hunyuan.vae.codec import HunyuanVAECodec
from models.hunyuan.vae.tiling import HunyuanTiling
from tests import tiny_hunyuan_vae
from tests.cases import mostly_nightly
from tests.tolerances import HUNYUAN_VAE_BFLOAT16, VAE_PARITY

# The original's ratios, as in the fixtures.
TILING = HunyuanTiling(size=(16, 16, 16), step=(12, 12, 12))
CASES = {"deep": None, "small": None, "tiled": TILING, "wide": TILING, "long": TILING}


def make_codec(name, seed, **changes):
    model = tiny_hunyuan_vae.make_model(name, seed, **changes)
    return HunyuanVAECodec(model=model, tiling=CASES[name])


@pytest.mark.parametrize(
    "case",
    mostly_nightly(itertools.product(CASES, "01"), [("small", "1")]),
    ids="-".join,
)
def test_codec_matches_diffusers(case):
    name, seed = case
    outputs, _ = tiny_hunyuan_vae.load_fixture()
    codec = make_codec(name, seed)
    latents, video = tiny_hunyuan_vae.make_arrays(name, seed)
    decoded, posterior = codec.decode(latents), codec.posterior(video)
    got = {
        "video": decoded,
        "latents": codec.encode(video),
        "log_variance": posterior.log_variance,
    }
    for key, value in got.items():
        assert value.dtype == jnp.float32
        expected = outputs[f"{name}/{seed}/{key}"]
        np.testing.assert_allclose(value, expected, **VAE_PARITY, err_msg=key)
    on_host = codec.decode_to_host(latents)
    assert isinstance(on_host, np.ndarray)
    np.testing.assert_array_equal(on_host, decoded)


@pytest.mark.nightly
def test_convolutions_in_three_dimensions_give_the_same():
    outputs, _ = tiny_hunyuan_vae.load_fixture()
    codec = make_codec("small", "0", convolution="3d")
    latents, video = tiny_hunyuan_vae.make_arrays("small")
    for got, key in (
        (codec.decode(latents), "video"),
        (codec.encode(video), "latents"),
    ):
        np.testing.assert_allclose(got, outputs[f"small/0/{key}"], **VAE_PARITY)


@pytest.mark.nightly
def test_bfloat16_stays_close_to_float32():
    outputs, _ = tiny_hunyuan_vae.load_fixture()
    codec = make_codec("small", "0", dtype="bfloat16")
    latents, video = tiny_hunyuan_vae.make_arrays("small")
    for got, key in (
        (codec.decode(latents), "video"),
        (codec.encode(video), "latents"),
    ):
        expected = outputs[f"small/0/{key}"]
        assert got.dtype == jnp.float32
        relative = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        assert relative < HUNYUAN_VAE_BFLOAT16[key]
