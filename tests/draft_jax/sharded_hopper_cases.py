"""Programs for two Hopper GPUs, lowered on two devices of a CPU, in their own process.

    python -m tests.draft_jax.sharded_hopper_cases manual|explicit|"few heads"

Prints a JSON object: what each call raised or its program lacks; or, where each device
has fewer heads than its kernel takes, errors and warnings.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from draft_jax import (
    DraftConfig,
    Product,
    QKNorm,
    VideoGrid,
    draft_attention,
    draft_scores,
    norm_rope_pool,
)
from draft_jax.draft.pooling import tiling_of
from pallas_kernels import SubTiles, dense_attention, pooling
from pallas_kernels.common import device as device_module
from pallas_kernels.common.device import Device
from tests.warnings_once import forget_warnings

H100 = Device(platform="gpu", kind="NVIDIA H100", compute_capability=(9, 0))
GRID = VideoGrid(9, 16, 32)  # 4,608 tokens: dense attention takes its kernel, too
SHAPE = (2, GRID.num_tokens, 8, 128)
BY_HEADS = P("x", None, "y", None)
# Exact rows are cuDNN's, which can only be traced where it is installed: no correction.
CONFIGS = {
    "percentile": DraftConfig.paper(sparsity=0.5),
    "means": DraftConfig.compensated(sparsity=0.5, correction=None),
    "top_p": DraftConfig.paper(sparsity=0.5, selection="top_p", pooling="mean+max"),
}


def attend(name):
    def run(q, k, v):
        return draft_attention(q, k, v, grid=GRID, config=CONFIGS[name])

    return run


def scores(q, k, v):
    return draft_scores(q, k, grid=GRID, config=CONFIGS["means"])


def prepare(q, k, v):
    scale = jnp.ones(SHAPE[-1])
    angles = jnp.ones((GRID.num_visual_tokens, SHAPE[-1] // 2))
    return norm_rope_pool(
        q,
        k,
        grid=GRID,
        config=CONFIGS["percentile"],
        norm=QKNorm(over="head"),
        scales=(scale, scale),
        rope=(angles, angles),
    )[:2]


def prepare_products(q, k, v):
    """Their scales are made of sharded arrays, and lie as their own axes do."""
    rows, channels = q.mean((2, 3)), q.mean((0, 1))
    return prepare(Product(q, rows, channels, channels), Product(k, bias=channels), v)


# Their gradients need nothing of the forward pass.
ONLY_FORWARD = ("norm_rope_pool", "norm_rope_pool of products")
CALLS = {  # and kernels that must be in the program
    **{name: (attend(name), "block_sparse_attention_sm90") for name in CONFIGS},
    "dense": (dense_attention, "block_sparse_attention_sm90"),
    "scores": (scores, "tile_scores_sm90"),
    "norm_rope_pool": (prepare, "norm_rope_pool_sm90"),
    "norm_rope_pool of products": (prepare_products, "norm_rope_pool_sm90"),
}


def gradient(call):
    def loss(q, k, v):
        results = jax.tree.leaves(call(q, k, v))
        return sum((y.astype(jnp.float32) ** 2).sum() for y in results)

    return jax.grad(loss, (0, 1, 2))


KINDS = ("manual", "explicit")
# cuDNN's attention, which runs backward, can only be traced where it is installed.
LEFT_OUT = ("dense, gradient",)


def lower(name: str, *, backward: bool, kind: str) -> str | None:
    """Lowers a call; says what its program lacks."""
    call, kernel = CALLS[name]
    call = gradient(call) if backward else call
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((1, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    plain = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)
    if kind == "manual":
        results = jax.eval_shape(call, plain, plain, plain)
        out_specs = jax.tree.map(
            lambda x: BY_HEADS if x.shape == SHAPE else P("x", "y"), results
        )
        call = jax.shard_map(
            call, mesh=mesh, in_specs=(BY_HEADS,) * 3, out_specs=out_specs
        )
    sharding = NamedSharding(mesh, BY_HEADS)
    q = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16, sharding=sharding)
    text = jax.jit(call).trace(q, q, q).lower(lowering_platforms=("cuda",)).as_text()
    if not (backward and name in ONLY_FORWARD) and kernel not in text:
        return f"no {kernel}"
    heads = f"x{SHAPE[2] // 2}x{SHAPE[3]}x"
    return None if heads in text else f"no array of {heads}: a device's own heads"


def on_hopper() -> Any:
    return mock.patch.object(device_module, "describe_device", return_value=H100)


def lower_all(kind: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in CALLS:
        for backward in (False, True):
            case = f"{name}, gradient" if backward else name
            if case in LEFT_OUT:
                continue
            try:
                with on_hopper():
                    found[case] = lower(name, backward=backward, kind=kind)
            except Exception as cause:
                found[case] = f"{type(cause).__name__}: {cause}"[:3000]
    return found


SMALL = VideoGrid(2, 4, 4, tile=(2, 2))
CELLS = SubTiles(
    frames=2, height=4, width=4, tile=(2, 2), sub_tile=(1, 2), group_frames=2
)
WHOLE_VIDEO = pooling.VideoPooling(means=CELLS, draft=None, spread=True, order="raster")
# Heads of two devices that the kernel takes, and not those of one; what is told then.
POOLINGS: dict[str, tuple[tuple[int, int], str, Callable[..., Any]]] = {
    "pool_tiles": (
        (2, 64),
        "not 1 * 64",
        lambda q, k: pooling.pool_tiles(q, k, tiling_of(SMALL, "raster")),
    ),
    "pool_sub_tiles": (
        (2, 64),
        "not 1 * 64",
        lambda q, k: pooling.pool_sub_tiles(q, k, CELLS, order="raster"),
    ),
    "pool_video": (
        (2, 64),
        "not 1 * 64",
        lambda q, k: pooling.pool_video(q, k, k, WHOLE_VIDEO),
    ),
    "norm_rope_pool": (
        (2, 32),
        "1 heads of 32 channels",
        lambda q, k: pooling.norm_rope_pool(q, k, tiling_of(SMALL, "raster")),
    ),
}


def with_few_heads() -> dict[str, dict[str, Any]]:
    """Runs what a kernel takes of all heads, and not of those of one device."""
    found = {}
    for name, (heads, told, call) in POOLINGS.items():
        shape = (2, 2, SMALL.num_tokens, *heads)
        arrays = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        want = jax.tree.leaves(jax.jit(call)(*arrays))
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((2,), ("y",), axis_types=(kind,))
            sharding = NamedSharding(mesh, P(None, None, "y", None))
            own = jax.device_put(tuple(arrays), sharding)
            with on_hopper(), warnings.catch_warnings(record=True) as issued:
                warnings.simplefilter("always")
                forget_warnings()
                # Traced anew: XLA's program for the CPU is that of this function, too.
                got = jax.tree.leaves(jax.jit(lambda *x: call(*x))(*own))  # noqa: B023
            pairs = zip(got, want, strict=True)
            found[f"{name}, {kind.name}"] = {
                "error": max(float(np.abs(np.asarray(x) - y).max()) for x, y in pairs),
                "is told": any(told in str(warning.message) for warning in issued),
            }
    return found


def main() -> None:
    (kind,) = sys.argv[1:]
    found = with_few_heads() if kind == "few heads" else lower_all(kind)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
