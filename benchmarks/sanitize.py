"""Runs every kernel once on small shapes, for NVIDIA's compute-sanitizer.

    compute-sanitizer --tool memcheck --kernel-regex kns=sm90 \\
        python -m benchmarks.sanitize
    compute-sanitizer --tool racecheck --kernel-regex kns=sm90 \\
        python -m benchmarks.sanitize

That takes minutes; parts can be named and run side by side.
"""

import argparse
import functools
import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention import random_mask
from draft_jax import DraftConfig, QKNorm, VideoGrid, draft_attention, norm_rope_pool
from pallas_kernels import block_sparse_attention, dense_attention

HEADS, HEAD_DIM = 4, 128  # 2 heads would be norm_rope_pool's XLA path
TEXT_GRID = VideoGrid(2, 13, 32, text_length=40)  # with edge tiles


def inputs(num_tokens: int) -> tuple[jax.Array, ...]:
    size = (1, num_tokens, HEADS, HEAD_DIM)
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, size, jnp.bfloat16) for key in keys)


def check(name: str, *arrays: jax.Array) -> None:
    for array in arrays:
        assert np.isfinite(np.asarray(array, np.float32)).all(), name
    print(f"{name}: finite", flush=True)


def attention(grid: VideoGrid, order: str) -> None:
    """Block-sparse attention."""
    qkv = inputs(grid.num_tokens)
    attend = jax.jit(
        lambda q, k, v, mask: block_sparse_attention(
            q, k, v, mask, grid=grid, order=order, backend="hopper"
        )
    )
    for density in (0.4, 1.0):
        mask = random_mask(grid, 1, HEADS, density)
        check(f"{grid}, {order}, density {density}", attend(*qkv, mask))


def dense() -> None:
    """Dense attention."""
    check("dense", jax.jit(dense_attention)(*inputs(4096 + 72)))


def draft() -> None:
    """Pooling and selection, and the attention that follows."""
    grid = TEXT_GRID
    for selection in ("percentile", "row_topk", "top_p"):
        config = DraftConfig(selection=selection, sparsity=0.5)
        attend = jax.jit(
            lambda q, k, v, config=config: draft_attention(
                q, k, v, grid=grid, config=config
            )
        )
        check(f"draft attention, {selection}", attend(*inputs(grid.num_tokens)))


def prepare() -> None:
    """Norm, rotation and pooling."""
    grid = TEXT_GRID
    angles = jnp.ones((grid.num_visual_tokens, HEAD_DIM // 2))
    q, k, pooled = norm_rope_pool(
        *inputs(grid.num_tokens)[:2],
        grid=grid,
        config=DraftConfig(),
        norm=QKNorm(over="head"),
        scales=(jnp.ones(HEAD_DIM), jnp.ones(HEAD_DIM)),
        rope=(jnp.cos(angles), jnp.sin(angles)),
        order="tiled",
    )
    check("norm, rotation and pooling", q, k, *jax.tree.leaves(pooled))


PARTS = {
    "text": functools.partial(attention, TEXT_GRID, "tiled"),
    "raster": functools.partial(attention, TEXT_GRID, "raster"),
    "boxes": functools.partial(attention, VideoGrid(2, 13, 32), "raster"),
    "widths": functools.partial(attention, VideoGrid(2, 14, 20), "tiled"),
    "dense": dense,
    "draft": draft,
    "prepare": prepare,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=PARTS, help="default: all")
    for part in parser.parse_args().parts or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
