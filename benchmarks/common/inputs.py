"""Arrays and masks that benchmarks run on, all from a seed."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common.shapes import Shape
from draft_jax import BlockMask, DraftConfig, VideoGrid, compute_mask

MaskKind = Literal["random", "draft"]


def random_inputs(shape: Shape, seed: int = 0) -> tuple[jax.Array, ...]:
    """Makes q, k and v from a standard normal distribution."""
    keys = jax.random.split(jax.random.key(seed), 3)
    make = jax.jit(lambda key: jax.random.normal(key, shape.qkv_shape, shape.dtype))
    return tuple(make(key) for key in keys)


def random_mask(
    grid: VideoGrid, batch: int, num_heads: int, density: float, seed: int = 0
) -> BlockMask:
    """Keeps each block pair with this probability, and one of each row at least.

    Built in NumPy, with room for every pair, so that all densities share one shape.
    """
    rng = np.random.default_rng(seed)
    size = grid.num_blocks
    offsets = np.zeros((batch, num_heads, size + 1), np.int32)
    ids = np.zeros((batch, num_heads, size * size), np.int32)
    for index in np.ndindex(batch, num_heads):
        kept = rng.random((size, size), np.float32) < density
        kept[np.arange(size), rng.integers(0, size, size)] = True
        np.cumsum(kept.sum(1), out=offsets[index][1:])
        columns = np.nonzero(kept)[1]
        ids[index][: columns.size] = columns
    return BlockMask(
        row_offsets=jnp.asarray(offsets), block_ids=jnp.asarray(ids), grid=grid
    )


def smooth_inputs(shape: Shape, seed: int = 0) -> tuple[jax.Array, ...]:
    """Makes q, k and v whose attention prefers tokens near in space and time.

    Sums of a few slow plane waves over the grid, another set for each head, plus
    noise: drafts of them keep whole neighbourhoods, as those of a video model do.
    """
    grid = shape.grid
    axes = [np.arange(n) / n for n in (grid.frames, grid.height, grid.width)]
    place = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    place = np.pad(place, ((0, grid.text_length), (0, 0)))[grid.tile_order]
    rng = np.random.default_rng(seed)
    waves = rng.normal(size=(3, shape.num_heads * shape.head_dim)) * 12
    phase = rng.uniform(0, 2 * np.pi, shape.num_heads * shape.head_dim)
    size = shape.qkv_shape
    signal = jnp.cos(jnp.asarray(place, jnp.float32) @ waves + phase).reshape(size)

    @jax.jit  # the signal is an argument, or it would be a constant of a gigabyte
    def make(key, signal, amplitude):
        noise = jax.random.normal(key, size, jnp.float32)
        return (noise + amplitude * signal).astype(shape.dtype)

    keys = jax.random.split(jax.random.key(seed), 3)
    amplitudes = (1.0, 1.0, 0.0)
    return tuple(make(k, signal, a) for k, a in zip(keys, amplitudes, strict=True))


def draft_mask(shape: Shape, q: jax.Array, k: jax.Array, density: float) -> BlockMask:
    """Selects this share of visual block pairs from the draft of q and k."""
    config = DraftConfig.paper(sparsity=min(1 - density, 1 - 1e-6))
    select = functools.partial(
        compute_mask, grid=shape.grid, config=config, order="tiled"
    )
    return jax.jit(select)(q, k)
