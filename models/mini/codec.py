"""A linear video codec: principal components of small space-time patches."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import einops
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors.numpy import load_file, save_file

from draft_jax.pytree import register_dataclass

PATCH = (2, 4, 4)  # frames, rows, columns of pixels behind one latent position
PATCH_NUMBERS = PATCH[0] * PATCH[1] * PATCH[2] * 3
LATENT_CHANNELS = 16


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LinearCodec:
    """Projects each patch of a video on its first principal components.

    Attributes:
      mean: float32 [96], the mean patch. A patch is ordered frame, row, column,
        colour.
      basis: float32 [96, C], orthonormal columns, strongest component first.
      scale: float32 [C], divides the coefficients, so that the sampler's unit
        noise is of the right strength in every channel.
    """

    mean: Float[Array, " P"]
    basis: Float[Array, "P C"]
    scale: Float[Array, " C"]

    @classmethod
    def fit(
        cls,
        videos: Iterable[Float[Array | np.ndarray, "B T Y X 3"]],
        *,
        channels: int = LATENT_CHANNELS,
        whitening: float = 1.0,
    ) -> "LinearCodec":
        """Finds the components of some videos.

        Args:
          videos: Batches of videos in [-1, 1].
          channels: Components to keep, C.
          whitening: 1 gives every channel unit variance. Smaller values leave
            weak channels weaker: the standard deviations, relative to the first
            channel's, are raised to the power `1 - whitening`.

        Returns:
          The codec; its first channel has unit variance on these videos.

        Source: Pearson, "On lines and planes of closest fit", 1901.
        """
        count, total = 0, np.zeros(PATCH_NUMBERS)
        products = np.zeros((PATCH_NUMBERS, PATCH_NUMBERS))
        for batch in videos:
            patches = np.asarray(to_patches(jnp.asarray(batch)), np.float64)
            rows = einops.rearrange(patches, "B F H W P -> (B F H W) P")
            count += len(rows)
            total = total + rows.sum(0)
            products = products + rows.T @ rows
        mean = total / count
        variances, vectors = np.linalg.eigh(products / count - np.outer(mean, mean))
        deviations = np.sqrt(np.maximum(variances[::-1][:channels], 1e-8))
        scale = deviations[0] * (deviations / deviations[0]) ** whitening
        return cls(
            mean=jnp.asarray(mean, jnp.float32),
            basis=jnp.asarray(vectors[:, ::-1][:, :channels], jnp.float32),
            scale=jnp.asarray(scale, jnp.float32),
        )

    @property
    def stride(self) -> tuple[int, int, int]:
        """The frames, rows and columns of pixels behind one latent position."""
        return PATCH

    @property
    def channels(self) -> int:
        """The number of latent channels, C."""
        return self.scale.shape[0]

    def latent_shape(
        self, *, frames: int, height: int, width: int
    ) -> tuple[int, int, int, int]:
        """Returns frames, rows, columns and channels of the latent of a video.

        Raises:
          ValueError: A side of the video is not a multiple of the stride.
        """
        sides = (("frames", frames), ("height", height), ("width", width))
        for (name, value), step in zip(sides, PATCH, strict=True):
            if value % step:
                raise ValueError(f"{name}={value} must be a multiple of {step}")
        step_t, step_y, step_x = PATCH
        return frames // step_t, height // step_y, width // step_x, self.channels

    def tiled(self, pixels: int) -> "LinearCodec":
        """Returns the codec itself: every patch is a tile already."""
        del pixels
        return self

    @classmethod
    def load(cls, path: Path | str) -> "LinearCodec":
        """Reads `codec.safetensors`."""
        tensors = load_file(path)
        return cls(**{name: jnp.asarray(value) for name, value in tensors.items()})

    def save(self, path: Path | str) -> None:
        """Writes `codec.safetensors`."""
        fields = [field.name for field in dataclasses.fields(self)]
        save_file({name: np.asarray(getattr(self, name)) for name in fields}, path)

    def encode(self, video: Float[Array, "B T Y X 3"]) -> Float[Array, "B F H W C"]:
        """Encodes a video.

        Args:
          video: Pixels in [-1, 1]; T a multiple of 2, Y and X of 4.

        Returns:
          float32 latents, F = T/2, H = Y/4, W = X/4.

        Raises:
          ValueError: A size is not such a multiple.
        """
        centred = to_patches(video.astype(jnp.float32)) - self.mean
        return jnp.matmul(centred, self.basis, precision="highest") / self.scale

    def decode(self, latents: Float[Array, "B F H W C"]) -> Float[Array, "B T Y X 3"]:
        """Decodes latents to float32 pixels in [-1, 1]; T = 2F, Y = 4H, X = 4W."""
        coefficients = latents.astype(jnp.float32) * self.scale
        patches = jnp.matmul(coefficients, self.basis.T, precision="highest")
        return jnp.clip(from_patches(patches + self.mean), -1.0, 1.0)


def to_patches(video: Float[Array, "B T Y X 3"]) -> Float[Array, "B F H W P"]:
    """Cuts a video in patches of 2 frames x 4 x 4 pixels, as vectors of 96.

    Raises:
      ValueError: The frames are not a multiple of 2, or a side not one of 4.
    """
    _, frames, height, width, _ = video.shape
    step_t, step_y, step_x = PATCH
    if frames % step_t or height % step_y or width % step_x:
        raise ValueError(
            f"video of {frames} frames, {height} x {width} pixels: the frames must "
            f"be a multiple of {step_t}, the sides of {step_y}"
        )
    return einops.rearrange(
        video,
        "B (F t) (H y) (W x) colours -> B F H W (t y x colours)",
        t=step_t,
        y=step_y,
        x=step_x,
    )


def from_patches(patches: Float[Array, "B F H W P"]) -> Float[Array, "B T Y X 3"]:
    """Puts patches together again; the inverse of `to_patches`."""
    step_t, step_y, step_x = PATCH
    return einops.rearrange(
        patches,
        "B F H W (t y x colours) -> B (F t) (H y) (W x) colours",
        t=step_t,
        y=step_y,
        x=step_x,
    )
