"""The Wan2.1 diffusion transformer, from text or from an image and text.

Tokens and rotary table are put into tiled order once, after patchifying, and the
output is put back once; no layer reorders tokens. Layers share one traced block:
their parameters are stacked along a leading layer axis and scanned, so the program
and its compile time do not grow with depth. Layers that a step is known to treat in
another way than their neighbours are a scan of their own.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from draft_jax import AttentionPlan, BlockMask, DraftStep, VideoGrid
from models.diffusion.capture import call_and_capture
from models.diffusion.interfaces import ImageCondition, TextContext
from models.diffusion.layer_runs import runs_of_layers, scan_layers
from models.diffusion.layer_state import check_layer_state, first_masks, sparse_step
from models.wan.conditions import NO_EMBEDDED_GUIDANCE, WanConditioning
from models.wan.config import WanConfig
from models.wan.embeddings import ConditionEmbedder, PatchEmbedding
from models.wan.inputs import WanInputs, check_inputs
from models.wan.layers import (
    BlockInputs,
    WanBlock,
    layer_norm,
    linear,
    modulation_table,
)
from models.wan.rope import rope_table
from pallas_kernels.common import reorder_tokens

Velocity = Float[Array, "B F H W C_out"]

_DENSE = AttentionPlan.dense()


class WanTransformer(nnx.Module):
    """Predicts the velocity of a noisy latent, given time, text and perhaps an image.

    A `VideoModel`. Source: Wan2.1 `WanModel` and diffusers `WanTransformer3DModel`.
    """

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs) -> None:
        """Builds the model with random parameters.

        The output layer starts at zero, as in the original.

        Args:
          config: Sizes and dtypes.
          rngs: Source of the initial parameters, stream `params`.
        """
        self.config = config
        self.patch_embedding = PatchEmbedding(config, rngs=rngs)
        self.condition_embedder = ConditionEmbedder(config, rngs=rngs)
        self.blocks = _stack_blocks(config, rngs)
        self.scale_shift_table = modulation_table(2, config, rngs)
        self.proj_out = linear(
            config.dim,
            math.prod(config.patch_size) * config.out_channels,
            config,
            rngs,
            kernel_init=nnx.initializers.zeros_init(),
        )

    def __call__(
        self,
        inputs: WanInputs,
        *,
        attention: AttentionPlan = _DENSE,
        step: DraftStep | None = None,
        masks: BlockMask | None = None,
        remat: bool = False,
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

        Returns:
          The velocity (noise - clean) in float32, and the masks to hand to the
          next step, leaves [layers, ...]; None with dense attention.

        Raises:
          ValueError: An input does not fit the configuration or the others.
        """
        velocity, masks, _ = self._run(inputs, attention, step, masks, remat=remat)
        return velocity, masks

    def capture_qk(
        self,
        inputs: WanInputs,
        *,
        attention: AttentionPlan = _DENSE,
        step: DraftStep | None = None,
        masks: BlockMask | None = None,
    ) -> tuple[Float[Array, "layers B T N D"], Float[Array, "layers B T N D"]]:
        """Returns queries and keys that every layer's self-attention sees.

        Takes what `__call__` takes. All layers are held at once, so it is for small
        models or short videos.

        Returns:
          q and k after norm and rotary embedding, tokens in tiled order.
        """
        *_, sown = self._run(inputs, attention, step, masks, capture=True)
        return sown["attn1"]["q"], sown["attn1"]["k"]

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
        tokens = None
        if image is not None:
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
        if len(latent_shape) not in (4, 5):
            raise ValueError(
                f"{latent_shape=} must be [batch, frames, height, width, channels]; "
                "batch may be left out"
            )
        sizes = latent_shape[-4:-1]
        patch = self.config.patch_size
        if any(size % side for size, side in zip(sizes, patch, strict=True)):
            raise ValueError(
                f"latent frames, height and width {sizes} must be multiples of "
                f"patch_size={patch}"
            )
        frames, height, width = (
            size // side for size, side in zip(sizes, patch, strict=True)
        )
        return VideoGrid(frames, height, width, tile=self.config.tile)

    def _run(
        self,
        inputs: WanInputs,
        attention: AttentionPlan,
        step: DraftStep | None,
        masks: BlockMask | None,
        *,
        remat: bool = False,
        capture: bool = False,
    ) -> tuple[Velocity, BlockMask | None, Any]:
        """Returns velocity, masks, and with `capture` what all layers have sown."""
        config = self.config
        check_inputs(inputs, config)
        grid = self.grid(inputs.latents.shape)
        num_layers = config.num_layers
        check_layer_state(attention, step, masks, grid=grid, num_layers=num_layers)
        if attention.config is not None:
            if step is None:
                step = sparse_step(grid, attention.config, num_layers)
            if masks is None:
                masks = first_masks(
                    grid,
                    attention.config,
                    num_layers=num_layers,
                    batch=len(inputs.latents),
                    num_heads=config.num_heads,
                )
        time, modulation, text = self.condition_embedder(
            inputs.timesteps, inputs.context, inputs.context_lengths
        )
        shared = BlockInputs(
            text=text,
            image=self.condition_embedder.embed_image(inputs.image_tokens),
            modulation=modulation,
            rope=rope_table(grid, config.head_dim, config.rope_theta),
            grid=grid,
            draft=attention.config,
        )
        x = self.patch_embedding(inputs.latents, grid).astype(jnp.float32)
        call_block = call_and_capture if capture else _call_block
        x, masks, sown = self._run_blocks(
            x, masks, shared, step, call_block, remat=remat
        )
        return self._head(x, time, grid), masks, sown

    def _run_blocks(
        self,
        x: Float[Array, "B T E"],
        masks: BlockMask | None,
        shared: BlockInputs,
        step: DraftStep | None,
        call_block: Callable,
        *,
        remat: bool,
    ) -> tuple[Float[Array, "B T E"], BlockMask | None, Any]:
        """Scans over the layers; each run of layers that do the same by itself."""
        structure, parameters = nnx.split(self.blocks)

        def run_layer(known_dense, carry, layer):
            x, masks = carry
            index, layer_parameters = layer
            layer_step = None
            if step is not None:
                dense = step.dense[index] if known_dense is None else known_dense
                layer_step = step.with_dense(dense)

            def run_block(x, layer_parameters, mask):
                block = nnx.merge(structure, layer_parameters)
                return call_block(block, x, shared, layer_step, mask)

            if remat:
                # Inside a scan the backward pass cannot merge with the forward one.
                run_block = jax.checkpoint(run_block, prevent_cse=False)
            mask = jax.tree.map(lambda leaf: leaf[index], masks)
            (x, mask), sown = run_block(x, layer_parameters, mask)
            # In place: the masks of all layers may take a gigabyte.
            masks = jax.tree.map(lambda old, new: old.at[index].set(new), masks, mask)
            return (x, masks), sown

        carry, sown_of_runs = (x, masks), []
        for layers, known_dense in runs_of_layers(step, self.config.num_layers):
            body = functools.partial(run_layer, known_dense)
            carry, sown = scan_layers(body, carry, parameters, layers)
            sown_of_runs.append(sown)
        x, masks = carry
        sown = jax.tree.map(lambda *runs: jnp.concatenate(runs), *sown_of_runs)
        return x, masks, sown

    def _head(
        self, x: Float[Array, "B T E"], time: Float[Array, "B E"], grid: VideoGrid
    ) -> Velocity:
        """Applies the modulated norm in float32 and the projection in `dtype`.

        Then puts tokens back to raster order and cuts patches into positions.
        """
        table = self.scale_shift_table[...].astype(jnp.float32)
        shift, scale = (table[row] + time[:, None] for row in range(2))
        x = layer_norm(x, self.config.eps) * (1 + scale) + shift
        patches = self.proj_out(x.astype(self.config.dtype)).astype(jnp.float32)
        patches = reorder_tokens(patches, grid, to="raster", axis=1)
        frames, rows, columns = self.config.patch_size
        return rearrange(
            patches,
            "B (F H W) (frames rows columns C) -> B (F frames) (H rows) (W columns) C",
            F=grid.frames,
            H=grid.height,
            W=grid.width,
            frames=frames,
            rows=rows,
            columns=columns,
        )


def _call_block(block: WanBlock, *arguments: Any) -> tuple[Any, None]:
    """Calls a block as `call_and_capture` does, and collects nothing."""
    return block(*arguments), None


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


def _stack_blocks(config: WanConfig, rngs: nnx.Rngs) -> WanBlock:
    """Returns one block module whose parameters have a leading layer axis."""

    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs: nnx.Rngs) -> WanBlock:
        return WanBlock(config, rngs=rngs)

    return make(rngs)
