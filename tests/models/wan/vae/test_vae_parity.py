"""Against diffusers' AutoencoderKLWan; see tests/fixtures/make_wan_vae_fixtures."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.wan.vae.codec import WanVAECodec
from tests import tiny_vae
from tests.cases import mostly_nightly
from tests.tolerances import VAE_BFLOAT16, VAE_PARITY

CASES = ("deep", "small")


@pytest.fixture(params=CASES)
def case(request):
    """Codec, latents and video, and diffusers' video and latents of them."""
    name = request.param
    outputs, _ = tiny_vae.load_fixture()
    codec = WanVAECodec(model=tiny_vae.make_model(name))
    expected = outputs[f"{name}/video"], outputs[f"{name}/latents"]
    return codec, tiny_vae.make_arrays(name), expected


@pytest.mark.parametrize("frames", mostly_nightly((1, 2, 3, 4), (1, 3)))
def test_decode_matches_diffusers(case, frames):
    codec, (latents, _), (expected, _) = case
    got = codec.decode(latents[:, :frames])
    assert got.dtype == jnp.float32
    assert got.shape[1] == codec.stride[0] * (frames - 1) + 1
    np.testing.assert_allclose(got, expected[:, : got.shape[1]], **VAE_PARITY)


@pytest.mark.parametrize("frames", mostly_nightly((1, 5, 9, 13), (1, 9)))
def test_encode_matches_diffusers(case, frames):
    codec, (_, video), (_, expected) = case
    got = codec.encode(video[:, :frames])
    frames = min(frames, video.shape[1])
    assert got.dtype == jnp.float32
    assert got.shape[1] == (frames - 1) // codec.stride[0] + 1
    np.testing.assert_allclose(got, expected[:, : got.shape[1]], **VAE_PARITY)


@nnx.jit
def decode_at_once(model, latents):
    return model.decode_frames(latents)[0]


@nnx.jit
def encode_at_once(model, video):
    return model.encode_frames(video)[0]


def test_chunks_change_nothing():
    """The causal network is one function of the whole video, however it is cut."""
    model = tiny_vae.make_model("small")
    latents, video = tiny_vae.make_arrays("small")
    outputs, _ = tiny_vae.load_fixture()
    whole = decode_at_once(model, latents), encode_at_once(model, video)
    codec = WanVAECodec(model=model)
    chunked = codec.decode(latents), codec.encode(video)
    for got, cut, name in zip(whole, chunked, ("video", "latents"), strict=True):
        np.testing.assert_allclose(got, cut, **VAE_PARITY)
        np.testing.assert_allclose(got, outputs[f"small/{name}"], **VAE_PARITY)


def test_bfloat16_stays_close_to_float32():
    outputs, _ = tiny_vae.load_fixture()
    expected = outputs["small/video"][:, :1]
    model = tiny_vae.make_model("small", dtype="bfloat16")
    latents, _ = tiny_vae.make_arrays("small")
    got = WanVAECodec(model=model).decode(latents[:, :1])
    assert got.dtype == jnp.float32
    relative = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert relative < VAE_BFLOAT16
