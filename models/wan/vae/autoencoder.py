"""Wan's causal video autoencoder: encoder and decoder of the next frames of a video.

This is the mathematics; `models.wan.vae.codec` runs it over whole videos.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from models.diffusion.video_autoencoder.layers import Frames, pointwise
from models.wan.vae.averages import average_down, repeat_up
from models.wan.vae.config import Level, WanVAEConfig
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

# Mean, log variance, and the cache for the frames that follow.
Moments = tuple[Float[Array, "B F H W C"], Float[Array, "B F H W C"], Cache]


class WanVAE(nnx.Module):
    """The autoencoder of Wan2.1, and that of Wan2.2's 5B model.

    Args:
      config: Sizes and dtypes.
      rngs: Source of the initial weights.

    Source: Wan2.1 `WanVAE_` and, for the normalisation of latents, `WanVAE`; Wan2.2's
    of the same names in `vae2_2.py`.
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
        mean, _, cache = self.moments(video, cache)
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
        x, cache = self.pixels(latents, cache)
        return jnp.clip(x, -1.0, 1.0), cache

    def patches(self, video: Float[Array, "B T Y X 3"]) -> Float[Array, "B T H W P"]:
        """Cuts frames in patches, whose pixels follow each other by columns."""
        side = self.config.patch_size
        return rearrange(video, "B T (Y y) (X x) C -> B T Y X (C x y)", y=side, x=side)

    def moments(self, video: Float[Array, "B T Y X 3"], cache: Cache = None) -> Moments:
        """Returns mean and log variance of the posterior, as trained, and the cache."""
        x, cache = self.encoder(self.patches(video), cache)
        moments = self.quant_conv(x).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, log_variance, cache

    def pixels(self, latents: Float[Array, "B F H W C"], cache: Cache = None) -> Step:
        """Decodes latents as trained, not normalised; float32, not clipped."""
        x, cache = self.decoder(self.post_quant_conv(latents), cache)
        side = self.config.patch_size
        x = rearrange(x, "B T Y X (C x y) -> B T (Y y) (X x) C", y=side, x=side)
        return x.astype(jnp.float32), cache

    def _latents(self, statistic: str) -> Float[Array, " C"]:
        return jnp.asarray(getattr(self.config, f"latents_{statistic}"), jnp.float32)


class Encoder(nnx.Module):
    """Turns patches of pixels into mean and log variance of the latent.

    Source: Wan2.1 and Wan2.2 `Encoder3d`.
    """

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs) -> None:
        self.conv_in = CausalConv(
            config.patch_channels, config.base_dim, config, rngs=rngs
        )
        self.down_blocks = nnx.List(
            [
                block
                for level in config.encoder_levels
                for block in _blocks_down(level, config, rngs)
            ]
        )
        size = config.channels[-1]
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
    """Turns latents into patches of pixels.

    Source: Wan2.1 and Wan2.2 `Decoder3d`.
    """

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs) -> None:
        first, *_, last = config.decoder_levels
        self.conv_in = CausalConv(
            config.latent_channels, first.inputs, config, rngs=rngs
        )
        self.mid_block = MidBlock(first.inputs, config, rngs)
        self.up_blocks = nnx.List(
            [UpBlock(level, config, rngs) for level in config.decoder_levels]
        )
        self.norm_out = RMSNorm(last.outputs, config)
        self.conv_out = CausalConv(
            last.outputs, config.patch_channels, config, rngs=rngs
        )

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


def _blocks_down(
    level: Level, config: WanVAEConfig, rngs: nnx.Rngs
) -> list[nnx.Module]:
    """Returns the parts of a level: one to go round, or else each by itself."""
    if config.averages:
        return [DownBlock(level, config, rngs)]
    resnets = _resnets(level, config, rngs, count=config.num_res_blocks)
    if level.temporal is None:
        return resnets
    return [*resnets, Downsample(level, config, rngs)]


def _resnets(
    level: Level, config: WanVAEConfig, rngs: nnx.Rngs, *, count: int
) -> list[nnx.Module]:
    sizes = [level.inputs] + [level.outputs] * (count - 1)
    return [ResidualBlock(size, level.outputs, config, rngs) for size in sizes]


class DownBlock(nnx.Module):
    """Residual blocks of one resolution and the step to the next, gone round.

    What goes round them is the input, averaged.

    Source: Wan2.2 `Down_ResidualBlock`.
    """

    def __init__(self, level: Level, config: WanVAEConfig, rngs: nnx.Rngs) -> None:
        self.level = level
        self.resnets = nnx.List(
            _resnets(level, config, rngs, count=config.num_res_blocks)
        )
        self.downsampler = (
            None if level.temporal is None else Downsample(level, config, rngs)
        )

    def __call__(self, x: Frames, cache: Cache) -> Step:
        """Runs the next frames of a video."""
        round_it = average_down(x, self.level, starts=cache is None)
        last = () if self.downsampler is None else (self.downsampler,)
        x, cache = run_layers((*self.resnets, *last), x, cache)
        return x + round_it, cache


class UpBlock(nnx.Module):
    """Residual blocks of one resolution, and the step to the next.

    With averages the input goes round them, repeated, where there is a step.

    Source: Wan2.1 `Decoder3d`, Wan2.2 `Up_ResidualBlock`.
    """

    def __init__(self, level: Level, config: WanVAEConfig, rngs: nnx.Rngs) -> None:
        self.level = level
        self.goes_round = config.averages and level.temporal is not None
        self.resnets = nnx.List(
            _resnets(level, config, rngs, count=config.num_res_blocks + 1)
        )
        outputs = level.outputs if config.averages else level.outputs // 2
        self.upsampler = (
            None if level.temporal is None else Upsample(level, outputs, config, rngs)
        )

    def __call__(self, x: Frames, cache: Cache) -> Step:
        """Runs the next frames of a video."""
        last = () if self.upsampler is None else (self.upsampler,)
        out, after = run_layers((*self.resnets, *last), x, cache)
        if self.goes_round:
            out = out + repeat_up(x, self.level, starts=cache is None)
        return out, after
