"""Layers of a Wan transformer block.

Attribute names are those of the diffusers checkpoint. Where a value changes dtype:
norms, modulation, gates, rotary embedding and the residual stream are float32, as
in the original under autocast; what enters a matrix product or attention is cast to
`config.dtype`, and so is what comes out of it.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from draft_jax import (
    BlockMask,
    DraftConfig,
    DraftStep,
    PooledTokens,
    QKNorm,
    VideoGrid,
    norm_rope_pool,
    scheduled_attention,
)
from models.wan.config import WanConfig
from pallas_kernels import dense_attention, why_no_cudnn
from pallas_kernels.common.device import current_device

# The original's initialisation of all linear layers but the last.
XAVIER_UNIFORM = nnx.initializers.xavier_uniform()

RopeTable = tuple[Float[Array, "T half"], Float[Array, "T half"]]


def linear(
    in_features: int,
    out_features: int,
    config: WanConfig,
    rngs: nnx.Rngs,
    *,
    dtype: str | None = None,
    kernel_init: Callable = XAVIER_UNIFORM,
) -> nnx.Linear:
    """A dense layer that computes in `dtype`, `config.dtype` by default."""
    return nnx.Linear(
        in_features,
        out_features,
        dtype=jnp.dtype(dtype or config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=kernel_init,
        rngs=rngs,
    )


def layer_norm(x: Float[Array, "*axes E"], eps: float) -> Float[Array, "*axes E"]:
    """Zero mean and unit variance over the last axis, in float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + eps)


class LayerNorm(nnx.Module):
    """Layer norm with learned scale and bias; float32 in and out.

    Of width `config.dim` and with `config.eps` unless others are given.
    """

    def __init__(
        self,
        config: WanConfig,
        *,
        size: int | None = None,
        eps: float | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        size, dtype = size or config.dim, jnp.dtype(config.param_dtype)
        self.eps = config.eps if eps is None else eps
        self.scale = nnx.Param(jnp.ones(size, dtype))
        self.bias = nnx.Param(jnp.zeros(size, dtype))

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        scale, bias = (p[...].astype(jnp.float32) for p in (self.scale, self.bias))
        return layer_norm(x, self.eps) * scale + bias


class RMSNorm(nnx.Module):
    """Root mean square norm over all channels with a learned scale; float32 out."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs) -> None:
        self.eps = config.eps
        self.scale = nnx.Param(jnp.ones(config.dim, jnp.dtype(config.param_dtype)))

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        x = x.astype(jnp.float32)
        mean_square = jnp.square(x).mean(-1, keepdims=True)
        scale = self.scale[...].astype(jnp.float32)
        return x * jax.lax.rsqrt(mean_square + self.eps) * scale


class MLP(nnx.Module):
    """Two linear layers with an activation between; in and out in `dtype`."""

    def __init__(
        self,
        sizes: tuple[int, int, int],
        activation: Callable[[Array], Array],
        config: WanConfig,
        *,
        dtype: str | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        features_in, hidden, features_out = sizes
        self.linear_1 = linear(features_in, hidden, config, rngs, dtype=dtype)
        self.linear_2 = linear(hidden, features_out, config, rngs, dtype=dtype)
        self.activation = activation

    def __call__(self, x: Float[Array, "*axes I"]) -> Float[Array, "*axes O"]:
        return self.linear_2(self.activation(self.linear_1(x)))


def gelu_tanh(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """GELU by its tanh approximation."""
    return jax.nn.gelu(x, approximate=True)


def gelu_exact(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """GELU by the error function."""
    return jax.nn.gelu(x, approximate=False)


class Attention(nnx.Module):
    """Projections and norms around an attention; the attention itself is the caller's.

    With `image`, a second pair of keys and values that image tokens go through.

    Source: Wan2.1 `WanSelfAttention`, `WanT2VCrossAttention`, `WanI2VCrossAttention`.
    """

    def __init__(
        self, config: WanConfig, *, image: bool = False, rngs: nnx.Rngs
    ) -> None:
        dim = config.dim
        self.num_heads = config.num_heads
        self.dtype = config.dtype
        self.to_q = linear(dim, dim, config, rngs)
        self.to_k = linear(dim, dim, config, rngs)
        self.to_v = linear(dim, dim, config, rngs)
        self.to_out = linear(dim, dim, config, rngs)
        self.norm_q = RMSNorm(config, rngs=rngs) if config.qk_norm else None
        self.norm_k = RMSNorm(config, rngs=rngs) if config.qk_norm else None
        self.add_k_proj = linear(dim, dim, config, rngs) if image else None
        self.add_v_proj = linear(dim, dim, config, rngs) if image else None
        has_norm = image and config.qk_norm
        self.norm_added_k = RMSNorm(config, rngs=rngs) if has_norm else None

    def project(
        self,
        x: Float[Array, "B T E"],
        context: Float[Array, "B L E"],
    ) -> tuple[
        Float[Array, "B T N D"], Float[Array, "B L N D"], Float[Array, "B L N D"]
    ]:
        """Queries from x, keys and values from context, per head, in `dtype`.

        Norms are float32; the RMS is over all heads together.
        """
        q, k = self.to_q(x), self.to_k(context)
        q = self._split_heads(q if self.norm_q is None else self.norm_q(q))
        k = self._split_heads(k if self.norm_k is None else self.norm_k(k))
        v = self._split_heads(self.to_v(context))
        return q.astype(self.dtype), k.astype(self.dtype), v

    def project_video(
        self,
        x: Float[Array, "B T E"],
        rope: RopeTable,
        grid: VideoGrid,
        draft: DraftConfig | None,
    ) -> tuple[
        Float[Array, "B T N D"],
        Float[Array, "B T N D"],
        Float[Array, "B T N D"],
        PooledTokens | None,
    ]:
        """Queries, keys and values of video tokens in tiled order, in `dtype`.

        Norm and rotation are float32; the RMS is over all heads together. Pooled as
        `draft` says where that comes with them for free.
        """
        norm, scales = None, None
        if self.norm_q is not None and self.norm_k is not None:
            norm = QKNorm(over="heads", eps=self.norm_q.eps)
            scales = (self.norm_q.scale[...], self.norm_k.scale[...])
        q, k, pooled = norm_rope_pool(
            self._split_heads(self.to_q(x)),
            self._split_heads(self.to_k(x)),
            grid=grid,
            config=draft,
            norm=norm,
            scales=scales,
            rope=rope,
            order="tiled",
            pool_anyway=False,
        )
        return q, k, self._split_heads(self.to_v(x)), pooled

    def project_image(
        self, image: Float[Array, "B I E"]
    ) -> tuple[Float[Array, "B I N D"], Float[Array, "B I N D"]]:
        """Keys and values of embedded image tokens, as `project` makes those of text.

        Only for attention that was made with `image`.
        """
        assert self.add_k_proj is not None, "made with image"
        assert self.add_v_proj is not None, "made with image"
        k = self.add_k_proj(image)
        if self.norm_added_k is not None:
            k = self.norm_added_k(k).astype(self.dtype)
        return self._split_heads(k), self._split_heads(self.add_v_proj(image))

    def merge(self, heads: Float[Array, "B T N D"]) -> Float[Array, "B T E"]:
        """The output projection of the heads put side by side."""
        return self.to_out(heads.reshape(*heads.shape[:2], -1))

    def _split_heads(self, x: Float[Array, "B T E"]) -> Float[Array, "B T N D"]:
        return x.reshape(*x.shape[:2], self.num_heads, -1)


class WanBlock(nnx.Module):
    """One transformer block: self-attention, cross-attention, feed-forward.

    Source: Wan2.1 `WanAttentionBlock`.
    """

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.attn1 = Attention(config, rngs=rngs)
        self.attn2 = Attention(config, image=config.image_dim is not None, rngs=rngs)
        self.norm2 = LayerNorm(config, rngs=rngs) if config.cross_attn_norm else None
        sizes = (config.dim, config.ffn_dim, config.dim)
        self.ffn = MLP(sizes, gelu_tanh, config, rngs=rngs)
        self.scale_shift_table = modulation_table(6, config, rngs)

    def __call__(
        self,
        x: Float[Array, "B T E"],
        context: Float[Array, "B L E"],
        modulation: Float[Array, "B 6 E"],
        rope: RopeTable,
        grid: VideoGrid,
        step: DraftStep | None,
        mask: BlockMask | None,
        image: Float[Array, "B I E"] | None = None,
    ) -> tuple[
        Float[Array, "B T E"],
        BlockMask | None,
        tuple[Float[Array, "B T N D"], Float[Array, "B T N D"]],
    ]:
        """Runs the block.

        Args:
          x: The residual stream, float32, tokens in tiled order.
          context: Embedded text in `config.dtype`.
          modulation: The projected time embedding, float32.
          rope: Cosine and sine per token, in tiled order.
          grid: Geometry of the tokens.
          step: This layer's part of the schedule (`dense` is a scalar); None
            when `config.attention` is "dense".
          mask: The layer's mask from the step before; None with a None step.
          image: Embedded image tokens, for an image-to-video model.

        Returns:
          The residual stream, the mask in use, and self-attention's q and k.
        """
        config = self.config
        rows = self.scale_shift_table[...].astype(jnp.float32) + modulation
        shift_1, scale_1, gate_1, shift_3, scale_3, gate_3 = (
            rows[:, row, None] for row in range(6)
        )
        hidden = layer_norm(x, config.eps) * (1 + scale_1) + shift_1
        hidden = hidden.astype(config.dtype)
        draft = None if config.attention == "dense" else config.draft
        q, k, v, pooled = self.attn1.project_video(hidden, rope, grid, draft)
        attended, mask = self._self_attention(q, k, v, pooled, grid, step, mask)
        x = x + self.attn1.merge(attended).astype(jnp.float32) * gate_1

        hidden = x if self.norm2 is None else self.norm2(x)
        q2, k2, v2 = self.attn2.project(hidden.astype(config.dtype), context)
        attended = cross_attention(q2, k2, v2)
        if image is not None:
            attended += cross_attention(q2, *self.attn2.project_image(image))
        x = x + self.attn2.merge(attended).astype(jnp.float32)

        hidden = layer_norm(x, config.eps) * (1 + scale_3) + shift_3
        hidden = self.ffn(hidden.astype(config.dtype))
        return x + hidden.astype(jnp.float32) * gate_3, mask, (q, k)

    def _self_attention(
        self,
        q: Float[Array, "B T N D"],
        k: Float[Array, "B T N D"],
        v: Float[Array, "B T N D"],
        pooled: PooledTokens | None,
        grid: VideoGrid,
        step: DraftStep | None,
        mask: BlockMask | None,
    ) -> tuple[Float[Array, "B T N D"], BlockMask | None]:
        if self.config.attention == "dense":
            return dense_attention(q, k, v), mask
        assert step is not None, "WanTransformer makes one"
        assert mask is not None, "WanTransformer makes one"
        return scheduled_attention(
            q,
            k,
            v,
            grid=grid,
            config=self.config.draft,
            step=step,
            mask=mask,
            order="tiled",
            pooled=pooled,
        )


def modulation_table(rows: int, config: WanConfig, rngs: nnx.Rngs) -> nnx.Param:
    """A learned table that is added to the time embedding."""
    values = jax.random.normal(rngs.params(), (rows, config.dim))
    values = values / math.sqrt(config.dim)
    return nnx.Param(values.astype(config.param_dtype))


def cross_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B L N D"],
    v: Float[Array, "B L N D"],
) -> Float[Array, "B T N D"]:
    """Softmax attention of video tokens over all text rows, without a mask.

    The softmax is float32. cuDNN where it can run; elsewhere logits of size
    [B, N, T, L] exist at once, which short texts allow.
    """
    device = current_device(q)
    fused = why_no_cudnn(q.dtype.name, q.shape[-1], device) is None
    return jax.nn.dot_product_attention(
        q, k, v, implementation="cudnn" if fused else "xla"
    )
