"""Layers against NumPy, and where a narrow model still computes in float32."""

import dataclasses
import decimal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from draft_jax import VideoGrid
from models.diffusion.capture import call_and_capture
from models.wan.embeddings import ConditionEmbedder, timestep_embedding
from models.wan.layers import (
    BlockInputs,
    LayerNorm,
    RMSNorm,
    WanBlock,
    attend_to_all,
    layer_norm,
)
from models.wan.rope import rope_table, split_head_dim
from pallas_kernels.pooling.xla import rotate_pairs
from tests import tiny_model

# Against float64; measured on CPU: 3e-7 for norms, 2e-6 for rotations.
F32 = {"rtol": 0, "atol": 5e-6}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_layer_norm_matches_numpy():
    x = 3 + 2 * normal(2, 5, 24)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1) + 1e-6)[..., None]
    np.testing.assert_allclose(layer_norm(jnp.float32(x), 1e-6), expected, **F32)
    affine = LayerNorm(tiny_model.CONFIG, rngs=nnx.Rngs(0))
    scale, bias = normal(2, 24, seed=1)
    affine.scale[...], affine.bias[...] = jnp.float32(scale), jnp.float32(bias)
    np.testing.assert_allclose(affine(jnp.float32(x)), expected * scale + bias, **F32)


def test_rms_norm_matches_numpy():
    x, scale = 2 * normal(2, 5, 24), normal(24, seed=1)
    norm = RMSNorm(tiny_model.CONFIG, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.float32(scale)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(norm(jnp.float32(x)), expected, **F32)


@pytest.mark.parametrize(
    ("head_dim", "split"), [(128, (44, 42, 42)), (12, (4, 4, 4)), (16, (8, 4, 4))]
)
def test_head_dim_is_split_as_published(head_dim, split):
    """[head_dim - 4 (head_dim // 6), 2 (head_dim // 6), 2 (head_dim // 6)]."""
    assert split_head_dim(head_dim) == split


def test_rope_matches_complex_rotation():
    """Token by token in raster order, as Wan2.1's rope_apply multiplies."""
    frames, height, width, dim = 3, 4, 6, 16
    x = normal(1, frames * height * width, 2, dim)
    expected = np.empty_like(x)
    for token, position in enumerate(np.ndindex(frames, height, width)):
        angles = [
            place * 10000.0 ** (-2 * i / channels)
            for place, channels in zip(position, (8, 4, 4), strict=True)
            for i in range(channels // 2)
        ]
        pairs = x[0, token, :, 0::2] + 1j * x[0, token, :, 1::2]
        turned = pairs * np.exp(1j * np.array(angles))
        expected[0, token, :, 0::2] = turned.real
        expected[0, token, :, 1::2] = turned.imag
    grid = VideoGrid(frames, height, width, tile=(2, 4))
    cos, sin = rope_table(grid, dim)
    assert cos.dtype == sin.dtype == jnp.float32
    tiled = jnp.float32(x[:, grid.tile_order])
    got = rotate_pairs(tiled, cos, sin)[:, grid.raster_order]
    np.testing.assert_allclose(got, expected, **F32)


def test_timestep_embedding_is_that_of_wan():
    """Whose code takes float64 throughout."""
    times = np.array([0.0, 1.0, 37.5, 999.0])
    angles = times[:, None] * 10000.0 ** (-np.arange(8) / 8)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    got = timestep_embedding(jnp.float32(times), 16)
    assert got.dtype == jnp.float32
    # Two roundings of a float32 angle near 1000 move it by 6e-5. Measured: 1.5e-5.
    np.testing.assert_allclose(got, expected, rtol=0, atol=6e-5)


def exponential(exponent):
    """The float32 nearest to e to the power of a float32, from 40 decimal digits."""
    with decimal.localcontext(prec=40):
        return np.float32(decimal.Decimal(float(exponent)).exp())


@pytest.mark.parametrize("size", [16, 32, 256])
def test_timestep_embedding_rounds_where_diffusers_does(size):
    half = size // 2
    exponents = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32)
    frequencies = [exponential(exponent / np.float32(half)) for exponent in exponents]
    # The sine of a small angle is the angle, so this shows every bit of a frequency.
    tiny = timestep_embedding(jnp.float32([2.0**-14]), size)[0, half:]
    np.testing.assert_array_equal(2.0**14 * tiny, frequencies)
    times = np.float32([0.0, 1.0, 37.5, 640.25, 999.0, 1000.0])
    angles = (times[:, None] * np.stack(frequencies)).astype(np.float64)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    got = timestep_embedding(jnp.asarray(times), size)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-7)  # measured: 6.0e-8


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
    modulation = jnp.float32(normal(1, 6, 24, seed=2))
    shared = BlockInputs(
        text=context,
        image=None,
        modulation=modulation,
        rope=rope_table(grid, 12),
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
    assert sorted(sown["attn1"]) == ["k", "q"]


def test_norms_are_float32_for_narrow_inputs():
    x = jnp.bfloat16(100 + normal(1, 3, 24))
    config = dataclasses.replace(tiny_model.CONFIG, param_dtype="bfloat16")
    for norm in (
        LayerNorm(config, rngs=nnx.Rngs(0)),
        RMSNorm(config, rngs=nnx.Rngs(0)),
    ):
        got = norm(x)
        assert got.dtype == jnp.float32
        # Equal to the norm of the same numbers in float32: nothing is rounded between.
        np.testing.assert_array_equal(got, norm(x.astype(jnp.float32)))


def test_time_embedding_is_float32_and_text_is_narrow():
    config = dataclasses.replace(tiny_model.CONFIG, dtype="bfloat16")
    embed = ConditionEmbedder(config, rngs=nnx.Rngs(0))
    time, modulation, text = embed(jnp.ones(1), jnp.ones((1, 6, 8)), None)
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
