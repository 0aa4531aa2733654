"""Whole runs of diffusers' HunyuanVideo pipeline, from the same noise.

See tests/fixtures/make_hunyuan_pipeline_fixtures.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.diffusion.interfaces import TextContext
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.sampling import Sampling
from models.hunyuan.vae.codec import HunyuanVAECodec
from models.hunyuan.vae.config import HunyuanVAEConfig
from models.hunyuan.vae.convert import load_hunyuan_vae
from tests import tolerances
from tests.fixtures.seeded_arrays import seeded_uniform
from tests.tiny_hunyuan import (
    channels_last,
    load_transformer,
    read_fixture,
    seeded_weights,
)

TENSORS, METADATA = read_fixture("hunyuan_pipeline")
PROMPTS, TEXT_ROWS, VALID, NEGATIVE_VALID = 2, 9, (9, 4), (1, 6)
TILE = 32  # pixels
SAMPLING = Sampling(
    frames=9,
    height=32,
    width=48,
    num_steps=10,
    guidance=1.0,
    embedded_guidance=6.0,
    shift=7.0,
    solver="euler",
)


def draw(name, *shape):
    """An input of the runs, as the script has it."""
    return seeded_uniform(f"hunyuan {name}", shape)


def make_context(name, valid):
    return TextContext(
        jnp.asarray(draw(f"{name} rows", PROMPTS, TEXT_ROWS, 10)),
        jnp.asarray(valid, jnp.int32),
        pooled=jnp.asarray(draw(f"{name} pooled", PROMPTS, 6)),
    )


@functools.cache
def make_pipeline(guidance_rounding="none"):
    transformer = load_transformer(
        METADATA["transformer_config"],
        METADATA["transformer_shapes"],
        text_length=TEXT_ROWS,
        guidance_rounding=guidance_rounding,
    )
    config = HunyuanVAEConfig.from_dict(METADATA["vae_config"], dtype="float32")
    vae = load_hunyuan_vae(seeded_weights(METADATA["vae_shapes"]), config)
    return VideoPipeline(transformer, None, HunyuanVAECodec(model=vae))


def generate(pipeline, sampling=SAMPLING):
    with jax.default_matmul_precision("highest"):
        return pipeline.generate(
            make_context("prompts", VALID),
            sampling,
            negative_context=make_context("negative prompts", NEGATIVE_VALID),
            noise=channels_last(draw("noise", PROMPTS, 4, 3, 4, 6)),
        )


def difference(got, expected):
    """The greatest, over the greatest of what is expected."""
    return np.abs(got - expected).max() / np.abs(expected).max()


@functools.cache
def plain_run():
    return generate(make_pipeline())


def check(got, name, measured):
    """Compares with what a fixture has of this name, channels last."""
    kind, _ = name.split("/")
    expected = np.moveaxis(TENSORS[name], 1 if kind == "latents" else 2, -1)
    error = difference(got, expected)
    measured("HUNYUAN_RUN", error)
    assert error <= tolerances.HUNYUAN_RUN


def test_latents_match_diffusers(measured):
    result = plain_run()
    np.testing.assert_allclose(result.timesteps[:3], [1000.0, 984.375, 965.5172414])
    check(result.latents, "latents/plain", measured)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "rounding", "changes"),
    [
        # What both published codes make of 6.0 in bfloat16.
        ("rounded", "bfloat16", {}),
        ("negative", "none", {"guidance": 3.0}),
    ],
    ids=["rounded", "negative"],
)
def test_latents_of_other_guidance_match_diffusers(name, rounding, changes, measured):
    sampling = dataclasses.replace(SAMPLING, **changes)
    result = generate(make_pipeline(rounding), sampling)
    check(result.latents, f"latents/{name}", measured)


def test_pixels_match_diffusers(measured):
    result = plain_run()
    check(result.video[:, :, 1::3, ::3], "pixels/untiled", measured)


@pytest.mark.nightly
def test_tiled_pixels_match_diffusers(measured):
    result = plain_run()
    codec = make_pipeline().codec.tiled(TILE)
    with jax.default_matmul_precision("highest"):
        video = np.asarray(codec.decode(jnp.asarray(result.latents)))
    video = np.clip(0.5 * (video + 1.0), 0.0, 1.0)
    check(video[:, :, 1::3, ::3], "pixels/tiled", measured)


def test_roundings_and_tiles_are_told_apart():
    """The fixtures do not agree by chance."""
    for one, other in (
        ("latents/plain", "latents/rounded"),
        ("pixels/untiled", "pixels/tiled"),
    ):
        apart = difference(TENSORS[one], TENSORS[other])
        assert apart > 100 * tolerances.HUNYUAN_RUN
