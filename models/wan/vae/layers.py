"""Layers of Wan's causal video autoencoder.

Every layer is a function `(x, cache) -> (x, cache)` of the next frames of a video and
its memory of the frames before. A cache of None starts a video. How a video
is cut in chunks does not change the outputs, joined, since a layer remembers as many
frames as its window reaches back. Layers that look at one frame at a time remember
nothing, `()`.

Attribute names are those of the diffusers checkpoint, without the indices of
`nn.Sequential`. Norms, activations and softmax are float32. Operands and results of
convolutions and matrix products are cast to `config.dtype`.

Source: Wan2.1 `wan/modules/vae.py`, where a list indexed by a counter is the cache.
"""

from collections.abc import Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.diffusion.video_autoencoder.layers import Frames, convolve, pointwise
from models.wan.vae.config import Level, WanVAEConfig
from pallas_kernels import dense_attention, why_no_cudnn
from pallas_kernels.common import current_device

WINDOW = 3  # frames that a convolution in time sees
NORM_EPS = 1e-12  # smallest length of a vector that the norm divides by

Cache = Any  # pytree of frames; None at the start of a video
Step = tuple[Float[Array, "B t h w O"], Cache]  # a layer's output


def run_layers(
    layers: Sequence[nnx.Module], x: Frames, caches: Sequence[Cache] | None
) -> Step:
    """Runs layers one after the other, each with its own cache."""
    remembered = []
    for layer, cache in zip(layers, caches or [None] * len(layers), strict=True):
        x, cache = layer(x, cache)  # type: ignore[operator]
        remembered.append(cache)
    return x, tuple(remembered)


class RMSNorm(nnx.Module):
    """Scales each position's channels to a root mean square of one; float32 out."""

    def __init__(self, dim: int, config: WanVAEConfig) -> None:
        self.gamma = nnx.Param(jnp.ones(dim, config.param_dtype))

    def __call__(self, x: Float[Array, "*axes C"]) -> Float[Array, "*axes C"]:
        """Normalises the last axis."""
        x = x.astype(jnp.float32)
        length = jnp.sqrt(jnp.square(x).sum(-1, keepdims=True))
        gamma = self.gamma[...].astype(jnp.float32) * x.shape[-1] ** 0.5
        return x / jnp.maximum(length, NORM_EPS) * gamma


class CausalConv(nnx.Module):
    """A convolution whose window ends at the current frame, three frames long.

    Before the video come frames of zeros; rows and columns are padded, so that none
    is lost.

    Args:
      in_features: Channels in.
      out_features: Channels out.
      config: dtypes and form of the convolution.
      side: Rows and columns of the window, odd.
      stride: Frames from one window to the next. A call gets a multiple of
        it; `WINDOW - stride` frames are remembered.
      rngs: Source of the initial weights.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: WanVAEConfig,
        *,
        side: int = 3,
        stride: int = 1,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (WINDOW, side, side, in_features, out_features)
        init = nnx.initializers.lecun_normal()
        self.config = config
        self.stride = stride
        self.kernel = nnx.Param(init(rngs.params(), shape, config.param_dtype))
        self.bias = nnx.Param(jnp.zeros(out_features, config.param_dtype))

    def __call__(self, x: Frames, cache: Cache) -> Step:
        """Runs the next frames of a video."""
        dtype = jnp.dtype(self.config.dtype)
        memory = WINDOW - self.stride
        x = x.astype(dtype)
        if cache is None:
            cache = jnp.zeros((x.shape[0], memory, *x.shape[2:]), dtype)
        x = jnp.concatenate([cache, x], axis=1)
        kernel, bias = (p[...].astype(dtype) for p in (self.kernel, self.bias))
        _, rows, columns, *_ = kernel.shape
        out = convolve(
            x,
            kernel,
            strides=(self.stride, 1, 1),
            padding=(rows // 2, columns // 2),
            form=self.config.convolution,
        )
        return out + bias, x[:, x.shape[1] - memory :]


class ResidualBlock(nnx.Module):
    """Norm, SiLU and convolution, twice, beside a shortcut.

    Source: Wan2.1 `ResidualBlock`.
    """

    def __init__(
        self, in_features: int, out_features: int, config: WanVAEConfig, rngs: nnx.Rngs
    ) -> None:
        self.norm1 = RMSNorm(in_features, config)
        self.conv1 = CausalConv(in_features, out_features, config, rngs=rngs)
        self.norm2 = RMSNorm(out_features, config)
        self.conv2 = CausalConv(out_features, out_features, config, rngs=rngs)
        self.conv_shortcut = (
            pointwise(in_features, out_features, config, rngs)
            if in_features != out_features
            else None
        )

    def __call__(self, x: Frames, cache: Cache) -> Step:
        """Runs the next frames of a video."""
        first, second = (None, None) if cache is None else cache
        hidden, first = self.conv1(jax.nn.silu(self.norm1(x)), first)
        hidden, second = self.conv2(jax.nn.silu(self.norm2(hidden)), second)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return shortcut + hidden, (first, second)


class FrameAttention(nnx.Module):
    """Self-attention with one head over the positions of each frame.

    Source: Wan2.1 `AttentionBlock`.
    """

    def __init__(self, dim: int, config: WanVAEConfig, rngs: nnx.Rngs) -> None:
        self.dtype = jnp.dtype(config.attention_dtype or config.dtype)
        self.norm = RMSNorm(dim, config)
        self.to_qkv = pointwise(dim, 3 * dim, config, rngs)
        self.proj = pointwise(dim, dim, config, rngs)

    def __call__(self, x: Frames, cache: Cache) -> Step:
        """Attends within each frame."""
        tokens = einops.rearrange(x, "B T H W C -> (B T) (H W) 1 C")
        qkv = self.to_qkv(self.norm(tokens)).astype(self.dtype)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        # One head of 384 channels in the published model: no fused kernel takes it.
        unfused = why_no_cudnn(q.dtype.name, q.shape[-1], current_device(q))
        out = dense_attention(q, k, v, backend="xla" if unfused else "auto")
        batch, _, rows, *_ = x.shape
        frames = einops.rearrange(
            self.proj(out), "(B T) (H W) 1 C -> B T H W C", B=batch, H=rows
        )
        return x + frames, ()


class Downsample(nnx.Module):
    """Halves rows and columns, the frames after the first, or both.

    The first frame of a video stays; each later one that is kept sees itself and the
    two before it.

    Args:
      level: Its outputs come in; says what the step halves.
      config: Sizes and dtypes.
      rngs: Source of the initial weights.

    Source: Wan2.1 `Resample`, modes "downsample2d" and "downsample3d".
    """

    def __init__(self, level: Level, config: WanVAEConfig, rngs: nnx.Rngs) -> None:
        dim = level.outputs
        self.resample = nnx.Conv(
            dim,
            dim,
            (3, 3),
            strides=(2, 2) if level.spatial else (1, 1),
            padding=((0, 1), (0, 1)) if level.spatial else ((1, 1), (1, 1)),
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )
        self.time_conv = (
            CausalConv(dim, dim, config, side=1, stride=2, rngs=rngs)
            if level.temporal
            else None
        )

    def __call__(self, x: Frames, cache: Cache) -> Step:
        """Runs the next frames of a video."""
        x = self.resample(x)
        if self.time_conv is None:
            return x, ()
        if cache is not None:
            return self.time_conv(x, cache)
        first, later = x[:, :1], x[:, 1:]
        if not later.shape[1]:
            return first, first
        later, cache = self.time_conv(later, first)
        return jnp.concatenate([first, later], axis=1), cache


class Upsample(nnx.Module):
    """Doubles rows and columns, the frames, or both.

    The first frame of a video stays one frame, and later frames do not see it. To the
    convolution in time the video begins after it.

    Args:
      level: Its outputs come in; says what the step doubles.
      out_features: Channels out.
      config: Sizes and dtypes.
      rngs: Source of the initial weights.

    Source: Wan2.1 `Resample`, modes "upsample2d" and "upsample3d"; the first frame
    is its special case "Rep".
    """

    def __init__(
        self, level: Level, out_features: int, config: WanVAEConfig, rngs: nnx.Rngs
    ) -> None:
        dim = level.outputs
        self.spatial = level.spatial
        self.resample = nnx.Conv(
            dim,
            out_features,
            (3, 3),
            padding=((1, 1), (1, 1)),
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )
        self.time_conv = (
            CausalConv(dim, 2 * dim, config, side=1, rngs=rngs)
            if level.temporal
            else None
        )

    def __call__(self, x: Frames, cache: Cache) -> Step:
        """Runs the next frames of a video."""
        if self.time_conv is None:
            cache = ()
        elif cache is not None:
            x, cache = self._double_frames(x, cache)
        else:
            first, later = x[:, :1], x[:, 1:]
            cache = jnp.zeros((x.shape[0], WINDOW - 1, *x.shape[2:]), x.dtype)
            if later.shape[1]:
                later, cache = self._double_frames(later, cache)
            x = jnp.concatenate([first, later], axis=1)
        if self.spatial:
            x = x.repeat(2, axis=2).repeat(2, axis=3)
        return self.resample(x), cache

    def _double_frames(self, x: Frames, cache: Cache) -> Step:
        """Makes two frames of each: the two halves of the convolution's channels."""
        assert self.time_conv is not None, "called only if there is one"
        pairs, cache = self.time_conv(x, cache)
        frames = einops.rearrange(pairs, "B T H W (pair C) -> B (T pair) H W C", pair=2)
        return frames, cache
