"""Whole videos: chunks, batches, tiles, and inputs that do not fit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.diffusion.interfaces import Codec
from models.wan.vae import codec as codec_module
from models.wan.vae.autoencoder import WanVAE
from models.wan.vae.codec import WanVAECodec
from models.wan.vae.config import WanVAEConfig
from models.wan.vae.tiling import Tiling, split_axis
from tests import tiny_vae
from tests.tolerances import VAE_PARITY

CASE = "small"  # 2 frames and 2 x 2 pixels to a latent position, 3 channels
STRIDE = (2, 2, 2)


@pytest.fixture(scope="module")
def codec():
    return WanVAECodec(model=tiny_vae.make_model(CASE))


@pytest.fixture(scope="module")
def latents():
    return tiny_vae.make_arrays(CASE)[0]


@pytest.fixture(scope="module")
def video():
    return tiny_vae.make_arrays(CASE)[1]


@pytest.fixture(scope="module")
def decoded(codec, latents):
    return np.asarray(codec.decode(latents))


def test_it_is_a_codec(codec):
    assert isinstance(codec, Codec)
    assert codec.stride == STRIDE
    assert codec.channels == 3


def test_tiles_share_a_quarter_of_their_sides(codec):
    assert codec.tiled(16).tiling == Tiling(size=(16, 16), overlap=(4, 4))
    for pixels in (0, -8, 12):
        with pytest.raises(ValueError, match=f"tiles of {pixels} pixels must be a pos"):
            codec.tiled(pixels)


def test_a_codec_in_another_dtype_is_as_if_made_in_it(codec):
    narrow = codec.tiled(16).in_dtype("bfloat16")
    made = tiny_vae.make_model(CASE, dtype="bfloat16")
    assert nnx.split(narrow.model)[0] == nnx.split(made)[0] != nnx.split(codec.model)[0]
    jax.tree.map(
        np.testing.assert_array_equal, nnx.state(narrow.model), nnx.state(made)
    )
    assert narrow.tiling == codec.tiled(16).tiling
    with pytest.raises(ValueError, match="dtype='float8' must be one of"):
        codec.in_dtype("float8")


@pytest.mark.nightly
def test_every_way_to_decode_gives_the_same(codec, latents, decoded):
    chunks = list(codec.decode_chunks(jnp.asarray(latents[:1])))
    assert [chunk.shape[1] for chunk in chunks] == [1, 2, 2, 2, 2]
    assert all(isinstance(chunk, jax.Array) for chunk in chunks)
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), decoded[:1])
    on_host = codec.decode_to_host(latents)
    assert isinstance(on_host, np.ndarray)
    np.testing.assert_array_equal(on_host, decoded)
    assert np.abs(decoded).max() == 1.0  # the clip is in use


def test_host_and_device_arrays_encode_the_same(codec, video):
    np.testing.assert_array_equal(codec.encode(video), codec.encode(jnp.asarray(video)))


def test_more_frames_and_videos_compile_nothing(codec, latents, decoded):
    def programs():
        return codec_module._decode_step._cache_size()

    before = programs()
    longer = np.concatenate([latents, latents], axis=1)
    got = codec.decode(np.concatenate([longer, longer]))[:2]
    assert programs() == before
    assert got.shape[1] == 2 * (2 * latents.shape[1] - 1) + 1
    np.testing.assert_array_equal(got[:, : decoded.shape[1]], decoded)


@nnx.jit
def decode_one_frame(model, latents):
    return model.decode_frames(latents)[0]


def test_batch_items_do_not_influence_each_other(codec, latents, decoded):
    """Neither in the codec, nor where the network runs a batch at once."""
    other = latents.copy()
    other[0] = -3 * other[0]
    got = np.asarray(codec.decode(other))
    np.testing.assert_array_equal(got[1], decoded[1])
    assert np.abs(got[0] - decoded[0]).max() > 0.1

    before, after = (
        np.asarray(decode_one_frame(codec.model, x[:, :1])) for x in (latents, other)
    )
    np.testing.assert_array_equal(after[1], before[1])
    np.testing.assert_allclose(before, decoded[:, :1], **VAE_PARITY)
    assert np.abs(after[0] - before[0]).max() > 0.1


def test_later_frames_do_not_influence_earlier_ones(codec, latents, video, decoded):
    later = latents.copy()
    later[:, 3:] = 0
    got = np.asarray(codec.decode(later))
    np.testing.assert_array_equal(got[:, :5], decoded[:, :5])
    assert (np.abs(got[:, 5:] - decoded[:, 5:]).max(axis=(0, 2, 3, 4)) > 0).all()

    later = video.copy()
    later[:, 5:] = 0
    got, expected = np.asarray(codec.encode(later)), np.asarray(codec.encode(video))
    np.testing.assert_array_equal(got[:, :3], expected[:, :3])


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 8, 8), (1, 1, 1, 16)),
        ((81, 480, 832), (21, 60, 104, 16)),
        ((81, 720, 1280), (21, 90, 160, 16)),
    ],
    ids=str,
)
def test_latent_shape_of_wan2_1(size, expected):
    codec = make_abstract_codec()
    frames, height, width = size
    got = codec.latent_shape(frames=frames, height=height, width=width)
    assert got == expected
    assert codec.video_shape(*expected[:3]) == (*size, 3)


def make_abstract_codec(**options):
    config = WanVAEConfig.wan2_1()
    model = object.__new__(WanVAE)
    object.__setattr__(model, "config", config)
    return WanVAECodec(model=model, **options)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((0, 8, 8), "frames=0 must be 1 more than a multiple of 4"),
        ((80, 8, 8), "frames=80 must be 1 more than a multiple of 4"),
        ((-3, 8, 8), "frames=-3 must be"),
        ((81, 484, 832), "height=484 must be a multiple of 8"),
        ((81, 480, 0), "width=0 must be a multiple of 8"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(size, message):
    frames, height, width = size
    with pytest.raises(ValueError, match=message):
        make_abstract_codec().latent_shape(frames=frames, height=height, width=width)


@pytest.mark.parametrize(
    ("method", "shape", "dtype", "error", "message"),
    [
        ("decode", (5, 5, 4, 3), "float32", ValueError, r"\(5, 5, 4, 3\); expected"),
        ("decode", (1, 2, 5, 4, 16), "float32", ValueError, "columns, 3]"),
        ("decode", (1, 0, 5, 4, 3), "float32", ValueError, "none of them 0"),
        ("decode", (1, 2, 5, 4, 3), "int32", TypeError, "latents are of int32"),
        ("decode_chunks", (1, 2, 5, 0, 3), "float32", ValueError, "none of them 0"),
        ("decode_to_host", (0, 2, 5, 4, 3), "float32", ValueError, "none of them 0"),
        ("encode", (2, 3, 10, 8), "float32", ValueError, r"\(2, 3, 10, 8\); expected"),
        ("encode", (2, 3, 10, 8, 4), "float32", ValueError, "width, 3]"),
        ("encode", (0, 3, 10, 8, 3), "float32", ValueError, "at least one"),
        ("encode", (2, 4, 10, 8, 3), "float32", ValueError, "frames=4 must be 1 more"),
        ("encode", (2, 3, 9, 8, 3), "float32", ValueError, "height=9 must be"),
        ("encode", (2, 3, 10, 8, 3), "uint8", TypeError, "video are of uint8"),
    ],
    ids=str,
)
def test_arrays_that_do_not_fit(
    codec, method, shape, dtype, error, message, without_jaxtyping
):
    with pytest.raises(error, match=message):
        getattr(codec, method)(np.zeros(shape, dtype))


@pytest.mark.parametrize(
    ("shape", "cache", "message"),
    [
        ((1, 2, 4, 4, 3), None, r"expected 1 \+ a multiple of 2 frames"),
        ((1, 3, 4, 4, 3), (), r"expected a multiple of 2 frames"),
        ((1, 0, 4, 4, 3), (), r"has shape \(1, 0, 4, 4, 3\)"),
        ((1, 1, 3, 4, 3), None, "rows and columns multiples of 2"),
    ],
    ids=str,
)
def test_chunks_that_do_not_fit(codec, shape, cache, message):
    with pytest.raises(ValueError, match=message):
        codec.model.encode_frames(jnp.zeros(shape), cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (256,)}, r"size=\(256,\) must be two integers >= 1"),
        ({"size": (0, 256)}, r"size=\(0, 256\) must be"),
        ({"overlap": (-8, 64)}, r"overlap=\(-8, 64\) must be two integers >= 0"),
        ({"overlap": (64, 96)}, "must be at most a third of"),
        ({"size": (250, 256)}, r"tiling.size=\(250, 256\) must be multiples of 8"),
        ({"overlap": (60, 64)}, r"tiling.overlap=\(60, 64\) must be multiples of 8"),
    ],
    ids=str,
)
def test_tiles_that_do_not_fit(options, message, without_jaxtyping):
    with pytest.raises(ValueError, match=message):
        make_abstract_codec(tiling=Tiling(**options))


def test_tiles_have_no_chunks_of_whole_frames(codec, latents):
    tiled = WanVAECodec(model=codec.model, tiling=Tiling())
    with pytest.raises(ValueError, match="needs tiling=None"):
        tiled.decode_chunks(latents)


@pytest.mark.parametrize("overlap", [0, 1, 4])
def test_tiles_cover_every_axis(overlap):
    for length, size in itertools.product(range(1, 60), (12, 17)):
        intervals = split_axis(length, size, overlap)
        total = np.zeros(3 * length)
        for interval in intervals:
            assert interval.size == intervals[0].size <= size
            total[interval.range(3)] += interval.weights(3)
        np.testing.assert_allclose(total, 1.0, rtol=1e-12)
        assert all(i.before >= overlap for i in intervals[1:])
        # One tile less, each as large as allowed, would not reach the end.
        assert len(intervals) == 1 or (len(intervals) - 1) * (size - overlap) < (
            length - overlap
        )
