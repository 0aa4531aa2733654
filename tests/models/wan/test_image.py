"""Image to video: the condition against diffusers, and the pipeline around it."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from models.diffusion.interfaces import ImageCondition, TextContext
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.sampling import Sampling
from models.diffusion.schedulers import FlowEuler
from models.wan.config import WanConfig
from models.wan.image import condition_latents, kept_part
from models.wan.inputs import WanInputs
from models.wan.transformer import WanTransformer
from tests import tolerances

FIXTURES = Path(__file__).parents[2] / "fixtures"
TENSORS = safetensors.numpy.load_file(FIXTURES / "image_condition.safetensors")
FRAMES = 9
CONFIG = WanConfig(
    dim=24,
    ffn_dim=32,
    num_heads=2,
    num_layers=2,
    in_channels=36,
    text_dim=8,
    text_length=6,
    image_dim=6,
    freq_dim=16,
    tile=(2, 4),
    dtype="float32",
)
SAMPLING = Sampling(
    frames=FRAMES, height=32, width=48, num_steps=3, guidance=3.0, shift=2.0
)


class MeanCodec:
    """The fixture's stand-in for a VAE, channels last, and normalised."""

    stride = (4, 8, 8)

    def latent_shape(self, *, frames, height, width):
        assert frames % 4 == 1
        return 1 + frames // 4, height // 8, width // 8, 16

    def encode(self, video):
        video = np.asarray(video, np.float64)
        video = np.concatenate([video[:, :1].repeat(3, axis=1), video], axis=1)
        batch, frames, height, width, _ = video.shape
        split = (batch, frames // 4, 4, height // 8, 8, width // 8, 8, 3)
        pooled = video.reshape(split).mean((2, 4, 6))
        latents = (pooled @ TENSORS["matrix"] - TENSORS["mean"]) / TENSORS["std"]
        return jnp.asarray(latents, jnp.float32)

    def tiled(self, pixels):
        raise NotImplementedError

    def decode(self, latents):
        pixels = latents[..., :3].repeat(8, axis=2).repeat(8, axis=3)
        return jnp.concatenate([pixels[:, :1], pixels[:, 1:].repeat(4, axis=1)], axis=1)


class MeanColours:
    """An image encoder: three tokens with the mean and spread of the colours."""

    def encode(self, images):
        token = jnp.concatenate([images.mean((1, 2)), images.std((1, 2))], axis=-1)
        return jnp.stack([token, 2 * token, -token], axis=1)


@pytest.fixture(scope="module")
def pipeline():
    structure, state = nnx.split(shapes_of(CONFIG))
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), state
    )
    model = nnx.merge(structure, state)
    return VideoPipeline(model, None, MeanCodec(), MeanColours())


def shapes_of(config):
    """A model without values."""
    return nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))


def make_context(batch=1, seed=0):
    rows = np.random.default_rng(seed).normal(size=(batch, 6, 8))
    return TextContext(jnp.asarray(rows, jnp.float32), jnp.full(batch, 4))


def make_images(batch=1):
    pixels = np.random.default_rng(2).uniform(-1, 1, size=(batch, 32, 48, 3))
    return pixels.astype(np.float32)


def generate(pipeline, image, batch=1, **options):
    return pipeline.generate(
        make_context(batch),
        SAMPLING,
        image=image,
        negative_context=make_context(seed=1),
        **options,
    )


@pytest.fixture(scope="module")
def result(pipeline):
    return generate(pipeline, make_images()[0])


def test_condition_matches_diffusers():
    images = jnp.asarray(TENSORS["images"].transpose(0, 2, 3, 1))
    got = condition_latents(MeanCodec(), images, frames=FRAMES)
    expected = TENSORS["condition"].transpose(0, 2, 3, 4, 1)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got[..., :4], expected[..., :4])
    np.testing.assert_allclose(got, expected, **tolerances.IMAGE_CONDITION)


@pytest.mark.nightly
def test_run_follows_the_flow_equation(pipeline, result):
    """The loop once more, with channels and tokens put together here."""
    start = pipeline.start(
        make_context(),
        SAMPLING,
        image=make_images(),
        negative_context=make_context(seed=1),
    )
    latents = start[1].latents
    mask = np.zeros((1, 3, 4, 6, 4), np.float32)
    mask[:, 0] = 1
    video = np.zeros((1, FRAMES, 32, 48, 3), np.float32)
    video[:, 0] = make_images()
    condition = jnp.concatenate([mask, MeanCodec().encode(video)], axis=-1)
    tokens = MeanColours().encode(jnp.asarray(make_images()))
    predict = nnx.jit(
        lambda model, latents, time, context: model(
            WanInputs(
                jnp.concatenate([latents, condition], axis=-1),
                time,
                context.embeddings,
                context.lengths,
                image_tokens=tokens,
            )
        )[0]
    )
    solver = FlowEuler(num_steps=3, shift=2.0)
    for index, timestep in enumerate(solver.timesteps):
        time = jnp.full(1, timestep, jnp.float32)
        positive, negative = (
            predict(pipeline.model, latents, time, make_context(seed=seed))
            for seed in (0, 1)
        )
        velocity = negative + 3.0 * (positive - negative)
        latents = solver.step(latents, velocity, index)
    assert result.latents.shape == (1, 3, 4, 6, 16)
    assert result.video.shape == (1, FRAMES, 32, 48, 3)
    np.testing.assert_allclose(result.latents, latents, **tolerances.TINY_RUN)


@pytest.mark.nightly
def test_each_prompt_can_have_its_image(pipeline, result):
    images = np.concatenate([make_images(), -make_images()])
    own = generate(pipeline, images, batch=2)
    np.testing.assert_allclose(own.latents[0], result.latents[0], **tolerances.TINY_RUN)
    assert np.abs(own.latents[1] - result.latents[0]).max() > 0.1


@pytest.mark.nightly
def test_prompts_can_share_a_condition(pipeline, result):
    """In two calls."""
    shared = generate(
        pipeline,
        pipeline.encode_images(make_images()[0], SAMPLING),
        batch=2,
        guidance_batching="two_calls",
    )
    np.testing.assert_allclose(
        shared.latents[0], result.latents[0], **tolerances.TINY_RUN
    )
    assert np.abs(shared.latents[1] - shared.latents[0]).max() > 1e-2


@pytest.mark.parametrize(
    ("image", "video", "kept"),
    [
        ((32, 48), (32, 48), (slice(0, 32), slice(0, 48))),
        # Scaled to 48 columns it has 38.4 rows: squeezed, for 6.4 is less than 16.
        ((40, 50), (32, 48), (slice(0, 40), slice(0, 50))),
        # Scaled to 32 rows it has 80 columns; 48 of them are 96 of the image.
        ((64, 160), (32, 48), (slice(0, 64), slice(32, 128))),
        # 48 rows are 16 too many; two thirds of 1000 are kept.
        ((1000, 1000), (32, 48), (slice(166, 833), slice(0, 1000))),
        # A line: at least one column stays.
        ((900, 1), (32, 48), (slice(449, 450), slice(0, 1))),
    ],
    ids=str,
)
def test_part_of_an_image_that_is_kept(image, video, kept):
    assert kept_part(image, video, (16, 16)) == kept


def test_images_of_any_size_are_cut_and_resized(pipeline):
    """Three times as large and wider: an odd frame around what is kept."""
    middle = np.random.default_rng(4).uniform(-1, 1, size=(96, 144, 3))
    wide = np.pad(middle, ((0, 0), (60, 60), (0, 0)), constant_values=0.9)
    got = pipeline.encode_images(wide.astype(np.float32), SAMPLING)
    tokens = MeanColours().encode(jnp.asarray(middle[None], jnp.float32))
    np.testing.assert_allclose(got.tokens, tokens, rtol=0, atol=1e-6)
    # Every new centre is an old one, so bicubic weights are 1 there and 0 elsewhere.
    first = condition_latents(
        MeanCodec(), jnp.asarray(middle[None, 1::3, 1::3], jnp.float32), frames=FRAMES
    )
    np.testing.assert_allclose(got.latents, first, **tolerances.IMAGE_CONDITION)


def test_missing_and_unfit_images_are_named(pipeline):
    with pytest.raises(ValueError, match="image is missing, but this is an image-to-"):
        generate(pipeline, None)
    with pytest.raises(ValueError, match=r"image has 3 items .*; expected 1 or 2 of"):
        generate(pipeline, make_images(3), batch=2)
    condition = pipeline.encode_images(make_images(), SAMPLING)
    narrow = condition._replace(latents=condition.latents[..., 1:])
    with pytest.raises(ValueError, match=r"shape \(3, 4, 6, 19\); .* \(3, 4, 6, 20\)"):
        generate(pipeline, narrow)
    blind = dataclasses.replace(pipeline, image_encoder=None)
    with pytest.raises(ValueError, match="no image encoder: pass an ImageCondition"):
        generate(blind, make_images())
    with pytest.raises(ValueError, match=r"image_tokens are missing, .*image_dim=6"):
        generate(pipeline, condition._replace(tokens=None))
    wide = ImageCondition(condition.latents, jnp.zeros((1, 3, 7)))
    with pytest.raises(ValueError, match=r"image_tokens has shape \(2, 3, 7\)"):
        generate(pipeline, wide)


@pytest.mark.usefixtures("without_jaxtyping")
def test_what_is_no_image_is_named(pipeline):
    with pytest.raises(ValueError, match=r"shape \(1, 32, 48, 4\); expected \[height,"):
        generate(pipeline, np.zeros((1, 32, 48, 4), np.float32))
    with pytest.raises(ValueError, match="image has dtype uint8; expected floating-p"):
        generate(pipeline, np.zeros((32, 48, 3), np.uint8))
    with pytest.raises(ValueError, match=r"values up to 255; expected \[-1, 1\]"):
        generate(pipeline, np.full((32, 48, 3), 255, np.float32))


def test_text_to_video_models_take_no_image(pipeline):
    config = dataclasses.replace(CONFIG, in_channels=16, image_dim=None)
    plain = dataclasses.replace(pipeline, model=shapes_of(config))
    with pytest.raises(ValueError, match="image is given, but this is a text-to-video"):
        generate(plain, make_images())
    with pytest.raises(ValueError, match=r"image_tokens are given, .*image_dim=None"):
        plain.model(
            WanInputs(
                jnp.zeros((1, 1, 4, 4, 16)),
                jnp.zeros(1),
                make_context().embeddings,
                image_tokens=jnp.zeros((1, 3, 6)),
            )
        )
