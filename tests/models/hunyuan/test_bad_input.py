"""Requests that do not fit, through what users call.

Each is refused before anything is computed, by a message that names what was given,
what is expected and what to do.
"""

import dataclasses
import functools

import jax.numpy as jnp
import pytest
from flax import nnx

from models.diffusion.interfaces import ImageCondition, TextContext
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.sampling import Sampling
from models.diffusion.video_autoencoder import sizes
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.transformer import HunyuanTransformer

TEXT, WIDTH, POOLED = 9, 10, 6
CONFIG = HunyuanConfig(
    dim=24,
    num_heads=2,
    num_double_blocks=1,
    num_single_blocks=1,
    in_channels=4,
    out_channels=4,
    text_dim=WIDTH,
    text_length=TEXT,
    pooled_dim=POOLED,
    rope_channels=(2, 4, 6),
    tile=(2, 4),
    dtype="float32",
)
CUSTOM = dataclasses.replace(CONFIG, guidance_embeds=False, reference_frames=1)
SAMPLING = Sampling(
    frames=9,
    height=32,
    width=48,
    num_steps=2,
    guidance=1.0,
    embedded_guidance=6.0,
    shift=7.0,
)
CUSTOM_SAMPLING = dataclasses.replace(SAMPLING, embedded_guidance=None)


class NoCodec:
    """Sizes of the autoencoder; pixels are not looked at."""

    stride = (4, 8, 8)
    channels = 4

    def latent_shape(self, **video):
        return sizes.latent_shape(self.stride, self.channels, **video)

    def encode(self, video):
        raise NotImplementedError

    def decode(self, latents):
        raise NotImplementedError

    def tiled(self, pixels):
        raise NotImplementedError


class WanCodec(NoCodec):
    """One of another number of channels."""

    channels = 16


@functools.cache
def make_pipeline(config=CONFIG, codec=NoCodec):
    # Without weights: whatever is computed before a request is refused fails.
    model = nnx.eval_shape(lambda: HunyuanTransformer(config, rngs=nnx.Rngs(0)))
    return VideoPipeline(model, None, codec())


def make_context(batch=1, **changes):
    context = TextContext(
        jnp.ones((batch, TEXT, WIDTH)),
        jnp.full(batch, 5, jnp.int32),
        pooled=jnp.ones((batch, POOLED)),
    )
    return context._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 8}, "frames=8 must be 1 more than a multiple of 4, such as 5 or 9"),
        ({"frames": 3}, "frames=3 must be 1 more .* such as 1 or 5"),
        ({"height": 40}, "height=40 must be a multiple of 16 .* 32 or 48"),
        ({"width": 8}, "width=8 must be a multiple of 16 .* such as 16"),
        ({"embedded_guidance": None}, "embedded_guidance=None, .* such as 6.0"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(changes, message):
    sampling = dataclasses.replace(SAMPLING, **changes)
    with pytest.raises(ValueError, match=message):
        make_pipeline().generate(make_context(), sampling)


def test_guidance_for_a_model_that_embeds_none():
    image = ImageCondition(jnp.ones((1, 1, 4, 6, 4)), None)
    with pytest.raises(ValueError, match=r"embedded_guidance=6.0, .* use guidance"):
        make_pipeline(CUSTOM).generate(make_context(), SAMPLING, image=image)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"embeddings": jnp.ones((1, 8, WIDTH))},
            r"prompts has embeddings of shape \(1, 8, 10\); expected \(1, 9, 10\)",
        ),
        (
            {"embeddings": jnp.ones((1, TEXT, 12))},
            r"embeddings of shape \(1, 9, 12\); expected \(1, 9, 10\)",
        ),
        (
            {"lengths": jnp.ones(2, jnp.int32)},
            r"prompts has embeddings of shape \(1, 9, 10\); expected \(2, 9, 10\)",
        ),
        ({"pooled": None}, r"prompts has no pooled; expected shape \(1, 6\)"),
        (
            {"pooled": jnp.ones((1, 7))},
            r"pooled of shape \(1, 7\); expected \(1, 6\)",
        ),
        (
            {"mask": jnp.ones((1, 8), bool)},
            r"mask of shape \(1, 8\); expected \(1, 9\)",
        ),
        (
            {"mask": jnp.ones((1, TEXT), bool)},
            r"prompts has masks of \[9\] rows and lengths \[5\]",
        ),
        (
            {"lengths": jnp.asarray([10], jnp.int32)},
            r"prompts has lengths \[10\]; expected 1 to 9",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.usefixtures("without_jaxtyping")
def test_contexts_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline().generate(make_context(**changes), SAMPLING)


@pytest.mark.usefixtures("without_jaxtyping")
def test_negative_contexts_that_do_not_fit():
    guided = dataclasses.replace(SAMPLING, guidance=2.0)
    for negative, message in (
        (make_context(pooled=None), "negative_context has no pooled"),
        (make_context(3), "negative_context has 3 items; expected 1 or 2"),
    ):
        with pytest.raises(ValueError, match=message):
            make_pipeline().generate(make_context(2), guided, negative_context=negative)
    with pytest.raises(ValueError, match="no text encoder for prompts"):
        make_pipeline().generate(make_context(2), guided)


def test_noise_of_another_size():
    with pytest.raises(ValueError, match=r"noise has shape .* expected \(1, 3, 4, 6"):
        make_pipeline().generate(
            make_context(), SAMPLING, noise=jnp.zeros((1, 2, 4, 6, 4))
        )


def test_a_codec_of_other_channels():
    with pytest.raises(ValueError, match=r"codec has 16 latent channels; .* makes 4"):
        make_pipeline(codec=WanCodec).generate(make_context(), SAMPLING)


def test_images_for_a_model_of_text_alone():
    image = ImageCondition(jnp.ones((1, 1, 4, 6, 4)), None)
    with pytest.raises(ValueError, match=r"image is given, .* from text alone"):
        make_pipeline().generate(make_context(), SAMPLING, image=image)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "image is missing, .* is shown a reference image"),
        (
            ImageCondition(jnp.ones((1, 3, 4, 6, 4)), None),
            r"latents of shape \(3, 4, 6, 4\); expected 1 or 1 of shape \(1, 4, 6, 4\)",
        ),
        (
            ImageCondition(jnp.ones((2, 1, 4, 6, 4)), None),
            "image has 2 items .* expected 1 or 1",
        ),
        (
            jnp.ones((32, 40, 3)),
            "image has 32 rows and 40 columns; .* 32 and 48: .* fill the rest",
        ),
        (jnp.ones((32, 48, 4)), r"image has shape \(32, 48, 4\); expected"),
        (jnp.full((32, 48, 3), 255.0), r"values up to 255; expected \[-1, 1\]"),
    ],
    ids=["missing", "a-video", "two-images", "size", "channels", "values"],
)
@pytest.mark.usefixtures("without_jaxtyping")
def test_references_that_do_not_fit(image, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(CUSTOM).generate(make_context(), CUSTOM_SAMPLING, image=image)
