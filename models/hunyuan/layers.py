"""Blocks of a HunyuanVideo transformer.

Attribute names are those of the diffusers checkpoint. Where a value changes dtype, as
in the original under autocast: residual streams, gates and whatever enters or leaves a
matrix product or attention are `config.dtype`. Norms, modulation and rotary embedding
are float32 inside, and rounded at the next linear layer; a gated output is added in
float32 and rounded once.

Sequences are [video, text]: visual tokens in tiled order, then the text with its
padding. In double blocks the pass that norms queries, keys and values joins those of
the two. In single blocks the output layer takes its two inputs one by one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from draft_jax import (
    QKV,
    BlockMask,
    DraftConfig,
    DraftStep,
    QKNorm,
    VideoGrid,
    joint_norm_rope_pool,
    norm_rope_pool,
)
from draft_jax.pytree import register_named_tuple
from models.diffusion.capture import sow_if_captured
from models.diffusion.transformer.attention import self_attention
from models.diffusion.transformer.float8 import Float8Linear
from models.diffusion.transformer.layers import (
    MLP,
    Activations,
    RMSNorm,
    activate,
    apply_side_by_side,
    linear,
    merge_heads,
    modulated_norm,
    projection,
    split_heads,
    unfinished,
)
from models.diffusion.transformer.rope import RopeTable
from models.diffusion.transformer.token_shards import TokenShards
from models.hunyuan.config import HunyuanConfig
from pallas_kernels.common import Product
from pallas_kernels.float8_rows import gelu_tanh

Streams = tuple[Float[Array, "B V E"], Float[Array, "B L E"]]


@register_named_tuple
class JointBlockInputs(NamedTuple):
    """Inputs that all blocks of one call share.

    Attributes:
      conditioning: SiLU of the embedded time, pooled text and guidance, in
        `config.dtype`.
      rope: Cosine and sine per visual token, in tiled order.
      text_lengths: Valid text tokens of each item; None means all.
      grid: Geometry of the sequence, with its text.
      draft: Options of draft attention; None is dense attention.
      shards: The device's part of the visual tokens; None for all. Norm and rotation
        come after the exchange, so `rope` is that of all.
    """

    conditioning: Float[Array, "B E"]
    rope: RopeTable
    text_lengths: Int[Array, " B"] | None
    grid: VideoGrid
    draft: DraftConfig | None
    shards: TokenShards | None = None


class Modulation(nnx.Module):
    """Shifts, scales and gates of a block, in `config.dtype`."""

    def __init__(self, rows: int, config: HunyuanConfig, *, rngs: nnx.Rngs) -> None:
        self.rows = rows
        self.linear = linear(
            config.dim,
            rows * config.dim,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )

    def __call__(
        self, conditioning: Float[Array, "B E"]
    ) -> list[Float[Array, "B 1 E"]]:
        """Returns as many vectors as there are rows, for all tokens alike."""
        return jnp.split(self.linear(conditioning)[:, None], self.rows, axis=-1)


def norm_shift_scale(
    x: Float[Array, "B T E"],
    shift: Float[Array, "B 1 E"],
    scale: Float[Array, "B 1 E"],
    *,
    eps: float,
    before: nnx.Linear | Float8Linear,
) -> Activations:
    """Norms, scales and shifts each token in float32; see `modulated_norm`."""
    shift, scale = shift.astype(jnp.float32), scale.astype(jnp.float32)
    return modulated_norm(x, 1 + scale, shift, eps=eps, before=before)


def add_gated(
    x: Float[Array, "B T E"], out: Float[Array, "B T E"], gate: Float[Array, "B 1 E"]
) -> Float[Array, "B T E"]:
    """Returns `x + gate * out`, computed in float32, in the dtype of x."""
    gated = gate.astype(jnp.float32) * out.astype(jnp.float32)
    return (x.astype(jnp.float32) + gated).astype(x.dtype)


class JointAttention(nnx.Module):
    """Attention of video and text to both, each with projections of its own.

    Sows queries and keys as "q" and "k"; see `models.diffusion.capture`.
    """

    def __init__(self, config: HunyuanConfig, *, rngs: nnx.Rngs) -> None:
        self.num_heads, self.eps = config.num_heads, config.eps
        project, norm = projection(config, rngs), _qk_norm(config)
        self.to_q, self.to_k, self.to_v = project(), project(), project()
        self.add_q_proj, self.add_k_proj = project(), project()
        self.add_v_proj = project()
        self.norm_q, self.norm_k = norm(), norm()
        self.norm_added_q, self.norm_added_k = norm(), norm()
        self.to_out, self.to_add_out = project(), project()

    def __call__(
        self,
        video: Activations,
        text: Activations,
        inputs: JointBlockInputs,
        step: DraftStep | None,
        mask: BlockMask | None,
    ) -> tuple[Streams, BlockMask | None]:
        """Attends within the joint sequence; the result is in `config.dtype`."""
        of_video, of_text = (
            QKV(*(split_heads(unfinished(p, x), self.num_heads) for p in projections))
            for x, projections in (
                (video, (self.to_q, self.to_k, self.to_v)),
                (text, (self.add_q_proj, self.add_k_proj, self.add_v_proj)),
            )
        )
        if inputs.shards is not None:
            of_video, of_text = _exchange(of_video, of_text, inputs.shards)
        q, k, v, pooled = joint_norm_rope_pool(
            of_video,
            of_text,
            grid=inputs.grid,
            config=inputs.draft,
            norm=QKNorm(over="head", eps=self.eps),
            scales=(self.norm_q.scale[...], self.norm_k.scale[...]),
            text_scales=(self.norm_added_q.scale[...], self.norm_added_k.scale[...]),
            rope=inputs.rope,
            order="tiled",
            pool_anyway=False,
        )
        sow_if_captured(self, q=q, k=k, v=v)
        attended, mask = _attend(q, k, v, pooled, inputs, step, mask)
        grid = inputs.grid
        if inputs.shards is not None:
            video, text = _exchange_back(attended, inputs)
            return (self.to_out(video), self.to_add_out(text)), mask
        attended = merge_heads(attended)
        # Cut after the product: libraries take no slice, so that one would be a copy.
        video_out = self.to_out(attended)[:, grid.visual_tokens]
        return (video_out, self.to_add_out(attended[:, grid.text_tokens])), mask


class DoubleBlock(nnx.Module):
    """A block in which video and text have streams and weights of their own.

    Source: HunyuanVideo `MMDoubleStreamBlock`; diffusers
    `HunyuanVideoTransformerBlock`.
    """

    def __init__(self, config: HunyuanConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.norm1 = Modulation(6, config, rngs=rngs)
        self.norm1_context = Modulation(6, config, rngs=rngs)
        self.attn = JointAttention(config, rngs=rngs)
        mlp = functools.partial(
            MLP,
            (config.dim, config.mlp_dim, config.dim),
            gelu_tanh,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.ff, self.ff_context = mlp(), mlp()

    def __call__(
        self,
        streams: Streams,
        inputs: JointBlockInputs,
        step: DraftStep | None,
        mask: BlockMask | None,
    ) -> tuple[Streams, BlockMask | None]:
        """Runs the block.

        Args:
          streams: Residual streams of video and of text.
          inputs: Inputs that all blocks share.
          step: This layer's part of the schedule (`dense` is a scalar); None with
            dense attention.
          mask: The layer's mask from the step before; None with a None step.

        Returns:
          The residual streams, and the mask in use.
        """
        video, text = streams
        shift, scale, gate, *mlp_rows = self.norm1(inputs.conditioning)
        text_shift, text_scale, text_gate, *text_mlp_rows = self.norm1_context(
            inputs.conditioning
        )
        (attended, text_attended), mask = self.attn(
            self._norm(video, shift, scale, before=self.attn.to_q),
            self._norm(text, text_shift, text_scale, before=self.attn.add_q_proj),
            inputs,
            step,
            mask,
        )
        video = add_gated(video, attended, gate)
        text = add_gated(text, text_attended, text_gate)
        return (
            self._feed_forward(video, self.ff, mlp_rows),
            self._feed_forward(text, self.ff_context, text_mlp_rows),
        ), mask

    def _feed_forward(
        self,
        x: Float[Array, "B T E"],
        mlp: MLP,
        rows: list[Float[Array, "B 1 E"]],
    ) -> Float[Array, "B T E"]:
        shift, scale, gate = rows
        normed = self._norm(x, shift, scale, before=mlp.linear_1)
        return add_gated(x, mlp(normed), gate)

    @property
    def _norm(self) -> Callable[..., Activations]:
        return functools.partial(norm_shift_scale, eps=self.config.eps)


class SingleAttention(nnx.Module):
    """Attention within one stream of video and text, without an output layer.

    Sows queries and keys as "q" and "k"; see `models.diffusion.capture`.
    """

    def __init__(self, config: HunyuanConfig, *, rngs: nnx.Rngs) -> None:
        self.num_heads, self.eps = config.num_heads, config.eps
        project, norm = projection(config, rngs), _qk_norm(config)
        self.to_q, self.to_k, self.to_v = project(), project(), project()
        self.norm_q, self.norm_k = norm(), norm()

    def __call__(
        self,
        x: Activations,
        inputs: JointBlockInputs,
        step: DraftStep | None,
        mask: BlockMask | None,
    ) -> tuple[Float[Array, "B T E"], BlockMask | None]:
        """Attends within the sequence; the result is in `config.dtype`."""
        q, k, v, pooled = self._project(x, inputs)
        sow_if_captured(self, q=q, k=k, v=v)
        attended, mask = _attend(q, k, v, pooled, inputs, step, mask)
        if inputs.shards is not None:
            return jnp.concatenate(_exchange_back(attended, inputs), axis=1), mask
        return merge_heads(attended), mask

    def _project(self, x: Activations, inputs: JointBlockInputs):
        """Returns queries, keys and values, and what is pooled of the first two."""
        q, k, v = (
            split_heads(unfinished(project, x), self.num_heads)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        v = v.finished()  # attention reads it, which takes no product
        options: dict[str, Any] = {
            "grid": inputs.grid,
            "config": inputs.draft,
            "norm": QKNorm(over="head", eps=self.eps),
            "scales": (self.norm_q.scale[...], self.norm_k.scale[...]),
            "rope": inputs.rope,
            "order": "tiled",
            "pool_anyway": False,
        }
        if inputs.shards is None:
            q, k, pooled = norm_rope_pool(q, k, **options)
            return q, k, v, pooled
        end, q, k = inputs.shards.local_tokens, q.finished(), k.finished()
        of_video, of_text = (
            QKV(*(array[:, part] for array in (q, k, v)))
            for part in (slice(end), slice(end, None))
        )
        of_video, of_text = _exchange(of_video, of_text, inputs.shards)
        return joint_norm_rope_pool(of_video, of_text, **options)


class SingleBlock(nnx.Module):
    """A block of one stream, whose attention and feed-forward run side by side.

    Source: HunyuanVideo `MMSingleStreamBlock`; diffusers
    `HunyuanVideoSingleTransformerBlock`.
    """

    def __init__(self, config: HunyuanConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        layer = functools.partial(
            linear, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs
        )
        self.norm = Modulation(3, config, rngs=rngs)
        self.attn = SingleAttention(config, rngs=rngs)
        self.proj_mlp = layer(config.dim, config.mlp_dim)
        self.proj_out = layer(config.dim + config.mlp_dim, config.dim)

    def __call__(
        self,
        x: Float[Array, "B T E"],
        inputs: JointBlockInputs,
        step: DraftStep | None,
        mask: BlockMask | None,
    ) -> tuple[Float[Array, "B T E"], BlockMask | None]:
        """Runs the block; see `DoubleBlock`.

        Args:
          x: Residual stream of video and text.
          inputs: Inputs that all blocks share.
          step: This layer's part of the schedule.
          mask: The layer's mask from the step before.

        Returns:
          The residual stream, and the mask in use.
        """
        shift, scale, gate = self.norm(inputs.conditioning)
        normed = norm_shift_scale(
            x, shift, scale, eps=self.config.eps, before=self.proj_mlp
        )
        attended, mask = self.attn(normed, inputs, step, mask)
        hidden = activate(gelu_tanh, self.proj_mlp, normed, before=self.proj_out)
        out = apply_side_by_side(self.proj_out, attended, hidden)
        return add_gated(x, out, gate), mask


def _exchange(video: QKV, text: QKV, shards: TokenShards) -> tuple[QKV, QKV]:
    """Returns the device's heads of all tokens, from all heads of its tokens.

    The pass that splits products finishes them.
    """
    of_video = (shards.to_heads(Product.of(x).finished()) for x in video)
    of_text = (shards.own_heads(Product.of(x).finished()) for x in text)
    return QKV(*of_video), QKV(*of_text)


def _exchange_back(
    attended: Float[Array, "B T N D"], inputs: JointBlockInputs
) -> Streams:
    """Returns all heads of the device's video tokens, and those of the text."""
    shards, grid = inputs.shards, inputs.grid
    assert shards is not None, "called with a part of the tokens"
    video = shards.to_tokens(attended[:, grid.visual_tokens])
    text = shards.all_heads(attended[:, grid.text_tokens])
    return merge_heads(video), merge_heads(text)


def _attend(q, k, v, pooled, inputs: JointBlockInputs, step, mask):
    """Attends as the call's inputs and the layer's state say."""
    return self_attention(
        q,
        k,
        v,
        grid=inputs.grid,
        draft=inputs.draft,
        step=step,
        mask=mask,
        pooled=pooled,
        text_lengths=inputs.text_lengths,
    )


def _qk_norm(config: HunyuanConfig):
    """Returns a function that makes the norm of each head's queries or keys."""
    return functools.partial(
        RMSNorm, config.head_dim, eps=config.eps, param_dtype=config.param_dtype
    )
