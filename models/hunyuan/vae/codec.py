"""Encodes and decodes whole videos with HunyuanVideo's autoencoder, tile by tile.

Norms and attention see all frames of a tile, so a video cannot run in chunks of frames
as Wan's does: tiles bound the memory. Tiles of one shape share a compiled program; 129
frames of 768x1280 have eight shapes, two in each direction. Tiles of the same frames
stay on the device until they are blended; finished frames are copied to the host while
the next tiles run.

Arithmetic on the original's tiles, by XLA's count: 129 frames of 768x1280 take 3.46
PFLOP to decode and 2.40 to encode; a tile of 65 frames of 256x256 takes 56 TFLOP to
decode. Convolutions of doubled frames, as in the original, would make it 4.4 PFLOP.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from models.diffusion.video_autoencoder.codec import (
    Latents,
    Video,
    VideoCodec,
    items,
    join,
)
from models.hunyuan.vae.autoencoder import HunyuanVAE
from models.hunyuan.vae.tiling import HunyuanTiling, run_tiles

LOG_VARIANCES = (-30.0, 20.0)  # that the original keeps


class Posterior(NamedTuple):
    """A normal distribution of latents by position, as the encoder gives them."""

    mean: Float[Array, "B F H W C"]
    log_variance: Float[Array, "B F H W C"]

    def sample(self, key: PRNGKeyArray) -> Float[Array, "B F H W C"]:
        """Draws latents."""
        noise = jax.random.normal(key, self.mean.shape, jnp.float32)
        return self.mean + jnp.exp(0.5 * self.log_variance) * noise


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class HunyuanVAECodec(VideoCodec):
    """Encodes pixels in [-1, 1] to the latents of a HunyuanVideo transformer, and back.

    Latents have the size that the transformer expects: `scaling_factor` times the
    encoder's. The methods run compiled programs one after the other; code under
    `jax.jit` calls `HunyuanVAE` instead.

    Args:
      model: The autoencoder.
      tiling: Cuts videos in tiles, as in the original by default; None for whole
        videos, whose memory grows with their size.

    Raises:
      ValueError: A size of the tiles is not a multiple of the stride.
    """

    model: HunyuanVAE
    tiling: HunyuanTiling | None = dataclasses.field(
        default_factory=HunyuanTiling.original
    )

    def __post_init__(self) -> None:
        if self.tiling is not None:
            self.tiling.divided(self.stride)

    def tiled(self, pixels: int) -> "HunyuanVAECodec":
        """Returns the codec on square tiles that share a quarter of their sides.

        Tiles in time stay as they are; whole videos get the original's.

        Raises:
          ValueError: `pixels`, rows and columns of a tile, is not a positive multiple
            of four latent positions.
        """
        self.check_tile(pixels)
        tiling = self.tiling or HunyuanTiling.original()
        (frames, _, _), (step, _, _) = tiling.size, tiling.step
        next_one = pixels - pixels // 4
        return dataclasses.replace(
            self,
            tiling=HunyuanTiling(
                size=(frames, pixels, pixels), step=(step, next_one, next_one)
            ),
        )

    def decode_chunks(self, latents: Latents) -> Iterator[Float[Array, "B t Y X 3"]]:
        """Decodes and yields the frames of one tile in time after the other.

        Args:
          latents: Latents as the transformer has them. Here a batch runs at once.

        Raises:
          ValueError: The shape is not [B, F, H, W, C].
          TypeError: The dtype is not floating-point.
        """
        self.check_latents(latents)
        return self._decode(latents)

    def encode(self, video: Video) -> Float[Array, "B F H W C"]:
        """Encodes videos to the mean of the posterior.

        Args:
          video: Pixels in [-1, 1], of a size that `latent_shape` accepts. From a
            NumPy array only a tile at a time is copied to the device.

        Returns:
          float32 latents on the device.

        Raises:
          ValueError: The shape is not [B, T, Y, X, 3], or a size does not fit.
          TypeError: The dtype is not floating-point.
        """
        return self.posterior(video).mean * self.model.config.scaling_factor

    def sample(self, video: Video, key: PRNGKeyArray) -> Float[Array, "B F H W C"]:
        """Encodes videos to a sample of the posterior, as HunyuanCustom does.

        Args:
          video: As for `encode`.
          key: Source of the noise.

        Returns:
          float32 latents on the device.

        Raises:
          ValueError: As for `encode`.
          TypeError: As for `encode`.
        """
        return self.posterior(video).sample(key) * self.model.config.scaling_factor

    def posterior(self, video: Video) -> Posterior:
        """Encodes videos to the distribution of the encoder's latents, not scaled.

        Args:
          video: As for `encode`.

        Raises:
          ValueError: As for `encode`.
          TypeError: As for `encode`.
        """
        self.check_video(video)
        moments = join(self._encode(item) for item in items(video))
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return Posterior(mean, jnp.clip(log_variance, *LOG_VARIANCES))

    def _decode(self, latents: Latents) -> Iterator[Array]:
        graph, state = nnx.split(self.model)
        run = functools.partial(decode_tile, graph, state)
        if self.tiling is None:
            frames: Iterator[Array] = iter((run(latents),))
        else:
            tiles = self.tiling.divided(self.stride)
            frames = run_tiles(run, latents, tiles, self.tiling)
        return map(_clip, frames)

    def _encode(self, video: Video) -> Iterator[Array]:
        graph, state = nnx.split(self.model)
        run = functools.partial(encode_tile, graph, state)
        if self.tiling is None:
            return iter((run(video),))
        return run_tiles(run, video, self.tiling, self.tiling.divided(self.stride))


@functools.partial(jax.jit, static_argnums=0)
def decode_tile(graph: Any, state: Any, latents: Array) -> Array:
    """Decodes a tile of the transformer's latents to pixels that are not clipped."""
    model: HunyuanVAE = nnx.merge(graph, state)
    return model.decode(latents.astype(jnp.float32) / model.config.scaling_factor)


@functools.partial(jax.jit, static_argnums=0)
def encode_tile(graph: Any, state: Any, video: Array) -> Array:
    """Encodes a tile of pixels to the posterior's moments."""
    return nnx.merge(graph, state).encode(video)


@functools.partial(jax.jit, donate_argnums=0)
def _clip(frames: Array) -> Array:
    return jnp.clip(frames, -1.0, 1.0)
