"""Measured ratios against a loop around the model."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from draft_jax import AttentionPlan, DraftConfig
from models.diffusion.caches import MagCache
from models.diffusion.calibration import measure_ratios
from models.diffusion.results import StopGeneration
from models.loading import load_pipeline
from models.wan.inputs import WanInputs
from tests import tiny_model

PROMPT = "a red ball"
# Ratios are rounded to five digits; float32 adds less.
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return load_pipeline(tiny_model.save_checkpoint(folder))


def measure(pipeline, sampling=tiny_model.SAMPLING, **options):
    options = {"attention": AttentionPlan.dense(), "model": "tiny"} | options
    return measure_ratios(pipeline, PROMPT, sampling, **options)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "batching", ["one_call", pytest.param("two_calls", marks=pytest.mark.nightly)]
)
def test_ratios_are_those_of_a_loop(pipeline, batching):
    """Means over tokens of ratios of lengths, each branch by itself, in float64."""
    ratios = measure(pipeline, guidance_batching=batching)
    call = nnx.jit(lambda model, inputs: model.call_with_residual(inputs)[::2])
    sampling = tiny_model.SAMPLING
    solver = sampling.make_solver()
    latents = pipeline.start(PROMPT, sampling)[1].latents
    lengths, expected = [None, None], np.ones((2, sampling.num_steps))
    contexts = [pipeline.text_encoder.encode([text])[:2] for text in (PROMPT, "")]
    for index, timestep in enumerate(solver.timesteps):
        velocities = []
        for branch, context in enumerate(contexts):
            time = np.full(1, timestep, np.float32)
            inputs = WanInputs(latents, jnp.asarray(time), *context)
            velocity, residual = call(pipeline.model, inputs)
            squares = np.square(np.asarray(residual, np.float64))
            new = np.sqrt(squares.sum(-1))
            if index:
                expected[branch, index] = (new / lengths[branch]).mean()
            lengths[branch] = new
            velocities.append(velocity)
        positive, negative = velocities
        velocity = negative + sampling.guidance * (positive - negative)
        latents = solver.step(latents, velocity, index)
    np.testing.assert_allclose(ratios.values, expected, rtol=0, atol=ROUNDING)
    assert np.ptp(expected[0]) > 100 * ROUNDING


@pytest.mark.nightly
def test_ratios_say_what_they_belong_to(pipeline):
    """Those of a run without guidance have one branch, and suit the same run."""
    attention = AttentionPlan.draft(DraftConfig.paper(sparsity=0.5))
    sampling = dataclasses.replace(tiny_model.SAMPLING, guidance=1.0, num_steps=3)
    steps = []
    ratios = measure(pipeline, sampling, attention=attention, callback=steps.append)
    assert [report.work for report in steps] == ["dense", "sparse", "sparse"]
    assert (len(ratios.values), ratios.num_steps, ratios.num_layers) == (1, 3, 3)
    assert (ratios.model, ratios.shift) == ("tiny", 3.0)
    assert ratios.attention == "percentile sparse (50 %)"
    assert MagCache(ratios=ratios).notes(sampling.make_solver(), attention) == []


def test_calibration_can_be_stopped(pipeline):
    def stop(report):
        raise StopGeneration

    with pytest.raises(StopGeneration):
        measure(pipeline, callback=stop)
