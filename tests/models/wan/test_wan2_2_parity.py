"""Wan2.2 against diffusers: transformers, and whole runs from seeded noise.

See tests/fixtures/make_wan2_2_fixtures.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.diffusion import experts
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.sampling import Sampling
from models.diffusion.schedulers import make_solver
from models.wan.convert import (
    load_wan_transformer,
    open_transformer_weights,
    save_wan_transformer,
)
from models.wan.inputs import WanInputs
from models.wan.pair import make_experts
from tests import tiny_wan2_2 as tiny
from tests.cases import mostly_nightly
from tests.fixtures.seeded_arrays import seeded_uniform
from tests.tolerances import WAN2_2_PART, WAN2_2_RUN

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
    assert differs_by(velocity, expected) < WAN2_2_PART


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", mostly_nightly(("t2v", "i2v"), ()))
def test_run_of_two_experts_matches_diffusers(kind, seed):
    """Each has its steps and its guidance; the solver's state goes on."""
    name = f"{kind}/{seed}"
    result = run_of_two(name, resident_experts(name))
    assert differs_by(result.latents, expected_run(name)) < WAN2_2_RUN


@pytest.mark.nightly
@pytest.mark.parametrize("model", ["ti2v", "i2v"])
def test_both_layouts_give_the_same_transformer(model, tmp_path):
    """What was read by the table of one is written and read by that of the other."""
    config = tiny.make_config(model)
    network = tiny.make_transformer(config, f"{model}/0")
    save_wan_transformer(network, tmp_path, layout="original", dtype=None)
    weights = open_transformer_weights(tmp_path)
    assert any(".self_attn.q." in key for key in weights)
    again = load_wan_transformer(weights, config)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(network))


@pytest.mark.parametrize("seed", mostly_nightly(range(3), ()))
def test_the_autoencoder_matches_diffusers(seed):
    codec, name = tiny.make_codec(averages=True, name=f"vae/{seed}"), f"vae/{seed}"
    config, outputs = codec.model.config, tiny.load_fixture("wan2_2_vae.safetensors")
    mean, std = map(np.float32, (config.latents_mean, config.latents_std))
    latents = tiny.draw(f"{name} latents", 1, 4, 2, 1, 1)
    video = tiny.draw(f"{name} video", 1, 3, 5, 16, 16)
    with jax.default_matmul_precision("highest"):
        decoded = codec.decode((latents - mean) / std)
        encoded = codec.encode(video) * std + mean
    assert differs_by(decoded, outputs[f"{name}/video"]) < WAN2_2_PART
    assert differs_by(encoded, outputs[f"{name}/latents"]) < WAN2_2_PART


@pytest.mark.nightly
def test_streamed_experts_make_the_same_videos(monkeypatch):
    """Also the second video, for which the first expert's weights come back."""
    monkeypatch.setattr(experts, "PIECE_BYTES", 1000)  # of many pieces
    monkeypatch.setattr(experts, "STAGED_BYTES", 5000)
    config = tiny.make_config("t2v")
    model, streamed = make_experts(
        config,
        {
            side: functools.partial(tiny.make_transformer, config, f"t2v/0/{side}")
            for side in ("high", "low")
        },
        streamed=True,
    )
    assert streamed.model is model
    resident = run_of_two("t2v/0", resident_experts("t2v/0")).latents
    for _ in range(2):
        np.testing.assert_array_equal(run_of_two("t2v/0", streamed).latents, resident)


def resident_experts(name):
    config = tiny.make_config(kind_of(name))
    high, low = (
        tiny.make_transformer(config, f"{name}/{side}") for side in ("high", "low")
    )
    return experts.ResidentExperts(high, low, boundary=800.0)


def kind_of(name):
    """The model of a run, without its seed."""
    return name.split("/")[0]


def expected_run(name):
    return tiny.load_fixture()[f"run/{name}/latents"]


def run_of_two(name, both):
    """A run of two transformers, with the settings of the fixture."""
    both.boundary = 800.0
    sampling = Sampling(
        frames=9,
        height=8 * tiny.ROWS,
        width=8 * tiny.COLUMNS,
        low_guidance=3.0,
        solver=make_solver("unipc", num_steps=8, shift=3.0, grid="diffusers"),
        **RUN,
    )
    image = None
    if kind_of(name) == "i2v":
        image = tiny.make_image(name, sampling.height, sampling.width)
    pipeline = VideoPipeline(
        both.model, None, tiny.make_codec(averages=False), experts=both
    )
    shape = (tiny.ITEMS, 4, tiny.FRAMES, tiny.ROWS, tiny.COLUMNS)
    with jax.default_matmul_precision("highest"):
        return pipeline.generate(
            tiny.make_context(f"{name}/context"),
            sampling,
            image=image,
            negative_context=tiny.make_context(f"{name}/negative"),
            noise=tiny.draw(f"{name}/noise", *shape),
        )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", mostly_nightly(("ti2v_text", "ti2v_image"), ()))
def test_run_of_one_transformer_matches_diffusers(kind, seed):
    name = f"{kind}/{seed}"
    codec = tiny.make_codec(averages=True)
    sampling = Sampling(
        frames=9,
        height=16 * tiny.ROWS,
        width=16 * tiny.COLUMNS,
        solver=make_solver("unipc", num_steps=8, shift=3.0, grid="diffusers"),
        **RUN,
    )
    image = None
    if kind == "ti2v_image":
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
    assert differs_by(result.latents, expected_run(name)) < WAN2_2_RUN
    assert result.video.shape == (tiny.ITEMS, 9, sampling.height, sampling.width, 3)
