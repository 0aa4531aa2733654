"""HunyuanVideo's causal video autoencoder: encoder and decoder of a video or a tile.

This is the mathematics; `models.hunyuan.vae.codec` runs it over whole videos.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.diffusion.video_autoencoder.layers import Frames, pointwise
from models.diffusion.video_autoencoder.sizes import COLOURS
from models.hunyuan.vae.config import HunyuanVAEConfig
from models.hunyuan.vae.layers import (
    CausalAttention,
    CausalConv,
    GroupNorm,
    ResidualBlock,
    Resized,
    Upsample,
)


class HunyuanVAE(nnx.Module):
    """The autoencoder of HunyuanVideo.

    Args:
      config: Sizes and dtypes.
      rngs: Source of the initial weights.

    Source: HunyuanVideo `AutoencoderKLCausal3D`.
    """

    def __init__(self, config: HunyuanVAEConfig, *, rngs: nnx.Rngs) -> None:
        size = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.quant_conv = pointwise(2 * size, 2 * size, config, rngs)
        self.post_quant_conv = pointwise(size, size, config, rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, video: Float[Array, "B T Y X 3"]) -> Float[Array, "B F H W C"]:
        """Encodes pixels to the moments of the posterior.

        Args:
          video: Pixels in [-1, 1]: 1 + n * stride frames, rows and columns multiples
            of the stride.

        Returns:
          Mean, then log variance, side by side in the channels; float32, as the
          encoder was trained: the transformer has `scaling_factor` times the latents.
        """
        return self.quant_conv(self.encoder(video)).astype(jnp.float32)

    def decode(self, latents: Float[Array, "B F H W C"]) -> Float[Array, "B T Y X 3"]:
        """Decodes latents, as the encoder gives them, to pixels in float32.

        They lie around [-1, 1] and are not clipped: tiles are blended as they are.
        """
        return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)


class Encoder(nnx.Module):
    """Turns pixels into mean and log variance of the latent.

    Source: HunyuanVideo `EncoderCausal3D`.
    """

    def __init__(self, config: HunyuanVAEConfig, *, rngs: nnx.Rngs) -> None:
        channels = config.block_out_channels
        self.conv_in = CausalConv(COLOURS, channels[0], config, rngs=rngs)
        blocks, size = [], channels[0]
        # The last block has no step to a coarser resolution.
        for dim, temporal in zip(channels, (*config.temporal_steps, None), strict=True):
            blocks.append(DownBlock(size, dim, config, temporal=temporal, rngs=rngs))
            size = dim
        self.down_blocks = nnx.List(blocks)
        self.mid_block = MidBlock(size, config, rngs)
        self.conv_norm_out = GroupNorm(size, config)
        self.conv_out = CausalConv(size, 2 * config.latent_channels, config, rngs=rngs)

    def __call__(self, x: Frames) -> Resized:
        """Runs all frames."""
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block):
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """Turns latents into pixels.

    Source: HunyuanVideo `DecoderCausal3D`.
    """

    def __init__(self, config: HunyuanVAEConfig, *, rngs: nnx.Rngs) -> None:
        channels = tuple(reversed(config.block_out_channels))
        size = channels[0]
        self.conv_in = CausalConv(config.latent_channels, size, config, rngs=rngs)
        self.mid_block = MidBlock(size, config, rngs)
        blocks = []
        # The last block has no step to a finer resolution.
        for dim, temporal in zip(channels, (*config.temporal_steps, None), strict=True):
            blocks.append(UpBlock(size, dim, config, temporal=temporal, rngs=rngs))
            size = dim
        self.up_blocks = nnx.List(blocks)
        self.conv_norm_out = GroupNorm(size, config)
        self.conv_out = CausalConv(size, COLOURS, config, rngs=rngs)

    def __call__(self, x: Frames) -> Resized:
        """Runs all frames."""
        x = self.conv_in(x)
        for block in (self.mid_block, *self.up_blocks):
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class MidBlock(nnx.Module):
    """Residual block, attention, residual block, at the latent's resolution."""

    def __init__(self, dim: int, config: HunyuanVAEConfig, rngs: nnx.Rngs) -> None:
        blocks = [ResidualBlock(dim, dim, config, rngs) for _ in range(2)]
        self.resnets = nnx.List(blocks)
        self.attentions = nnx.List([CausalAttention(dim, config, rngs)])

    def __call__(self, x: Frames) -> Frames:
        """Runs all frames."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class DownBlock(nnx.Module):
    """Residual blocks of one resolution of the encoder, and the step to the next.

    Args:
      in_features: Channels in.
      out_features: Channels of the resolution.
      config: Sizes and dtypes.
      temporal: Whether the step halves the frames, too; None for no step.
      rngs: Source of the initial weights.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: HunyuanVAEConfig,
        *,
        temporal: bool | None,
        rngs: nnx.Rngs,
    ) -> None:
        widths = [in_features] + [out_features] * (config.layers_per_block - 1)
        self.resnets = nnx.List(
            [ResidualBlock(width, out_features, config, rngs) for width in widths]
        )
        strides = (2 if temporal else 1, 2, 2)
        self.downsampler = (
            None
            if temporal is None
            else CausalConv(
                out_features, out_features, config, strides=strides, rngs=rngs
            )
        )

    def __call__(self, x: Frames) -> Resized:
        """Runs all frames."""
        for block in self.resnets:
            x = block(x)
        return x if self.downsampler is None else self.downsampler(x)


class UpBlock(nnx.Module):
    """Residual blocks of one resolution of the decoder, and the step to the next.

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
        config: HunyuanVAEConfig,
        *,
        temporal: bool | None,
        rngs: nnx.Rngs,
    ) -> None:
        widths = [in_features] + [out_features] * config.layers_per_block
        self.resnets = nnx.List(
            [ResidualBlock(width, out_features, config, rngs) for width in widths]
        )
        self.upsampler = (
            None
            if temporal is None
            else Upsample(out_features, config, temporal=temporal, rngs=rngs)
        )

    def __call__(self, x: Frames) -> Resized:
        """Runs all frames."""
        for block in self.resnets:
            x = block(x)
        return x if self.upsampler is None else self.upsampler(x)
