"""Images to tokens: torch's resize, the whole path, and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from models.checkpoints.conversion import ConversionError
from models.clip.image_encoder import CLIPImageEncoder, clip_pixels
from models.diffusion.interfaces import ImageEncoder
from tests.models.clip.conftest import CASES, FIXTURES, read_groups
from tests.tolerances import BICUBIC, CLIP_PARITY

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def resizes():
    groups, _ = read_groups(FIXTURES / "clip_resize.safetensors")
    return groups


def resized(images, size):
    """Returns the pixels of `clip_pixels` before it normalises them."""
    pixels = np.asarray(clip_pixels(jnp.asarray(images), size), np.float64)
    return 2 * (pixels * STD + MEAN) - 1


@pytest.mark.parametrize("size", ["28x28", "61x45", "9x13", "1x2", "28x56"])
def test_resize_matches_torch(resizes, size):
    got = resized(resizes["images"][size], 28)
    np.testing.assert_allclose(got, resizes["resized"][size], **BICUBIC)


def test_resize_of_a_full_size_image_matches_torch(resizes):
    image = np.random.default_rng(0).uniform(-1, 1, (1, 720, 1280, 3))
    got = resized(image.astype(np.float32), 224)[:, ::13, ::13]
    np.testing.assert_allclose(got, resizes["large_samples"][""], **BICUBIC)


@pytest.mark.parametrize("name", CASES)
def test_pixels_match_the_published_code(cases, name):
    case = cases[name]
    got = clip_pixels(jnp.asarray(case.images), case.published["image_size"])
    np.testing.assert_allclose(got, case.pixels, **BICUBIC)


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_tokens_match_the_published_code(cases, layout, tmp_path):
    case = cases["exact"]
    file = tmp_path / "encoder.safetensors"
    safetensors.numpy.save_file(case.weights[layout], file)
    device = jax.devices("cpu")[0]
    encoder = CLIPImageEncoder.load(tmp_path, config=case.config(), device=device)
    assert isinstance(encoder, ImageEncoder)
    tokens = encoder.encode(jnp.asarray(case.images))
    assert (tokens.shape, tokens.dtype) == ((2, 10, 24), jnp.float32)
    np.testing.assert_allclose(tokens, case.tokens, **CLIP_PARITY)


def test_a_freed_encoder_says_so(cases):
    encoder = CLIPImageEncoder(model=cases["quick"].model())
    encoder.free()
    with pytest.raises(RuntimeError, match="was freed; load it again"):
        encoder.encode(jnp.asarray(cases["quick"].images))


def test_results_that_are_not_finite_are_refused(cases):
    case = cases["exact"]
    weights = dict(case.weights["original"])
    key = "visual.pre_norm.bias"
    weights[key] = np.full_like(weights[key], np.nan)
    encoder = CLIPImageEncoder.load(weights, config=case.config())
    with pytest.raises(FloatingPointError, match="image tokens are not finite"):
        encoder.encode(jnp.asarray(case.images))


def test_the_default_is_the_published_tower(cases):
    with pytest.raises(ConversionError, match="num_layers=32"):
        CLIPImageEncoder.load(cases["exact"].weights["original"])


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((4, 5, 3), np.float32),
        np.zeros((1, 3, 4, 5), np.float32),
        np.zeros((0, 4, 5, 3), np.float32),
        np.zeros((1, 4, 5, 3), np.uint8),
    ],
    ids=["no batch", "channels first", "none", "integers"],
)
@pytest.mark.usefixtures("without_jaxtyping")
def test_other_images_are_refused(cases, images):
    encoder = CLIPImageEncoder(model=cases["quick"].model())
    with pytest.raises(ValueError, match=r"must be .*height, width, 3.*floating-point"):
        encoder.encode(images)
