"""Norms that all transformers share, against NumPy."""

import jax.numpy as jnp
import numpy as np

from models.diffusion.transformer.layers import LayerNorm, RMSNorm, layer_norm

# Against float64; measured on CPU: 3e-7.
F32 = {"rtol": 0, "atol": 5e-6}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_layer_norm_matches_numpy():
    x = 3 + 2 * normal(2, 5, 24)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1) + 1e-6)[..., None]
    np.testing.assert_allclose(layer_norm(jnp.float32(x), 1e-6), expected, **F32)
    affine = LayerNorm(24, eps=1e-6, param_dtype="float32")
    scale, bias = normal(2, 24, seed=1)
    affine.scale[...], affine.bias[...] = jnp.float32(scale), jnp.float32(bias)
    np.testing.assert_allclose(affine(jnp.float32(x)), expected * scale + bias, **F32)


def test_rms_norm_matches_numpy():
    x, scale = 2 * normal(2, 5, 24), normal(24, seed=1)
    norm = RMSNorm(24, eps=1e-6, param_dtype="float32")
    norm.scale[...] = jnp.float32(scale)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(norm(jnp.float32(x)), expected, **F32)


def test_norms_are_float32_for_narrow_inputs():
    x = jnp.bfloat16(100 + normal(1, 3, 24))
    for kind in (LayerNorm, RMSNorm):
        norm = kind(24, eps=1e-6, param_dtype="bfloat16")
        got = norm(x)
        assert got.dtype == jnp.float32
        # Equal to the norm of the same numbers in float32: nothing is rounded between.
        np.testing.assert_array_equal(got, norm(x.astype(jnp.float32)))
