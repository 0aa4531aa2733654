"""Wan's causal video autoencoder: encoder and decoder of the next frames of a video.

This is the mathematics; `models.wan.vae.codec` runs it over whole videos.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.diffusion.video_autoencoder.layers import Frames, pointwise
from models.diffusion.video_autoencoder.sizes import COLOURS
from models.wan.vae.config import WanVAEConfig
from models.wan.vae.layers import (
    Cache,
    CausalConv,
    Downsample,
    FrameAttention,
    ResidualBlock,
    RMSNorm,
    Step,
    Upsample,
    run_layers,
)


class WanVAE(nnx.Module):
    """The autoencoder of Wan2.1.

    Args:
      config: Sizes and dtypes.
      rngs: Source of the initial weights.

    Source: Wan2.1 `WanVAE_` and, for the normalisation of latents, `WanVAE`.
    """

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs) -> None:
        size = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.quant_conv = pointwise(2 * size, 2 * size, config, rngs)
        self.post_quant_conv = pointwise(size, size, config, rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode_frames(
        self, video: Float[Array, "B T Y X 3"], cache: Cache = None
    ) -> tuple[Float[Array, "B F H W C"], Cache]:
        """Encodes the next frames of a video.

        Args:
          video: Pixels in [-1, 1]. At the start of a video 1 + n * stride frames,
            later n * stride, with the config's stride in time. Rows and columns
            are multiples of the stride in space.
          cache: Cache that the last call returned; None at the start of a video.

        Returns:
          The mean of the posterior, normalised, float32; and the cache for the
          frames that follow.

        Raises:
          ValueError: Frames, rows or columns are no such multiple.
        """
        time, side, _ = self.config.stride
        _, frames, height, width, _ = video.shape
        start = int(cache is None)
        if frames < 1 or (frames - start) % time or height % side or width % side:
            raise ValueError(
                f"video has shape {video.shape}; expected {'1 + ' if start else ''}a "
                f"multiple of {time} frames, rows and columns multiples of {side}"
            )
        x, cache = self.encoder(video, cache)
        mean, _ = jnp.split(self.quant_conv(x).astype(jnp.float32), 2, axis=-1)
        return (mean - self._latents("mean")) / self._latents("std"), cache

    def decode_frames(
        self, latents: Float[Array, "B F H W C"], cache: Cache = None
    ) -> tuple[Float[Array, "B T Y X 3"], Cache]:
        """Decodes the next latent frames of a video.

        Args:
          latents: Normalised, as the transformer has them.
          cache: Cache that the last call returned; None at the start of a video.

        Returns:
          float32 in [-1, 1]: one frame for the first latent frame of a video,
          `stride` frames for each other; and the cache for the frames that follow.
        """
        latents = latents.astype(jnp.float32)
        latents = latents * self._latents("std") + self._latents("mean")
        x, cache = self.decoder(self.post_quant_conv(latents), cache)
        return jnp.clip(x.astype(jnp.float32), -1.0, 1.0), cache

    def _latents(self, statistic: str) -> Float[Array, " C"]:
        return jnp.asarray(getattr(self.config, f"latents_{statistic}"), jnp.float32)


class Encoder(nnx.Module):
    """Turns pixels into mean and log variance of the latent.

    Source: Wan2.1 `Encoder3d`.
    """

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs) -> None:
        size = config.base_dim
        self.conv_in = CausalConv(COLOURS, size, config, rngs=rngs)
        blocks: list[nnx.Module] = []
        for level, dim in enumerate(config.channels):
            for _ in range(config.num_res_blocks):
                blocks.append(ResidualBlock(size, dim, config, rngs))
                size = dim
            if level < len(config.temporal_downsample):
                temporal = config.temporal_downsample[level]
                blocks.append(Downsample(dim, config, temporal=temporal, rngs=rngs))
        self.down_blocks = nnx.List(blocks)
        self.mid_block = MidBlock(size, config, rngs)
        self.norm_out = RMSNorm(size, config)
        self.conv_out = CausalConv(size, 2 * config.latent_channels, config, rngs=rngs)

    def __call__(self, x: Frames, cache: Cache) -> Step:
        """Runs the next frames of a video."""
        body, head = (None, None) if cache is None else cache
        layers = (self.conv_in, *self.down_blocks, self.mid_block)
        x, body = run_layers(layers, x, body)
        x, head = self.conv_out(jax.nn.silu(self.norm_out(x)), head)
        return x, (body, head)


class Decoder(nnx.Module):
    """Turns latents into pixels.

    Source: Wan2.1 `Decoder3d`.
    """

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs) -> None:
        size = config.channels[-1]
        self.conv_in = CausalConv(config.latent_channels, size, config, rngs=rngs)
        self.mid_block = MidBlock(size, config, rngs)
        blocks = []
        # The last block has no step to a finer resolution.
        steps = (*reversed(config.temporal_downsample), None)
        for dim, temporal in zip(reversed(config.channels), steps, strict=True):
            blocks.append(UpBlock(size, dim, config, temporal=temporal, rngs=rngs))
            size = dim // 2  # the step halves the channels
        self.up_blocks = nnx.List(blocks)
        self.norm_out = RMSNorm(config.channels[0], config)
        self.conv_out = CausalConv(config.channels[0], COLOURS, config, rngs=rngs)

    def __call__(self, x: Frames, cache: Cache) -> Step:
        """Runs the next frames of a video."""
        body, head = (None, None) if cache is None else cache
        layers = (self.conv_in, self.mid_block, *self.up_blocks)
        x, body = run_layers(layers, x, body)
        x, head = self.conv_out(jax.nn.silu(self.norm_out(x)), head)
        return x, (body, head)


class MidBlock(nnx.Module):
    """Residual block, attention, residual block, at the latent's resolution."""

    def __init__(self, dim: int, config: WanVAEConfig, rngs: nnx.Rngs) -> None:
        blocks = [ResidualBlock(dim, dim, config, rngs) for _ in range(2)]
        self.resnets = nnx.List(blocks)
        self.attentions = nnx.List([FrameAttention(dim, config, rngs)])

    def __call__(self, x: Frames, cache: Cache) -> Step:
        """Runs the next frames of a video."""
        layers = (self.resnets[0], self.attentions[0], self.resnets[1])
        return run_layers(layers, x, cache)


class UpBlock(nnx.Module):
    """Residual blocks of one resolution, and the step to the next.

    Args:
      in_features: Channels in.
      out_features: Channels of the resolution.
      config: Sizes and dtypes.
      temporal: Whether the step doubles the frames, too; None for no step.
      rngs: Source of the initial weights.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: WanVAEConfig,
        *,
        temporal: bool | None,
        rngs: nnx.Rngs,
    ) -> None:
        sizes = [in_features] + [out_features] * config.num_res_blocks
        self.resnets = nnx.List(
            [ResidualBlock(size, out_features, config, rngs) for size in sizes]
        )
        self.upsampler = (
            None
            if temporal is None
            else Upsample(out_features, config, temporal=temporal, rngs=rngs)
        )

    def __call__(self, x: Frames, cache: Cache) -> Step:
        """Runs the next frames of a video."""
        last = () if self.upsampler is None else (self.upsampler,)
        return run_layers((*self.resnets, *last), x, cache)
