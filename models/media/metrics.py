"""Measures of how close two videos are, in float64 NumPy.

PSNR, SSIM, the deviation of gradient similarity, and flicker.
"""

import math

import numpy as np
from jaxtyping import Float

SSIM_SIGMA = 1.5  # pixels; the window of Wang et al. (2004)
SSIM_RADIUS = 5  # pixels; the window is cut off at 3.5 sigma, 11 taps
SSIM_K1, SSIM_K2 = 0.01, 0.03
LUMA = (0.299, 0.587, 0.114)  # Rec. 601, as image metrics take it
GMSD_CONSTANT = 170 / 255**2  # that of the paper, for values in [0, 1]

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


def gmsd(video: Video, reference: Video) -> float:
    """Computes the deviation of gradient similarity, averaged over frames.

    Edges are what people judge a picture by. The similarity of gradient magnitudes
    is a map; its standard deviation tells local damage from an even change, which is
    less visible. It has no trained part, and follows opinion scores better than SSIM
    does in its paper. Frames are halved first, by means of 2 x 2 pixels.

    Args:
      video: Values in [0, 1], RGB, frames of at least 6 x 6 pixels.
      reference: The video to compare with.

    Returns:
      0.0 for equal videos; larger is worse.

    Raises:
      ValueError: The shapes differ, or a frame is too small.

    Source: Xue et al., Gradient Magnitude Similarity Deviation: A Highly Efficient
    Perceptual Image Quality Index (2014).
    """
    _check_same_shape(video, reference)
    if min(video.shape[1:3]) < 6:
        raise ValueError(f"frames of {video.shape[1:3]} pixels: less than 6 x 6")
    frames = zip(video, reference, strict=True)
    return float(np.mean([_frame_gmsd(*pair) for pair in frames]))


def flicker(video: Video, reference: Video) -> float:
    """Computes how much more or less changes from frame to frame than it should.

    The root mean square of the differences between consecutive frames, less those of
    the reference: an error that stands still does not count, one that comes and goes
    does.

    Args:
      video: Values in [0, 1], at least two frames.
      reference: The video to compare with.

    Returns:
      0.0 for equal videos; larger is worse.

    Raises:
      ValueError: The shapes differ, or there is one frame only.
    """
    _check_same_shape(video, reference)
    if len(video) < 2:
        raise ValueError(f"video has {len(video)} frames; expected at least 2")
    error = video.astype(np.float64) - reference.astype(np.float64)
    return float(np.sqrt(np.mean(np.diff(error, axis=0) ** 2)))


def _frame_gmsd(frame: np.ndarray, reference: np.ndarray) -> float:
    x, y = _gradients(frame), _gradients(reference)
    similarity = (2 * x * y + GMSD_CONSTANT) / (x * x + y * y + GMSD_CONSTANT)
    return float(similarity.std())


def _gradients(frame: np.ndarray) -> np.ndarray:
    """Returns the magnitudes of Prewitt's gradients of the halved luma."""
    luma = frame.astype(np.float64) @ np.array(LUMA)
    rows, columns = (size // 2 * 2 for size in luma.shape)
    even = luma[:rows, :columns]
    half = (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / 4
    across = half[:, 2:] - half[:, :-2]
    down = half[2:] - half[:-2]
    across = (across[:-2] + across[1:-1] + across[2:]) / 3
    down = (down[:, :-2] + down[:, 1:-1] + down[:, 2:]) / 3
    return np.hypot(across, down)


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
        size = image.shape[axis] - 2 * SSIM_RADIUS
        # Sums of shifted pictures: four times as fast as a product with windows.
        parts = np.moveaxis(image, axis, 0)
        image = np.moveaxis(
            sum(w * parts[shift : shift + size] for shift, w in enumerate(weights)),
            0,
            axis,
        )
    return image


def _check_same_shape(video: np.ndarray, reference: np.ndarray) -> None:
    if video.shape != reference.shape:
        raise ValueError(
            f"video has shape {video.shape} and reference {reference.shape}; they "
            "must be equal"
        )
