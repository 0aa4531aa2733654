"""Layers against NumPy, and where a narrow model still computes in float32."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from draft_jax import VideoGrid
from models.diffusion.capture import call_and_capture
from models.diffusion.transformer.rope import rope_table
from models.wan.embeddings import ConditionEmbedder
from models.wan.layers import BlockInputs, WanBlock, attend_to_all
from models.wan.rope import split_head_dim
from tests import tiny_model

# Against float64.
F32 = {"rtol": 0, "atol": 5e-6}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize(
    ("head_dim", "split"), [(128, (44, 42, 42)), (12, (4, 4, 4)), (16, (8, 4, 4))]
)
def test_head_dim_is_split_as_published(head_dim, split):
    """[head_dim - 4 (head_dim // 6), 2 (head_dim // 6), 2 (head_dim // 6)]."""
    assert split_head_dim(head_dim) == split


def test_attend_to_all_matches_numpy():
    q, k, v = normal(1, 7, 2, 12), normal(1, 5, 2, 12, seed=1), normal(1, 5, 2, 12)
    logits = np.einsum("btnd,blnd->bntl", q, k) / np.sqrt(12)
    weights = np.exp(logits)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bntl,blnd->btnd", weights, v)
    got = attend_to_all(*(jnp.float32(x) for x in (q, k, v)))
    np.testing.assert_allclose(got, expected, **F32)


# ---------------------------------------------------------------- narrow dtypes


@pytest.fixture(scope="module")
def narrow_block():
    config = dataclasses.replace(tiny_model.CONFIG, dtype="bfloat16")
    return WanBlock(config, rngs=nnx.Rngs(0))


def block_inputs():
    grid = VideoGrid(2, 4, 6, tile=(2, 4))
    x = jnp.float32(normal(1, grid.num_tokens, 24))
    context = jnp.bfloat16(normal(1, 6, 24, seed=1))
    modulation = jnp.float32(normal(1, 1, 6, 24, seed=2))
    shared = BlockInputs(
        text=context,
        image=None,
        modulation=modulation,
        rope=rope_table(grid, split_head_dim(12), theta=10000.0),
        grid=grid,
        draft=None,
    )
    return x, shared


def test_residual_stream_stays_float32(narrow_block):
    (x, mask), sown = call_and_capture(narrow_block, *block_inputs(), None, None)
    assert x.dtype == jnp.float32
    assert mask is None
    chex.assert_shape(list(sown["attn1"].values()), (1, 2 * 4 * 6, 2, 12))
    chex.assert_type(list(sown["attn1"].values()), jnp.bfloat16)
    assert sorted(sown["attn1"]) == ["k", "q", "v"]


def test_time_embedding_is_float32_and_text_is_narrow():
    config = dataclasses.replace(tiny_model.CONFIG, dtype="bfloat16")
    embed = ConditionEmbedder(config, rngs=nnx.Rngs(0))
    time, modulation, text = embed(jnp.ones((1, 1)), jnp.ones((1, 6, 8)), None)
    assert time.dtype == modulation.dtype == jnp.float32
    assert text.dtype == jnp.bfloat16


def test_only_matrix_products_are_narrow(narrow_block):
    """Exponentials, roots, divisions: none of them takes bfloat16 but GELU's tanh."""
    structure, state = nnx.split(narrow_block)
    x, shared = block_inputs()

    def run(state, x, text, modulation):
        inputs = shared._replace(text=text, modulation=modulation)
        return nnx.merge(structure, state)(x, inputs, None, None)[0]

    program = jax.make_jaxpr(run)(state, x, shared.text, shared.modulation)
    narrow = {
        equation.primitive.name
        for equation in equations(program.jaxpr)
        if any(
            getattr(variable.aval, "dtype", None) == jnp.bfloat16
            for variable in equation.invars
        )
    }
    assert "dot_general" in narrow
    assert not narrow & {"exp", "exp2", "rsqrt", "sqrt", "div", "reduce_sum", "sin"}


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
