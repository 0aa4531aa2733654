"""Layers of HunyuanVideo's causal video autoencoder.

A layer sees the whole tensor that it is given: a video, or a tile of one. Norms take
their statistics over all of it, so frames cannot be run one after the other.

Attribute names are those of the checkpoint, less the second `conv` of a convolution.
Norms, activations and softmax are float32. Operands and results of convolutions and
matrix products are cast to `config.dtype`.

Source: HunyuanVideo `hyvideo/vae/unet_causal_3d_blocks.py`.
"""

import math

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.diffusion.video_autoencoder.layers import Frames, convolve, pointwise
from models.hunyuan.vae.config import HunyuanVAEConfig

Resized = Float[Array, "B t h w O"]  # frames of another size

WINDOW = 3  # frames, rows and columns that a convolution sees
NORM_EPS = 1e-6
# Logits of attention that are held at once, in float32: half a GiB.
MOST_LOGITS = 1 << 27


class CausalConv(nnx.Module):
    """A convolution whose window ends at the current frame.

    Before the video stand copies of the first frame, and around each frame copies of
    its edges, so that no position is lost.

    Args:
      in_features: Channels in.
      out_features: Channels out.
      config: dtypes and form of the convolution.
      strides: Frames, rows and columns from one window to the next.
      rngs: Source of the initial weights.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: HunyuanVAEConfig,
        *,
        strides: tuple[int, int, int] = (1, 1, 1),
        rngs: nnx.Rngs,
    ) -> None:
        shape = (WINDOW,) * 3 + (in_features, out_features)
        init = nnx.initializers.lecun_normal()
        self.config = config
        self.strides = strides
        self.kernel = nnx.Param(init(rngs.params(), shape, config.param_dtype))
        self.bias = nnx.Param(jnp.zeros(out_features, config.param_dtype))

    def __call__(self, x: Frames) -> Resized:
        """Convolves all frames."""
        dtype = jnp.dtype(self.config.dtype)
        sides = (WINDOW // 2,) * 2
        padding = ((0, 0), (WINDOW - 1, 0), sides, sides, (0, 0))
        x = jnp.pad(x.astype(dtype), padding, mode="edge")
        kernel, bias = (p[...].astype(dtype) for p in (self.kernel, self.bias))
        form = self.config.convolution
        return convolve(x, kernel, strides=self.strides, form=form) + bias


class GroupNorm(nnx.Module):
    """Normalises groups of channels over all frames and pixels; float32 out."""

    def __init__(self, features: int, config: HunyuanVAEConfig) -> None:
        self.groups = config.norm_num_groups
        self.scale = nnx.Param(jnp.ones(features, config.param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, config.param_dtype))

    def __call__(self, x: Frames) -> Frames:
        """Normalises each item of the batch by itself.

        One pass reads the sums, one normalises. The sums are of differences from one
        position's channels: of the values themselves, the squares of a large mean
        would leave no digits for the variance.
        """
        x = x.astype(jnp.float32)
        pivot = x[:, :1, :1, :1]
        positions, count = (1, 2, 3), math.prod(x.shape[1:4])
        first = (x - pivot).sum(positions, keepdims=True) / count
        second = jnp.square(x - pivot).sum(positions, keepdims=True) / count
        mean, variance = pivot + first, second - jnp.square(first)
        # Channels to groups: a group's variance has that of its channels' means.
        of_group = self._average(mean)
        variance = self._average(variance + jnp.square(mean - of_group))
        scale, bias = (p[...].astype(jnp.float32) for p in (self.scale, self.bias))
        scale = scale * jax.lax.rsqrt(variance + NORM_EPS)
        return x * scale + (bias - of_group * scale)

    def _average(self, x: Float[Array, "B 1 1 1 C"]) -> Float[Array, "B 1 1 1 C"]:
        """Averages over the channels of each group."""
        size = x.shape[-1] // self.groups
        means = x.reshape(*x.shape[:-1], self.groups, size).mean(-1)
        return means.repeat(size, axis=-1)


class ResidualBlock(nnx.Module):
    """Norm, SiLU and convolution, twice, beside a shortcut.

    Source: HunyuanVideo `ResnetBlockCausal3D`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: HunyuanVAEConfig,
        rngs: nnx.Rngs,
    ) -> None:
        self.norm1 = GroupNorm(in_features, config)
        self.conv1 = CausalConv(in_features, out_features, config, rngs=rngs)
        self.norm2 = GroupNorm(out_features, config)
        self.conv2 = CausalConv(out_features, out_features, config, rngs=rngs)
        self.conv_shortcut = (
            pointwise(in_features, out_features, config, rngs)
            if in_features != out_features
            else None
        )

    def __call__(self, x: Frames) -> Resized:
        """Runs all frames."""
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return shortcut + hidden


class CausalAttention(nnx.Module):
    """Self-attention with one head, from each frame to itself and those before.

    The frames take turns, each over its own keys: no mask of tokens by tokens exists,
    and nothing is computed to be thrown away.

    Source: HunyuanVideo `UNetMidBlockCausal3D` with `prepare_causal_attention_mask`.
    """

    def __init__(self, dim: int, config: HunyuanVAEConfig, rngs: nnx.Rngs) -> None:
        self.group_norm = GroupNorm(dim, config)
        self.to_q = pointwise(dim, dim, config, rngs)
        self.to_k = pointwise(dim, dim, config, rngs)
        self.to_v = pointwise(dim, dim, config, rngs)
        self.to_out = pointwise(dim, dim, config, rngs)

    def __call__(self, x: Frames) -> Frames:
        """Attends from all frames."""
        _, frames, rows, columns, _ = x.shape
        tokens = einops.rearrange(self.group_norm(x), "B T H W C -> B (T H W) C")
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        size = rows * columns
        outputs = [
            attend(
                q[:, start : start + size], k[:, : start + size], v[:, : start + size]
            )
            for start in range(0, frames * size, size)
        ]
        out = self.to_out(jnp.concatenate(outputs, axis=1))
        return x + out.reshape(x.shape)


def attend(
    q: Float[Array, "B Q C"], k: Float[Array, "B K C"], v: Float[Array, "B K C"]
) -> Float[Array, "B Q C"]:
    """Computes softmax attention with one head, a bounded number of logits at a time.

    The heads of 512 channels are too wide for fused kernels.
    """
    batch, queries, channels = q.shape
    keys = k.shape[1]
    chunks = -(-queries * batch * keys // MOST_LOGITS)
    length = -(-queries // chunks)

    def attend_chunk(q: Float[Array, "B q C"]) -> Float[Array, "B q C"]:
        logits = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * channels**-0.5, axis=-1)
        return jnp.einsum("bqk,bkc->bqc", weights.astype(v.dtype), v)

    if chunks == 1:
        return attend_chunk(q)
    padded = jnp.pad(q, ((0, 0), (0, chunks * length - queries), (0, 0)))
    parts = einops.rearrange(padded, "B (n q) C -> n B q C", n=chunks)
    out = einops.rearrange(jax.lax.map(attend_chunk, parts), "n B q C -> B (n q) C")
    return out[:, :queries]


class Upsample(nnx.Module):
    """Doubles rows and columns, and if asked the frames after the first; convolves.

    Of the 27 doubled neighbours that a window sees, many are copies. So each place
    within a doubled position has a kernel of its own for the frames as they are, of
    sums of the weights: with doubled frames a window of 8, which is 30 % of the
    arithmetic, and no array of doubled frames exists. The result differs by rounding.

    Source: HunyuanVideo `UpsampleCausal3D`, which doubles, then convolves.
    """

    def __init__(
        self, dim: int, config: HunyuanVAEConfig, *, temporal: bool, rngs: nnx.Rngs
    ) -> None:
        self.temporal = temporal
        self.conv = CausalConv(dim, dim, config, rngs=rngs)

    def __call__(self, x: Frames) -> Resized:
        """Runs all frames."""
        config = self.conv.config
        dtype = jnp.dtype(config.dtype)
        _, _, rows, columns, _ = x.shape
        history = 1 if self.temporal else WINDOW - 1
        padding = ((0, 0), (history, 0), (1, 1), (1, 1), (0, 0))
        x = jnp.pad(x.astype(dtype), padding, mode="edge")
        kernel = self.conv.kernel[...].astype(jnp.float32)
        # The first of two doubled frames sees two copies of the frame before.
        in_time = [merge(kernel, 0, first) for first in (True, False)]
        kernel = jnp.concatenate(in_time, axis=-1) if self.temporal else kernel
        places = [
            convolve(
                x[:, :, down : down + rows + 1, right : right + columns + 1],
                merge(merge(kernel, 1, down), 2, right).astype(dtype),
                form=config.convolution,
            )
            for down in (False, True)
            for right in (False, True)
        ]
        x = einops.rearrange(
            jnp.stack(places),
            "(down right) B T H W (late O) -> B (T late) (H down) (W right) O",
            down=2,
            late=1 + self.temporal,
        )
        x = x[:, 1:] if self.temporal else x
        return x + self.conv.bias[...].astype(dtype)


def merge(kernel: Array, axis: int, first: bool) -> Array:
    """Adds the first two of an axis's three weights, or else the last two."""
    before, middle, after = jnp.split(kernel, WINDOW, axis)
    pair = [before + middle, after] if first else [before, middle + after]
    return jnp.concatenate(pair, axis)
