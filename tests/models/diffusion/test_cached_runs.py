"""Runs with step caches on a tiny random model, against loops around the model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from draft_jax import AttentionPlan, DraftConfig, SparsitySchedule, StepKind
from models.diffusion.caches import EasyCache, MagCache, MagRatios
from models.diffusion.pipeline import CacheWarning
from models.diffusion.sampler import Sampler
from models.diffusion.step_programs import SKIPPED
from models.loading import load_pipeline
from models.wan.inputs import WanInputs
from tests import tiny_model
from tests.published_caches import easycache_run

PROMPT = "a red ball"
STEPS = 8
SAMPLING = dataclasses.replace(tiny_model.SAMPLING, num_steps=STEPS)
# Relative to latents of size one; measured on CPU: 2e-6.
ROUNDING = 2e-5
RATIOS = MagRatios(values=((1.0,) + (0.99,) * 7,) * 2, model="tiny", source="a test")
MAG = MagCache(ratios=RATIOS, threshold=0.1, max_skips=2)  # computes 0 1 4 7
EASY = EasyCache(threshold=0.7, first_steps=2)
DENSE = AttentionPlan.dense()
# Masks are made on the sparse steps 2 and 5 of each three; 2, 3, 5 and 6 are skipped.
SPARSE = AttentionPlan.draft(
    DraftConfig.paper(sparsity=0.5),
    SparsitySchedule(dense_fraction=0.25, mask_refresh=3),
)
pytestmark = pytest.mark.filterwarnings(
    "ignore::models.diffusion.pipeline.CacheWarning"
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return load_pipeline(tiny_model.save_checkpoint(folder))


class Model:
    """Calls on one branch at a time, each with its own text."""

    def __init__(self, pipeline):
        contexts = [pipeline.text_encoder.encode([text])[:2] for text in (PROMPT, "")]
        self._contexts, self._model = contexts, pipeline.model
        self._call = nnx.jit(lambda model, x: model.call_with_residual(x)[::2])
        self._reuse = nnx.jit(lambda model, x, kept: model.reuse_residual(x, kept))

    def _inputs(self, x, timestep, branch):
        rows = jnp.asarray(x, jnp.float32)
        time = jnp.full(len(x), timestep, jnp.float32)
        return WanInputs(rows, time, *self._contexts[branch])

    def call(self, x, timestep, branch):
        return self._call(self._model, self._inputs(x, timestep, branch))

    def reuse(self, x, timestep, branch, kept):
        return self._reuse(self._model, self._inputs(x, timestep, branch), kept)


def mag_run(pipeline, sampling, skipped):
    """Each branch has its own residual; both skip the same steps."""
    model, solver = Model(pipeline), sampling.make_solver()
    latents = pipeline.start(PROMPT, sampling)[1].latents
    history, kept = solver.initial_history(latents), [None, None]
    for index, skip in enumerate(skipped):
        both = [None, None]
        for branch in range(2):
            at = latents, solver.timesteps[index], branch
            if skip:
                both[branch] = model.reuse(*at, kept[branch])
            else:
                both[branch], kept[branch] = model.call(*at)
        velocity = both[1] + sampling.guidance * (both[0] - both[1])
        latents, history = solver.update(
            latents, velocity, history, solver.coefficients(index)
        )
    return np.asarray(latents)


def easy_run(pipeline, sampling, rule):
    model, solver = Model(pipeline), sampling.make_solver()
    latents = pipeline.start(PROMPT, sampling)[1].latents
    histories = [solver.initial_history(latents)]

    def velocities(x, index):
        at = x, solver.timesteps[index]
        return np.stack([np.asarray(model.call(*at, branch)[0]) for branch in range(2)])

    def move(x, both, index):
        velocity = both[1] + sampling.guidance * (both[0] - both[1])
        x, history = solver.update(
            *map(jnp.asarray, (x, velocity)),
            histories[-1],
            solver.coefficients(index),
        )
        histories.append(history)
        return np.asarray(x)

    skipped, _, x = easycache_run(
        velocities,
        move,
        np.asarray(latents),
        num_steps=sampling.num_steps,
        threshold=rule.threshold,
        first_steps=rule.first_steps,
    )
    return skipped, x


def check_close(got, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=ROUNDING * scale)


CASES = [
    "euler-one_call",
    pytest.param("euler-two_calls", marks=pytest.mark.nightly),
    pytest.param("unipc-one_call", marks=pytest.mark.nightly),
    pytest.param("unipc-two_calls", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize("case", CASES)
def test_mag_cache_follows_a_loop(pipeline, case):
    solver, batching = case.split("-")
    sampling = dataclasses.replace(SAMPLING, solver=solver)
    result = pipeline.generate(PROMPT, sampling, cache=MAG, guidance_batching=batching)
    skipped = np.array([0, 0, 1, 1, 0, 1, 1, 0], np.bool_)
    np.testing.assert_array_equal(result.skipped, skipped)
    np.testing.assert_array_equal(
        result.dense, ~skipped[:, None] & np.ones((1, 3), bool)
    )
    np.testing.assert_array_equal(result.kept_density, result.dense)
    check_close(result.latents, mag_run(pipeline, sampling, skipped))


@pytest.mark.parametrize("case", CASES)
def test_easy_cache_follows_the_published_loop(pipeline, case):
    solver, batching = case.split("-")
    sampling = dataclasses.replace(SAMPLING, solver=solver)
    result = pipeline.generate(PROMPT, sampling, cache=EASY, guidance_batching=batching)
    skipped, latents = easy_run(pipeline, sampling, EASY)
    assert 2 <= skipped.sum() <= 5
    np.testing.assert_array_equal(result.skipped, skipped)
    check_close(result.latents, latents)


def test_residual_of_the_same_inputs_gives_the_same_velocity(pipeline):
    model = Model(pipeline)
    x = np.random.default_rng(0).normal(size=(1, 2, 8, 12, 16))
    velocity, residual = model.call(x, 700.0, 0)
    assert residual.shape[1:] == pipeline.model.residual_shape(x.shape).shape
    check_close(model.reuse(x, 700.0, 0, residual), np.asarray(velocity))
    # The blocks do something: without them the velocity is another one.
    without = model.reuse(x, 700.0, 0, jnp.zeros_like(residual))
    assert np.abs(np.asarray(without - velocity)).max() > 0.1


@pytest.mark.nightly
def test_residual_is_what_the_blocks_add(pipeline):
    """In a model whose blocks' outputs are zeros: nothing."""
    structure, parameters = nnx.split(pipeline.model)
    silent = jax.tree.map(jnp.array, parameters)
    for name in ("attn1", "attn2"):
        for leaf in ("kernel", "bias"):
            silent.blocks[name].to_out[leaf][...] *= 0.0
    for leaf in ("kernel", "bias"):
        silent.blocks.ffn.linear_2[leaf][...] *= 0.0
    x = jnp.ones((1, 2, 8, 12, 16))
    context = pipeline.text_encoder.encode([PROMPT])[:2]
    inputs = WanInputs(x, jnp.full(1, 500.0), *context)
    *_, residual = nnx.merge(structure, silent).call_with_residual(inputs)
    np.testing.assert_array_equal(residual, 0.0)


def leaves_of(masks):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(masks)]


@pytest.mark.nightly
def test_skipped_steps_keep_masks_and_owe_new_ones(pipeline):
    """Masks due on the skipped steps 2 and 5 are made on the steps 4 and 7."""
    sampler, state, inputs = pipeline.start(
        PROMPT, SAMPLING, attention=SPARSE, cache=MAG
    )
    dense = StepKind(dense=(True,) * 3, refresh=False)
    makes_masks = StepKind(dense=(False,) * 3, refresh=True)
    assert sampler.kinds == [dense, SKIPPED, makes_masks]
    programs, _ = pipeline.compile(sampler, state, inputs)
    work, new_masks, due = [], [], []
    for index in range(STEPS):
        before = leaves_of(state.masks)
        state, report = sampler.run_step(programs, state, inputs, index)
        work.append(report.work)
        due.append(state.cache.owes_masks)
        new_masks.append(before != leaves_of(state.masks))
    assert work == [
        *("dense", "dense", "skipped", "skipped"),
        *("sparse", "skipped", "skipped", "sparse"),
    ]
    assert new_masks == [False] * 4 + [True] + [False] * 2 + [True]
    assert due == [False, False, True, True, False, True, True, False]


def test_programs_of_a_data_dependent_cache(pipeline):
    """Whichever steps are skipped, the program that is needed is there."""
    cache = EasyCache(threshold=1.0, first_steps=3)
    sampler, *_ = pipeline.start(PROMPT, SAMPLING, attention=SPARSE, cache=cache)
    dense = StepKind(dense=(True,) * 3, refresh=False)
    makes_masks, reuses = (
        StepKind(dense=(False,) * 3, refresh=refresh) for refresh in (True, False)
    )
    assert set(sampler.kinds) == {dense, makes_masks, reuses, SKIPPED}
    program, owes = sampler.program(5, skip=True, owes_masks=False)
    assert (program, owes) == (SKIPPED, True)
    assert sampler.program(6, skip=False, owes_masks=True) == (makes_masks, False)
    assert sampler.program(6, skip=False, owes_masks=False) == (reuses, False)


@pytest.mark.parametrize("cache", [MAG, EASY], ids=["mag", "easy"])
def test_second_run_compiles_nothing(pipeline, cache):
    """Nor do other constants: they are read on the host."""
    first = pipeline.generate(PROMPT, SAMPLING, cache=cache)
    other = dataclasses.replace(cache, threshold=cache.threshold / 4)
    again = pipeline.generate(PROMPT, SAMPLING, cache=other)
    assert again.compile_ms == 0.0
    assert again.skipped.sum() < first.skipped.sum()
    third = pipeline.generate(PROMPT, SAMPLING, cache=cache)
    assert third.compile_ms == 0.0
    np.testing.assert_array_equal(third.latents, first.latents)


def test_memory_of_the_residual_is_given_up(pipeline):
    """A computed step writes the new residual over the old one, which it ignores."""
    start = pipeline.start(PROMPT, SAMPLING, cache=MAG)
    programs, _ = pipeline.compile(*start)
    state = start[1]
    assert state.cache.kept.shape == (2, 48, 24)  # rows, tokens, width
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    given_up = programs[None].memory_analysis().alias_size_in_bytes
    assert given_up >= nbytes
    latents = state.latents.nbytes
    assert programs[SKIPPED].memory_analysis().alias_size_in_bytes >= latents


@pytest.mark.nightly
@pytest.mark.parametrize("cache", [MAG, EASY], ids=["mag", "easy"])
def test_several_seeds_are_those_of_single_runs(pipeline, cache):
    together = pipeline.generate(PROMPT, SAMPLING, seeds=[3, 4], cache=cache)
    alone = [
        pipeline.generate(PROMPT, dataclasses.replace(SAMPLING, seed=seed), cache=cache)
        for seed in (3, 4)
    ]
    for index, result in enumerate(alone):
        np.testing.assert_array_equal(together.video[index], result.video[0])
    np.testing.assert_array_equal(together.skipped, alone[0].skipped & alone[1].skipped)


@pytest.mark.nightly
@pytest.mark.parametrize("cache", [MAG, EASY], ids=["mag", "easy"])
@pytest.mark.parametrize("guidance", [1.0, 4.0], ids=str)
def test_batches_and_runs_without_guidance(pipeline, cache, guidance):
    sampling = dataclasses.replace(SAMPLING, guidance=guidance)
    prompts = [PROMPT, "a blue boat"]
    result = pipeline.generate(prompts, sampling, cache=cache)
    plain = pipeline.generate(prompts, sampling)
    assert result.skipped.any()
    assert plain.video.shape == result.video.shape
    assert (
        0 < np.abs(plain.latents - result.latents).max() < np.abs(plain.latents).max()
    )


@pytest.mark.nightly
@pytest.mark.parametrize("cache", [MAG, EASY], ids=["mag", "easy"])
def test_both_batchings_agree_with_sparse_attention(pipeline, cache):
    runs = [
        pipeline.generate(
            PROMPT, SAMPLING, attention=SPARSE, cache=cache, guidance_batching=batching
        )
        for batching in ("one_call", "two_calls")
    ]
    np.testing.assert_array_equal(runs[0].skipped, runs[1].skipped)
    np.testing.assert_allclose(runs[0].kept_density, runs[1].kept_density, rtol=1e-6)
    check_close(runs[1].latents, runs[0].latents)
    assert not runs[0].kept_density[runs[0].skipped].any()


def test_note_of_foreign_ratios(pipeline):
    with pytest.warns(CacheWarning, match="dense attention, not percentile sparse"):
        pipeline.start(PROMPT, SAMPLING, attention=SPARSE, cache=MAG)


class WithoutResidual:
    """A model that has no `call_with_residual`."""

    num_layers = 3


@pytest.mark.usefixtures("without_jaxtyping")
def test_a_model_without_a_residual_is_refused(pipeline):
    sampler, *_ = pipeline.start(PROMPT, SAMPLING)
    parts = {
        field.name: getattr(sampler, field.name)
        for field in dataclasses.fields(Sampler)
    }
    with pytest.raises(ValueError, match=r"WithoutResidual gives no residual.*EasyC"):
        Sampler(**(parts | {"cache": MAG, "model": WithoutResidual()}))


def test_ratios_of_a_model_with_other_layers_are_refused(pipeline):
    foreign = dataclasses.replace(RATIOS, num_layers=8)
    with pytest.raises(ValueError, match=r"has 8 layers; this model has 3: .*calib"):
        pipeline.start(PROMPT, SAMPLING, cache=MagCache(ratios=foreign))
