"""Encodes and decodes whole videos with Wan's autoencoder, a chunk of frames at a time.

The first chunk is the first frame; each other is the `stride` frames of one latent
frame, as in the original. Videos of a batch run one after the other. Two compiled steps
serve any count of frames and videos, and memory beside the videos themselves does not
grow with it. A step hands the cache of the layers to the next, which reuses its
buffers.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from models.wan.vae.autoencoder import COLOURS, WanVAE
from models.wan.vae.layers import Cache
from models.wan.vae.tiling import Tiling

Video = Float[Array | np.ndarray, "B T Y X 3"]
Latents = Float[Array | np.ndarray, "B F H W C"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class WanVAECodec:
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
        _, side, _ = self.stride
        if pixels < 1 or pixels % (4 * side):
            raise ValueError(
                f"tiles of {pixels} pixels must be a positive multiple of {4 * side}"
            )
        tiling = Tiling(size=(pixels, pixels), overlap=(pixels // 4, pixels // 4))
        return dataclasses.replace(self, tiling=tiling)

    @property
    def stride(self) -> tuple[int, int, int]:
        """The frames, rows and columns of pixels behind one latent position."""
        return self.model.config.stride

    @property
    def channels(self) -> int:
        """The number of latent channels, C."""
        return self.model.config.latent_channels

    def latent_shape(
        self, *, frames: int, height: int, width: int
    ) -> tuple[int, int, int, int]:
        """Returns the shape of one video's latent; see `WanVAEConfig.latent_shape`."""
        return self.model.config.latent_shape(frames=frames, height=height, width=width)

    def video_shape(
        self, frames: int, rows: int, columns: int
    ) -> tuple[int, int, int, int]:
        """Returns frames, height, width and colours of the video of a latent.

        Args:
          frames: Frames of the latent.
          rows: Rows of the latent.
          columns: Columns of the latent.
        """
        time, side, _ = self.stride
        return time * (frames - 1) + 1, rows * side, columns * side, COLOURS

    def decode(self, latents: Latents) -> Float[Array, "B T Y X 3"]:
        """Decodes latents to videos.

        Args:
          latents: Normalised latents.

        Returns:
          float32 pixels in [-1, 1] on the device, T = stride * (F - 1) + 1.

        Raises:
          ValueError: The shape is not [B, F, H, W, C].
          TypeError: The dtype is not floating-point.
        """
        if self.tiling is not None:
            return jnp.asarray(self.decode_to_host(latents))
        self._check_latents(latents)
        return _join(self._decode(item) for item in _items(latents))

    def decode_to_host(self, latents: Latents) -> Float[np.ndarray, "B T Y X 3"]:
        """Decodes into the host's memory, one chunk on the device at a time."""
        self._check_latents(latents)
        batch, *size, _ = latents.shape
        video = np.zeros((batch, *self.video_shape(*size)), np.float32)
        if self.tiling is not None:
            self._run_tiles(self._decode, latents, video)
            return np.clip(video, -1.0, 1.0, out=video)
        for index, item in enumerate(_items(latents)):
            for frames, chunk in _copy_to_host(self._decode(item)):
                video[index, frames] = chunk[0]
        return video

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
        self._check_latents(latents)
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
        _check_floating("video", video)
        if video.ndim != 5 or video.shape[-1] != COLOURS or not video.shape[0]:
            raise ValueError(
                f"video has shape {video.shape}; expected [batch, frames, height, "
                f"width, {COLOURS}], at least one in the batch"
            )
        batch, frames, height, width, _ = video.shape
        shape = self.latent_shape(frames=frames, height=height, width=width)
        if self.tiling is None:
            return _join(self._encode(item) for item in _items(video))
        latents = np.zeros((batch, *shape), np.float32)
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
            for index, item in enumerate(_items(tile.cut(source, scale_in))):
                for frames, chunk in _copy_to_host(run(item)):
                    target[index, frames] += weights * chunk[0]

    def _check_latents(self, latents: Latents) -> None:
        _check_floating("latents", latents)
        shape = latents.shape
        if len(shape) != 5 or shape[-1] != self.channels or not all(shape):
            raise ValueError(
                f"latents have shape {shape}; expected [batch, frames, rows, columns, "
                f"{self.channels}], none of them 0"
            )


def _check_floating(name: str, array: Array | np.ndarray) -> None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} are of {array.dtype}; expected floating-point numbers")


def _items(batch: Latents | Video) -> Iterator[Array | np.ndarray]:
    """Yields batches of one."""
    return (batch[index : index + 1] for index in range(batch.shape[0]))


def _join(videos: Iterable[Iterable[Array]]) -> Array:
    """Joins the chunks of each video, and the videos to a batch."""
    joined = [jnp.concatenate(list(chunks), axis=1) for chunks in videos]
    return joined[0] if len(joined) == 1 else jnp.concatenate(joined)


def _run(
    step: Callable, model: WanVAE, frames: Latents | Video, chunk: int
) -> Iterator[Array]:
    """Runs a step for the first frame, then one for each `chunk` frames."""
    graph, state = nnx.split(model)
    cache = None
    for start in (0, *range(1, frames.shape[1], chunk)):
        part = _cut(frames, start, chunk if start else 1)
        result, cache = step(graph, state, part, cache)
        yield result


def _cut(frames: Latents | Video, start: int, length: int) -> Array | np.ndarray:
    if isinstance(frames, np.ndarray):
        return frames[:, start : start + length]
    return _cut_on_device(frames, start, length)


@functools.partial(jax.jit, static_argnames="length")
def _cut_on_device(frames: Array, start: int | Array, length: int) -> Array:
    """Cuts frames; their start is not part of the compiled program."""
    return jax.lax.dynamic_slice_in_dim(frames, start, length, axis=1)


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


def _copy_to_host(chunks: Iterator[Array]) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields the frames of each chunk, and the chunk, copied while the next runs."""
    start = 0
    ready: Array | None = next(chunks)
    while ready is not None:
        running = next(chunks, None)
        chunk = np.asarray(ready)
        yield slice(start, start + chunk.shape[1]), chunk
        start += chunk.shape[1]
        ready = running
