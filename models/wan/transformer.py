"""The Wan2.1 and Wan2.2 diffusion transformers, from text or from an image and text.

Tokens and rotary table are put into tiled order once, after patchifying, and the
output is put back once; no layer reorders tokens. Layers share one traced block; see
`models.diffusion.transformer.block_stack`.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from draft_jax import AttentionPlan, BlockMask, DraftStep, VideoGrid
from models.diffusion.interfaces import ImageCondition, TextContext
from models.diffusion.layer_state import prepare_layer_state
from models.diffusion.transformer.block_stack import run_blocks, stack_blocks
from models.diffusion.transformer.embeddings import PatchEmbedding
from models.diffusion.transformer.float8 import use_float8_linears
from models.diffusion.transformer.layers import linear, modulated_norm
from models.diffusion.transformer.model import (
    Results,
    Velocity,
    VideoTransformer,
)
from models.diffusion.transformer.rope import rope_table
from models.diffusion.transformer.token_shards import TokenShards
from models.diffusion.transformer.tokens import latent_grid, unpatchify
from models.diffusion.transformer.weight_shards import WeightShards, gather_of
from models.wan.conditions import NO_EMBEDDED_GUIDANCE, WanConditioning
from models.wan.config import WanConfig
from models.wan.embeddings import ConditionEmbedder
from models.wan.inputs import WanInputs, check_inputs
from models.wan.layers import BlockInputs, WanBlock, modulation_table, of_tokens
from models.wan.rope import split_head_dim

# Paths of linear layers that are in `config.dtype` with linears in FP8, too. (The
# embedding of patches is none.)
WIDE_LINEARS = ("condition_embedder", "proj_out")

_DENSE = AttentionPlan.dense()


class WanTransformer(VideoTransformer):
    """Predicts the velocity of a noisy latent, given time, text and perhaps an image.

    A `VideoModel`. Source: Wan2.1 and Wan2.2 `WanModel`, diffusers
    `WanTransformer3DModel`.
    """

    stacks: ClassVar = ("blocks",)

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs) -> None:
        """Builds the model with random parameters.

        The output layer starts at zero, as in the original.

        Args:
          config: Sizes and dtypes.
          rngs: Source of the initial parameters, stream `params`.
        """
        self.config = config
        self.patch_embedding = PatchEmbedding(
            config.in_channels,
            config.dim,
            patch_size=config.patch_size,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.condition_embedder = ConditionEmbedder(config, rngs=rngs)
        self.blocks = stack_blocks(
            lambda rngs: WanBlock(config, rngs=rngs), config.num_layers, rngs
        )
        self.scale_shift_table = modulation_table(2, config, rngs)
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
        inputs: WanInputs,
        *,
        attention: AttentionPlan = _DENSE,
        step: DraftStep | None = None,
        masks: BlockMask | None = None,
        remat: bool = False,
        unrolled: bool = False,
    ) -> tuple[Velocity, BlockMask | None]:
        """Runs the model.

        Args:
          inputs: Latents, timesteps, text, and an image's tokens where the model
            takes one.
          attention: Dense or draft attention. Its schedule is not read: `step` is
            what came of it.
          step: The schedule's entry for this step (`StepPlan.step`), for draft
            attention. None makes all layers sparse, with new masks.
          masks: Block masks that the step before returned, stacked over layers;
            None on the first step.
          remat: Recompute each block in the backward pass instead of keeping what
            it computed: less memory, about a third more time.
          unrolled: Compile each layer for itself; see `run_blocks`.

        Returns:
          The velocity (noise - clean) in float32, and the masks to hand to the
          next step, leaves [layers, ...]; None with dense attention.

        Raises:
          ValueError: An input does not fit the configuration or the others.
        """
        results = self.run(
            inputs, attention, step, masks, remat=remat, unrolled=unrolled
        )
        return results.velocity, results.masks

    def reuse_residual(
        self,
        inputs: WanInputs,
        residual: Float[Array, "B T E"],
        *,
        shards: TokenShards | None = None,
    ) -> Velocity:
        """Returns the velocity that follows from a residual; see `KeepsResidual`."""
        check_inputs(inputs, self.config)
        grid = self.grid(inputs.latents.shape)
        time, _, _ = self.condition_embedder(
            inputs.times, inputs.context, inputs.context_lengths
        )
        x = self._embed(inputs, grid, shards).astype(jnp.float32)
        return self._head(x + residual, time, grid, shards)

    def residual_shape(self, latent_shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        """Returns shape and dtype of one item's residual."""
        tokens = self.grid(latent_shape).num_tokens
        return jax.ShapeDtypeStruct(
            (tokens, self.config.dim), self.config.compute_dtype
        )

    def map_qkv(
        self,
        function: Callable[[Array, Array, Array], Any],
        inputs: WanInputs,
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
            capture=lambda sown: function(*(sown["attn1"][name] for name in "qkv")),
            shards=shards,
            weights=weights,
        )
        return results.velocity, results.found

    def step_inputs(
        self,
        latents: Float[Array, "B F H W C"],
        timestep: Float[Array, ""] | float,
        context: TextContext,
        image: ImageCondition | None,
        embedded_guidance: Float[Array, ""] | None = None,
    ) -> WanInputs:
        """Returns the inputs of one step; see `VideoModel.step_inputs`."""
        if embedded_guidance is not None:
            raise ValueError(NO_EMBEDDED_GUIDANCE)
        rows = len(context.lengths)
        repeats = rows // len(latents)
        tokens = first_timesteps = None
        if image is not None and self.config.holds_first_frame:
            first_timesteps = jnp.zeros(rows)
        elif image is not None:
            latents = jnp.concatenate([latents, image.latents], axis=-1)
            tokens = image.tokens
        return WanInputs(
            latents=jnp.concatenate([latents] * repeats),
            timesteps=jnp.full(rows, timestep, jnp.float32),
            context=context.embeddings,
            context_lengths=context.lengths,
            image_tokens=(
                None if tokens is None else jnp.concatenate([tokens] * repeats)
            ),
            first_timesteps=first_timesteps,
        )

    @property
    def num_layers(self) -> int:
        """Transformer blocks."""
        return self.config.num_layers

    @property
    def num_heads(self) -> int:
        """Heads of each block's self-attention."""
        return self.config.num_heads

    @property
    def conditioning(self) -> WanConditioning:
        """Wan's rules for requests."""
        return WanConditioning(self.config)

    def grid(self, latent_shape: tuple[int, ...]) -> VideoGrid:
        """Returns the token grid of latents of this shape.

        Args:
          latent_shape: Axes [B, F, H, W, C] or [F, H, W, C].

        Raises:
          ValueError: A size is not a multiple of the patch.
        """
        config = self.config
        return latent_grid(
            latent_shape,
            patch_size=config.patch_size,
            tile=config.tile,
            turns_tile=config.turns_tile,
        )

    def run(
        self,
        inputs: WanInputs,
        attention: AttentionPlan,
        step: DraftStep | None,
        masks: BlockMask | None,
        *,
        remat: bool = False,
        unrolled: bool = False,
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
        time, modulation, text = self.condition_embedder(
            inputs.times, inputs.context, inputs.context_lengths
        )
        shared = BlockInputs(
            text=text,
            image=self.condition_embedder.embed_image(inputs.image_tokens),
            modulation=modulation,
            rope=rope_table(
                grid, split_head_dim(config.head_dim), theta=config.rope_theta
            ),
            grid=grid,
            draft=attention.config,
            shards=shards,
        )
        embedded = self._embed(inputs, grid, shards)
        x, masks, sown = run_blocks(
            self.blocks,
            embedded.astype(jnp.float32),
            shared,
            step=step,
            masks=masks,
            remat=remat,
            unrolled=unrolled,
            capture=capture,
            gather=gather_of(weights, "blocks"),
        )
        return Results(
            self._head(x, time, grid, shards),
            masks,
            sown,
            # Of the embedding as it was made: half the memory of its float32 copy.
            (x - embedded.astype(jnp.float32)).astype(config.compute_dtype),
        )

    def _embed(
        self, inputs: WanInputs, grid: VideoGrid, shards: TokenShards | None
    ) -> Float[Array, "B T E"]:
        """Returns the tokens of the latents, those of the device."""
        patches = self.patch_embedding.patches(inputs.latents, grid)
        if shards is not None:
            patches = shards.own(patches, axis=1)
        return self.patch_embedding.project(patches)

    def _head(
        self,
        x: Float[Array, "B T E"],
        time: Float[Array, "B times E"],
        grid: VideoGrid,
        shards: TokenShards | None,
    ) -> Velocity:
        """Applies the modulated norm in float32 and the projection in `dtype`.

        Then puts tokens back to raster order and cuts patches into positions.
        """
        table = self.scale_shift_table[...].astype(jnp.float32)
        shift, scale = (of_tokens(table[row] + time, grid, shards) for row in range(2))
        normed = modulated_norm(
            x, 1 + scale, shift, eps=self.config.eps, before=self.proj_out
        )
        patches = self.proj_out(normed).astype(jnp.float32)
        if shards is not None:
            patches = shards.gather(patches)
        return unpatchify(
            patches, grid, patch_size=self.config.patch_size, channels="last"
        )


def kept_density(
    masks: BlockMask, step: DraftStep | None = None
) -> Float[Array, "layers B N"]:
    """Returns the share of token pairs that each layer's self-attention computes.

    Args:
      masks: Masks that the model returned, stacked over layers.
      step: Step that it ran with; its dense layers count as 1. None for no dense layer.
    """
    density = jax.lax.map(lambda mask: mask.density, masks)
    if step is None:
        return density
    return jnp.where(step.dense[:, None, None], 1.0, density)
