"""Runs of a model in FP8: their last computed step rounds no activations."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import AttentionPlan, DraftConfig, SparsitySchedule, StepKind
from models.diffusion.caches import EasyCache, MagCache, MagRatios
from models.diffusion.comparison import run_report
from models.diffusion.step_programs import SKIPPED, WeightOnly
from models.diffusion.transformer.float8 import weight_only
from models.loading import load_pipeline
from tests import tiny_model

PROMPT = "a red ball"
STEPS = 4
SAMPLING = dataclasses.replace(tiny_model.SAMPLING, num_steps=STEPS)
DENSE = StepKind(dense=(True,) * 3, refresh=False)
SPARSE = StepKind(dense=(False,) * 3, refresh=True)
PLAN = AttentionPlan.draft(
    DraftConfig.paper(sparsity=0.5), SparsitySchedule(dense_fraction=0.5)
)
REFUSED = r"weight_only_steps=.* must be an integer >= 0"
RATIOS = MagRatios(values=((1.0,) + (0.99,) * 3,) * 2, model="tiny", source="a test")
# Computes the first step and the third.
MAG = MagCache(ratios=RATIOS, threshold=0.1, max_skips=1, retention=0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def pipeline(folder):
    return load_pipeline(folder, linears="float8")


def run(pipeline, state=None, steps=range(STEPS)):
    """Runs some steps of a run, from a state of another; dense and without a cache."""
    sampler, first, inputs = pipeline.start(PROMPT, SAMPLING)
    programs, _ = pipeline.compile(sampler, first, inputs)
    state, reports = first if state is None else state, []
    for index in steps:
        state, report = sampler.run_step(programs, state, inputs, index)
        reports.append(report)
    return state, reports


def test_only_the_last_step_rounds_no_activations(pipeline):
    """Against the same steps of models that always round, and never."""
    always = dataclasses.replace(pipeline, weight_only_steps=0)
    never = dataclasses.replace(always, model=weight_only(pipeline.model))
    last = STEPS - 1
    state, reports = run(always, steps=range(last))
    assert not any(report.weight_only for report in reports)
    expected, _ = run(never, state, steps=[last])
    got, reports = run(pipeline)
    np.testing.assert_allclose(got.latents, expected.latents, rtol=0, atol=1e-6)
    assert [report.weight_only for report in reports] == [False] * last + [True]
    assert {report.work for report in reports} == {"dense"}
    rounded, _ = run(always)
    assert float(jnp.abs(got.latents - rounded.latents).max()) > 1e-4


@pytest.mark.parametrize(
    ("cache", "expected"),
    [
        (None, [DENSE, DENSE, SPARSE, WeightOnly(SPARSE)]),
        (MAG, [DENSE, SKIPPED, WeightOnly(SPARSE), SKIPPED]),
        # It computes the last step, and may skip the two before.
        (EasyCache(first_steps=1), [DENSE, SKIPPED, SKIPPED, WeightOnly(SPARSE)]),
    ],
    ids=["none", "mag", "easy"],
)
def test_it_is_the_last_that_is_computed(pipeline, cache, expected):
    sampler, *_ = pipeline.start(PROMPT, SAMPLING, attention=PLAN, cache=cache)
    programs = [
        sampler.program(index, skip=bool(skip), owes_masks=False)[0]
        for index, skip in enumerate(sampler.skippable)
    ]
    assert programs == expected
    assert set(expected) <= set(sampler.kinds)
    assert sampler.weight_only.tolist() == [isinstance(p, WeightOnly) for p in expected]


@pytest.mark.parametrize(
    ("cache", "steps"), [(None, [3]), (MAG, [2])], ids=["none", "mag"]
)
def test_results_and_reports_name_the_step(pipeline, cache, steps):
    result = pipeline.generate(PROMPT, SAMPLING, cache=cache)
    assert list(result.weight_only_steps) == steps
    assert run_report(result)["weight_only_steps"] == steps


@pytest.mark.parametrize("steps", [0, 1, 2, STEPS + 1])
def test_number_of_steps(pipeline, steps):
    changed = dataclasses.replace(pipeline, weight_only_steps=steps)
    sampler, *_ = changed.start(PROMPT, SAMPLING)
    expected = [index >= STEPS - steps for index in range(STEPS)]
    assert sampler.weight_only.tolist() == expected


def test_models_without_fp8_have_no_such_step(folder):
    sampler, *_ = load_pipeline(folder).start(PROMPT, SAMPLING)
    assert not sampler.weight_only.any()
    assert sampler.kinds == [None]


@pytest.mark.parametrize("steps", [-1, True])
def test_wrong_numbers_of_steps_are_refused(pipeline, steps):
    with pytest.raises(ValueError, match=REFUSED):
        dataclasses.replace(pipeline, weight_only_steps=steps)
    sampler, *_ = pipeline.start(PROMPT, SAMPLING)
    with pytest.raises(ValueError, match=REFUSED):
        dataclasses.replace(sampler, weight_only_steps=steps)
