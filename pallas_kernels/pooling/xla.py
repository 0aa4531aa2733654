"""Pooling, norm and rotation as XLA operations, for any device."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from pallas_kernels.pooling.interfaces import (
    MeanSquares,
    QKNorm,
    Reduction,
    Rope,
    Scales,
    Tiling,
)


def pool_tiles(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    tiling: Tiling,
    *,
    reductions: tuple[Reduction, ...],
) -> tuple[Float[Array, "B S N D"], ...]:
    """Pools q and k, one reduction after another; see `pallas_kernels.pooling`."""
    return tuple(
        reduce_tiles(x, tiling, reduction=name) for x in (q, k) for name in reductions
    )


def reduce_tiles(
    x: Float[Array, "B T N D"], tiling: Tiling, *, reduction: Reduction = "mean"
) -> Float[Array, "B S N D"]:
    """Reduces the tokens of each tile of one array.

    Args:
      x: Tokens of the whole sequence.
      tiling: Tiles of the frames. Static.
      reduction: "mean", or "max" for the largest value of each channel.

    Returns:
      float32. Means are taken in float32; an edge tile is reduced over the tokens it
      really has.
    """
    x = x[:, tiling.tokens]
    padding = 0.0 if reduction == "mean" else -math.inf
    by_tile = _tiles_of_raster if tiling.order == "raster" else _tiles_of_tiled
    tiles, token_axes = by_tile(x, tiling, padding)
    shape = (x.shape[0], tiling.num_tiles, *x.shape[2:])
    if reduction == "max":
        return tiles.max(token_axes).astype(jnp.float32).reshape(shape)
    sums = tiles.sum(token_axes, dtype=jnp.float32).reshape(shape)
    return sums / tiling.lengths.astype(np.float32)[:, None, None]


def _tiles_of_raster(
    x: Array, tiling: Tiling, padding: float
) -> tuple[Array, tuple[int, ...]]:
    """Splits rows and columns into tiles; edges are filled with `padding`."""
    x = rearrange(x, "b (f h w) n d -> b f h w n d", f=tiling.frames, h=tiling.height)
    rows, columns = tiling.tile
    if tiling.has_edges:
        tile_rows, tile_columns = tiling.tiles_per_frame
        widths = [(0, 0)] * x.ndim
        widths[2] = (0, tile_rows * rows - tiling.height)
        widths[3] = (0, tile_columns * columns - tiling.width)
        x = jnp.pad(x, widths, constant_values=padding)
    x = rearrange(x, "b f (th r) (tw c) n d -> b f th r tw c n d", r=rows, c=columns)
    return x, (3, 5)


def _tiles_of_tiled(
    x: Array, tiling: Tiling, padding: float
) -> tuple[Array, tuple[int, ...]]:
    """Splits tokens into tiles; small tiles are filled with `padding`."""
    if tiling.has_edges:
        # A gather, not a segment sum: scatter-adds on a GPU run in any order, and a
        # last-bit difference between two calls could flip a tie in the selection.
        x = x.at[:, _token_of_slot(tiling)].get(mode="fill", fill_value=padding)
    x = rearrange(x, "b (s p) n d -> b s p n d", p=tiling.tile_size)
    return x, (2,)


@functools.lru_cache(maxsize=64)
def _token_of_slot(tiling: Tiling) -> Int[np.ndarray, " slots"]:
    """Token in each slot of S full tiles; one past the last for slots without one."""
    lengths = tiling.lengths
    starts = np.cumsum(lengths) - lengths
    slots = np.arange(tiling.tile_size)
    tokens = np.where(slots < lengths[:, None], starts[:, None] + slots, lengths.sum())
    tokens = tokens.ravel().astype(np.int32)
    tokens.flags.writeable = False
    return tokens


def join_text(
    video: tuple[Float[Array, "B V N D"], ...],
    text: tuple[Float[Array, "B X N D"], ...],
    tiling: Tiling,
) -> tuple[Float[Array, "B T N D"], ...]:
    """Joins arrays of the video with those of the text, which `tiling` says where."""
    is_first = tiling.start > 0
    return tuple(
        jnp.concatenate([x, y] if is_first else [y, x], axis=1)
        for x, y in zip(text, video, strict=True)
    )


def norm_rope(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    scales: Scales | None,
    text_scales: Scales | None,
    rope: Rope | None,
    *,
    visual_tokens: slice,
    norm: QKNorm | None,
    mean_squares: MeanSquares | None = None,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N D"]]:
    """Norms and rotates q and k; see `pallas_kernels.pooling.norm_rope_pool`."""
    run = functools.partial(
        _norm_rope, rope=rope, visual_tokens=visual_tokens, norm=norm
    )
    q_scale, k_scale = scales or (None, None)
    q_text, k_text = text_scales or (None, None)
    q_square, k_square = mean_squares or (None, None)
    return run(q, q_scale, q_text, q_square), run(k, k_scale, k_text, k_square)


def _norm_rope(
    x,
    scale,
    text_scale,
    mean_square,
    *,
    rope: Rope | None,
    visual_tokens: slice,
    norm: QKNorm | None,
):
    y = x.astype(jnp.float32)
    if norm is not None:
        if mean_square is None:
            axes = (-2, -1) if norm.over == "heads" else (-1,)
            mean_square = jnp.square(y).mean(axes, keepdims=True)
        else:
            mean_square = mean_square[:, :, None, None]
        shape = x.shape[2:] if norm.over == "heads" else (1, *x.shape[3:])
        factor = scale.astype(jnp.float32).reshape(shape)
        if text_scale is not None:
            token = np.arange(x.shape[1])[:, None, None]
            is_visual = (token >= visual_tokens.start) & (token < visual_tokens.stop)
            of_text = text_scale.astype(jnp.float32).reshape(shape)
            factor = jnp.where(is_visual, factor, of_text)
        y = y * jax.lax.rsqrt(mean_square + norm.eps) * factor
    if rope is not None:
        y = _rotate_visual(y, rope, visual_tokens)
    return y.astype(x.dtype)


def _rotate_visual(y, rope: Rope, visual: slice):
    rotated = rotate_pairs(y[:, visual], *rope)
    if rotated.shape == y.shape:
        return rotated
    return jnp.concatenate([y[:, : visual.start], rotated, y[:, visual.stop :]], axis=1)


def rotate_pairs(
    x: Float[Array, "B T N D"],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
) -> Float[Array, "B T N D"]:
    """Rotates the channel pairs (2i, 2i + 1) of each token.

    Args:
      x: Queries or keys; float32 keeps the rotation in float32.
      cos: Cosines in the token order of x.
      sin: Sines in the token order of x.

    Returns:
      The rotated x, in its dtype.
    """
    pairs = rearrange(x, "b t n (half pair) -> b t n half pair", pair=2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    merged = rearrange(rotated, "b t n half pair -> b t n (half pair)")
    return merged.astype(x.dtype)
