"""Finishing, RMS norm, rotary embedding of Q or K in NumPy loops, float64."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.common.products import Product


def norm_rope(
    x: np.ndarray,
    *,
    over: str | None,
    eps: float,
    scale: np.ndarray | None,
    cos: np.ndarray | None,
    sin: np.ndarray | None,
    visual: slice,
) -> np.ndarray:
    """One token and one pair of channels at a time; [B, T, N, D], not rounded."""
    out = np.array(x, np.float64)
    # An array of jax would be read one entry at a time, each by a program.
    scale, cos, sin = (
        None if y is None else np.asarray(y, np.float64) for y in (scale, cos, sin)
    )
    batch, num_tokens, num_heads, head_dim = out.shape
    for b in range(batch):
        for t in range(num_tokens):
            if over == "heads":
                mean = (out[b, t] ** 2).sum() / (num_heads * head_dim)
                factor = scale.reshape(num_heads, head_dim)
                out[b, t] = out[b, t] / np.sqrt(mean + eps) * factor
            for n in range(num_heads):
                if over == "head":
                    mean = (out[b, t, n] ** 2).sum() / head_dim
                    out[b, t, n] *= scale / np.sqrt(mean + eps)
            row = t - visual.start
            if cos is None or not 0 <= row < visual.stop - visual.start:
                continue
            for i in range(head_dim // 2):
                c, s = cos[row, i], sin[row, i]
                even, odd = out[b, t, :, 2 * i].copy(), out[b, t, :, 2 * i + 1].copy()
                out[b, t, :, 2 * i] = even * c - odd * s
                out[b, t, :, 2 * i + 1] = even * s + odd * c
    return out


def random_product(shape, dtype, parts, seed=0) -> Product:
    """A product of [B, T, N, D] with some of its rows, columns and bias.

    Scales are powers of two: results do not depend on whether sums are fused.
    """
    rng = np.random.default_rng(seed)
    values = jnp.asarray(3 * rng.normal(size=shape), dtype)
    rows, columns = (
        2.0 ** rng.integers(-1, 2, size) for size in (shape[:2], shape[2:])
    )
    bias = rng.integers(-64, 64, shape[2:]) / 32
    made = (
        jnp.asarray(x, jnp.float32) if has_part else None
        for x, has_part in zip((rows, columns, bias), parts, strict=True)
    )
    return Product(values, *made)


def finish(product: Product) -> np.ndarray:
    """A product of [B, T, N, D] with scales and bias, one token at a time."""
    values, *parts = product
    values = np.asarray(values)
    rows, columns, bias = (
        None if x is None else np.asarray(x, np.float64) for x in parts
    )
    out = np.zeros_like(values)
    for b, t in np.ndindex(values.shape[:2]):
        token = values[b, t].astype(np.float64)
        if rows is not None:
            token *= rows[b, t]
        if columns is not None:
            token *= columns
        if bias is not None:
            token += bias
        out[b, t] = token.astype(values.dtype)
    return out
