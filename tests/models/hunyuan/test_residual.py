"""Steps that reuse the residual of the blocks, with text in the sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import AttentionPlan, DraftConfig
from models.diffusion.caches import EasyCache, MagCache, published_ratios
from models.diffusion.sampler import Sampler
from models.diffusion.schedulers import FlowEuler
from models.diffusion.step_programs import StepInputs
from models.hunyuan.convert import load_hunyuan_transformer
from models.hunyuan.inputs import HunyuanInputs
from tests.models.hunyuan import test_custom
from tests.models.hunyuan.test_pipeline_parity import (
    SAMPLING,
    VALID,
    make_context,
    make_pipeline,
)
from tests.published_hunyuan import config_of, inputs_of, load_published

# Relative to the greatest velocity; measured: 3e-7.
ROUNDING = 1e-5


@functools.cache
def results(name):
    """Velocity, residual, and the velocities of two reused residuals."""
    if name == "divided":
        weights = load_published("divided")["diffusers"]
        model = load_hunyuan_transformer(weights, config_of("divided"))
        inputs: HunyuanInputs = inputs_of("divided")
    else:
        model, inputs = (
            test_custom.load("published"),
            test_custom.make_inputs("published"),
        )

    def run(inputs):
        velocity, _, residual = model.call_with_residual(inputs)
        same = model.reuse_residual(inputs, residual)
        without = model.reuse_residual(inputs, jnp.zeros_like(residual))
        return velocity, residual, same, without

    shape = model.residual_shape(inputs.latents.shape)
    return shape, *map(np.asarray, jax.jit(run)(inputs))


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["divided", "custom"])
def test_residual_of_the_same_inputs_gives_the_same_velocity(name):
    """HunyuanCustom's reference frame stands before the video and is left out."""
    shape, velocity, residual, same, without = results(name)
    assert residual.shape[1:] == shape.shape
    assert residual.dtype == shape.dtype
    scale = np.abs(velocity).max()
    np.testing.assert_allclose(same / scale, velocity / scale, rtol=0, atol=ROUNDING)
    assert np.abs(without - velocity).max() > 0.01 * scale


@pytest.mark.nightly
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    "cache",
    [
        MagCache(ratios=published_ratios("hunyuanvideo-720p"), threshold=0.9),
        EasyCache(threshold=0.5, first_steps=3),
    ],
    ids=["mag", "easy"],
)
def test_runs_skip_steps(cache, sparse):
    """A distilled model has one branch; skipped steps change little."""
    model = make_pipeline().model
    attention = AttentionPlan.dense()
    if sparse:
        attention = AttentionPlan.draft(DraftConfig.paper(sparsity=0.5))
    latents = {}
    for rule in (None, cache):
        sampler = Sampler.create(
            model,
            latent_shape=(3, 4, 6, 4),
            solver=FlowEuler(num_steps=SAMPLING.num_steps, shift=7.0),
            attention=attention,
            cache=rule,
        )
        inputs = StepInputs(
            make_context("prompts", VALID),
            guidance=jnp.float32(1.0),
            embedded_guidance=jnp.float32(6.0),
        )
        state = sampler.initial_state(2, seed=0, guided=False)
        programs = sampler.compile(state, inputs)
        state, reports = sampler.run_steps(programs, state, inputs, SAMPLING.num_steps)
        latents[rule] = np.asarray(state.latents)
    work = [report.work for report in reports]
    assert work[0] == "dense"
    assert 2 <= work.count("skipped") <= 7
    if isinstance(cache, MagCache):
        skipped = cache.skippable(SAMPLING.num_steps)
        np.testing.assert_array_equal(skipped, [one == "skipped" for one in work])
    difference = np.abs(latents[cache] - latents[None]).max()
    assert 0 < difference < np.abs(latents[None]).max()
