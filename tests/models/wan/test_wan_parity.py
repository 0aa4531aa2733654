"""Against diffusers' WanTransformer3DModel; see tests/fixtures/make_wan_fixtures."""

import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx

from draft_jax import AttentionPlan, DraftConfig, SparsitySchedule
from models.wan.config import WanConfig
from models.wan.convert import load_wan_transformer
from models.wan.inputs import WanInputs
from tests.cases import mostly_nightly
from tests.fixtures.seeded_arrays import seeded_weight
from tests.tolerances import WAN_BFLOAT16_RELATIVE

FIXTURES = Path(__file__).parents[2] / "fixtures"
CASES = sorted(file.stem.removeprefix("wan_") for file in FIXTURES.glob("wan_*.safe*"))

# Largest differences measured on CPU, with outputs up to 4.8: from text 1.5e-6
# (ragged), from an image 4.4e-6.
PARITY_ATOL = 4e-6
IMAGE_PARITY_ATOL = 8e-6


def load_case(name, published=None, **changes):
    """The model, its inputs as keyword arguments, and diffusers' output.

    `published` are keys to change in the stored configuration.
    """
    tensors = {}
    with safetensors.safe_open(FIXTURES / f"wan_{name}.safetensors", "np") as file:
        for key in file.keys():  # noqa: SIM118
            tensors[key] = file.get_tensor(key)
        metadata = file.metadata()
    published = json.loads(metadata["config"]) | (published or {})
    weights = {
        key: seeded_weight(f"wan_{name}/{key}", tuple(shape))
        for key, shape in json.loads(metadata.get("shapes", "{}")).items()
    } or {
        key.removeprefix("weights/"): value
        for key, value in tensors.items()
        if key.startswith("weights/")
    }
    context = tensors["inputs/context"]
    text_length = int(metadata.get("text_rows", context.shape[1]))
    padding = text_length - context.shape[1]
    context = np.pad(context, ((0, 0), (0, padding), (0, 0)))
    config = WanConfig.from_dict(
        published,
        **{
            "text_length": text_length,
            "tile": (2, 4),
            "dtype": "float32",
            **changes,
        },
    )
    inputs = WanInputs(
        # diffusers keeps channels before frames.
        latents=jnp.asarray(tensors["inputs/latents"].transpose(0, 2, 3, 4, 1)),
        timesteps=jnp.asarray(tensors["inputs/timesteps"]),
        context=jnp.asarray(context),
        context_lengths=jnp.asarray(tensors["inputs/context_lengths"]),
    )
    if config.image_dim is not None:
        tokens = jnp.asarray(tensors["inputs/image_tokens"])
        inputs = inputs._replace(image_tokens=tokens)
    expected = tensors["outputs/velocity"].transpose(0, 2, 3, 4, 1)
    return load_wan_transformer(weights, config), inputs, expected


@functools.partial(nnx.jit, static_argnames="attention")
def run(model, inputs, step=None, attention=AttentionPlan.dense()):  # noqa: B008
    with jax.default_matmul_precision("highest"):
        return model(inputs, attention=attention, step=step)


def test_there_are_fixtures():
    assert len(CASES) == 6


@pytest.mark.parametrize("name", CASES)
def test_dense_matches_diffusers(name):
    model, inputs, expected = load_case(name)
    got, masks = run(model, inputs)
    assert masks is None
    assert got.dtype == jnp.float32
    atol = IMAGE_PARITY_ATOL if name == "image" else PARITY_ATOL
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


def test_no_name_for_the_norm_still_means_the_norm():
    """diffusers' `WanAttention` makes it without looking at `qk_norm`."""
    model, inputs, expected = load_case("divided", published={"qk_norm": None})
    got, _ = run(model, inputs)
    np.testing.assert_allclose(got, expected, rtol=0, atol=PARITY_ATOL)


@pytest.mark.parametrize(
    "tile", mostly_nightly([(1, 1), (3, 2), (8, 16)], [(3, 2), (8, 16)]), ids=str
)
def test_the_tile_does_not_change_the_result(tile):
    model, inputs, expected = load_case("ragged", tile=tile)
    got, _ = run(model, inputs)
    np.testing.assert_allclose(got, expected, rtol=0, atol=PARITY_ATOL)


@pytest.mark.parametrize(
    "case",
    mostly_nightly(
        itertools.product(["ragged", "wide_head"], ["percentile", "row_topk"]),
        [("ragged", "percentile"), ("wide_head", "row_topk")],
    ),
    ids="-".join,
)
def test_draft_that_skips_nothing_matches_diffusers(case):
    name, selection = case
    config = DraftConfig.paper(sparsity=0.0, selection=selection)
    model, inputs, expected = load_case(name)
    got, masks = run(model, inputs, attention=AttentionPlan.draft(config))
    assert masks.row_offsets.shape[0] == model.config.num_layers
    np.testing.assert_allclose(got, expected, rtol=0, atol=PARITY_ATOL)


def test_a_mix_of_dense_and_full_sparse_layers_matches_diffusers():
    config = DraftConfig.paper(sparsity=0.0)
    model, inputs, expected = load_case("wide_head")
    plan = SparsitySchedule(dense_layers=(0, 2)).plan(
        np.array([900.0, 500.0]),
        num_layers=model.config.num_layers,
        grid=model.grid(inputs.latents.shape),
        config=config,
    )
    got, _ = run(model, inputs, plan.step(0), AttentionPlan.draft(config))
    np.testing.assert_allclose(got, expected, rtol=0, atol=PARITY_ATOL)


def test_real_sparsity_changes_the_result():
    model, inputs, expected = load_case("ragged")
    got, _ = run(
        model, inputs, attention=AttentionPlan.draft(DraftConfig.paper(sparsity=0.8))
    )
    assert np.isfinite(got).all()
    assert np.abs(got - expected).max() > 1e-2


def test_image_tokens_change_the_result():
    model, inputs, expected = load_case("image")
    tokens = inputs.image_tokens.at[1].multiply(-1.0)
    got, _ = run(model, inputs._replace(image_tokens=tokens))
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=IMAGE_PARITY_ATOL)
    assert np.abs(got[1] - expected[1]).max() > 1e-2


@pytest.mark.parametrize("name", WAN_BFLOAT16_RELATIVE)
def test_bfloat16_stays_close_to_float32(name):
    model, inputs, expected = load_case(name, dtype="bfloat16")
    got, _ = run(model, inputs)
    assert got.dtype == jnp.float32
    relative = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert relative < WAN_BFLOAT16_RELATIVE[name]
