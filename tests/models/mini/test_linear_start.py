"""A codec begins as principal components, computed here apart by NumPy."""

import numpy as np
import pytest
from flax import nnx

from models.mini.autoencoder import autoencoder_config
from models.mini.linear_start import start_linear
from models.wan.vae.autoencoder import WanVAE

pytestmark = pytest.mark.nightly

FRAMES, SIDE = 5, 32


@pytest.fixture(scope="module")
def videos():
    """Waves of several lengths that travel, one colour after another."""
    rng = np.random.default_rng(0)
    t, y, x = np.mgrid[:FRAMES, :SIDE, :SIDE]
    films = []
    for _ in range(12):
        film = np.zeros((FRAMES, SIDE, SIDE, 3))
        for length in (40.0, 24.0, 12.0):
            angle, phase = rng.uniform(0, 2 * np.pi, 2)
            along = x * np.cos(angle) + y * np.sin(angle) - 2.0 * t
            wave = np.sin(2 * np.pi * along / length + phase)
            film += wave[..., None] * rng.uniform(-1, 1, 3) * length / 80
        films.append(film)
    return np.stack(films).astype(np.float32)


def patches(frames):
    """[B, T, ..., 48]: the 4 x 4 pixels of each place, in some order."""
    batch, length, side, _, _ = frames.shape
    cut = frames.reshape(batch, length, side // 4, 4, side // 4, 4, 3)
    return cut.transpose(0, 1, 2, 4, 3, 5, 6).reshape(batch, length, -1, 48)


def error_of_components(videos, count):
    """The mean squared error of the best components of pairs of later frames."""
    single = patches(videos)
    pairs = np.concatenate([single[:, 1:-1:2], single[:, 2::2]], axis=-1)
    flat = pairs.reshape(-1, 96).astype(np.float64)
    values = np.linalg.eigvalsh(np.cov(flat.T))
    return values[:-count].sum() / 96


def test_it_restores_as_well_as_principal_components(videos):
    config = autoencoder_config(base_dim=24, decoder_base_dim=48)
    model = start_linear(WanVAE(config, rngs=nnx.Rngs(0)), videos)
    restored = nnx.jit(lambda m, v: m.pixels(m.moments(v)[0])[0])(model, videos)
    error = np.square(np.asarray(restored) - videos)
    best = error_of_components(videos, 16)
    spread = np.var(videos)
    assert best < 0.02 * spread, "the videos suit the test"
    # Norms and SiLU leave a little; the first frame alone has 16 numbers, too.
    assert error[:, 1:].mean() < best + 0.01 * spread
    assert error[:, 0].mean() < 0.02 * spread


@pytest.mark.parametrize(
    "changes",
    [
        {"base_dim": 8},
        {"decoder_base_dim": 16},
        {"spatial_downsample": None},
    ],
    ids=str,
)
def test_other_models_are_refused(videos, changes):
    model = nnx.eval_shape(
        lambda: WanVAE(autoencoder_config(**changes), rngs=nnx.Rngs(0))
    )
    with pytest.raises(ValueError, match="at least the 16 latent channels, and spati"):
        start_linear(model, videos)
