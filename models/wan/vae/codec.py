"""Encodes and decodes whole videos with Wan's autoencoder, a chunk of frames at a time.

The first chunk is the first frame; each other is the `stride` frames of one latent
frame, as in the original. Videos of a batch run one after the other. Two compiled steps
serve any count of frames and videos, and memory beside the videos themselves does not
grow with it. A step hands the cache of the layers to the next, which reuses its
buffers.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from models.diffusion.video_autoencoder.codec import (
    Latents,
    Video,
    VideoCodec,
    copy_to_host,
    cut,
    items,
    join,
)
from models.wan.vae.autoencoder import WanVAE
from models.wan.vae.layers import Cache
from models.wan.vae.tiling import Tiling


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class WanVAECodec(VideoCodec):
    """Encodes pixels in [-1, 1] to the latents of a Wan transformer, and back.

    Latents are normalised by channel, as the transformer has them. The methods run
    compiled steps one after the other; code under `jax.jit` calls `WanVAE` instead.

    Args:
      model: The autoencoder.
      tiling: Cuts frames in tiles, to save memory; None for whole frames.

    Raises:
      ValueError: A size of the tiles is not a multiple of the stride.
    """

    model: WanVAE
    tiling: Tiling | None = None

    def __post_init__(self) -> None:
        _, side, _ = self.stride
        if self.tiling is None:
            return
        for name in ("size", "overlap"):
            value = getattr(self.tiling, name)
            if any(length % side for length in value):
                raise ValueError(f"tiling.{name}={value} must be multiples of {side}")

    def tiled(self, pixels: int) -> "WanVAECodec":
        """Returns the codec on square tiles that share a quarter of their sides.

        Diffusers' tiles overlap by as much.

        Raises:
          ValueError: `pixels`, rows and columns of a tile, is not a positive multiple
            of four latent positions.
        """
        self.check_tile(pixels)
        tiling = Tiling(size=(pixels, pixels), overlap=(pixels // 4, pixels // 4))
        return dataclasses.replace(self, tiling=tiling)

    def decode(self, latents: Latents) -> Float[Array, "B T Y X 3"]:
        """Decodes normalised latents to videos; see `VideoCodec.decode`."""
        if self.tiling is not None:
            return jnp.asarray(self.decode_to_host(latents))
        return super().decode(latents)

    def decode_to_host(self, latents: Latents) -> Float[np.ndarray, "B T Y X 3"]:
        """Decodes into the host's memory, one chunk on the device at a time."""
        if self.tiling is None:
            return super().decode_to_host(latents)
        self.check_latents(latents)
        batch, *size, _ = latents.shape
        video = np.zeros((batch, *self.video_shape(*size)), np.float32)
        self._run_tiles(self._decode, latents, video)
        return np.clip(video, -1.0, 1.0, out=video)

    def decode_chunks(self, latents: Latents) -> Iterator[Float[Array, "B t Y X 3"]]:
        """Decodes chunk by chunk, and yields each as soon as it is started.

        Args:
          latents: Normalised latents. Here a batch runs at once.

        Returns:
          Iterator over the first frame, then `stride` frames each.

        Raises:
          ValueError: The shape is not [B, F, H, W, C]; or tiling is on, where each
            tile is decoded to its last frame before the next.
          TypeError: The dtype is not floating-point.
        """
        self.check_latents(latents)
        if self.tiling is not None:
            raise ValueError(f"decode_chunks needs tiling=None, not {self.tiling}")
        return self._decode(latents)

    def encode(self, video: Video) -> Float[Array, "B F H W C"]:
        """Encodes videos to the normalised mean of the posterior.

        Args:
          video: Pixels in [-1, 1], of a size that `latent_shape` accepts. From a
            NumPy array only a chunk at a time is copied to the device.

        Returns:
          float32 latents on the device.

        Raises:
          ValueError: The shape is not [B, T, Y, X, 3], or a size does not fit.
          TypeError: The dtype is not floating-point.
        """
        shape = self.check_video(video)
        if self.tiling is None:
            return join(self._encode(item) for item in items(video))
        latents = np.zeros((video.shape[0], *shape), np.float32)
        self._run_tiles(self._encode, video, latents)
        return jnp.asarray(latents)

    def _decode(self, latents: Latents) -> Iterator[Array]:
        return _run(_decode_step, self.model, latents, chunk=1)

    def _encode(self, video: Video) -> Iterator[Array]:
        return _run(_encode_step, self.model, video, chunk=self.stride[0])

    def _run_tiles(
        self,
        run: Callable[[Any], Iterator[Array]],
        source: Latents | Video,
        result: np.ndarray,
    ) -> None:
        """Runs each tile over all frames and adds it to the result.

        Args:
          run: Encodes or decodes frames in chunks.
          source: Frames to cut.
          result: Zeros to begin with.
        """
        assert self.tiling is not None, "callers have checked"
        source = np.asarray(source)
        _, side, _ = self.stride
        rows, columns = (min(source.shape[i], result.shape[i]) for i in (2, 3))
        scale_in, scale_out = (array.shape[2] // rows for array in (source, result))
        for tile in self.tiling.tiles(rows, columns, side):
            target, weights = tile.cut(result, scale_out), tile.weights(scale_out)
            for index, item in enumerate(items(tile.cut(source, scale_in))):
                for frames, chunk in copy_to_host(run(item)):
                    target[index, frames] += weights * chunk[0]


def _run(
    step: Callable, model: WanVAE, frames: Latents | Video, chunk: int
) -> Iterator[Array]:
    """Runs a step for the first frame, then one for each `chunk` frames."""
    graph, state = nnx.split(model)
    cache = None
    for start in (0, *range(1, frames.shape[1], chunk)):
        part = cut(frames, (start,), (chunk if start else 1,))
        result, cache = step(graph, state, part, cache)
        yield result


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _decode_step(
    graph: Any, state: Any, latents: Array, cache: Cache
) -> tuple[Array, Cache]:
    return nnx.merge(graph, state).decode_frames(latents, cache)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _encode_step(
    graph: Any, state: Any, video: Array, cache: Cache
) -> tuple[Array, Cache]:
    return nnx.merge(graph, state).encode_frames(video, cache)
