"""CLIP's vision tower up to its last but one layer.

Attribute names are those of the original Wan checkpoint. Layers share one traced block;
see `models.diffusion.transformer.block_stack`.

Casts: the residual stream, norms, logits and softmax are float32. Operands and results
of matrix products are cast to `config.dtype`.
"""

import functools
from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.clip.config import CLIPVisionConfig
from models.diffusion.transformer.block_stack import scan_blocks, stack_blocks
from models.diffusion.transformer.layers import linear, merge_heads, split_heads


class CLIPVisionEncoder(nnx.Module):
    """Turns pixels into one vector for the whole image and one for each patch.

    Source: Wan2.1 `VisionTransformer` with `use_31_block=True`; transformers
    `CLIPVisionModel`, `hidden_states[-2]`.
    """

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs) -> None:
        """Builds the tower with random parameters, without the unused last layer.

        Args:
          config: Sizes and dtypes.
          rngs: Source of the initial parameters, stream `params`.
        """
        self.config = config
        patch = (config.patch_size, config.patch_size)
        dtype = jnp.dtype(config.param_dtype)
        init = nnx.initializers.normal(config.dim**-0.5)
        self.patch_embedding = nnx.Conv(
            3,
            config.dim,
            kernel_size=patch,
            strides=patch,
            padding="VALID",
            use_bias=False,
            dtype=jnp.dtype(config.dtype),
            param_dtype=dtype,
            rngs=rngs,
        )
        self.cls_embedding = nnx.Param(init(rngs.params(), (config.dim,), dtype))
        self.pos_embedding = nnx.Param(
            init(rngs.params(), (config.num_tokens, config.dim), dtype)
        )
        self.pre_norm = _layer_norm(config, rngs)
        # The last layer is not run.
        self.transformer = stack_blocks(
            lambda rngs: Block(config, rngs=rngs), config.num_layers - 1, rngs
        )

    def __call__(
        self, pixels: Float[Array, "B height width 3"]
    ) -> Float[Array, "B T E"]:
        """Runs the tower.

        Args:
          pixels: Normalised images of `config.image_size` rows and columns; see
            `models.clip.image_encoder.clip_pixels`.

        Returns:
          What enters the last layer, float32, without a norm: the class token, then
          the patches row by row; T = `config.num_tokens`.

        Raises:
          ValueError: `pixels` has another shape.
        """
        config = self.config
        if pixels.shape[1:] != (config.image_size, config.image_size, 3):
            raise ValueError(
                f"pixels of shape {pixels.shape} must be [batch, {config.image_size}, "
                f"{config.image_size}, 3]"
            )
        patches = einops.rearrange(self.patch_embedding(pixels), "B H W E -> B (H W) E")
        first = einops.repeat(self.cls_embedding[...], "E -> B 1 E", B=len(pixels))
        x = jnp.concatenate([first, patches], axis=1, dtype=jnp.float32)
        x = self.pre_norm(x + self.pos_embedding[...].astype(jnp.float32))
        return scan_blocks(self.transformer, x)


class Block(nnx.Module):
    """Self-attention and feed-forward network, each on a normed copy of the stream.

    Source: Wan2.1 `AttentionBlock` with `post_norm=False`.
    """

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs) -> None:
        self.dtype = config.dtype
        self.norm1 = _layer_norm(config, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.norm2 = _layer_norm(config, rngs)
        self.mlp = FeedForward(config, rngs=rngs)

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Runs the block on the residual stream, float32 in and out."""
        x = x + self.attn(self.norm1(x).astype(self.dtype)).astype(jnp.float32)
        return x + self.mlp(self.norm2(x).astype(self.dtype)).astype(jnp.float32)


class Attention(nnx.Module):
    """Self-attention of every token with every other; in and out in `dtype`.

    Source: Wan2.1 `SelfAttention`, transformers `CLIPAttention`.
    """

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs) -> None:
        self.num_heads = config.num_heads
        self.to_q = _linear(config.dim, config.dim, config, rngs)
        self.to_k = _linear(config.dim, config.dim, config, rngs)
        self.to_v = _linear(config.dim, config.dim, config, rngs)
        self.proj = _linear(config.dim, config.dim, config, rngs)

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Attends from every token to every other.

        The softmax is float32; probabilities are cast to `dtype` before they
        multiply the values. Logits [B, N, T, T] exist at once.
        """
        q, k, v = (
            split_heads(project(x), self.num_heads)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        # jax.nn.dot_product_attention does not run in float16 on a CPU.
        logits = jnp.einsum("BTND,BSND->BNTS", q, k, preferred_element_type=jnp.float32)
        probabilities = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1)
        attended = jnp.einsum("BNTS,BSND->BTND", probabilities.astype(v.dtype), v)
        return self.proj(merge_heads(attended))


class FeedForward(nnx.Module):
    """Two matrices with an activation between; in and out in `dtype`.

    Source: transformers `CLIPMLP`.
    """

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs) -> None:
        self.activation = config.activation
        self.fc1 = _linear(config.dim, config.ffn_dim, config, rngs)
        self.fc2 = _linear(config.ffn_dim, config.dim, config, rngs)

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Runs the network on each token."""
        return self.fc2(_ACTIVATIONS[self.activation](self.fc1(x)))


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Approximates GELU as OpenAI's CLIP models were trained with it."""
    return x * jax.nn.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": quick_gelu,
}


def _linear(
    in_features: int, out_features: int, config: CLIPVisionConfig, rngs: nnx.Rngs
) -> nnx.Linear:
    return linear(
        in_features,
        out_features,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


def _layer_norm(config: CLIPVisionConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Makes a norm that computes and returns float32."""
    return nnx.LayerNorm(
        config.dim,
        epsilon=config.eps,
        dtype=jnp.float32,
        param_dtype=jnp.dtype(config.param_dtype),
        use_fast_variance=False,  # a difference of squares would lose digits
        rngs=rngs,
    )
