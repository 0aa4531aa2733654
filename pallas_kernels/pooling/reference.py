"""Pooling, norm and rotation in float32, tile by tile: the reference for tests.

It reads like the definitions and shares no helper with the kernels or the XLA path.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.pooling.interfaces import QKNorm, Reduction, Rope


def pool_tiles(
    x: Float[Array, "B T N D"],
    tiles: Int[np.ndarray, "S 4"],
    *,
    reduction: Reduction = "mean",
) -> Float[Array, "B S N D"]:
    """Reduces the tokens of each tile of one array.

    Args:
      x: Tokens of the whole sequence.
      tiles: First token, tokens between two rows, rows and columns of each tile.
      reduction: "mean" or "max".

    Returns:
      float32 results of all tiles.
    """
    pooled = []
    for first, stride, rows, columns in tiles:
        tokens = [
            first + row * stride + column
            for row in range(rows)
            for column in range(columns)
        ]
        own = x[:, np.array(tokens)].astype(jnp.float32)
        pooled.append(own.mean(1) if reduction == "mean" else own.max(1))
    return jnp.stack(pooled, axis=1)


def norm_rope(
    x: Float[Array, "B T N D"],
    *,
    norm: QKNorm | None,
    scale: Float[Array, " C"] | None,
    rope: Rope | None,
    visual_tokens: slice,
) -> Float[Array, "B T N D"]:
    """Norms and rotates queries or keys.

    A channel pair (2i, 2i + 1) is a complex number, which the rotation multiplies.

    Args:
      x: Queries or keys as projected.
      norm: RMS norm to apply, or None.
      scale: Factors of the channels after the norm.
      rope: Cosine and sine of each channel pair of the visual tokens, or None.
      visual_tokens: The tokens that are rotated.

    Returns:
      float32, not rounded to the dtype of x.
    """
    batch, num_tokens, num_heads, head_dim = x.shape
    y = x.astype(jnp.float32)
    if norm is not None:
        assert scale is not None, "a norm has a scale"
        if norm.over == "heads":
            y = y.reshape(batch, num_tokens, num_heads * head_dim)
        root = jnp.sqrt((y**2).mean(-1, keepdims=True) + norm.eps)
        y = (y / root * scale).reshape(x.shape)
    if rope is not None:
        cos, sin = rope
        numbers = jax.lax.complex(
            y[:, visual_tokens, :, ::2], y[:, visual_tokens, :, 1::2]
        )
        turned = numbers * jax.lax.complex(cos, sin)[:, None, :]
        y = y.at[:, visual_tokens, :, ::2].set(turned.real)
        y = y.at[:, visual_tokens, :, 1::2].set(turned.imag)
    return y
