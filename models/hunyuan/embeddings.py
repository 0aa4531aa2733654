"""Embeddings of a HunyuanVideo transformer: time, guidance, pooled text, and text.

Attribute names are those of the diffusers checkpoint. What modulates the blocks is
computed in float32. The token refiner rounds where the blocks do; see
`models.hunyuan.layers`.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from models.diffusion.transformer.block_stack import scan_blocks, stack_blocks
from models.diffusion.transformer.embeddings import timestep_embedding
from models.diffusion.transformer.layers import (
    MLP,
    LayerNorm,
    linear,
    merge_heads,
    projection,
    split_heads,
)
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.layers import Modulation, add_gated

# Of the token refiner, whatever the blocks have: both published codes leave a default.
_MLP_RATIO = 4


def guidance_level(
    embedded_guidance: Float[Array, ""] | float, config: HunyuanConfig
) -> Float[Array, ""]:
    """Returns 1,000 times a guidance scale as the model is told it, float32.

    Both published codes multiply in bfloat16, which makes 6016 of 6.0.

    Source: HunyuanVideo `pipeline_hunyuan_video.py`, `guidance_expand`.
    """
    guidance = jnp.asarray(embedded_guidance, jnp.float32)
    if config.guidance_rounding == "none":
        return 1000 * guidance
    # Casts there and back are none to XLA where it may keep excess precision.
    narrow = functools.partial(
        jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7
    )
    return narrow(1000 * narrow(guidance))


class ConditionEmbedder(nnx.Module):
    """Embeds time, pooled text and guidance; float32.

    Source: diffusers `HunyuanVideoConditionEmbedding`.
    """

    def __init__(self, config: HunyuanConfig, *, rngs: nnx.Rngs) -> None:
        self.freq_dim = config.freq_dim
        self.timestep_embedder = _embedder(config.freq_dim, config, rngs)
        self.text_embedder = _embedder(config.pooled_dim, config, rngs)
        self.guidance_embedder = (
            _embedder(config.freq_dim, config, rngs) if config.guidance_embeds else None
        )

    def __call__(
        self,
        timesteps: Float[Array, " B"],
        pooled: Float[Array, "B pooled"],
        guidance: Float[Array, " B"] | None,
    ) -> Float[Array, "B E"]:
        """Returns the vector that modulates all blocks."""
        vector = self.timestep_embedder(timestep_embedding(timesteps, self.freq_dim))
        vector += self.text_embedder(pooled)
        if self.guidance_embedder is not None and guidance is not None:
            sinusoid = timestep_embedding(guidance, self.freq_dim)
            vector += self.guidance_embedder(sinusoid)
        return vector


class TextConditionEmbedder(nnx.Module):
    """Embeds time and the mean of the text for the token refiner; float32."""

    def __init__(self, config: HunyuanConfig, *, rngs: nnx.Rngs) -> None:
        self.freq_dim = config.freq_dim
        self.timestep_embedder = _embedder(config.freq_dim, config, rngs)
        self.text_embedder = _embedder(config.text_dim, config, rngs)

    def __call__(
        self, timesteps: Float[Array, " B"], mean: Float[Array, "B text"]
    ) -> Float[Array, "B E"]:
        """Returns the vector that the refiner's gates come from."""
        sinusoid = timestep_embedding(timesteps, self.freq_dim)
        return self.timestep_embedder(sinusoid) + self.text_embedder(mean)


class RefinerAttention(nnx.Module):
    """Self-attention of text, without a norm and without positions.

    Logits of size [B, N, L, L] exist at once; the softmax is float32.
    """

    def __init__(self, config: HunyuanConfig, *, rngs: nnx.Rngs) -> None:
        self.num_heads = config.num_heads
        project = projection(config, rngs)
        self.to_q, self.to_k, self.to_v = project(), project(), project()
        self.to_out = project()

    def __call__(
        self, x: Float[Array, "B L E"], allowed: Bool[Array, "B 1 L L"] | None
    ) -> Float[Array, "B L E"]:
        """Attends where it is allowed, queries before keys; everywhere if None."""
        q, k, v = (
            split_heads(project(x), self.num_heads)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        attended = jax.nn.dot_product_attention(
            q, k, v, mask=allowed, implementation="xla"
        )
        return self.to_out(merge_heads(attended))


class RefinerBlock(nnx.Module):
    """Gated attention and feed-forward network, each on a normed copy of the text.

    Source: diffusers `HunyuanVideoIndividualTokenRefinerBlock`.
    """

    def __init__(self, config: HunyuanConfig, *, rngs: nnx.Rngs) -> None:
        self.dtype = config.dtype
        norm = functools.partial(
            LayerNorm, config.dim, eps=config.eps, param_dtype=config.param_dtype
        )
        self.norm1, self.norm2 = norm(), norm()
        self.attn = RefinerAttention(config, rngs=rngs)
        self.ff = MLP(
            (config.dim, _MLP_RATIO * config.dim, config.dim),
            jax.nn.silu,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.norm_out = Modulation(2, config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B L E"],
        conditioning: Float[Array, "B E"],
        allowed: Bool[Array, "B 1 L L"] | None,
    ) -> Float[Array, "B L E"]:
        """Runs the block on the residual stream, `config.dtype` in and out."""
        gate_attention, gate_mlp = self.norm_out(conditioning)
        attended = self.attn(self.norm1(x).astype(self.dtype), allowed)
        x = add_gated(x, attended, gate_attention)
        return add_gated(x, self.ff(self.norm2(x).astype(self.dtype)), gate_mlp)


class TokenRefiner(nnx.Module):
    """Embeds the language model's states, and lets the rows see each other.

    Source: HunyuanVideo `SingleTokenRefiner`; diffusers `HunyuanVideoTokenRefiner`.
    """

    def __init__(self, config: HunyuanConfig, *, rngs: nnx.Rngs) -> None:
        self.dtype = config.dtype
        self.time_text_embed = TextConditionEmbedder(config, rngs=rngs)
        self.proj_in = linear(
            config.text_dim,
            config.dim,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.refiner_blocks = stack_blocks(
            lambda rngs: RefinerBlock(config, rngs=rngs),
            config.num_refiner_blocks,
            rngs,
        )

    def __call__(
        self,
        context: Float[Array, "B L text"],
        timesteps: Float[Array, " B"],
        mask: Bool[Array, "B L"] | None,
    ) -> Float[Array, "B L E"]:
        """Returns the text as the blocks take it, in `config.dtype`.

        Rows outside of the mask see the first row alone. Rows that neither the mask
        nor the video has are set to zero first, so that nothing in them matters.
        """
        allowed = None
        context = context.astype(jnp.float32)
        if mask is None:
            mean = context.mean(axis=1)
        else:
            count = mask.sum(axis=1)
            seen = mask | (jnp.arange(mask.shape[1]) < count[:, None])
            context = jnp.where(seen[..., None], context, 0)
            total = jnp.where(mask[..., None], context, 0).sum(axis=1)
            mean = total / jnp.maximum(count, 1)[:, None]
            allowed = mask[:, None, :, None] & mask[:, None, None, :]
            allowed = allowed.at[..., 0].set(True)
        vector = jax.nn.silu(self.time_text_embed(timesteps, mean))
        x = self.proj_in(context.astype(self.dtype))
        conditioning = vector.astype(self.dtype)
        return scan_blocks(self.refiner_blocks, x, conditioning, allowed)


def _embedder(in_features: int, config: HunyuanConfig, rngs: nnx.Rngs) -> MLP:
    """Returns two linear layers with SiLU between, in float32."""
    return MLP(
        (in_features, config.dim, config.dim),
        jax.nn.silu,
        dtype="float32",
        param_dtype=config.param_dtype,
        rngs=rngs,
    )
