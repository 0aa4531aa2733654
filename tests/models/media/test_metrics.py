"""Metrics of videos, against worked cases, loops and scikit-image."""

import math

import numpy as np
import pytest

from models.media.metrics import flicker, gmsd, psnr, ssim


def two_videos():
    """Two unlike, textured videos that any program can compute again."""
    f, h, w, c = np.indices((2, 24, 31, 3))
    phase = 0.7 * h + 0.3 * w * (1 + f) + c
    first = 0.5 + 0.5 * np.sin(phase)
    second = 0.5 + 0.45 * np.sin(phase + 0.2 * np.cos(h * w))
    return first.astype(np.float32), second.astype(np.float32)


def test_psnr_of_hand_worked_videos():
    # Every value is off by 0.1: the mean squared error is 0.01, so 20 dB.
    reference = np.full((2, 4, 4, 3), 0.5)
    assert psnr(reference + 0.1, reference) == pytest.approx(20.0, abs=1e-9)
    # One of 96 values off by 1: 10 log10(96).
    video = np.zeros((2, 4, 4, 3))
    video[1, 2, 3, 0] = 1.0
    assert psnr(video, np.zeros((2, 4, 4, 3))) == pytest.approx(19.822712330395684)


def test_equal_videos():
    video, _ = two_videos()
    assert psnr(video, video) == math.inf
    assert ssim(video, video) == pytest.approx(1.0, abs=1e-12)


def test_values_of_scikit_image():
    """Compares with constants of scikit-image 0.26.0, made in float64.

    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    video, reference = (x.astype(float) for x in two_videos())
    peak_signal_noise_ratio(video, reference, data_range=1.0)
    numpy.mean([structural_similarity(x, y, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, data_range=1.0, channel_axis=-1)
        for x, y in zip(video, reference)])
    """
    video, reference = two_videos()
    assert psnr(video, reference) == pytest.approx(24.302931329789562, abs=1e-9)
    assert ssim(video, reference) == pytest.approx(0.981100230811588, abs=1e-9)


def naive_ssim(x, y):
    """The paper's formula, one window of one channel at a time."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for row in range(x.shape[0] - 10):
        for column in range(x.shape[1] - 10):
            a = x[row : row + 11, column : column + 11]
            b = y[row : row + 11, column : column + 11]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a = (window * (a - mean_a) ** 2).sum()
            var_b = (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            values.append(
                (2 * mean_a * mean_b + 1e-4)
                * (2 * covariance + 9e-4)
                / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4))
            )
    return np.mean(values)


def test_ssim_matches_a_loop_over_windows():
    rng = np.random.default_rng(0)
    video = rng.random((2, 13, 16, 3))
    reference = np.clip(video + 0.3 * rng.normal(size=video.shape), 0, 1)
    expected = np.mean(
        [
            naive_ssim(video[frame, ..., channel], reference[frame, ..., channel])
            for frame in range(2)
            for channel in range(3)
        ]
    )
    assert ssim(video, reference) == pytest.approx(expected, abs=1e-12)


def naive_gmsd(x, y):
    """The paper's formula, a place at a time."""
    weights = np.array([0.299, 0.587, 0.114])

    def magnitude(frame, row, column):
        total = np.zeros(2)
        for r, c in np.ndindex(3, 3):
            top, left = 2 * (row + r), 2 * (column + c)
            mean = (frame[top : top + 2, left : left + 2] @ weights).mean()
            total += mean * np.array([c - 1, r - 1]) / 3
        return np.sqrt((total**2).sum())

    similarities = []
    for row, column in np.ndindex(x.shape[0] // 2 - 2, x.shape[1] // 2 - 2):
        a, b = magnitude(x, row, column), magnitude(y, row, column)
        constant = 170 / 255**2
        similarities.append((2 * a * b + constant) / (a * a + b * b + constant))
    return np.std(similarities)


def test_gmsd_matches_a_loop_over_places():
    rng = np.random.default_rng(0)
    video = rng.random((2, 9, 12, 3))
    reference = np.clip(video + 0.3 * rng.normal(size=video.shape), 0, 1)
    expected = np.mean(
        [naive_gmsd(x, y) for x, y in zip(video, reference, strict=True)]
    )
    assert gmsd(video, reference) == pytest.approx(expected, abs=1e-12)


def test_gmsd_orders_known_distortions():
    """Lighter is unseen; more noise, more blur and damage in one place are worse."""
    _, h, w, _ = np.indices((1, 64, 64, 3))
    reference = 0.5 + 0.4 * np.sign(np.sin(0.4 * h) * np.sin(0.3 * w))[..., :3]
    reference = np.clip(reference, 0, 1).astype(np.float64)
    noise = np.random.default_rng(0).normal(size=reference.shape)

    def blurred(radius):
        shifts = range(-radius, radius + 1)
        return np.mean([np.roll(reference, n, axis=2) for n in shifts], axis=0)

    assert gmsd(reference, reference) == 0.0
    assert gmsd(reference + 0.05, reference) == pytest.approx(0.0, abs=1e-12)
    for worse, better in (
        (reference + 0.1 * noise, reference + 0.03 * noise),
        (blurred(3), blurred(1)),
    ):
        assert gmsd(worse, reference) > 1.2 * gmsd(better, reference) > 0.01
    local = reference.copy()
    local[:, :16, :16] = 0.5
    assert gmsd(local, reference) > 0.1


def test_flicker_of_hand_worked_videos():
    reference = np.random.default_rng(0).random((4, 5, 6, 3))
    assert flicker(reference + 0.1, reference) == pytest.approx(0.0, abs=1e-15)
    # The error is 0.1 and -0.1 in turns: each difference is off by 0.2.
    signs = np.array([1, -1, 1, -1])[:, None, None, None]
    assert flicker(reference + 0.1 * signs, reference) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="at least 2"):
        flicker(reference[:1], reference[:1])


@pytest.mark.parametrize("metric", [psnr, ssim, gmsd, flicker])
def test_unlike_shapes_are_named(metric):
    with pytest.raises(ValueError, match=r"shape \(1, 16, 16, 3\) and reference"):
        metric(np.zeros((1, 16, 16, 3)), np.zeros((2, 16, 16, 3)))


def test_frames_smaller_than_the_window_are_named():
    video = np.zeros((1, 16, 10, 3))
    with pytest.raises(ValueError, match="16 x 10 pixels are smaller than the 11 x 11"):
        ssim(video, video)
