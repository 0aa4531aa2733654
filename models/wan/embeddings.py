"""Embeddings at the entrance of a Wan transformer: patches, timestep, text, image."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from draft_jax import VideoGrid
from models.wan.config import WanConfig
from models.wan.layers import (
    MLP,
    XAVIER_UNIFORM,
    LayerNorm,
    gelu_exact,
    gelu_tanh,
    linear,
)
from pallas_kernels.common import reorder_tokens

_IMAGE_NORM_EPS = 1e-5  # not the model's own: both published codes take torch's default


class PatchEmbedding(nnx.Module):
    """Cuts the latent into patches and maps each to a token: a strided convolution."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs) -> None:
        shape = (*config.patch_size, config.in_channels, config.dim)
        fan_in = math.prod(shape[:-1])
        kernel = XAVIER_UNIFORM(rngs.params(), (fan_in, config.dim), jnp.float32)
        self.kernel = nnx.Param(kernel.reshape(shape).astype(config.param_dtype))
        self.bias = nnx.Param(jnp.zeros(config.dim, jnp.dtype(config.param_dtype)))
        self.patch_size = config.patch_size
        self.dtype = config.dtype

    def __call__(
        self, latents: Float[Array, "B F H W C"], grid: VideoGrid
    ) -> Float[Array, "B T E"]:
        """Returns tokens in tiled order, in `config.dtype`."""
        frames, rows, columns = self.patch_size
        patches = rearrange(
            latents,
            "B (F frames) (H rows) (W columns) C -> B (F H W) (frames rows columns C)",
            frames=frames,
            rows=rows,
            columns=columns,
        ).astype(self.dtype)
        # A token depends on its patch alone, so the narrower patches are permuted.
        patches = reorder_tokens(patches, grid, to="tiled", axis=1)
        kernel = self.kernel[...].astype(self.dtype)
        kernel = kernel.reshape(patches.shape[-1], -1)
        return patches @ kernel + self.bias[...].astype(self.dtype)


class ImageEmbedder(nnx.Module):
    """Embeds the tokens of an image's encoder; `config.dtype` out.

    Source: Wan2.1 `MLPProj`.
    """

    def __init__(self, config: WanConfig, size: int, *, rngs: nnx.Rngs) -> None:
        self.dtype = config.dtype
        self.norm1 = LayerNorm(config, size=size, eps=_IMAGE_NORM_EPS, rngs=rngs)
        self.ff = MLP((size, size, config.dim), gelu_exact, config, rngs=rngs)
        self.norm2 = LayerNorm(config, eps=_IMAGE_NORM_EPS, rngs=rngs)

    def __call__(self, tokens: Float[Array, "B I image"]) -> Float[Array, "B I E"]:
        """Projects image tokens to the width of the model."""
        hidden = self.ff(self.norm1(tokens).astype(self.dtype))
        return self.norm2(hidden).astype(self.dtype)


class ConditionEmbedder(nnx.Module):
    """Embeds timestep (float32), text and image tokens (`config.dtype`)."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs) -> None:
        dim = config.dim
        self.freq_dim = config.freq_dim
        self.dtype = config.dtype
        self.time_embedder = MLP(
            (config.freq_dim, dim, dim), jax.nn.silu, config, dtype="float32", rngs=rngs
        )
        self.time_proj = linear(dim, 6 * dim, config, rngs, dtype="float32")
        self.text_embedder = MLP(
            (config.text_dim, dim, dim), gelu_tanh, config, rngs=rngs
        )
        self.image_embedder = (
            ImageEmbedder(config, config.image_dim, rngs=rngs)
            if config.image_dim is not None
            else None
        )

    def __call__(
        self,
        timesteps: Float[Array, " B"],
        context: Float[Array, "B L text"],
        context_lengths: Int[Array, " B"] | None,
    ) -> tuple[Float[Array, "B E"], Float[Array, "B 6 E"], Float[Array, "B L E"]]:
        """Returns time embedding, its projection for the blocks, and embedded text."""
        if context_lengths is not None:
            row = jnp.arange(context.shape[1])[:, None]
            context = jnp.where(row < context_lengths[:, None, None], context, 0)
        time = self.time_embedder(timestep_embedding(timesteps, self.freq_dim))
        projected = self.time_proj(jax.nn.silu(time))
        modulation = rearrange(projected, "B (rows E) -> B rows E", rows=6)
        return time, modulation, self.text_embedder(context.astype(self.dtype))

    def embed_image(
        self, image_tokens: Float[Array, "B I image"] | None
    ) -> Float[Array, "B I E"] | None:
        """Returns embedded image tokens; None for a text-to-video model."""
        if self.image_embedder is None or image_tokens is None:
            return None
        return self.image_embedder(image_tokens)


def timestep_embedding(
    timesteps: Float[Array, " B"], size: int
) -> Float[Array, "B size"]:
    """Returns cosines, then sines, of the timestep at geometric frequencies; float32.

    Angles are rounded where diffusers rounds them: the exponent, its exponential and
    the angle, each to the nearest float32. Wan's own code takes float64 throughout. At
    t = 1000 the two differ by up to 6e-5, a sixtieth of a rounding of bfloat16.

    Source: diffusers `get_timestep_embedding`; Wan2.1 `sinusoidal_embedding_1d`.
    """
    angles = timesteps.astype(jnp.float32)[:, None] * _frequencies(size // 2)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _frequencies(count: int) -> np.ndarray:
    exponents = np.float32(-math.log(10000.0)) * np.arange(count, dtype=np.float32)
    exponents /= np.float32(count)
    # NumPy's float32 exponential misses the nearest number for half the frequencies.
    return np.exp(exponents.astype(np.float64)).astype(np.float32)
