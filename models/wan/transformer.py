"""The Wan2.1 diffusion transformer, from text or from an image and text.

Tokens and rotary table are put into tiled order once, after patchifying, and the
output is put back once; no layer reorders tokens. Layers share one traced block:
their parameters are stacked along a leading layer axis and scanned, so the program
and its compile time do not grow with depth. Layers that a step is known to treat in
another way than their neighbours are a scan of their own.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from draft_jax import (
    BlockMask,
    DraftConfig,
    DraftStep,
    VideoGrid,
    constant_step,
    initial_mask,
)
from models.diffusion.layer_runs import runs_of_layers, scan_layers
from models.wan.config import AttentionName, WanConfig
from models.wan.layers import (
    MLP,
    XAVIER_UNIFORM,
    LayerNorm,
    WanBlock,
    gelu_exact,
    gelu_tanh,
    layer_norm,
    linear,
    modulation_table,
)
from models.wan.rope import rope_table

Velocity = Float[Array, "B F H W C_out"]
_IMAGE_NORM_EPS = 1e-5  # not the model's own: both published codes take torch's default


class PatchEmbedding(nnx.Module):
    """Cuts the latent into patches and maps each to a token: a strided convolution."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs) -> None:
        shape = (*config.patch_size, config.in_channels, config.dim)
        fan_in = math.prod(shape[:-1])
        kernel = XAVIER_UNIFORM(rngs.params(), (fan_in, config.dim), jnp.float32)
        self.kernel = nnx.Param(kernel.reshape(shape).astype(config.param_dtype))
        self.bias = nnx.Param(jnp.zeros(config.dim, jnp.dtype(config.param_dtype)))
        self.patch_size = config.patch_size
        self.dtype = config.dtype

    def __call__(
        self, latents: Float[Array, "B F H W C"], grid: VideoGrid
    ) -> Float[Array, "B T E"]:
        """Tokens in tiled order, in `config.dtype`."""
        batch, *_, channels = latents.shape
        frames, rows, columns = self.patch_size
        patches = latents.reshape(
            batch, grid.frames, frames, grid.height, rows, grid.width, columns, channels
        )
        patches = patches.transpose(0, 1, 3, 5, 2, 4, 6, 7)
        patches = patches.reshape(batch, grid.num_tokens, -1).astype(self.dtype)
        # A token depends on its patch alone, so the narrower patches are permuted.
        patches = patches[:, grid.tile_order]
        kernel = self.kernel[...].astype(self.dtype)
        kernel = kernel.reshape(patches.shape[-1], -1)
        return patches @ kernel + self.bias[...].astype(self.dtype)


class ImageEmbedder(nnx.Module):
    """Embeds the tokens of an image's encoder; `config.dtype` out.

    Source: Wan2.1 `MLPProj`.
    """

    def __init__(self, config: WanConfig, size: int, *, rngs: nnx.Rngs) -> None:
        self.dtype = config.dtype
        self.norm1 = LayerNorm(config, size=size, eps=_IMAGE_NORM_EPS, rngs=rngs)
        self.ff = MLP((size, size, config.dim), gelu_exact, config, rngs=rngs)
        self.norm2 = LayerNorm(config, eps=_IMAGE_NORM_EPS, rngs=rngs)

    def __call__(self, tokens: Float[Array, "B I image"]) -> Float[Array, "B I E"]:
        hidden = self.ff(self.norm1(tokens).astype(self.dtype))
        return self.norm2(hidden).astype(self.dtype)


class ConditionEmbedder(nnx.Module):
    """Embeds timestep (float32), text and image tokens (`config.dtype`)."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs) -> None:
        dim = config.dim
        self.freq_dim = config.freq_dim
        self.dtype = config.dtype
        self.time_embedder = MLP(
            (config.freq_dim, dim, dim), jax.nn.silu, config, dtype="float32", rngs=rngs
        )
        self.time_proj = linear(dim, 6 * dim, config, rngs, dtype="float32")
        self.text_embedder = MLP(
            (config.text_dim, dim, dim), gelu_tanh, config, rngs=rngs
        )
        self.image_embedder = (
            ImageEmbedder(config, config.image_dim, rngs=rngs)
            if config.image_dim is not None
            else None
        )

    def __call__(
        self,
        timesteps: Float[Array, " B"],
        context: Float[Array, "B L text"],
        context_lengths: Int[Array, " B"] | None,
    ) -> tuple[Float[Array, "B E"], Float[Array, "B 6 E"], Float[Array, "B L E"]]:
        """Time embedding, its projection for the blocks, and embedded text."""
        if context_lengths is not None:
            row = jnp.arange(context.shape[1])[:, None]
            context = jnp.where(row < context_lengths[:, None, None], context, 0)
        time = self.time_embedder(timestep_embedding(timesteps, self.freq_dim))
        projected = self.time_proj(jax.nn.silu(time))
        modulation = projected.reshape(len(timesteps), 6, -1)
        return time, modulation, self.text_embedder(context.astype(self.dtype))

    def embed_image(
        self, image_tokens: Float[Array, "B I image"] | None
    ) -> Float[Array, "B I E"] | None:
        """Embedded image tokens; None for a text-to-video model."""
        if self.image_embedder is None or image_tokens is None:
            return None
        return self.image_embedder(image_tokens)


def timestep_embedding(
    timesteps: Float[Array, " B"], size: int
) -> Float[Array, "B size"]:
    """Cosines, then sines, of the timestep at geometric frequencies; float32.

    Source: Wan2.1 `sinusoidal_embedding_1d`.
    """
    half = size // 2
    # Rounded where the published float32 code rounds: at t = 1000 one rounding of
    # the exponent moves an angle by 1e-4.
    exponents = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32)
    frequencies = np.exp(exponents / np.float32(half))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class WanTransformer(nnx.Module):
    """Predicts the velocity of a noisy latent, given time, text and perhaps an image.

    Source: Wan2.1 `WanModel` and diffusers `WanTransformer3DModel`.
    """

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs) -> None:
        """Builds the model with random parameters.

        The output layer starts at zero, as in the original.

        Args:
          config: Sizes, attention and dtypes.
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
        latents: Float[Array, "B F H W C"],
        timesteps: Float[Array, " B"],
        context: Float[Array, "B L text"],
        *,
        context_lengths: Int[Array, " B"] | None = None,
        image_tokens: Float[Array, "B I image"] | None = None,
        step: DraftStep | None = None,
        masks: BlockMask | None = None,
        remat: bool = False,
    ) -> tuple[Velocity, BlockMask | None]:
        """Runs the model.

        Args:
          latents: Noisy latents, channels last; an image-to-video model takes the
            condition's channels after them. Frames, rows and columns are multiples
            of `config.patch_size`.
          timesteps: Noise level of each item, 0 (clean) to 1000 (noise).
          context: Text embeddings, L = `config.text_length` rows, padded.
          context_lengths: Rows of context that are text; later ones are set to
            zero before they are embedded. None if they are zero already.
          image_tokens: What CLIP says of the image (257 tokens of a layer before its
            last), for an image-to-video model and only there.
          step: What the schedule says about this step (`StepPlan.step`), for draft
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
        velocity, masks, _ = self._run(
            latents,
            timesteps,
            context,
            context_lengths,
            image_tokens,
            step,
            masks,
            remat=remat,
            capture=False,
        )
        return velocity, masks

    def capture_qk(
        self,
        latents: Float[Array, "B F H W C"],
        timesteps: Float[Array, " B"],
        context: Float[Array, "B L text"],
        *,
        context_lengths: Int[Array, " B"] | None = None,
        image_tokens: Float[Array, "B I image"] | None = None,
        step: DraftStep | None = None,
        masks: BlockMask | None = None,
    ) -> tuple[Float[Array, "layers B T N D"], Float[Array, "layers B T N D"]]:
        """Queries and keys that every layer's self-attention sees, for inspection.

        Takes what `__call__` takes. All layers are held at once, so it is for small
        models or short videos.

        Returns:
          q and k after norm and rotary embedding, tokens in tiled order.
        """
        *_, captured = self._run(
            latents,
            timesteps,
            context,
            context_lengths,
            image_tokens,
            step,
            masks,
            remat=False,
            capture=True,
        )
        return captured

    def grid(self, latent_shape: tuple[int, ...]) -> VideoGrid:
        """The token grid of latents of this shape.

        Args:
          latent_shape: [B, F, H, W, C] or [F, H, W, C].

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

    def with_attention(
        self, attention: AttentionName, draft: DraftConfig | None = None
    ) -> "WanTransformer":
        """The same model, sharing its parameter arrays, with another attention."""
        config = dataclasses.replace(
            self.config, attention=attention, draft=draft or self.config.draft
        )
        structure = nnx.graphdef(
            nnx.eval_shape(lambda: type(self)(config, rngs=nnx.Rngs(0)))
        )
        return nnx.merge(structure, nnx.state(self))

    def _run(
        self,
        latents: Float[Array, "B F H W C"],
        timesteps: Float[Array, " B"],
        context: Float[Array, "B L text"],
        context_lengths: Int[Array, " B"] | None,
        image_tokens: Float[Array, "B I image"] | None,
        step: DraftStep | None,
        masks: BlockMask | None,
        *,
        remat: bool,
        capture: bool,
    ):
        config = self.config
        self._check_inputs(latents, timesteps, context, context_lengths)
        self._check_image_tokens(image_tokens, latents.shape[0])
        grid = self.grid(latents.shape)
        step, masks = self._check_schedule(grid, latents.shape[0], step, masks)
        time, modulation, context = self.condition_embedder(
            timesteps, context, context_lengths
        )
        image = self.condition_embedder.embed_image(image_tokens)
        rope = rope_table(grid, config.head_dim, config.rope_theta)
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
                return block(
                    x, context, modulation, rope, grid, layer_step, mask, image
                )

            if remat:
                # Inside a scan the backward pass cannot merge with the forward one.
                run_block = jax.checkpoint(run_block, prevent_cse=False)
            mask = jax.tree.map(lambda leaf: leaf[index], masks)
            x, mask, qk = run_block(x, layer_parameters, mask)
            # In place: the masks of all layers may take a gigabyte.
            masks = jax.tree.map(lambda old, new: old.at[index].set(new), masks, mask)
            return (x, masks), qk if capture else None

        carry = (self.patch_embedding(latents, grid).astype(jnp.float32), masks)
        qk_of_runs = []
        for layers, known_dense in runs_of_layers(step, config.num_layers):
            body = functools.partial(run_layer, known_dense)
            carry, qk = scan_layers(body, carry, parameters, layers)
            qk_of_runs.append(qk)
        x, masks = carry
        qk = jax.tree.map(lambda *runs: jnp.concatenate(runs), *qk_of_runs)
        return self._head(x, time, grid), masks, qk

    def _head(
        self, x: Float[Array, "B T E"], time: Float[Array, "B E"], grid: VideoGrid
    ) -> Velocity:
        """Modulated norm in float32, projection in `dtype`, tokens back to pixels."""
        table = self.scale_shift_table[...].astype(jnp.float32)
        shift, scale = (table[row] + time[:, None] for row in range(2))
        x = layer_norm(x, self.config.eps) * (1 + scale) + shift
        patches = self.proj_out(x.astype(self.config.dtype)).astype(jnp.float32)
        patches = patches[:, grid.raster_order]
        frames, rows, columns = self.config.patch_size
        batch = len(patches)
        video = patches.reshape(
            batch, grid.frames, grid.height, grid.width, frames, rows, columns, -1
        )
        video = video.transpose(0, 1, 4, 2, 5, 3, 6, 7)
        return video.reshape(
            batch, grid.frames * frames, grid.height * rows, grid.width * columns, -1
        )

    def _check_inputs(self, latents, timesteps, context, context_lengths) -> None:
        config = self.config
        batch = latents.shape[0]
        if latents.shape[-1] != config.in_channels:
            raise ValueError(
                f"latents have {latents.shape[-1]} channels, the last axis of "
                f"{latents.shape}; the model takes {config.in_channels}"
            )
        expected = (batch, config.text_length, config.text_dim)
        if context.shape != expected:
            raise ValueError(
                f"context has shape {context.shape}; expected [batch, text_length, "
                f"text_dim] = {expected}"
            )
        for name, array in (
            ("timesteps", timesteps),
            ("context_lengths", context_lengths),
        ):
            if array is not None and array.shape != (batch,):
                raise ValueError(f"{name} has shape {array.shape}; expected ({batch},)")

    def _check_image_tokens(
        self, image_tokens: Float[Array, "B I image"] | None, batch: int
    ) -> None:
        size = self.config.image_dim
        if (image_tokens is None) != (size is None):
            given = "missing" if image_tokens is None else "given"
            kind = "a text-to-video" if size is None else "an image-to-video"
            raise ValueError(
                f"image_tokens are {given}, but this is {kind} model (image_dim={size})"
            )
        if image_tokens is None:
            return
        shape = image_tokens.shape
        if (shape[0], shape[2]) != (batch, size) or not shape[1]:
            raise ValueError(
                f"image_tokens has shape {shape}; expected [batch, tokens, image_dim] "
                f"= [{batch}, 1 or more, {size}]"
            )

    def _check_schedule(
        self,
        grid: VideoGrid,
        batch: int,
        step: DraftStep | None,
        masks: BlockMask | None,
    ) -> tuple[DraftStep | None, BlockMask | None]:
        """Step and masks of every layer: those given, or ones to start from."""
        config = self.config
        if config.attention == "dense":
            if step is not None or masks is not None:
                raise ValueError(
                    "step and masks belong to draft attention, but "
                    f"{config.attention=}; see WanTransformer.with_attention"
                )
            return None, None
        if step is None:
            step = constant_step(grid, config.draft)
            dense = np.broadcast_to(step.dense, config.num_layers)
            step = dataclasses.replace(step, dense=dense)
        if step.dense.shape != (config.num_layers,):
            raise ValueError(
                f"step.dense has shape {step.dense.shape}; expected one entry for "
                f"each of the {config.num_layers} layers"
            )
        if masks is None:
            mask = initial_mask(
                grid, config.draft, batch=batch, num_heads=config.num_heads
            )
            masks = jax.tree.map(
                lambda leaf: jnp.broadcast_to(leaf, (config.num_layers, *leaf.shape)),
                mask,
            )
        if masks.grid != grid:
            raise ValueError(f"{masks.grid=} must equal the latents' {grid=}")
        return step, masks


def kept_density(
    masks: BlockMask, step: DraftStep | None = None
) -> Float[Array, "layers B N"]:
    """Share of token pairs that each layer's self-attention computes.

    Args:
      masks: What the model returned, stacked over layers.
      step: What it ran with; its dense layers count as 1. None for no dense layer.
    """
    density = jax.lax.map(lambda mask: mask.density, masks)
    if step is None:
        return density
    return jnp.where(step.dense[:, None, None], 1.0, density)


def _stack_blocks(config: WanConfig, rngs: nnx.Rngs) -> WanBlock:
    """One block module whose parameters have a leading layer axis."""

    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs: nnx.Rngs) -> WanBlock:
        return WanBlock(config, rngs=rngs)

    return make(rngs)
