"""The memory of a run by its estimate, beside that of steps as they are compiled."""

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from flax import nnx

from draft_jax import AttentionPlan, DraftConfig
from models.app.limits import STEP_ARRAYS
from models.diffusion.interfaces import TextContext
from models.diffusion.sampler import Sampler
from models.diffusion.schedulers import make_solver
from models.diffusion.step_programs import StepInputs
from models.hunyuan.transformer import HunyuanTransformer
from models.wan.transformer import WanTransformer
from tests import hunyuan_folders, tiny_model

DRAFT = AttentionPlan.draft(DraftConfig(sparsity=0.75))


def wan(dim):
    config = dataclasses.replace(
        tiny_model.CONFIG, dim=dim, ffn_dim=4 * dim, num_heads=2, tile=(8, 16)
    )
    return SimpleNamespace(model=WanTransformer(config, rngs=nnx.Rngs(0)), guided=True)


def hunyuan(dim):
    quarter = dim // 8
    config = dataclasses.replace(
        hunyuan_folders.CONFIG,
        dim=dim,
        rope_channels=(quarter, quarter, 2 * quarter),
        text_length=16,
    )
    return SimpleNamespace(
        model=HunyuanTransformer(config, rngs=nnx.Rngs(0)), guided=False
    )


def step_bytes(made, frames, attention):
    """Memory that XLA says the largest of a run's steps takes beside its arguments."""
    model, rows = made.model, 2 if made.guided else 1
    config = model.config
    sampler = Sampler.create(
        model,
        latent_shape=(frames, 16, 32, config.in_channels),
        solver=make_solver("euler", num_steps=4, shift=3.0),
        attention=attention,
    )
    text = jnp.zeros((rows, config.text_length, config.text_dim))
    told = getattr(config, "pooled_dim", None)
    inputs = StepInputs(
        TextContext(
            text,
            jnp.full(rows, 5),
            None if told is None else jnp.zeros((rows, told)),
        ),
        guidance=jnp.float32(4),
        embedded_guidance=None if told is None else jnp.float32(6),
    )
    state = sampler.initial_state(1, seed=0, guided=made.guided)
    programs = sampler.compile(state, inputs).values()
    return max(
        program.memory_analysis().temp_size_in_bytes for program in programs
    ), rows * model.grid(sampler.latent_shape).num_tokens


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("make", "dim"),
    [(wan, 64), (wan, 256), (hunyuan, 128)],
    ids=["wan-64", "wan-256", "hunyuan-128"],
)
@pytest.mark.parametrize(
    "attention", [AttentionPlan.dense(), DRAFT], ids=["dense", "draft"]
)
def test_steps_grow_with_tokens_no_faster_than_the_estimate(
    make, dim, attention, measured
):
    """By 16 numbers of the model's width for each token, whatever model it is."""
    made = make(dim)
    (small, few), (large, many) = (step_bytes(made, n, attention) for n in (4, 32))
    arrays = (large - small) / (many - few) / (4 * dim)
    measured(f"arrays of a step, {make.__name__} of width {dim}", arrays)
    assert STEP_ARRAYS / 4 <= arrays <= STEP_ARRAYS
