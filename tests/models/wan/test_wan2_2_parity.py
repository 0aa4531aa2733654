"""Wan2.2 against diffusers: transformers, and whole runs from seeded noise.

See tests/fixtures/make_wan2_2_fixtures.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.diffusion.pipeline import VideoPipeline
from models.diffusion.sampling import Sampling
from models.diffusion.schedulers import make_solver
from models.wan.inputs import WanInputs
from tests import tiny_wan2_2 as tiny
from tests.cases import mostly_nightly
from tests.fixtures.seeded_arrays import seeded_uniform
from tests.tolerances import WAN2_2_RUN, WAN2_2_VELOCITY

RUN = {"num_steps": 8, "guidance": 4.0}


def differs_by(got, expected):
    """The greatest difference over the greatest value."""
    assert got.shape == expected.shape
    return np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()


def times(name, mean, spread):
    return jnp.asarray(mean + spread * seeded_uniform(name, (tiny.ITEMS,)))


@pytest.mark.parametrize(
    ("model", "seed"),
    [
        pytest.param(*case, marks=[] if case == ("ti2v", 0) else pytest.mark.nightly)
        for case in [(model, seed) for model in ("ti2v", "i2v") for seed in range(3)]
    ],
)
def test_velocity_matches_diffusers(model, seed):
    name, config = f"{model}/{seed}", tiny.make_config(model)
    shape = (tiny.ITEMS, config.in_channels, tiny.FRAMES, tiny.ROWS, tiny.COLUMNS)
    inputs = WanInputs(
        latents=tiny.draw(f"{name}/latents", *shape),
        timesteps=times(f"{name}/times", 500, 250),
        context=tiny.make_context(f"{name}/context").embeddings,
    )
    if model == "ti2v":
        first = times(f"{name}/first times", 100, 50)
        inputs = inputs._replace(first_timesteps=first)
    network = tiny.make_transformer(config, name)
    with jax.default_matmul_precision("highest"):
        velocity, _ = nnx.jit(lambda model, inputs: model(inputs))(network, inputs)
    expected = tiny.load_fixture()[f"{name}/velocity"]
    assert differs_by(velocity, expected) < WAN2_2_VELOCITY


@pytest.mark.parametrize("name", mostly_nightly(("ti2v_text", "ti2v_image"), ()))
def test_run_of_one_transformer_matches_diffusers(name):
    codec = tiny.make_codec(averages=True)
    sampling = Sampling(
        frames=9,
        height=16 * tiny.ROWS,
        width=16 * tiny.COLUMNS,
        solver=make_solver("unipc", num_steps=8, shift=3.0, grid="diffusers"),
        **RUN,
    )
    image = None
    if name == "ti2v_image":
        image = tiny.make_image(name, sampling.height, sampling.width)
    model = tiny.make_transformer(tiny.make_config("ti2v"), f"{name}/high")
    shape = (tiny.ITEMS, 4, tiny.FRAMES, tiny.ROWS, tiny.COLUMNS)
    with jax.default_matmul_precision("highest"):
        result = VideoPipeline(model, None, codec).generate(
            tiny.make_context(f"{name}/context"),
            sampling,
            image=image,
            negative_context=tiny.make_context(f"{name}/negative"),
            noise=tiny.draw(f"{name}/noise", *shape),
        )
    expected = tiny.load_fixture()[f"run/{name}/latents"]
    assert differs_by(result.latents, expected) < WAN2_2_RUN
    assert result.video.shape == (tiny.ITEMS, 9, sampling.height, sampling.width, 3)
