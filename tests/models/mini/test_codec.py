"""The linear codec against principal components in plain NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from models.mini.codec import LinearCodec, from_patches, to_patches

SHAPE = (2, 4, 8, 12, 3)


@pytest.fixture(scope="module")
def videos() -> np.ndarray:
    """Smooth random videos, so that a few components matter."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=SHAPE)
    for axis in (1, 2, 3):
        noise = np.cumsum(noise, axis)
    return (noise / np.abs(noise).max()).astype(np.float32)


def naive_patches(videos: np.ndarray) -> np.ndarray:
    """[B, F, H, W, 96] by loops: frame, row, column, colour within a patch."""
    batch, frames, height, width, _ = videos.shape
    out = np.zeros((batch, frames // 2, height // 4, width // 4, 96))
    for b, f, y, x in np.ndindex(*out.shape[:-1]):
        block = videos[b, 2 * f : 2 * f + 2, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
        out[b, f, y, x] = [
            block[i, j, k, c]
            for i in range(2)
            for j in range(4)
            for k in range(4)
            for c in range(3)
        ]
    return out


def test_patches_match_loops_and_invert(videos):
    patches = to_patches(jnp.asarray(videos))
    np.testing.assert_array_equal(patches, naive_patches(videos).astype(np.float32))
    np.testing.assert_array_equal(from_patches(patches), videos)


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("channels", [3, 16])
def test_components_match_numpy(videos, channels, whitening):
    codec = LinearCodec.fit(
        [videos[:1], videos[1:]], channels=channels, whitening=whitening
    )
    rows = naive_patches(videos).reshape(-1, 96)
    mean = rows.mean(0)
    # Singular values of the centred rows: another way to the same components.
    _, singular, right = np.linalg.svd(rows - mean, full_matrices=False)
    deviations = singular[:channels] / np.sqrt(len(rows))
    scale = deviations[0] * (deviations / deviations[0]) ** whitening
    np.testing.assert_allclose(codec.scale, scale, rtol=2e-3)
    np.testing.assert_allclose(codec.mean, mean, atol=1e-6)
    ours, theirs = np.asarray(codec.basis), right[:channels].T
    np.testing.assert_allclose(ours.T @ ours, np.eye(channels), atol=1e-5)
    np.testing.assert_allclose(
        np.abs((ours[:, :3] * theirs[:, :3]).sum(0)), 1, atol=1e-4
    )

    latents = np.asarray(codec.encode(jnp.asarray(videos)))
    expected = (rows - mean) @ ours / scale
    np.testing.assert_allclose(latents.reshape(-1, channels), expected, atol=2e-3)
    assert latents.shape == (2, 2, 2, 3, channels)
    np.testing.assert_allclose(latents[..., 0].std(), 1.0, rtol=1e-3)

    decoded = np.asarray(codec.decode(jnp.asarray(latents)))
    projected = (rows - mean) @ theirs @ theirs.T + mean
    np.testing.assert_allclose(
        naive_patches(decoded).reshape(-1, 96), projected, atol=1e-4
    )


def test_all_components_restore_the_video(videos):
    codec = LinearCodec.fit([videos], channels=96, whitening=0.0)
    decoded = codec.decode(codec.encode(jnp.asarray(videos)))
    np.testing.assert_allclose(decoded, videos, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [(1, 3, 8, 8, 3), (1, 4, 6, 8, 3), (1, 4, 8, 10, 3)], ids=str
)
def test_bad_sizes(videos, shape):
    codec = LinearCodec.fit([videos], channels=4)
    with pytest.raises(ValueError, match="multiple"):
        codec.encode(jnp.zeros(shape))


def test_latent_shape(videos):
    codec = LinearCodec.fit([videos], channels=4)
    _, frames, height, width, _ = videos.shape
    shape = codec.latent_shape(frames=frames, height=height, width=width)
    assert (len(videos), *shape) == codec.encode(jnp.asarray(videos)).shape
    with pytest.raises(ValueError, match="frames=5 must be a multiple of 2"):
        codec.latent_shape(frames=5, height=8, width=8)
    with pytest.raises(ValueError, match="width=10 must be a multiple of 4"):
        codec.latent_shape(frames=4, height=8, width=10)


def test_saved_codec_is_the_same(videos, tmp_path):
    codec = LinearCodec.fit([videos], channels=4)
    codec.save(tmp_path / "codec.safetensors")
    loaded = LinearCodec.load(tmp_path / "codec.safetensors")
    for name in ("mean", "basis", "scale"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(codec, name))
    assert (loaded.channels, loaded.stride) == (4, (2, 4, 4))
