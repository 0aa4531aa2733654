"""Against diffusers' AutoencoderKLWan, of Wan2.1's sort and with Wan2.2's averages.

See tests/fixtures/make_wan_vae_fixtures and make_wan2_2_vae_fixtures.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.wan.vae.codec import WanVAECodec
from tests import tiny_vae
from tests.cases import mostly_nightly
from tests.tolerances import VAE_BFLOAT16, VAE_PARITY

CASES = ("deep", "small", "averages_deep", "averages_small")
# Case, and frames of the latent or of the video.
DECODED = mostly_nightly(
    itertools.product(CASES, (1, 2, 3, 4)),
    [*itertools.product(("deep", "small"), (1, 3)), ("averages_small", 3)],
)
ENCODED = mostly_nightly(
    itertools.product(CASES, (1, 5, 9, 13)),
    list(itertools.product(("deep", "small"), (1, 9))),
)


@pytest.mark.parametrize("case", DECODED, ids=str)
def test_decode_matches_diffusers(case):
    name, frames = case
    outputs, _ = tiny_vae.load_fixture()
    codec = WanVAECodec(model=tiny_vae.make_model(name))
    latents, _ = tiny_vae.make_arrays(name)
    frames = min(frames, latents.shape[1])
    got = codec.decode(latents[:, :frames])
    assert got.dtype == jnp.float32
    assert got.shape[1] == codec.stride[0] * (frames - 1) + 1
    expected = outputs[f"{name}/video"][:, : got.shape[1]]
    np.testing.assert_allclose(got, expected, **VAE_PARITY)


@pytest.mark.parametrize("case", ENCODED, ids=str)
def test_encode_matches_diffusers(case):
    name, frames = case
    outputs, _ = tiny_vae.load_fixture()
    codec = WanVAECodec(model=tiny_vae.make_model(name))
    _, video = tiny_vae.make_arrays(name)
    frames = min(frames, video.shape[1])
    got = codec.encode(video[:, :frames])
    assert got.dtype == jnp.float32
    assert got.shape[1] == (frames - 1) // codec.stride[0] + 1
    expected = outputs[f"{name}/latents"][:, : got.shape[1]]
    np.testing.assert_allclose(got, expected, **VAE_PARITY)


@nnx.jit
def decode_at_once(model, latents):
    return model.decode_frames(latents)[0]


@nnx.jit
def encode_at_once(model, video):
    return model.encode_frames(video)[0]


@pytest.mark.parametrize(
    "name", mostly_nightly(("small", "averages_small"), ("small",))
)
def test_chunks_change_nothing(name):
    """The causal network is one function of the whole video, however it is cut."""
    model = tiny_vae.make_model(name)
    latents, video = tiny_vae.make_arrays(name)
    outputs, _ = tiny_vae.load_fixture()
    whole = decode_at_once(model, latents), encode_at_once(model, video)
    codec = WanVAECodec(model=model)
    chunked = codec.decode(latents), codec.encode(video)
    for got, cut, what in zip(whole, chunked, ("video", "latents"), strict=True):
        np.testing.assert_allclose(got, cut, **VAE_PARITY)
        np.testing.assert_allclose(got, outputs[f"{name}/{what}"], **VAE_PARITY)


@pytest.mark.nightly
def test_one_tile_is_the_whole_frame_with_averages_too():
    latents, video = tiny_vae.make_arrays("averages_small")
    codec = WanVAECodec(model=tiny_vae.make_model("averages_small"))
    with pytest.raises(ValueError, match="positive multiple of 16"):
        codec.tiled(24)
    tiled = codec.tiled(16)  # rows and columns of pixels; the frame has 12 and 8
    np.testing.assert_allclose(
        tiled.decode(latents), codec.decode(latents), **VAE_PARITY
    )
    np.testing.assert_allclose(tiled.encode(video), codec.encode(video), **VAE_PARITY)


def test_bfloat16_stays_close_to_float32():
    outputs, _ = tiny_vae.load_fixture()
    expected = outputs["small/video"][:, :1]
    model = tiny_vae.make_model("small", dtype="bfloat16")
    latents, _ = tiny_vae.make_arrays("small")
    got = WanVAECodec(model=model).decode(latents[:, :1])
    assert got.dtype == jnp.float32
    relative = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert relative < VAE_BFLOAT16
