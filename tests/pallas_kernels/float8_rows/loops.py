"""Rows for products in FP8 by loops in float64, and what kernels' rows must be."""

import math

import ml_dtypes
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)


def gelu_loop(product, rows, columns, bias):
    """Float64, one number after another."""
    made = np.zeros(product.shape)
    for place in np.ndindex(product.shape):
        x = float(product[place]) * float(rows[place[:-1]])
        x = x * float(columns[place[-1]]) + float(bias[place[-1]])
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        made[place] = 0.5 * x * (1 + math.tanh(inner))
    return made


def norm_loop(x, factor, shift, eps):
    """Float64, one row after another; x is [B, T, K]."""
    made = np.zeros(x.shape)
    for item, token in np.ndindex(x.shape[:2]):
        row = [float(value) for value in x[item, token]]
        mean = math.fsum(row) / len(row)
        variance = math.fsum((value - mean) ** 2 for value in row) / len(row)
        for channel, value in enumerate(row):
            normed = (value - mean) / math.sqrt(variance + eps)
            normed = normed * float(factor[item, channel])
            made[item, token, channel] = normed + float(shift[item, channel])
    return made


def round_loop(x):
    """The codes of a matrix, one number after the other, and the scale of each row."""
    codes = np.zeros(x.shape, np.uint8)
    scales = np.zeros(len(x), np.float32)
    for r, row in enumerate(x.astype(np.float32)):
        largest = max(*(abs(value) for value in row), np.float32(2.0**-100))
        scales[r] = largest * np.float32(1 / 448)
        for c, value in enumerate(row):
            rounded = ml_dtypes.float8_e4m3fn(value * (np.float32(448) / largest))
            codes[r, c] = np.asarray(rounded).view(np.uint8)
    return codes, scales


def check_rows(values, scale, made):
    """Each number is the nearest of e4m3's at its row's scale, or beside a tie."""
    np.testing.assert_allclose(scale, np.abs(made).max(-1) / 448, rtol=1e-5)
    exact = made / np.asarray(scale, np.float64)[..., None]
    step = 2.0 ** np.maximum(np.floor(np.log2(np.abs(exact) + 2.0**-20)) - 3, -9)
    error = np.abs(np.asarray(values).astype(np.float64) - exact)
    assert (error <= step / 2 + 1e-4 * np.abs(exact)).all()
    nearest = exact.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    assert (nearest == np.asarray(values)).mean() > 0.999
