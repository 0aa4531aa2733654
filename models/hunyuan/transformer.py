"""The HunyuanVideo diffusion transformer: video and text in one sequence.

Visual tokens and the rotary table are put into tiled order once, after patchifying, and
the output is put back once; no layer reorders tokens. The text stands after the video.
The blocks are two stacks, double and single, each of which shares one traced block; see
`models.diffusion.transformer.block_stack`. Schedules and masks count their layers
through: the double blocks come first.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from draft_jax import AttentionPlan, BlockMask, DraftStep, VideoGrid
from models.diffusion.contexts import context_mask
from models.diffusion.interfaces import ImageCondition, TextContext
from models.diffusion.layer_state import prepare_layer_state
from models.diffusion.transformer.block_stack import run_blocks, stack_blocks
from models.diffusion.transformer.embeddings import PatchEmbedding
from models.diffusion.transformer.float8 import use_float8_linears
from models.diffusion.transformer.layers import linear, projection
from models.diffusion.transformer.model import (
    Results,
    Velocity,
    VideoTransformer,
)
from models.diffusion.transformer.token_shards import TokenShards
from models.diffusion.transformer.tokens import latent_grid, unpatchify
from models.diffusion.transformer.weight_shards import WeightShards, gather_of
from models.hunyuan.conditions import HunyuanConditioning
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.embeddings import ConditionEmbedder, TokenRefiner, guidance_level
from models.hunyuan.inputs import HunyuanInputs, check_inputs
from models.hunyuan.layers import (
    DoubleBlock,
    JointBlockInputs,
    SingleBlock,
    norm_shift_scale,
)
from models.hunyuan.rope import video_rope

# Paths of linear layers that are in `config.dtype` with linears in FP8, too: text
# projections and embeddings, modulation, and the last layer. (The embedding of patches
# is none.)
WIDE_LINEARS = (
    "context_embedder",
    "time_text_embed",
    "transformer_blocks.norm1",
    "transformer_blocks.norm1_context",
    "single_transformer_blocks.norm",
    "norm_out",
    "proj_out",
)

_DENSE = AttentionPlan.dense()


class OutputModulation(nnx.Module):
    """Shift and scale before the last layer; checkpoints store them as one layer."""

    def __init__(self, config: HunyuanConfig, *, rngs: nnx.Rngs) -> None:
        layer = projection(config, rngs)
        self.shift, self.scale = layer(), layer()

    def __call__(
        self, conditioning: Float[Array, "B E"]
    ) -> tuple[Float[Array, "B 1 E"], Float[Array, "B 1 E"]]:
        """Returns shift and scale, in `config.dtype`."""
        return self.shift(conditioning)[:, None], self.scale(conditioning)[:, None]


class HunyuanTransformer(VideoTransformer):
    """Predicts the velocity of a noisy latent, given time, text and guidance.

    A `VideoModel`. Source: HunyuanVideo `HYVideoDiffusionTransformer` and diffusers
    `HunyuanVideoTransformer3DModel`.
    """

    stacks: ClassVar = ("transformer_blocks", "single_transformer_blocks")

    def __init__(self, config: HunyuanConfig, *, rngs: nnx.Rngs) -> None:
        """Builds the model with random parameters.

        The output layer starts at zero, as in the original.

        Args:
          config: Sizes and dtypes.
          rngs: Source of the initial parameters, stream `params`.
        """
        self.config = config
        self.x_embedder = PatchEmbedding(
            config.in_channels,
            config.dim,
            patch_size=config.patch_size,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.context_embedder = TokenRefiner(config, rngs=rngs)
        self.time_text_embed = ConditionEmbedder(config, rngs=rngs)
        self.transformer_blocks = stack_blocks(
            lambda rngs: DoubleBlock(config, rngs=rngs), config.num_double_blocks, rngs
        )
        self.single_transformer_blocks = stack_blocks(
            lambda rngs: SingleBlock(config, rngs=rngs), config.num_single_blocks, rngs
        )
        self.norm_out = OutputModulation(config, rngs=rngs)
        self.proj_out = linear(
            config.dim,
            math.prod(config.patch_size) * config.out_channels,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
            kernel_init=nnx.initializers.zeros_init(),
        )
        if config.linears == "float8":
            use_float8_linears(self, leave=WIDE_LINEARS)

    def __call__(
        self,
        inputs: HunyuanInputs,
        *,
        attention: AttentionPlan = _DENSE,
        step: DraftStep | None = None,
        masks: BlockMask | None = None,
        remat: bool = False,
    ) -> tuple[Velocity, BlockMask | None]:
        """Runs the model.

        Args:
          inputs: Latents, timesteps, text, and guidance and a reference where the
            model takes them.
          attention: Dense or draft attention. Its schedule is not read: `step` is
            what came of it.
          step: The schedule's entry for this step (`StepPlan.step`), for draft
            attention. None makes all layers sparse, with new masks.
          masks: Block masks that the step before returned, stacked over layers;
            None on the first step.
          remat: Recompute each block in the backward pass instead of keeping what
            it computed: less memory, about a third more time.

        Returns:
          The velocity (noise - clean) in float32, and the masks to hand to the
          next step, leaves [layers, ...]; None with dense attention.

        Raises:
          ValueError: An input does not fit the configuration or the others.
        """
        results = self.run(inputs, attention, step, masks, remat=remat)
        return results.velocity, results.masks

    def reuse_residual(
        self,
        inputs: HunyuanInputs,
        residual: Float[Array, "B V E"],
        *,
        shards: TokenShards | None = None,
    ) -> Velocity:
        """Returns the velocity that follows from a residual; see `KeepsResidual`."""
        check_inputs(inputs, self.config)
        grid = self.grid(inputs.latents.shape)
        embedded = self._of_head(self._embed(inputs, grid, shards), grid, shards)
        x = embedded + residual
        return self._head(x, self._conditioning(inputs), grid, shards)

    def residual_shape(self, latent_shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        """Returns shape and dtype of one item's residual."""
        _, video = self._parts(self.grid(latent_shape))
        return jax.ShapeDtypeStruct(
            (video.num_tokens, self.config.dim), self.config.compute_dtype
        )

    def map_qkv(
        self,
        function: Callable[[Array, Array, Array], Any],
        inputs: HunyuanInputs,
        *,
        attention: AttentionPlan = _DENSE,
        step: DraftStep | None = None,
        masks: BlockMask | None = None,
        shards: TokenShards | None = None,
        weights: WeightShards | None = None,
    ) -> tuple[Velocity, Any]:
        """Calls a function of every layer's q, k, v; see `VideoModel.map_qkv`."""
        results = self.run(
            inputs,
            attention,
            step,
            masks,
            capture=lambda sown: function(*(sown["attn"][name] for name in "qkv")),
            shards=shards,
            weights=weights,
        )
        joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *results.found)
        return results.velocity, joined

    def step_inputs(
        self,
        latents: Float[Array, "B F H W C"],
        timestep: Float[Array, ""] | float,
        context: TextContext,
        image: ImageCondition | None,
        embedded_guidance: Float[Array, ""] | None = None,
    ) -> HunyuanInputs:
        """Returns the inputs of one step; see `VideoModel.step_inputs`."""
        rows = len(context.lengths)
        repeats = rows // len(latents)
        pooled = context.pooled
        if pooled is None:
            raise ValueError(
                "context.pooled is None; expected CLIP's pooled vector of each prompt"
            )
        guidance, reference = None, None
        if embedded_guidance is not None:
            level = guidance_level(embedded_guidance, self.config)
            guidance = jnp.full(rows, level, jnp.float32)
        if image is not None:
            reference = jnp.concatenate([image.latents] * repeats)
        return HunyuanInputs(
            latents=jnp.concatenate([latents] * repeats),
            timesteps=jnp.full(rows, timestep, jnp.float32),
            context=context.embeddings,
            context_mask=context_mask(context),
            pooled=pooled,
            guidance=guidance,
            reference=reference,
        )

    @property
    def num_layers(self) -> int:
        """Layers of attention: the double blocks, then the single ones."""
        return self.config.num_layers

    @property
    def num_heads(self) -> int:
        """Heads of each layer."""
        return self.config.num_heads

    @property
    def conditioning(self) -> HunyuanConditioning:
        """HunyuanVideo's rules for requests."""
        return HunyuanConditioning(self.config)

    def grid(self, latent_shape: tuple[int, ...]) -> VideoGrid:
        """Returns the sequence of latents of this shape, with reference and text.

        Args:
          latent_shape: Axes [B, F, H, W, C] or [F, H, W, C], of the video alone.

        Raises:
          ValueError: A size is not a multiple of the patch.
        """
        config = self.config
        video = latent_grid(
            latent_shape, patch_size=config.patch_size, tile=config.tile
        )
        return dataclasses.replace(
            video,
            frames=video.frames + config.reference_frames,
            text_length=config.text_length,
        )

    def run(
        self,
        inputs: HunyuanInputs,
        attention: AttentionPlan,
        step: DraftStep | None,
        masks: BlockMask | None,
        *,
        remat: bool = False,
        capture: Callable[[dict[str, Any]], Any] | None = None,
        shards: TokenShards | None = None,
        weights: WeightShards | None = None,
    ) -> Results:
        """Runs the model; see `VideoTransformer.run`."""
        config = self.config
        check_inputs(inputs, config)
        grid = self.grid(inputs.latents.shape)
        step, masks = prepare_layer_state(
            attention,
            step,
            masks,
            grid=grid,
            num_layers=config.num_layers,
            batch=len(inputs.latents),
            num_heads=config.num_heads // (1 if shards is None else shards.count),
        )
        mask = inputs.context_mask
        shared = JointBlockInputs(
            conditioning=self._conditioning(inputs),
            rope=video_rope(grid, config),
            text_lengths=None if mask is None else mask.sum(-1, dtype=jnp.int32),
            grid=grid,
            draft=attention.config,
            shards=shards,
        )
        text = self.context_embedder(inputs.context, inputs.timesteps, mask)
        embedded = self._embed(inputs, grid, shards)
        streams = embedded, text
        double, single = self.stacks
        streams, masks, sown = run_blocks(
            self.transformer_blocks,
            streams,
            shared,
            step=step,
            masks=masks,
            remat=remat,
            capture=capture,
            gather=gather_of(weights, double),
        )
        x, masks, sown_single = run_blocks(
            self.single_transformer_blocks,
            jnp.concatenate(streams, axis=1),
            shared,
            step=step,
            masks=masks,
            first=config.num_double_blocks,
            remat=remat,
            capture=capture,
            gather=gather_of(weights, single),
        )
        x = self._of_head(x, grid, shards)
        return Results(
            self._head(x, shared.conditioning, grid, shards),
            masks,
            (sown, sown_single),
            x - self._of_head(embedded, grid, shards),
        )

    def _conditioning(self, inputs: HunyuanInputs) -> Float[Array, "B E"]:
        """Returns what modulates all blocks; each applies its layer to its SiLU."""
        vector = self.time_text_embed(inputs.timesteps, inputs.pooled, inputs.guidance)
        return jax.nn.silu(vector).astype(self.config.dtype)

    def _embed(
        self, inputs: HunyuanInputs, grid: VideoGrid, shards: TokenShards | None
    ) -> Float[Array, "B V E"]:
        """Returns visual tokens: those of the reference frame, then the video's.

        Tiles do not reach from frame to frame, so joined parts are in tiled order.
        With `shards` they are those of the device.
        """
        reference, video = self._parts(grid)
        patches = self.x_embedder.patches(inputs.latents, video)
        if reference is not None and inputs.reference is not None:
            first = self.x_embedder.patches(inputs.reference, reference)
            patches = jnp.concatenate([first, patches], axis=1)
        if shards is not None:
            patches = shards.own(patches, axis=1)
        return self.x_embedder.project(patches)

    def _of_head(
        self, x: Float[Array, "B T E"], grid: VideoGrid, shards: TokenShards | None
    ) -> Float[Array, "B V E"]:
        """Returns the tokens that the head sees, from those before it or in blocks.

        They are those of the video. On several devices the head sees those of the
        reference frame, too: else some devices would have fewer.
        """
        if shards is not None:
            return x[:, : shards.local_tokens]
        _, video = self._parts(grid)
        end = grid.visual_tokens.stop
        return x[:, end - video.num_tokens : end]

    def _parts(self, grid: VideoGrid) -> tuple[VideoGrid | None, VideoGrid]:
        """Returns the grids of the reference frame, if there is one, and the video."""
        frames = self.config.reference_frames
        plain = dataclasses.replace(grid, text_length=0)
        video = dataclasses.replace(plain, frames=grid.frames - frames)
        return dataclasses.replace(plain, frames=frames) if frames else None, video

    def _head(
        self,
        x: Float[Array, "B V E"],
        conditioning: Float[Array, "B E"],
        grid: VideoGrid,
        shards: TokenShards | None,
    ) -> Velocity:
        """Applies the modulated norm and the last layer; see `_of_head`.

        Then puts tokens back to raster order and cuts patches into positions.
        """
        _, video = self._parts(grid)
        modulation = self.norm_out(conditioning)
        normed = norm_shift_scale(
            x, *modulation, eps=self.config.eps, before=self.proj_out
        )
        patches = self.proj_out(normed).astype(jnp.float32)
        if shards is not None:
            patches = shards.gather(patches)[:, -video.num_tokens :]
        return unpatchify(
            patches,
            video,
            patch_size=self.config.patch_size,
            channels="first",
        )
