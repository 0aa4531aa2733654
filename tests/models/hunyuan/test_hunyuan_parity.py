"""Against diffusers' model; see tests/fixtures/make_hunyuan_fixtures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from draft_jax import AttentionPlan, DraftConfig, SparsitySchedule
from models.hunyuan.convert import load_hunyuan_transformer
from tests.cases import mostly_nightly
from tests.published_hunyuan import (
    CASES,
    config_of,
    inputs_of,
    load_published,
    velocity_of,
)
from tests.tolerances import HUNYUAN_BFLOAT16_RELATIVE, HUNYUAN_PARITY


@functools.cache
def load_case(name, **changes):
    weights = load_published(name)["original"]
    return load_hunyuan_transformer(weights, config_of(name, **changes))


@functools.partial(nnx.jit, static_argnames="attention")
def run(model, inputs, step=None, attention=AttentionPlan.dense()):  # noqa: B008
    with jax.default_matmul_precision("highest"):
        return model(inputs, attention=attention, step=step)


def assert_close(got, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got / scale, expected / scale, **HUNYUAN_PARITY)


@pytest.mark.parametrize("name", mostly_nightly(CASES, ("divided",)))
def test_dense_matches_diffusers(name):
    got, masks = run(load_case(name), inputs_of(name))
    assert masks is None
    assert got.dtype == jnp.float32
    assert_close(got, velocity_of(name))


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["divided", "ragged"])
def test_draft_that_skips_nothing_matches_diffusers(name):
    attention = AttentionPlan.draft(DraftConfig.paper(sparsity=0.0))
    model = load_case(name)
    got, masks = run(model, inputs_of(name), attention=attention)
    assert masks.row_offsets.shape[0] == model.num_layers == 5
    assert_close(got, velocity_of(name))


@pytest.mark.nightly
def test_a_mix_of_dense_and_full_sparse_layers_matches_diffusers():
    """Dense layers of both stacks: the second and the fourth block."""
    config, model = DraftConfig.paper(sparsity=0.0), load_case("divided")
    inputs = inputs_of("divided")
    plan = SparsitySchedule(dense_layers=(1, 3)).plan(
        np.array([900.0, 500.0]),
        num_layers=model.num_layers,
        grid=model.grid(inputs.latents.shape),
        config=config,
    )
    got, _ = run(model, inputs, plan.step(0), AttentionPlan.draft(config))
    assert_close(got, velocity_of("divided"))


@pytest.mark.nightly
def test_real_sparsity_changes_the_result():
    attention = AttentionPlan.draft(DraftConfig.paper(sparsity=0.8))
    got, _ = run(load_case("ragged"), inputs_of("ragged"), attention=attention)
    assert np.isfinite(got).all()
    assert np.abs(got - velocity_of("ragged")).max() > 1e-2


@pytest.mark.nightly
def test_no_mask_is_a_mask_of_all_rows():
    inputs = inputs_of("unguided")
    assert inputs.context_mask.all()
    got, _ = run(load_case("unguided"), inputs._replace(context_mask=None))
    assert_close(got, velocity_of("unguided"))


@pytest.mark.parametrize("attention", ["dense", "draft"])
@pytest.mark.parametrize(
    "garbage",
    [np.nan, pytest.param(np.inf, marks=pytest.mark.nightly)],
    ids=str,
)
def test_padded_text_does_not_reach_the_video(garbage, attention):
    plans = {
        "dense": AttentionPlan.dense(),
        "draft": AttentionPlan.draft(DraftConfig.paper(sparsity=0.5)),
    }
    model, inputs = load_case("divided"), inputs_of("divided")
    expected, _ = run(model, inputs, attention=plans[attention])
    padded = jnp.where(inputs.context_mask[..., None], inputs.context, garbage)
    assert not np.array_equal(padded, inputs.context)
    got, _ = run(model, inputs._replace(context=padded), attention=plans[attention])
    np.testing.assert_array_equal(got, expected)


@pytest.mark.nightly
@pytest.mark.parametrize("name", HUNYUAN_BFLOAT16_RELATIVE)
def test_bfloat16_stays_close_to_float32(name):
    got, _ = run(load_case(name, dtype="bfloat16"), inputs_of(name))
    assert got.dtype == jnp.float32
    expected = velocity_of(name)
    relative = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert relative < HUNYUAN_BFLOAT16_RELATIVE[name]
