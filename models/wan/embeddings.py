"""Embeddings at the entrance of a Wan transformer: timestep, text and image."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from models.diffusion.transformer.embeddings import timestep_embedding
from models.diffusion.transformer.layers import (
    MLP,
    LayerNorm,
    gelu_exact,
    linear,
)
from models.wan.config import WanConfig
from pallas_kernels.float8_rows import gelu_tanh

_IMAGE_NORM_EPS = 1e-5  # not the model's own: both published codes take torch's default


class ImageEmbedder(nnx.Module):
    """Embeds the tokens of an image's encoder; `config.dtype` out.

    Source: Wan2.1 `MLPProj`.
    """

    def __init__(self, config: WanConfig, size: int, *, rngs: nnx.Rngs) -> None:
        self.dtype = config.dtype
        stored = config.param_dtype
        self.norm1 = LayerNorm(size, eps=_IMAGE_NORM_EPS, param_dtype=stored)
        self.ff = MLP(
            (size, size, config.dim),
            gelu_exact,
            dtype=config.dtype,
            param_dtype=stored,
            rngs=rngs,
        )
        self.norm2 = LayerNorm(config.dim, eps=_IMAGE_NORM_EPS, param_dtype=stored)

    def __call__(self, tokens: Float[Array, "B I image"]) -> Float[Array, "B I E"]:
        """Projects image tokens to the width of the model."""
        hidden = self.ff(self.norm1(tokens).astype(self.dtype))
        return self.norm2(hidden).astype(self.dtype)


class ConditionEmbedder(nnx.Module):
    """Embeds timestep (float32), text and image tokens (`config.dtype`)."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs) -> None:
        dim, stored = config.dim, config.param_dtype
        self.freq_dim = config.freq_dim
        self.dtype = config.dtype
        self.time_embedder = MLP(
            (config.freq_dim, dim, dim),
            jax.nn.silu,
            dtype="float32",
            param_dtype=stored,
            rngs=rngs,
        )
        self.time_proj = linear(
            dim, 6 * dim, dtype="float32", param_dtype=stored, rngs=rngs
        )
        self.text_embedder = MLP(
            (config.text_dim, dim, dim),
            gelu_tanh,
            dtype=config.dtype,
            param_dtype=stored,
            rngs=rngs,
        )
        self.image_embedder = (
            ImageEmbedder(config, config.image_dim, rngs=rngs)
            if config.image_dim is not None
            else None
        )

    def __call__(
        self,
        times: Float[Array, "B times"],
        context: Float[Array, "B L text"],
        context_lengths: Int[Array, " B"] | None,
    ) -> tuple[
        Float[Array, "B times E"], Float[Array, "B times 6 E"], Float[Array, "B L E"]
    ]:
        """Returns time embeddings, their projection for the blocks, and embedded text.

        Args:
          times: Noise levels of each item; see `WanInputs.times`.
          context: Text embeddings.
          context_lengths: Rows of them that are text; None if the others are zero.
        """
        if context_lengths is not None:
            row = jnp.arange(context.shape[1])[:, None]
            context = jnp.where(row < context_lengths[:, None, None], context, 0)
        batch = len(times)
        time = self.time_embedder(timestep_embedding(times.ravel(), self.freq_dim))
        projected = self.time_proj(jax.nn.silu(time))
        modulation = rearrange(
            projected, "(B times) (rows E) -> B times rows E", B=batch, rows=6
        )
        time = rearrange(time, "(B times) E -> B times E", B=batch)
        return time, modulation, self.text_embedder(context.astype(self.dtype))

    def embed_image(
        self, image_tokens: Float[Array, "B I image"] | None
    ) -> Float[Array, "B I E"] | None:
        """Returns embedded image tokens; None for a text-to-video model."""
        if self.image_embedder is None or image_tokens is None:
            return None
        return self.image_embedder(image_tokens)
