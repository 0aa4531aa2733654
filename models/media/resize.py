"""Resizes of images: bicubic as PyTorch does it, and Lanczos as Pillow does it."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_CUBIC = -0.75  # slope of PyTorch's bicubic kernel at distance 1; Pillow has -0.5


def resize_bicubic(
    images: Float[Array, "B _H _W C"], height: int, width: int
) -> Float[Array, "B {height} {width} C"]:
    """Resizes images without a low-pass filter; overshoot is kept.

    Args:
      images: Channels last.
      height: Rows of the result.
      width: Columns of the result.

    Returns:
      float32.

    Source: `torch.nn.functional.interpolate` with mode="bicubic" and
    align_corners=False, which Wan2.1's image-to-video code calls.
    """
    return jnp.einsum(
        "Hh,bhwc,Ww->bHWc",
        bicubic_weights(images.shape[1], height),
        images.astype(jnp.float32),
        bicubic_weights(images.shape[2], width),
        precision=jax.lax.Precision.HIGHEST,
    )


def resize_lanczos(
    images: Float[Array, "B _H _W C"], height: int, width: int
) -> Float[Array, "B {height} {width} C"]:
    """Resizes images, with a low-pass filter where they become smaller.

    Args:
      images: Channels last, in [-1, 1].
      height: Rows of the result.
      width: Columns of the result.

    Returns:
      float32 in [-1, 1].

    Source: Pillow's `Image.resize` with LANCZOS, which Wan2.2's 5B model calls; its
    rounding to 8 bits is left out.
    """
    resized = jax.image.resize(
        images.astype(jnp.float32),
        (images.shape[0], height, width, images.shape[-1]),
        "lanczos3",
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.clip(resized, -1.0, 1.0)


def bicubic_weights(length: int, size: int) -> Float[np.ndarray, "size length"]:
    """Returns each old sample's weight (axis 1) in each new one; rows sum to 1.

    Args:
      length: Old samples along one axis.
      size: New samples; their centres are spread evenly over the same extent.

    Source: PyTorch `upsample_bicubic2d`.
    """
    # Rounded where the published float32 code rounds, so that large images agree.
    scale = np.float32(length) / np.float32(size)
    centres = scale * (np.arange(size, dtype=np.float32) + np.float32(0.5))
    centres = centres - np.float32(0.5)
    left = np.floor(centres)
    t = (centres - left).astype(np.float64)
    weights = np.zeros((size, length))
    for tap in range(-1, 3):
        # Beyond the border, the outermost sample is repeated.
        column = np.clip(left.astype(np.int64) + tap, 0, length - 1)
        np.add.at(weights, (np.arange(size), column), _cubic_kernel(t - tap))
    return weights.astype(np.float32)


def _cubic_kernel(distance: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Evaluates Keys' cubic convolution kernel."""
    a, x = _CUBIC, np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
