"""Stages of `benchmarks.layer.run` that make Q and K: norm, rotation, pooling.

Each takes Q and K as projected. `xla` is XLA's norm and rotation and then the pooling
of the library, `fused` the one kernel for all. Their bytes are one read and one write
of Q and K; what XLA's path moves beyond that is its own.

`joint` stages take Q, K and V of the video and of a text. `fused` is the one kernel,
`concatenated` the same kernel after XLA has joined the arrays.
"""

import dataclasses
import functools
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.common.shapes import Shape
from draft_jax import QKV, DraftConfig, QKNorm, joint_norm_rope_pool, norm_rope_pool
from draft_jax.draft.pooling import tiling_of
from pallas_kernels.pooling.sm90 import norm_rope_pool as fused_kernel

NORMS = {"head": QKNorm(over="head"), "heads": QKNorm(over="heads")}
AHEADS = (1, 2, 3, 4)  # tokens that the kernel loads before their use
TEXT_LENGTH = 256  # HunyuanVideo's
Entry = tuple[Callable, tuple[str, ...], float]  # function, inputs, bytes


def entries(shape: Shape, has_kernel: bool) -> dict[str, Entry]:
    """Function, names of inputs and bytes of each stage."""
    size = shape.grid.num_tokens * shape.num_heads * shape.head_dim
    nbytes = 4 * size * jnp.dtype(shape.dtype).itemsize
    table: dict[str, Entry] = {}
    for name, norm in NORMS.items():
        inputs = ("q", "k", f"scale_{name}", "cos", "sin")
        run = functools.partial(_prepare, grid=shape.grid, norm=norm)
        table[f"prepare/xla/{name}"] = (_without_kernel(run), inputs, nbytes)
        if not has_kernel:
            continue
        for order in ("tiled", "raster"):
            fused = functools.partial(run, order=order)
            table[f"prepare/fused/{name}-{order}"] = (fused, inputs, nbytes)
        both = functools.partial(run, config=DraftConfig.paper(pooling="mean+max"))
        table[f"prepare/fused/{name}-mean+max"] = (both, inputs, nbytes)
        for ahead in AHEADS:
            kernel = functools.partial(_kernel, grid=shape.grid, norm=norm, ahead=ahead)
            table[f"prepare/kernel/{name}-ahead-{ahead}"] = (kernel, inputs, nbytes)
    return table | _joint_entries(shape, has_kernel)


def _joint_entries(shape: Shape, has_kernel: bool) -> dict[str, Entry]:
    """Stages with a text after the video; none for shapes that have one."""
    if shape.grid.text_length:
        return {}
    grid = dataclasses.replace(shape.grid, text_length=TEXT_LENGTH)
    inputs = ("q", "k", "v", "text", "scale_head", "text_scale_head", "cos", "sin")
    size = grid.num_tokens * shape.num_heads * shape.head_dim
    nbytes = 6 * size * jnp.dtype(shape.dtype).itemsize
    joint = functools.partial(_joint, grid=grid, norm=NORMS["head"])
    table: dict[str, Entry] = {
        "prepare/joint/xla": (_without_kernel(joint), inputs, nbytes)
    }
    if has_kernel:
        joined = functools.partial(_concatenated, grid=grid, norm=NORMS["head"])
        table["prepare/joint/fused"] = (joint, inputs, nbytes)
        table["prepare/joint/concatenated"] = (joined, inputs, nbytes)
    return table


def make_inputs(shape: Shape) -> dict[str, jax.Array]:
    """Scales, a rotary table and a text."""
    keys = jax.random.split(jax.random.key(7), 5)
    width = shape.head_dim
    angles = jax.random.uniform(
        keys[0], (shape.grid.num_visual_tokens, width // 2), maxval=6.0
    )
    text_shape = (1, TEXT_LENGTH, shape.num_heads, width)
    return {
        "text": jax.random.normal(keys[3], text_shape, jnp.dtype(shape.dtype)),
        "text_scale_head": jax.random.uniform(keys[4], (width,)),
        "scale_head": jax.random.uniform(keys[1], (width,)),
        "scale_heads": jax.random.uniform(keys[2], (shape.num_heads * width,)),
        "cos": jnp.cos(angles),
        "sin": jnp.sin(angles),
    }


def _prepare(q, k, scale, cos, sin, *, grid, norm, config=None, order="tiled"):
    return norm_rope_pool(
        q,
        k,
        grid=grid,
        config=config or DraftConfig.paper(),
        norm=norm,
        scales=(scale, scale),
        rope=(cos, sin),
        order=order,
    )


def _joint(q, k, v, text, scale, text_scale, cos, sin, *, grid, norm):
    return joint_norm_rope_pool(
        QKV(q, k, v),
        QKV(text, text, text),
        grid=grid,
        config=DraftConfig.paper(),
        norm=norm,
        scales=(scale, scale),
        text_scales=(text_scale, text_scale),
        rope=(cos, sin),
        order="tiled",
    )


def _concatenated(q, k, v, text, scale, text_scale, cos, sin, *, grid, norm):
    q, k, v = (jnp.concatenate([x, text], axis=1) for x in (q, k, v))
    prepared = norm_rope_pool(
        q,
        k,
        grid=grid,
        config=DraftConfig.paper(),
        norm=norm,
        scales=(scale, scale),
        text_scales=(text_scale, text_scale),
        rope=(cos, sin),
        order="tiled",
    )
    return *prepared, v


def _kernel(q, k, scale, cos, sin, *, grid, norm, ahead):
    return fused_kernel.norm_rope_pool(
        (q, k),
        None,
        (scale, scale),
        None,
        (cos, sin),
        tiling_of(grid, "tiled").table,
        grid.visual_tokens,
        norm=norm,
        ahead=ahead,
    )


def _without_kernel(function):
    def run(*arguments):
        unwanted = mock.patch.object(
            fused_kernel, "why_unsupported", return_value="unwanted"
        )
        with unwanted:
            return function(*arguments)

    return run
