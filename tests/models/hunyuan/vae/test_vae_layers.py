"""Single layers against loops in NumPy; the whole is in test_vae_parity."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.hunyuan.vae import layers
from models.hunyuan.vae.config import HunyuanVAEConfig
from models.hunyuan.vae.layers import CausalConv, GroupNorm, Upsample, attend

F32 = {"rtol": 0, "atol": 4e-6}  # of values up to 9; measured on CPU: 1.5e-6
CONFIG = HunyuanVAEConfig.video(norm_num_groups=2)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def naive_conv(x, conv):
    """One output position after the other, in float64; edges stand for outside."""
    kernel, bias = np.asarray(conv.kernel, np.float64), np.asarray(conv.bias)
    rows, columns = x.shape[2:4]
    steps = [range(0, n, s) for n, s in zip(x.shape[1:4], conv.strides, strict=True)]
    result = np.zeros((x.shape[0], *map(len, steps), kernel.shape[-1]))
    places = itertools.product(*(enumerate(step) for step in steps))
    for (i, t), (j, y), (k, c) in places:
        for dt, dy, dc in itertools.product(range(3), repeat=3):
            at = (
                max(t + dt - 2, 0),
                min(max(y + dy - 1, 0), rows - 1),
                min(max(c + dc - 1, 0), columns - 1),
            )
            result[:, i, j, k] += x[:, *at].astype(np.float64) @ kernel[dt, dy, dc]
    return result + bias


@pytest.mark.parametrize("convolution", ["3d", "2d"])
@pytest.mark.parametrize("strides", [(1, 1, 1), (1, 2, 2), (2, 2, 2)], ids=str)
def test_causal_convolution(convolution, strides):
    config = HunyuanVAEConfig.video(convolution=convolution)
    conv = CausalConv(3, 5, config, strides=strides, rngs=nnx.Rngs(0))
    conv.bias[...] = random(5)
    x = random(2, 5, 4, 6, 3)
    np.testing.assert_allclose(conv(jnp.asarray(x)), naive_conv(x, conv), **F32)


@pytest.mark.parametrize("convolution", ["3d", "2d"])
@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("temporal", [False, True])
def test_upsampling_is_that_of_doubled_frames(temporal, frames, convolution):
    """The first frame stays one; the convolution sees doubled frames."""
    config = HunyuanVAEConfig.video(convolution=convolution)
    layer = Upsample(4, config, temporal=temporal, rngs=nnx.Rngs(0))
    layer.conv.bias[...] = random(4)
    x = random(2, frames, 2, 3, 4)
    doubled = x.repeat(2, axis=2).repeat(2, axis=3)
    if temporal:
        later = doubled[:, 1:].repeat(2, axis=1)
        doubled = np.concatenate([doubled[:, :1], later], axis=1)
    np.testing.assert_allclose(
        layer(jnp.asarray(x)), naive_conv(doubled, layer.conv), **F32
    )


@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_group_norm(mean):
    """By item, over all positions and the channels of a group; any mean will do."""
    norm = GroupNorm(6, CONFIG)
    norm.scale[...], norm.bias[...] = random(6), random(6, seed=1)
    x = mean + random(2, 3, 4, 5, 6) * np.float32([1, 2, 3, 4, 5, 6])
    groups = x.astype(np.float64).reshape(2, 60, 2, 3)
    centred = groups - groups.mean((1, 3), keepdims=True)
    deviation = np.sqrt(groups.var((1, 3), keepdims=True) + 1e-6)
    expected = (centred / deviation).reshape(x.shape)
    expected = expected * np.asarray(norm.scale) + np.asarray(norm.bias)
    # Values near 300 are known to 3e-5.
    tolerance = F32 if not mean else {"rtol": 0, "atol": 2e-4}
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, **tolerance)


@pytest.mark.parametrize("most_logits", [1 << 27, 40], ids=["whole", "chunks"])
def test_attention_in_chunks(monkeypatch, most_logits):
    monkeypatch.setattr(layers, "MOST_LOGITS", most_logits)
    q, k, v = random(2, 7, 4), random(2, 9, 4, seed=1), random(2, 9, 4, seed=2)
    logits = np.einsum("bqc,bkc->bqk", q, k).astype(np.float64) / 2
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    got = attend(*map(jnp.asarray, (q, k, v)))
    np.testing.assert_allclose(got, weights @ v, **F32)
