"""Tilings and random inputs of the tests of the pooling operations."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.pooling import QKNorm, Tiling

HEADS = (4, 64)
NORMS = {
    "heads": QKNorm(over="heads"),
    "head": QKNorm(over="head", eps=1e-5),
    "none": None,
}
TILINGS = {
    "raster": Tiling(frames=2, height=5, width=6, tile=(2, 4), order="raster"),
    "tiled": Tiling(frames=2, height=5, width=6, tile=(2, 4), order="tiled", start=3),
    "whole": Tiling(frames=1, height=4, width=8, tile=(2, 4), order="tiled"),
    "small": Tiling(frames=1, height=1, width=3, tile=(2, 4), order="raster", start=1),
}


def random_case(tiling, norm, dtype="float32", seed=0):
    """q, k, scales and rope for the frames and 3 tokens after them."""
    rng = np.random.default_rng(seed)
    shape = (2, tiling.tokens.stop + 3, *HEADS)
    q, k = (jnp.asarray(2 * rng.normal(size=shape), dtype) for _ in range(2))
    num_tokens = tiling.tokens.stop - tiling.tokens.start
    return q, k, *scales_and_rope(rng, num_tokens, HEADS, norm)


def scales_and_rope(rng, num_tokens, heads, norm):
    """Scales of a norm, None without one, and a rotary table."""
    num_heads, head_dim = heads
    scales = None
    if norm is not None:
        width = head_dim if norm.over == "head" else num_heads * head_dim
        scales = tuple(
            jnp.asarray(rng.uniform(0.5, 2, width), jnp.float32) for _ in range(2)
        )
    angles = rng.uniform(0, 7, (num_tokens, head_dim // 2))
    rope = tuple(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    return scales, rope


def naive_table(tiling):
    """First token, tokens between rows, rows and columns of each tile, by loops."""
    table, token = [], tiling.start
    for frame in range(tiling.frames):
        for top in range(0, tiling.height, tiling.tile[0]):
            for left in range(0, tiling.width, tiling.tile[1]):
                rows = min(tiling.tile[0], tiling.height - top)
                columns = min(tiling.tile[1], tiling.width - left)
                if tiling.order == "tiled":
                    table.append((token, columns, rows, columns))
                else:
                    row = frame * tiling.height + top
                    first = tiling.start + row * tiling.width + left
                    table.append((first, tiling.width, rows, columns))
                token += rows * columns
    return np.array(table)


def naive_pool(x, tiling, reduction):
    """The reductions of all tiles, by loops, float64."""
    reduce = {"mean": np.mean, "max": np.max}[reduction]
    x = np.asarray(x, np.float64)
    tiles = []
    for first, stride, rows, columns in naive_table(tiling):
        members = [
            first + row * stride + i for row in range(rows) for i in range(columns)
        ]
        tiles.append(reduce(x[:, members], axis=1))
    return np.stack(tiles, axis=1)
