"""Measures of how close two videos are: PSNR and SSIM, in float64 NumPy."""

import math

import numpy as np
from jaxtyping import Float

SSIM_SIGMA = 1.5  # pixels; the window of Wang et al. (2004)
SSIM_RADIUS = 5  # pixels; the window is cut off at 3.5 sigma, 11 taps
SSIM_K1, SSIM_K2 = 0.01, 0.03

# Sizes are not bound to each other: unlike videos are an error with its own text.
Video = Float[np.ndarray, "_F _H _W _C"]


def psnr(video: Video, reference: Video) -> float:
    """Computes the peak signal-to-noise ratio over a whole video, in decibel.

    Args:
      video: Values in [0, 1].
      reference: The video to compare with.

    Returns:
      `-10 log10(mean squared error)`; infinity for equal videos.

    Raises:
      ValueError: The shapes differ.
    """
    _check_same_shape(video, reference)
    difference = video.astype(np.float64) - reference.astype(np.float64)
    error = np.mean(difference**2)
    return float("inf") if error == 0 else float(-10.0 * np.log10(error))


def psnr_per_frame(video: Video, reference: Video) -> list[float]:
    """Computes the `psnr` of each frame of a video.

    Raises:
      ValueError: The shapes differ.
    """
    _check_same_shape(video, reference)
    frames = zip(video, reference, strict=True)
    return [psnr(frame[None], of_reference[None]) for frame, of_reference in frames]


def finite_or_null(values: list[float]) -> list[float | None]:
    """Returns values as JSON can say them: None for the infinity of equal frames."""
    return [value if math.isfinite(value) else None for value in values]


def ssim(video: Video, reference: Video) -> float:
    """Computes structural similarity, averaged over pixels, channels and frames.

    The Gaussian-window form of the original paper, with values in [0, 1], as
    `skimage.metrics.structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=1.0)` computes it per frame.

    Args:
      video: Values in [0, 1], frames of at least 11 x 11 pixels.
      reference: The video to compare with.

    Returns:
      At most 1.0, which equal videos reach.

    Raises:
      ValueError: The shapes differ or a frame is smaller than the window.

    Source: Wang et al., Image quality assessment: from error visibility to
    structural similarity (2004).
    """
    _check_same_shape(video, reference)
    check_ssim_size(*video.shape[1:3])
    frames = zip(video, reference, strict=True)
    return float(np.mean([_frame_ssim(*pair) for pair in frames]))


def check_ssim_size(height: int, width: int) -> None:
    """Raises ValueError if frames of this size do not hold the window of `ssim`."""
    window = 2 * SSIM_RADIUS + 1
    if min(height, width) < window:
        raise ValueError(
            f"frames of {height} x {width} pixels are smaller than the {window} x "
            f"{window} window of SSIM"
        )


def _frame_ssim(frame: np.ndarray, reference: np.ndarray) -> float:
    x, y = frame.astype(np.float64), reference.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return float(similarity.mean())


def _blur(image: np.ndarray) -> np.ndarray:
    """Averages with Gaussian weights at pixels whose window lies in the image."""
    offsets = np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1)
    weights = np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(
            image, len(weights), axis=axis
        )
        image = windows @ weights
    return image


def _check_same_shape(video: np.ndarray, reference: np.ndarray) -> None:
    if video.shape != reference.shape:
        raise ValueError(
            f"video has shape {video.shape} and reference {reference.shape}; they "
            "must be equal"
        )
