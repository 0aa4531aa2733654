"""Layers of a Wan transformer block.

Attribute names are those of the diffusers checkpoint. Where a value changes dtype:
norms, modulation, gates, rotary embedding and the residual stream are float32, as
in the original under autocast; what enters a matrix product or attention is cast to
`config.dtype`, and so is what comes out of it.
"""

import functools
import math
from typing import NamedTuple

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
)
from draft_jax.pytree import register_named_tuple
from models.diffusion.capture import sow_if_captured
from models.diffusion.transformer.attention import self_attention
from models.diffusion.transformer.layers import (
    MLP,
    Activations,
    LayerNorm,
    RMSNorm,
    merge_heads,
    modulated_norm,
    projection,
    shared_input,
    split_heads,
    sum_and_norm,
    unfinished,
)
from models.diffusion.transformer.rope import RopeTable
from models.diffusion.transformer.token_shards import TokenShards
from models.float8.product import add_gated
from models.wan.config import WanConfig
from pallas_kernels import why_no_cudnn
from pallas_kernels.common import Product, current_device
from pallas_kernels.float8_rows import gelu_tanh


@register_named_tuple
class BlockInputs(NamedTuple):
    """Inputs that all blocks of one call share.

    Attributes:
      text: Embedded text in `config.dtype`.
      image: Embedded image tokens, for an image-to-video model.
      modulation: Projected time embeddings, float32: of all tokens, or of those of the
        first frame and those of the others.
      rope: Cosine and sine per token of the video, in tiled order.
      grid: Geometry of the tokens.
      draft: Options of draft attention; None is dense attention.
      shards: The device's part of the tokens; None for all. Norm and rotation come
        after the exchange, so `rope` is that of all.
    """

    text: Float[Array, "B L E"]
    image: Float[Array, "B I E"] | None
    modulation: Float[Array, "B times 6 E"]
    rope: RopeTable
    grid: VideoGrid
    draft: DraftConfig | None
    shards: TokenShards | None = None


class SelfAttention(nnx.Module):
    """Self-attention of video tokens, dense or by a draft.

    Sows its queries and keys as "q" and "k"; see `models.diffusion.capture`.

    Source: Wan2.1 `WanSelfAttention`.
    """

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs) -> None:
        self.num_heads = config.num_heads
        project = projection(config, rngs)
        self.to_q, self.to_k, self.to_v = project(), project(), project()
        self.to_out = project()
        self.norm_q = _qk_norm(config) if config.qk_norm else None
        self.norm_k = _qk_norm(config) if config.qk_norm else None

    def __call__(
        self,
        x: Activations,
        inputs: BlockInputs,
        step: DraftStep | None,
        mask: BlockMask | None,
    ) -> tuple[Product, BlockMask | None]:
        """Attends within the video.

        Args:
          x: Tokens in tiled order, in `config.dtype` or in FP8.
          inputs: Inputs that all blocks share.
          step: This layer's part of the schedule (`dense` is a scalar); None with
            dense attention.
          mask: The layer's mask from the step before; None with a None step.

        Returns:
          The projected result, to be finished, and the mask in use.
        """
        q, k, v, pooled = self._project(x, inputs)
        sow_if_captured(self, q=q, k=k, v=v)
        attended, mask = self_attention(
            q,
            k,
            v,
            grid=inputs.grid,
            draft=inputs.draft,
            step=step,
            mask=mask,
            pooled=pooled,
        )
        if inputs.shards is not None:
            attended = inputs.shards.to_tokens(attended)
        return unfinished(self.to_out, merge_heads(attended)), mask

    def _project(
        self, x: Activations, inputs: BlockInputs
    ) -> tuple[
        Float[Array, "B T N D"],
        Float[Array, "B T N D"],
        Float[Array, "B T N D"],
        PooledTokens | None,
    ]:
        """Returns queries, keys and values, in `config.dtype`.

        Norm and rotation are float32; the RMS is over all heads together. Pooled as
        `inputs.draft` says where that comes with them for free. All this needs all
        tokens of a head, so several devices exchange before it; of the other devices'
        heads the norm needs the mean squares.
        """
        shards = inputs.shards
        q, k, v = (
            split_heads(unfinished(project, x), self.num_heads)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        v = v.finished()  # attention reads it, which takes no product
        norm, scales, mean_squares = None, None, None
        if self.norm_q is not None and self.norm_k is not None:
            norm = QKNorm(over="heads", eps=self.norm_q.eps)
            scales = (self.norm_q.scale[...], self.norm_k.scale[...])
        if shards is not None:
            q, k = q.finished(), k.finished()  # in the pass that splits them
            squares = _mean_squares(q, k)
            q, k, v = map(shards.to_heads, (q, k, v))
            if scales is not None:
                # XLA would send these before queries, which would then not travel while
                # keys are projected.
                q, squares = jax.lax.optimization_barrier((q, squares))
                squares = shards.gather(squares)
                mean_squares = (squares[..., 0], squares[..., 1])
                scales = shards.own_channels(scales[0]), shards.own_channels(scales[1])
        q, k, pooled = norm_rope_pool(
            q,
            k,
            grid=inputs.grid,
            config=inputs.draft,
            norm=norm,
            scales=scales,
            rope=inputs.rope,
            mean_squares=mean_squares,
            order="tiled",
            pool_anyway=False,
        )
        return q, k, v, pooled


class CrossAttention(nnx.Module):
    """Attention of video tokens to text, and to an image beside it.

    With `image`, a second pair of keys and values is made of image tokens; what is
    attended to in text and image is added.

    Source: Wan2.1 `WanT2VCrossAttention`, `WanI2VCrossAttention`.
    """

    def __init__(self, config: WanConfig, *, image: bool, rngs: nnx.Rngs) -> None:
        self.num_heads = config.num_heads
        self.dtype = config.dtype
        project = projection(config, rngs)
        self.to_q, self.to_k, self.to_v = project(), project(), project()
        self.to_out = project()
        self.norm_q = _qk_norm(config) if config.qk_norm else None
        self.norm_k = _qk_norm(config) if config.qk_norm else None
        self.add_k_proj = project() if image else None
        self.add_v_proj = project() if image else None
        self.norm_added_k = _qk_norm(config) if image and config.qk_norm else None

    def __call__(
        self,
        x: Activations,
        text: Float[Array, "B L E"],
        image: Float[Array, "B I E"] | None,
    ) -> Product:
        """Attends to embedded text and image tokens; in and out in `config.dtype`.

        Norms are float32; the RMS is over all heads together. The result is to be
        finished.
        """
        words = shared_input(text, before=self.to_k)
        q, k = self.to_q(x), self.to_k(words)
        q = self._heads(q if self.norm_q is None else self.norm_q(q))
        k = self._heads(k if self.norm_k is None else self.norm_k(k))
        v = self._heads(self.to_v(words))
        q = q.astype(self.dtype)
        attended = attend_to_all(q, k.astype(self.dtype), v)
        if image is not None:
            attended += attend_to_all(q, *self._project_image(image))
        return unfinished(self.to_out, merge_heads(attended))

    def _project_image(
        self, image: Float[Array, "B I E"]
    ) -> tuple[Float[Array, "B I N D"], Float[Array, "B I N D"]]:
        """Returns keys and values of embedded image tokens."""
        assert self.add_k_proj is not None, "made with image"
        assert self.add_v_proj is not None, "made with image"
        patches = shared_input(image, before=self.add_k_proj)
        k = self.add_k_proj(patches)
        if self.norm_added_k is not None:
            k = self.norm_added_k(k).astype(self.dtype)
        return self._heads(k), self._heads(self.add_v_proj(patches))

    def _heads(self, x: Float[Array, "B T E"]) -> Float[Array, "B T N D"]:
        return split_heads(x, self.num_heads)


class WanBlock(nnx.Module):
    """One transformer block: self-attention, cross-attention, feed-forward.

    Source: Wan2.1 `WanAttentionBlock`.
    """

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs) -> None:
        self.eps = config.eps
        self.attn1 = SelfAttention(config, rngs=rngs)
        self.attn2 = CrossAttention(
            config, image=config.image_dim is not None, rngs=rngs
        )
        self.norm2 = (
            LayerNorm(config.dim, eps=config.eps, param_dtype=config.param_dtype)
            if config.cross_attn_norm
            else None
        )
        self.ffn = MLP(
            (config.dim, config.ffn_dim, config.dim),
            gelu_tanh,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.scale_shift_table = modulation_table(6, config, rngs)

    def __call__(
        self,
        x: Float[Array, "B T E"],
        inputs: BlockInputs,
        step: DraftStep | None,
        mask: BlockMask | None,
    ) -> tuple[Float[Array, "B T E"], BlockMask | None]:
        """Runs the block.

        Args:
          x: The residual stream, float32, tokens in tiled order.
          inputs: Inputs that all blocks share.
          step: This layer's part of the schedule; see `SelfAttention`.
          mask: The layer's mask from the step before; None with a None step.

        Returns:
          The residual stream, and the mask in use.
        """
        rows = self.scale_shift_table[...].astype(jnp.float32) + inputs.modulation
        shift_1, scale_1, gate_1, shift_3, scale_3, gate_3 = (
            of_tokens(rows[:, :, row], inputs.grid, inputs.shards) for row in range(6)
        )
        modulate = functools.partial(modulated_norm, eps=self.eps)
        hidden = modulate(x, 1 + scale_1, shift_1, before=self.attn1.to_q)
        attended, mask = self.attn1(hidden, inputs, step, mask)
        to_q = self.attn2.to_q
        if self.norm2 is None:
            x = add_gated(x, attended, gate_1)
            hidden = shared_input(x, before=to_q)
        else:
            own = self.norm2.parameters()
            x, hidden = sum_and_norm(
                x, attended, gate_1, *own, eps=self.norm2.eps, before=to_q
            )
        attended = self.attn2(hidden, inputs.text, inputs.image)

        x, hidden = sum_and_norm(
            x,
            attended,
            None,
            1 + scale_3,
            shift_3,
            eps=self.eps,
            before=self.ffn.linear_1,
        )
        hidden = self.ffn(hidden)
        return x + hidden.astype(jnp.float32) * gate_3, mask


def _mean_squares(*arrays: Float[Array, "B T N D"]) -> Float[Array, "B T count"]:
    """Returns the mean square of all heads of each token, float32."""
    squares = [jnp.square(x.astype(jnp.float32)).mean((-2, -1)) for x in arrays]
    return jnp.stack(squares, axis=-1)


def _qk_norm(config: WanConfig) -> RMSNorm:
    return RMSNorm(config.dim, eps=config.eps, param_dtype=config.param_dtype)


def modulation_table(rows: int, config: WanConfig, rngs: nnx.Rngs) -> nnx.Param:
    """Returns a learned table that is added to the time embedding."""
    values = jax.random.normal(rngs.params(), (rows, config.dim))
    values = values / math.sqrt(config.dim)
    return nnx.Param(values.astype(config.param_dtype))


def of_tokens(
    rows: Float[Array, "B times E"],
    grid: VideoGrid,
    shards: TokenShards | None = None,
) -> Float[Array, "B _T E"]:
    """Returns what belongs to each token of rows for one or two noise levels.

    Of two, the tokens of the first frame, which come first in tiled order, have the
    first. A compiled program chooses as it reads them: no table of all tokens exists.

    Args:
      rows: One row for all tokens, or one for the first frame and one for the others.
      grid: Geometry of the tokens.
      shards: The device's part of them; None for all.
    """
    if rows.shape[1] == 1:
        return rows
    is_first = jnp.arange(grid.num_visual_tokens) < grid.height * grid.width
    if shards is not None:
        is_first = shards.own(is_first, axis=0)
    return jnp.where(is_first[:, None], rows[:, :1], rows[:, 1:])


def attend_to_all(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B L N D"],
    v: Float[Array, "B L N D"],
) -> Float[Array, "B T N D"]:
    """Attends to all text rows, or all image tokens, without a mask.

    The softmax is float32. cuDNN where it can run; elsewhere logits of size
    [B, N, T, L] exist at once, which short texts allow.
    """
    device = current_device(q)
    fused = why_no_cudnn(q.dtype.name, q.shape[-1], device) is None
    return jax.nn.dot_product_attention(
        q, k, v, implementation="cudnn" if fused else "xla"
    )
