"""RMS norm, rotary embedding and pooling of Q or K in NumPy loops, float64."""

import numpy as np


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
    batch, num_tokens, num_heads, head_dim = out.shape
    for b in range(batch):
        for t in range(num_tokens):
            if over == "heads":
                mean = (out[b, t] ** 2).sum() / (num_heads * head_dim)
                factor = np.asarray(scale, np.float64).reshape(num_heads, head_dim)
                out[b, t] = out[b, t] / np.sqrt(mean + eps) * factor
            for n in range(num_heads):
                if over == "head":
                    mean = (out[b, t, n] ** 2).sum() / head_dim
                    out[b, t, n] *= np.asarray(scale, np.float64) / np.sqrt(mean + eps)
            row = t - visual.start
            if cos is None or not 0 <= row < visual.stop - visual.start:
                continue
            for i in range(head_dim // 2):
                c, s = float(cos[row, i]), float(sin[row, i])
                even, odd = out[b, t, :, 2 * i].copy(), out[b, t, :, 2 * i + 1].copy()
                out[b, t, :, 2 * i] = even * c - odd * s
                out[b, t, :, 2 * i + 1] = even * s + odd * c
    return out
