"""Whole runs of diffusers' Wan pipelines, from the same noise, up to the decoder.

See tests/fixtures/make_wan_pipeline_fixtures.py.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from models.diffusion.interfaces import ImageCondition, TextContext
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.sampling import Sampling
from models.diffusion.schedulers import make_solver
from models.wan.config import WanConfig
from models.wan.convert import load_wan_transformer
from tests import tolerances

FIXTURES = Path(__file__).parents[2] / "fixtures"
TEXT_ROWS = 512


class NoCodec:
    """Sizes of Wan's autoencoder with 4 channels; pixels are not looked at."""

    stride = (4, 8, 8)

    def latent_shape(self, *, frames, height, width):
        return 1 + frames // 4, height // 8, width // 8, 4

    def encode(self, video):
        raise NotImplementedError

    def tiled(self, pixels):
        raise NotImplementedError

    def decode(self, latents):
        return jnp.zeros((len(latents), 1, 1, 1, 3))


def read(name):
    """Tensors and metadata of a fixture."""
    with safetensors.safe_open(FIXTURES / f"{name}.safetensors", "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, file.metadata()


def load_pipeline(case):
    tensors, metadata = read(f"wan_{case}")
    config = WanConfig.from_dict(
        json.loads(metadata["config"]),
        text_length=TEXT_ROWS,
        tile=(2, 4),
        dtype="float32",
    )
    weights = {
        key.removeprefix("weights/"): value
        for key, value in tensors.items()
        if key.startswith("weights/")
    }
    return VideoPipeline(load_wan_transformer(weights, config), None, NoCodec())


def make_context(rows):
    batch, length, _ = rows.shape
    padded = np.pad(rows, ((0, 0), (0, TEXT_ROWS - length), (0, 0)))
    return TextContext(jnp.asarray(padded), jnp.full(batch, length, jnp.int32))


def channels_last(array):
    return jnp.asarray(np.moveaxis(array, 1, -1))


@pytest.mark.parametrize(
    ("name", "case", "solver"),
    [("text", "divided", "unipc"), ("image", "image", "euler")],
    ids=["text-unipc", "image-euler"],
)
def test_run_matches_diffusers(name, case, solver):
    tensors, _ = read(f"pipeline_{name}")
    image = None
    if name == "image":
        condition = channels_last(tensors["condition"])
        image = ImageCondition(condition, jnp.asarray(tensors["tokens"]))
    sampling = Sampling(
        frames=9,
        height=32,
        width=48,
        num_steps=10,
        guidance=4.0,
        solver=make_solver(solver, num_steps=10, shift=3.0, grid="diffusers"),
    )
    with jax.default_matmul_precision("highest"):
        result = load_pipeline(case).generate(
            make_context(tensors["context"]),
            sampling,
            image=image,
            negative_context=make_context(tensors["negative_context"]),
            noise=channels_last(tensors["noise"]),
        )
    expected = channels_last(tensors["latents"])
    np.testing.assert_allclose(result.latents, expected, **tolerances.PUBLISHED_RUN)
