"""Compiles Hopper kernels to machine code on a machine without a GPU.

    PYTHONPATH=cuda PATH=cuda/nvidia/cu13/bin:$PATH \
        python -m benchmarks.attention.compile_hopper

`benchmarks.common.hopper_target` says what belongs in the folder `cuda`.

Prints what ptxas reports of each program: registers, spills, and warnings such as
wgmma instructions that had to be serialised. PTX is left in --output; with nvdisasm on
the path, `ptxas -arch=sm_90a X.ptx -o X.cubin && nvdisasm -c X.cubin` shows the rest.
"""

import argparse
import os
import pathlib
import tempfile

from benchmarks.common.hopper_target import h100_sharding, leave_gpus_alone
from models.files import output_folder


def compile_variant(shape, options, sharding, order, means=None) -> None:
    """Compiles one configuration for one shape; Mosaic writes the dumps."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from draft_jax import BlockMask
    from pallas_kernels.attention.sm90 import backend as hopper
    from pallas_kernels.attention.sm90.plan import KernelConfig

    grid, num_heads, head_dim = shape.grid, shape.num_heads, shape.head_dim
    default = KernelConfig.for_head_dim(head_dim)
    config = dataclasses.replace(default, **options)

    def placed(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    size = (1, grid.num_tokens, num_heads, head_dim)
    q = placed(jax.ShapeDtypeStruct(size, jnp.dtype(shape.dtype)))
    full = jax.eval_shape(
        lambda: BlockMask.full(grid=grid, batch=1, num_heads=num_heads)
    )
    mask = jax.tree.map(placed, full)
    given = None
    if means is not None:
        *sub_tile, frames = means
        given = jax.tree.map(placed, means_like(q, grid, tuple(sub_tile), frames))

    @jax.jit
    def run(q, k, v, mask, means):
        return hopper.hopper_attention(
            q,
            k,
            v,
            mask,
            grid=grid,
            scale=head_dim**-0.5,
            text_lengths=None,
            order=order,
            means=means,
            config=config,
        )

    run.trace(q, q, q, mask, given).lower(lowering_platforms=("cuda",)).compile()


def means_like(q, grid, sub_tile, frames):
    """Returns means of a sequence's keys and values, without values."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import Means, SubTiles

    cells = SubTiles(
        frames=grid.frames,
        height=grid.height,
        width=grid.width,
        tile=grid.tile,
        sub_tile=sub_tile,
        group_frames=frames,
    )
    batch, _, num_heads, head_dim = q.shape
    mean = (batch, cells.num_cells, num_heads, head_dim)
    columns = (batch, num_heads, grid.num_blocks, cells.num_columns)

    def zeros():
        k, v = jnp.zeros(mean, q.dtype), jnp.zeros(mean, q.dtype)
        return Means(k, v, jnp.zeros(columns, jnp.uint8), cells)

    return jax.eval_shape(zeros)


def compile_prepare(shape, over, sharding, *, is_joint: bool) -> None:
    """Compiles the kernel that norms, rotates and pools, for one norm."""
    import functools

    import jax
    import jax.numpy as jnp

    from draft_jax.draft.pooling import tiling_of
    from pallas_kernels.pooling import QKNorm
    from pallas_kernels.pooling.sm90.norm_rope_pool import norm_rope_pool

    struct = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    grid, heads = shape.grid, (shape.num_heads, shape.head_dim)
    dtype = jnp.dtype(shape.dtype)
    count, tokens, text = 2, grid.num_tokens, None
    if is_joint:
        count, tokens = 3, grid.num_visual_tokens
        text = (struct((1, grid.text_length, *heads), dtype),) * 3
    video = (struct((1, tokens, *heads), dtype),) * count
    width = heads[1] if over == "head" else heads[0] * heads[1]
    scale = struct((width,), jnp.float32)
    angles = struct((grid.num_visual_tokens, heads[1] // 2), jnp.float32)
    run = functools.partial(
        norm_rope_pool,
        tiles=tiling_of(grid, "tiled").table,
        visual_tokens=grid.visual_tokens,
        norm=QKNorm(over=over),
    )
    scales = (scale, scale)
    of_text = scales if is_joint else None
    traced = jax.jit(run).trace(video, text, scales, of_text, (angles, angles))
    traced.lower(lowering_platforms=("cuda",)).compile()


def main() -> None:
    """Compiles what is asked for and prints the reports of ptxas."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["hunyuan", "hunyuan-edges"])
    parser.add_argument("--variants", nargs="+", default=["default"])
    parser.add_argument("--order", choices=("tiled", "raster"), default="tiled")
    parser.add_argument(
        "--means",
        nargs=3,
        type=int,
        metavar=("ROWS", "COLUMNS", "FRAMES"),
        help="with means over such sub-tiles and so many frames behind the lists",
    )
    parser.add_argument(
        "--norms",
        nargs="*",
        choices=["head", "heads"],
        help="compile the kernel for norm, rotation and pooling with these instead",
    )
    parser.add_argument(
        "--joint",
        action="store_true",
        help="the same with arrays and scales of the text apart (shapes with text)",
    )
    parser.add_argument("--output", type=output_folder, help="folder for PTX")
    arguments = parser.parse_args()
    leave_gpus_alone()
    folder = arguments.output or pathlib.Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(  # read when Mosaic compiles
        MOSAIC_GPU_DUMP_PTX="1",
        MOSAIC_GPU_DUMP_PTXAS="1",
        MOSAIC_GPU_DUMP_TO=str(folder),
    )

    from benchmarks.attention.variants import VARIANTS
    from benchmarks.common.shapes import SHAPES

    sharding = h100_sharding()
    seen: set[pathlib.Path] = set()
    for name in arguments.shapes:
        for variant in arguments.norms or arguments.variants:
            if arguments.norms:
                joint = arguments.joint
                compile_prepare(SHAPES[name], variant, sharding, is_joint=joint)
            else:
                options = VARIANTS[variant]
                compile_variant(
                    SHAPES[name], options, sharding, arguments.order, arguments.means
                )
            for report in sorted({*folder.glob("*.ptxas")} - seen):
                seen.add(report)
                print(f"== {name}, {variant}: {report}")
                print(report.read_text().strip(), flush=True)


if __name__ == "__main__":
    main()
