"""Two transformers that take turns: which steps are whose, and what starts anew."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from draft_jax import AttentionPlan, DraftConfig, SparsitySchedule
from models.diffusion.caches import EasyCache
from models.diffusion.experts import (
    ResidentExperts,
    StreamedExperts,
    expert_names,
    first_steps,
)
from models.diffusion.inspection import inspect_attention
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.sampler import Sampler
from models.diffusion.sampling import Sampling
from models.diffusion.schedulers import FlowEuler
from tests import tiny_wan2_2 as tiny

# With shift 1 the noise levels of 8 steps fall evenly from 1000 to 125.
SOLVER = FlowEuler(num_steps=8, shift=1.0)
SAMPLING = Sampling(
    frames=9,
    height=8 * tiny.ROWS,
    width=8 * tiny.COLUMNS,
    num_steps=8,
    solver=SOLVER,
    guidance=1.0,
)


class OneText:
    """A text encoder that knows one text."""

    def encode(self, prompts):
        context = tiny.make_context("text")
        return jax.tree.map(lambda leaf: leaf[: len(prompts)], context)


@pytest.fixture(scope="module")
def models():
    config = tiny.make_config("t2v")
    return tuple(tiny.make_transformer(config, side) for side in ("high", "low"))


def make_pipeline(models, boundary=560.0):
    both = ResidentExperts(*models, boundary=boundary)
    codec = tiny.make_codec(averages=False)
    return VideoPipeline(both.model, None, codec, experts=both)


def test_steps_are_those_of_the_expert_for_their_noise(models):
    both = ResidentExperts(*models, boundary=875.0)
    times = np.array([999.0, 875.0, 874.0, 10.0])
    names = expert_names(times, both.boundary)
    assert names == ["high", "high", "low", "low"]  # the boundary is high noise
    assert first_steps(names) == (0, 2)
    assert first_steps(names[:2]) == first_steps(names[2:]) == (0,)
    assert both.take("high") is models[0]
    assert both.take("low") is models[1]


@pytest.mark.nightly
@pytest.mark.parametrize("boundary", [0.0, 1000.0, float("nan")], ids=str)
def test_boundaries_are_timesteps(models, boundary):
    with pytest.raises(ValueError, match="must be a timestep between 0 and 1000"):
        ResidentExperts(*models, boundary=boundary)


@pytest.mark.nightly
def test_experts_that_do_not_fit_are_refused(models):
    high, low = models
    other = tiny.make_transformer(tiny.make_config("i2v"), "low")
    with pytest.raises(ValueError, match="the experts differ"):
        ResidentExperts(high, other, boundary=500.0)
    with pytest.raises(ValueError, match="other expert's weights do not have the mod"):
        StreamedExperts(high, nnx.state(other), resident="high", boundary=500.0)
    single = VideoPipeline(low, None, tiny.make_codec(averages=False))
    for name in ("low_guidance", "boundary"):
        wrong = dataclasses.replace(SAMPLING, **{name: 3.0})
        with pytest.raises(ValueError, match=rf"{name}=3\.0 is given, but this model"):
            single.generate(tiny.make_context("text"), wrong)


def test_masks_are_made_anew_by_the_second_expert(models):
    plan = AttentionPlan.draft(
        DraftConfig(sparsity=0.5),
        SparsitySchedule(dense_fraction=0.0, mask_refresh=3),
    )
    sampler = Sampler.create(
        models[0],
        latent_shape=(tiny.FRAMES, tiny.ROWS, tiny.COLUMNS, 4),
        solver=SOLVER,
        attention=plan,
        experts=ResidentExperts(*models, boundary=560.0),
    )
    assert sampler.expert_starts == (0, 4)
    programs = [
        sampler.program(index, skip=False, owes_masks=False)[0] for index in range(8)
    ]
    refreshed = [program.refresh for program in programs]
    assert refreshed == [True, False, False, True, True, False, True, False]
    assert set(programs) <= set(sampler.kinds)


@pytest.mark.nightly
def test_each_expert_has_its_dense_steps_and_layers(models):
    """By hand: t is 1000, 875, ... 125, and 600 leaves the last four to low noise."""
    rules = SparsitySchedule(
        dense_above_timestep=800.0,
        dense_layers=(0,),
        low_noise=SparsitySchedule(dense_fraction=0.5, dense_layers=(1,)),
    )
    plan = AttentionPlan.draft(DraftConfig(sparsity=0.5), rules)
    sampling = dataclasses.replace(SAMPLING, boundary=600.0)
    pipeline = make_pipeline(models, boundary=930.0)
    result = pipeline.generate(tiny.make_context("text"), sampling, attention=plan)
    sparse = ~result.dense
    expected = [[0, 0]] * 2 + [[0, 1]] * 2 + [[0, 0]] * 2 + [[1, 0]] * 2
    np.testing.assert_array_equal(sparse, np.array(expected, bool))
    assert (result.kept_density[sparse] < 1.0).all()
    single = VideoPipeline(models[1], None, tiny.make_codec(averages=False))
    with pytest.raises(ValueError, match="with one transformer leave low_noise out"):
        single.generate(tiny.make_context("text"), SAMPLING, attention=plan)


@pytest.mark.nightly
def test_a_cache_starts_anew_at_the_switch(models):
    """Of all steps that may be skipped, the first two of an expert never are."""
    cache = EasyCache(threshold=1e9, first_steps=1)
    result = make_pipeline(models).generate(
        tiny.make_context("text"), SAMPLING, cache=cache
    )
    skipped = [False, False, True, True, False, False, True, False]
    assert result.skipped.tolist() == skipped


@pytest.mark.nightly
def test_guidance_is_that_of_the_expert(models):
    """A run whose second half has guidance 1 ends as one that changes there."""
    text, negative = (tiny.make_context(name) for name in ("text", "other"))
    both = dataclasses.replace(SAMPLING, guidance=4.0, low_guidance=1.0)
    got = make_pipeline(models).generate(text, both, negative_context=negative)
    first = dataclasses.replace(SAMPLING, guidance=4.0)
    pipeline = make_pipeline(models)
    sampler, state, inputs = pipeline.start(text, first, negative_context=negative)
    programs, _ = pipeline.compile(sampler, state, inputs)
    for index in range(8):
        if index == 4:
            inputs = inputs._replace(guidance=jax.numpy.float32(1.0))
        state, _ = sampler.run_step(programs, state, inputs, index)
    np.testing.assert_array_equal(got.latents, np.asarray(state.latents))
    assert len(pipeline._compiled) == 1


@pytest.mark.nightly
def test_a_look_at_a_step_is_one_at_its_expert(models):
    """With both experts equal but for the one that looks, the maps differ."""
    high, low = models
    plan = AttentionPlan.draft(DraftConfig(sparsity=0.5), SparsitySchedule())

    def look(pair):
        pipeline = make_pipeline(pair, boundary=930.0)
        pipeline = dataclasses.replace(pipeline, text_encoder=OneText())
        view = inspect_attention(pipeline, "a cat", SAMPLING, step=1, attention=plan)
        return view.draft_maps

    of_low = look((high, low))
    assert np.abs(of_low - look((high, high))).max() > 1e-3
