"""Single layers against loops in NumPy; the whole is in test_vae_parity."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.wan.vae import layers
from models.wan.vae.config import Level, WanVAEConfig
from models.wan.vae.layers import (
    CausalConv,
    Downsample,
    FrameAttention,
    RMSNorm,
    Upsample,
)
from pallas_kernels.common.device import Device

F32 = {"rtol": 0, "atol": 2e-6}  # measured on CPU: 5e-7


def naive_causal_conv(x, kernel, bias, past, stride=1):
    """One output position after the other, in float64."""
    x = np.concatenate([past, x], axis=1).astype(np.float64)
    taps, rows, columns, _, out = kernel.shape
    pad = ((0, 0), (0, 0), (rows // 2,) * 2, (columns // 2,) * 2, (0, 0))
    padded = np.pad(x, pad)
    frames = (x.shape[1] - taps) // stride + 1
    result = np.zeros((x.shape[0], frames, *x.shape[2:4], out))
    for t, y, c in itertools.product(*map(range, result.shape[1:4])):
        start = t * stride
        window = padded[:, start : start + taps, y : y + rows, c : c + columns]
        result[:, t, y, c] = np.einsum("btyxi,tyxio->bo", window, kernel) + bias
    return result


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("convolution", ["3d", "2d"])
@pytest.mark.parametrize(("side", "stride"), [(3, 1), (1, 1), (1, 2)], ids=str)
def test_causal_convolution(convolution, side, stride):
    config = WanVAEConfig.wan2_1(convolution=convolution)
    conv = CausalConv(3, 5, config, side=side, stride=stride, rngs=nnx.Rngs(0))
    conv.bias[...] = random(5)
    kernel, bias = np.asarray(conv.kernel), np.asarray(conv.bias)
    x = random(2, 8, 3, 4, 3)
    past = np.zeros((2, 3 - stride, 3, 4, 3), np.float32)

    start, cache = conv(jnp.asarray(x[:, :2]), None)
    rest, cache = conv(jnp.asarray(x[:, 2:]), cache)
    expected = naive_causal_conv(x, kernel, bias, past, stride)
    np.testing.assert_allclose(jnp.concatenate([start, rest], 1), expected, **F32)
    np.testing.assert_array_equal(cache, x[:, stride - 3 :])


def test_norm():
    norm = RMSNorm(6, WanVAEConfig.wan2_1())
    norm.gamma[...] = random(6)
    x = random(2, 1, 2, 3, 6)
    x[0, 0, 0, 0] = 0  # divides by a tiny number instead of zero
    length = np.sqrt((x.astype(np.float64) ** 2).sum(-1, keepdims=True))
    expected = x / np.maximum(length, 1e-12) * np.sqrt(6) * np.asarray(norm.gamma)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, **F32)


@pytest.mark.parametrize(
    ("temporal", "spatial"), [(False, True), (True, True), (True, False)], ids=str
)
def test_the_first_frame_is_downsampled_alone(temporal, spatial):
    """Frames 1, 4 and 4: the first is kept, the others halved if temporal."""
    level = Level(inputs=4, outputs=4, temporal=temporal, spatial=spatial)
    layer = Downsample(level, WanVAEConfig.wan2_1(), nnx.Rngs(0))
    x = jnp.asarray(random(1, 9, 4, 6, 4))
    frames, cache = [], None
    for start, stop in ((0, 1), (1, 5), (5, 9)):
        chunk, cache = layer(x[:, start:stop], cache)
        frames.append(chunk)
    assert [chunk.shape[1] for chunk in frames] == (
        [1, 2, 2] if temporal else [1, 4, 4]
    )
    images = layer.resample(x)
    assert images.shape == ((1, 9, 2, 3, 4) if spatial else (1, 9, 4, 6, 4))
    if temporal:
        conv = layer.time_conv
        images = np.asarray(images)
        later = naive_causal_conv(
            images[:, 1:],
            np.asarray(conv.kernel),
            np.asarray(conv.bias),
            images[:, :1],
            stride=2,
        )
        images = np.concatenate([images[:, :1], later], axis=1)
    np.testing.assert_allclose(jnp.concatenate(frames, 1), images, **F32)


@pytest.mark.parametrize("spatial", [True, False])
def test_later_frames_are_upsampled_without_the_first(spatial):
    """The original's "Rep": one frame stays one, and is not in the window."""
    level = Level(inputs=4, outputs=4, temporal=True, spatial=spatial)
    layer = Upsample(level, 2, WanVAEConfig.wan2_1(), nnx.Rngs(0))
    x = random(1, 4, 2, 3, 4)
    frames, cache = [], None
    for index in range(4):
        chunk, cache = layer(jnp.asarray(x[:, index : index + 1]), cache)
        frames.append(chunk)
    assert [chunk.shape[1] for chunk in frames] == [1, 2, 2, 2]
    conv = layer.time_conv
    pairs = naive_causal_conv(
        x[:, 1:],
        np.asarray(conv.kernel),
        np.asarray(conv.bias),
        np.zeros_like(x[:, :2]),
    )
    doubled = np.empty((1, 7, 2, 3, 4), np.float32)
    doubled[:, 0] = x[:, 0]
    doubled[:, 1::2], doubled[:, 2::2] = pairs[..., :4], pairs[..., 4:]
    side = 1 + spatial
    large = np.empty((1, 7, 2 * side, 3 * side, 4), np.float32)
    for y, c in itertools.product(range(2 * side), range(3 * side)):
        large[:, :, y, c] = doubled[:, :, y // side, c // side]
    expected = layer.resample(jnp.asarray(large))
    assert expected.shape == (1, 7, 2 * side, 3 * side, 2)
    np.testing.assert_allclose(jnp.concatenate(frames, 1), expected, **F32)


# What bfloat16 rounds in queries, keys and values of the size of one: 1e-2 on CPU.
@pytest.mark.parametrize(
    ("attention_dtype", "tolerance"), [(None, 2e-6), ("bfloat16", 3e-2)], ids=str
)
def test_attention_within_frames(attention_dtype, tolerance):
    config = WanVAEConfig.wan2_1(attention_dtype=attention_dtype)
    attention = FrameAttention(4, config, nnx.Rngs(0))
    x = random(2, 3, 2, 3, 4)
    tokens = x.reshape(6, 6, 4).astype(np.float64)
    normed = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True) * 2
    q, k, v = np.split(normed @ np.asarray(attention.to_qkv.kernel), 3, axis=-1)
    weights = np.exp(q @ k.swapaxes(1, 2) / 2)
    attended = weights / weights.sum(-1, keepdims=True) @ v
    expected = x + (attended @ np.asarray(attention.proj.kernel)).reshape(x.shape)
    got, cache = attention(jnp.asarray(x), None)
    assert got.dtype == jnp.float32
    assert cache == ()
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("channels", "attention_dtype", "backend"),
    [(40, "bfloat16", "auto"), (40, None, "xla"), (384, "bfloat16", "xla")],
    ids=["narrow", "float32", "published"],
)
def test_cudnn_attends_in_narrow_frames(
    monkeypatch, channels, attention_dtype, backend
):
    def attend(q, k, v, *, backend):
        asked.append(backend)
        return q

    asked = []
    gpu = Device(platform="gpu", kind="GPU", compute_capability=(9, 0))
    monkeypatch.setattr(layers, "current_device", lambda *arrays: gpu)
    monkeypatch.setattr(layers, "dense_attention", attend)
    config = WanVAEConfig.wan2_1(attention_dtype=attention_dtype)
    FrameAttention(channels, config, nnx.Rngs(0))(jnp.zeros((1, 1, 2, 2, channels)), ())
    assert asked == [backend]
