"""Against transformers' UMT5EncoderModel; see tests/fixtures/make_umt5_fixtures."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.umt5.config import UMT5Config
from models.umt5.encoder import UMT5Encoder
from models.umt5.layers import relative_position_buckets
from tests.models.umt5.conftest import CASES, FIXTURES, TINY
from tests.tolerances import UMT5_BFLOAT16_RELATIVE, UMT5_PARITY


@nnx.jit
def run(model, ids, lengths):
    with jax.default_matmul_precision("highest"):
        return model(ids, lengths)


@pytest.mark.parametrize("name", CASES)
def test_encoder_matches_transformers(cases, name):
    case = cases[name]
    got = run(case.model(), case.ids, case.lengths)
    assert got.dtype == jnp.float32
    inside = np.arange(case.ids.shape[1]) < case.lengths[:, None]
    expected = np.where(inside[..., None], case.outputs["float32"], 0.0)
    np.testing.assert_allclose(got, expected, **UMT5_PARITY)
    np.testing.assert_array_equal(got[~inside], 0.0)


@pytest.mark.parametrize("name", UMT5_BFLOAT16_RELATIVE)
def test_bfloat16_is_as_close_as_the_published_code(cases, name):
    case = cases[name]
    model = case.model(dtype="bfloat16", param_dtype="bfloat16")
    got = np.asarray(run(model, case.ids, case.lengths))
    inside = np.arange(case.ids.shape[1]) < case.lengths[:, None]
    expected = case.outputs["float32"][inside]
    ours, theirs = (
        np.linalg.norm(output[inside] - expected) / np.linalg.norm(expected)
        for output in (got, case.outputs["bfloat16"])
    )
    assert ours < UMT5_BFLOAT16_RELATIVE[name]
    assert ours < theirs


def test_padding_changes_nothing(cases):
    case = cases["wide_inner"]
    model = case.model()
    wide = run(model, case.ids, case.lengths)
    other_ids = np.where(np.arange(9) < case.lengths[:, None], case.ids, 7)
    np.testing.assert_array_equal(run(model, other_ids, case.lengths), wide)
    narrow = run(model, case.ids[1:2, :7], case.lengths[1:2])
    np.testing.assert_allclose(narrow, wide[1:2, :7], **UMT5_PARITY)


@pytest.mark.parametrize("sizes", ["32,128", "8,20", "16,64", "32,100", "64,512"])
def test_buckets_match_torch(sizes):
    table = json.loads((FIXTURES / "umt5_buckets.json").read_text())
    expected = np.array(table[sizes])  # of keys -600 to 600 tokens after the query
    got = relative_position_buckets(601, *map(int, sizes.split(",")))
    np.testing.assert_array_equal(got[600], expected[:601])
    np.testing.assert_array_equal(got[0], expected[600:])
    np.testing.assert_array_equal(got[1:, 1:], got[:-1, :-1])


def test_buckets_of_a_hand_worked_case():
    # Four rows a side: distances 0 and 1 alone, 2 to 7 by the square root, then all.
    expected = [[0, 5, 6, 6, 6, 6, 7], [1, 0, 5, 6, 6, 6, 6]]
    np.testing.assert_array_equal(relative_position_buckets(7, 8, 18)[:2], expected)


def test_the_program_does_not_grow_with_depth():
    sizes = []
    for num_layers in (1, 5):
        config = UMT5Config.xxl(num_layers=num_layers)
        model = nnx.eval_shape(
            lambda config=config: UMT5Encoder(config, rngs=nnx.Rngs(0))
        )
        structure, state = nnx.split(model)
        trace = jax.make_jaxpr(
            lambda state, ids, lengths, structure=structure: nnx.merge(
                structure, state
            )(ids, lengths)
        )
        ids = jax.ShapeDtypeStruct((1, 64), jnp.int32)
        program = trace(state, ids, jax.ShapeDtypeStruct((1,), jnp.int32))
        sizes.append(str(program).count("\n"))
    assert sizes[0] == sizes[1]


def test_the_preset_has_the_published_number_of_parameters():
    model = nnx.eval_shape(lambda: UMT5Encoder(UMT5Config.xxl(), rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == 5_680_910_336
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}


def test_random_encoders_are_reproducible_and_of_order_one():
    one, same, other = (UMT5Encoder(TINY, rngs=nnx.Rngs(seed)) for seed in (3, 3, 4))
    ids = jnp.arange(20)[None]
    outputs = [run(model, ids, jnp.array([20])) for model in (one, same, other)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[0] - outputs[2]).max() > 0.1
    assert 0.9 < np.std(outputs[0]) < 1.1
    kernel = np.asarray(one.blocks.attn.k.kernel[...], np.float32)
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1  # layers differ


@pytest.mark.usefixtures("without_jaxtyping")
def test_bad_inputs_are_named():
    model = nnx.eval_shape(lambda: UMT5Encoder(TINY, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"ids of shape \(2, 3\) and lengths of shape"):
        model(jnp.zeros((2, 3), jnp.int32), jnp.ones(1, jnp.int32))
