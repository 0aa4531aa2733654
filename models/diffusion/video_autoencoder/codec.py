"""The codec of a video autoencoder: whole videos, a part on the device at a time.

A family says how one video is run. Here stand the checks of arrays, batches, and copies
to the host beside the computation.
"""

import abc
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from models.diffusion.interfaces import LatentShape
from models.diffusion.video_autoencoder import sizes
from models.diffusion.video_autoencoder.sizes import COLOURS, Stride

Video = Float[Array | np.ndarray, "B T Y X 3"]
Latents = Float[Array | np.ndarray, "B F H W C"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class VideoCodec(abc.ABC):
    """Encodes pixels in [-1, 1] to the latents of a transformer, and back.

    Videos of a batch run one after the other. The methods run compiled programs; code
    under `jax.jit` calls the autoencoder instead.

    Args:
      model: The autoencoder. Its configuration has `stride` and `latent_channels`.
    """

    model: Any

    @property
    def stride(self) -> Stride:
        """The frames, rows and columns of pixels behind one latent position."""
        return self.model.config.stride

    @property
    def channels(self) -> int:
        """The number of latent channels, C."""
        return self.model.config.latent_channels

    def latent_shape(self, *, frames: int, height: int, width: int) -> LatentShape:
        """Returns the shape of one video's latent; see `sizes.latent_shape`."""
        return sizes.latent_shape(
            self.stride, self.channels, frames=frames, height=height, width=width
        )

    def video_shape(
        self, frames: int, rows: int, columns: int
    ) -> tuple[int, int, int, int]:
        """Returns the shape of the video of a latent; see `sizes.video_shape`."""
        return sizes.video_shape(self.stride, frames=frames, rows=rows, columns=columns)

    def decode(self, latents: Latents) -> Float[Array, "B T Y X 3"]:
        """Decodes latents to videos.

        Args:
          latents: Latents as the transformer has them.

        Returns:
          float32 pixels in [-1, 1] on the device, T = stride * (F - 1) + 1.

        Raises:
          ValueError: The shape is not [B, F, H, W, C].
          TypeError: The dtype is not floating-point.
        """
        self.check_latents(latents)
        return join(self._decode(item) for item in items(latents))

    def decode_to_host(self, latents: Latents) -> Float[np.ndarray, "B T Y X 3"]:
        """Decodes into the host's memory, one chunk on the device at a time."""
        self.check_latents(latents)
        batch, *size, _ = latents.shape
        video = np.empty((batch, *self.video_shape(*size)), np.float32)
        for index, item in enumerate(items(latents)):
            for frames, chunk in copy_to_host(self._decode(item)):
                video[index, frames] = chunk[0]
        return video

    @abc.abstractmethod
    def encode(self, video: Video) -> Float[Array, "B F H W C"]:
        """Encodes pixels in [-1, 1] to latents as the transformer has them."""

    @abc.abstractmethod
    def tiled(self, pixels: int) -> "VideoCodec":
        """Returns the codec on square tiles of so many rows and columns of pixels."""

    @abc.abstractmethod
    def _decode(self, latents: Latents) -> Iterator[Array]:
        """Yields the frames of latents that are checked, chunk by chunk."""

    def check_latents(self, latents: Latents) -> None:
        """Checks the shape and dtype of latents.

        Raises:
          ValueError: The shape is not [B, F, H, W, C].
          TypeError: The dtype is not floating-point.
        """
        _check_floating("latents", latents)
        shape = latents.shape
        if len(shape) != 5 or shape[-1] != self.channels or not all(shape):
            raise ValueError(
                f"latents have shape {shape}; expected [batch, frames, rows, columns, "
                f"{self.channels}], none of them 0"
            )

    def check_video(self, video: Video) -> LatentShape:
        """Checks the shape and dtype of videos, and returns the shape of a latent.

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
        _, frames, height, width, _ = video.shape
        return self.latent_shape(frames=frames, height=height, width=width)

    def in_dtype(self, dtype: str) -> "VideoCodec":
        """Returns the codec with another dtype of convolutions and what they read.

        Parameters stay as they are stored. bfloat16 takes half the memory of float32,
        and pixels differ a little.

        Raises:
          ValueError: The autoencoder cannot compute in the dtype.
        """
        config = dataclasses.replace(self.model.config, dtype=dtype)
        make = type(self.model)
        other = nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0)))
        model = nnx.merge(nnx.split(other)[0], nnx.state(self.model))
        return dataclasses.replace(self, model=model)

    def check_tile(self, pixels: int) -> None:
        """Checks the side of tiles that share a quarter of it.

        Raises:
          ValueError: It is not a positive multiple of four latent positions.
        """
        _, side, _ = self.stride
        if pixels < 1 or pixels % (4 * side):
            raise ValueError(
                f"tiles of {pixels} pixels must be a positive multiple of {4 * side}"
            )


def _check_floating(name: str, array: Array | np.ndarray) -> None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} are of {array.dtype}; expected floating-point numbers")


def items(batch: Latents | Video) -> Iterator[Array | np.ndarray]:
    """Yields batches of one."""
    return (batch[index : index + 1] for index in range(batch.shape[0]))


def join(videos: Iterable[Iterable[Array]]) -> Array:
    """Joins the chunks of each video, and the videos to a batch."""
    joined = [jnp.concatenate(list(chunks), axis=1) for chunks in videos]
    return joined[0] if len(joined) == 1 else jnp.concatenate(joined)


def cut(
    frames: Latents | Video, starts: Sequence[int], lengths: Sequence[int]
) -> Array | np.ndarray:
    """Cuts a box of frames, rows and columns; an array on the host stays there.

    Args:
      frames: Videos or latents.
      starts: First frame, or first frame, row and column.
      lengths: Numbers of frames, rows and columns, as many as `starts`. A program is
        compiled for each, if the array is on the device.
    """
    if isinstance(frames, np.ndarray):
        slices = zip(starts, lengths, strict=True)
        return frames[:, *(slice(start, start + length) for start, length in slices)]
    return _cut_on_device(frames, tuple(starts), tuple(lengths))


@functools.partial(jax.jit, static_argnums=2)
def _cut_on_device(
    frames: Array, starts: tuple[int | Array, ...], lengths: tuple[int, ...]
) -> Array:
    """Cuts frames; where they start is not part of the compiled program."""
    for axis, (start, length) in enumerate(zip(starts, lengths, strict=True), 1):
        frames = jax.lax.dynamic_slice_in_dim(frames, start, length, axis=axis)
    return frames


def copy_to_host(chunks: Iterator[Array]) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields the frames of each chunk, and the chunk, copied while the next runs."""
    start = 0
    ready: Array | None = next(chunks)
    while ready is not None:
        running = next(chunks, None)
        chunk = np.asarray(ready)
        yield slice(start, start + chunk.shape[1]), chunk
        start += chunk.shape[1]
        ready = running
