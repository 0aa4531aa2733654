"""How close videos come to those of dense attention, on the device that made them.

The measures are those of `models.media.metrics`, which say their sources; in float32,
a clip at a time. On the host they would take as long as the videos themselves.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models.media.metrics import (
    GMSD_CONSTANT,
    LUMA,
    SSIM_K1,
    SSIM_K2,
    SSIM_RADIUS,
    SSIM_SIGMA,
    check_ssim_size,
)

METRICS = ("psnr", "ssim", "gmsd", "flicker")
FLOOR_DB = 120.0  # of equal videos, for means to be numbers


def likeness(
    videos: Float[Array, "B T Y X 3"], dense: Float[Array, "B T Y X 3"]
) -> dict[str, list[float]]:
    """Returns each metric of each clip.

    Raises:
      ValueError: The shapes differ, or a frame is smaller than the window of SSIM.
    """
    if videos.shape != dense.shape:
        raise ValueError(f"videos of {videos.shape} and dense ones of {dense.shape}")
    check_ssim_size(*videos.shape[2:4])
    found = np.asarray(_compare(videos, dense), np.float64)
    return {
        name: found[:, place].round(5).tolist() for place, name in enumerate(METRICS)
    }


@jax.jit
def _compare(videos, dense) -> Float[Array, "B metrics"]:
    def of_clip(pair):
        video, reference = (x.astype(jnp.float32) for x in pair)
        error = video - reference
        mean = (error**2).mean()
        decibels = -10.0 * jnp.log10(jnp.maximum(mean, 10.0 ** (-FLOOR_DB / 10.0)))
        ssim, gmsd = jax.lax.map(lambda frames: _of_frame(*frames), (video, reference))
        changes = jnp.sqrt((jnp.diff(error, axis=0) ** 2).mean())
        return jnp.stack([decibels, ssim.mean(), gmsd.mean(), changes])

    return jax.lax.map(of_clip, (videos, dense))


def _of_frame(x, y) -> tuple[Array, Array]:
    """Returns SSIM and the deviation of gradient similarity of a frame."""
    return _ssim(x, y), _gmsd(x, y)


def _ssim(x, y):
    mean_x, mean_y = _blur(x), _blur(y)
    # Of differences from the means of the frame: float32 has too few digits else.
    x, y = x - x.mean((0, 1)), y - y.mean((0, 1))
    near_x, near_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - near_x**2
    variance_y = _blur(y * y) - near_y**2
    covariance = _blur(x * y) - near_x * near_y
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return similarity.mean()


def _blur(image: Float[Array, "Y X C"]) -> Float[Array, "y x C"]:
    """Averages with Gaussian weights at pixels whose window lies in the image."""
    for axis in (0, 1):
        size = image.shape[axis] - 2 * SSIM_RADIUS
        shifted = [
            weight * jax.lax.slice_in_dim(image, shift, shift + size, axis=axis)
            for shift, weight in enumerate(_window())
        ]
        image = functools.reduce(jnp.add, shifted)
    return image


@functools.cache
def _window() -> tuple[float, ...]:
    offsets = np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1)
    weights = np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    return tuple((weights / weights.sum()).tolist())


def _gmsd(x, y):
    x, y = _gradients(x), _gradients(y)
    similarity = (2 * x * y + GMSD_CONSTANT) / (x * x + y * y + GMSD_CONSTANT)
    return similarity.std()


def _gradients(frame: Float[Array, "Y X 3"]) -> Float[Array, "y x"]:
    """Returns the magnitudes of Prewitt's gradients of the halved luma."""
    luma = frame @ jnp.asarray(LUMA, jnp.float32)
    rows, columns = (size // 2 for size in frame.shape[:2])
    halves = luma[: 2 * rows, : 2 * columns].reshape(rows, 2, columns, 2)
    half = halves.mean((1, 3))
    across, down = half[:, 2:] - half[:, :-2], half[2:] - half[:-2]
    across = (across[:-2] + across[1:-1] + across[2:]) / 3
    down = (down[:, :-2] + down[:, 1:-1] + down[:, 2:]) / 3
    return jnp.hypot(across, down)
