"""Layers of a UMT5 encoder block.

Attribute names are those of the original Wan checkpoint. Casts: the residual stream,
norms, position bias, logits and softmax are float32. Operands and results of matrix
products are cast to `config.dtype`. The published code keeps the residual stream in
bfloat16 too; ours rounds less.
"""

import math

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from models.diffusion.transformer.layers import linear, merge_heads, split_heads
from models.umt5.config import UMT5Config


def relative_position_buckets(
    length: int, num_buckets: int, max_distance: int
) -> Int[np.ndarray, "T T"]:
    """Returns the position table's row for each query (first axis) and key.

    Half of the rows are for keys after the query. In each half, the first
    `num_buckets // 4` distances have rows of their own; farther ones share rows
    whose width grows geometrically up to `max_distance`.

    Args:
      length: Tokens, T.
      num_buckets: Rows of the table.
      max_distance: Tokens; the last row holds all keys this far away or farther.

    Source: Mesh TensorFlow `_relative_position_bucket`, as in Wan2.1
    `T5RelativeEmbedding`.
    """
    position = np.arange(length)
    offset = position[None, :] - position[:, None]
    distance = np.abs(offset)
    half = num_buckets // 2
    exact = half // 2
    # Rounded where the published float32 code rounds, so that no distance changes
    # its bucket.
    ratio = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact))
    far = exact + (ratio * np.float32(half - exact)).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(far, half - 1))
    return (bucket + half * (offset > 0)).astype(np.int32)


class RelativePositionBias(nnx.Module):
    """A learned bias for each head and bucket of distances, added to logits."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs) -> None:
        shape = (config.num_buckets, config.num_heads)
        init = nnx.initializers.normal((2 * math.prod(shape)) ** -0.5)
        dtype = jnp.dtype(config.param_dtype)
        self.embedding = nnx.Param(init(rngs.params(), shape, dtype))

    def __call__(self, buckets: Int[Array, "T T"]) -> Float[Array, "1 N T T"]:
        """Returns the bias of each query (third axis) and key, float32."""
        table = self.embedding[...].astype(jnp.float32)
        return einops.rearrange(table[buckets], "query key N -> 1 N query key")


class Attention(nnx.Module):
    """Self-attention with a position bias; its logits are not scaled.

    Source: Wan2.1 `T5Attention`, transformers `UMT5Attention`.
    """

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs) -> None:
        inner = config.num_heads * config.head_dim
        self.config = config
        # Small queries stand in for the scaling that other models apply to logits.
        q_std = (config.dim * config.head_dim) ** -0.5
        self.q = _matrix(config.dim, inner, config, rngs, std=q_std)
        self.k = _matrix(config.dim, inner, config, rngs)
        self.v = _matrix(config.dim, inner, config, rngs)
        self.o = _matrix(inner, config.dim, config, rngs)

    def __call__(
        self,
        x: Float[Array, "B T E"],
        bias: Float[Array, "1 N T T"],
        lengths: Int[Array, " B"],
    ) -> Float[Array, "B T E"]:
        """Attends from every row to the first `lengths` rows; in and out in `dtype`.

        The softmax is float32; probabilities are cast to `dtype` before they
        multiply the values. Logits of size [B, N, T, T] exist at once.
        """
        q, k, v = (
            split_heads(project(x), self.config.num_heads)
            for project in (self.q, self.k, self.v)
        )
        attended = jax.nn.dot_product_attention(
            q,
            k,
            v,
            bias=bias,
            scale=1.0,
            key_value_seq_lengths=lengths,
            implementation="xla",  # cuDNN takes no bias in float32
        )
        return self.o(merge_heads(attended))


class FeedForward(nnx.Module):
    """GELU-gated linear unit; in and out in `dtype`.

    Source: Wan2.1 `T5FeedForward`, transformers `UMT5DenseGatedActDense`.
    """

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs) -> None:
        self.gate = _matrix(config.dim, config.ffn_dim, config, rngs)
        self.fc1 = _matrix(config.dim, config.ffn_dim, config, rngs)
        self.fc2 = _matrix(config.ffn_dim, config.dim, config, rngs)

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Runs the network on each token."""
        gate = jax.nn.gelu(self.gate(x), approximate=True)
        return self.fc2(self.fc1(x) * gate)


class UMT5Block(nnx.Module):
    """Self-attention and feed-forward network, each on a normed copy of the stream.

    Source: Wan2.1 `T5SelfAttention` with `shared_pos=False`.
    """

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs) -> None:
        self.dtype = config.dtype
        self.pos_embedding = RelativePositionBias(config, rngs=rngs)
        self.norm1 = rms_norm(config, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.norm2 = rms_norm(config, rngs)
        self.ffn = FeedForward(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T E"],
        buckets: Int[Array, "T T"],
        lengths: Int[Array, " B"],
    ) -> Float[Array, "B T E"]:
        """Runs the block on the residual stream, float32 in and out."""
        bias = self.pos_embedding(buckets)
        hidden = self.attn(self.norm1(x).astype(self.dtype), bias, lengths)
        x = x + hidden.astype(jnp.float32)
        hidden = self.ffn(self.norm2(x).astype(self.dtype))
        return x + hidden.astype(jnp.float32)


def _matrix(
    in_features: int,
    out_features: int,
    config: UMT5Config,
    rngs: nnx.Rngs,
    *,
    std: float | None = None,
) -> nnx.Linear:
    """Makes a matrix without bias; if `std` is None, initial values keep variance."""
    return linear(
        in_features,
        out_features,
        use_bias=False,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=nnx.initializers.normal(std or in_features**-0.5),
        rngs=rngs,
    )


def rms_norm(config: UMT5Config, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Makes a root mean square norm with a learned scale, float32 inside and out."""
    return nnx.RMSNorm(
        config.dim,
        epsilon=config.eps,
        dtype=jnp.float32,
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )
