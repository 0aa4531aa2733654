"""Times configurations of the Hopper kernel at one shape, beside cuDNN.

    python -m benchmarks.attention.variants --output hopper_variants.json

All programs are compiled before the first is timed: a busy host delays launches.
"""

import concurrent.futures
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from benchmarks.attention.contenders import cudnn_dense
from benchmarks.common.inputs import random_inputs, random_mask
from benchmarks.common.options import add_output, make_parser
from benchmarks.common.records import ResultFile
from benchmarks.common.shapes import SHAPES, Shape
from benchmarks.common.timing import measure
from draft_jax import BlockMask
from pallas_kernels.attention.sm90 import backend as hopper
from pallas_kernels.attention.sm90.plan import KernelConfig
from pallas_kernels.common.interfaces import Order

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "exact-softmax": {"exact_softmax": True},
    "five-slots": {"num_slots": 5},
    "four-slots": {"num_slots": 4},
    "sums-last": {"sums_last": True},
    "sums-between": {"sums_last": False},
}


def compiled(
    shape: Shape,
    qkv,
    mask: BlockMask,
    options: dict[str, Any],
    order: Order = "tiled",
):
    """The kernel for these arrays' shapes, with any mask of the same capacity."""
    default = KernelConfig.for_head_dim(shape.head_dim)
    config = dataclasses.replace(default, **options)

    @jax.jit
    def run(q, k, v, mask):
        return hopper.hopper_attention(
            q,
            k,
            v,
            mask,
            grid=shape.grid,
            scale=shape.head_dim**-0.5,
            text_lengths=None,
            order=order,
            config=config,
        )

    return run.lower(*qkv, mask).compile()


def _with_wait(call):
    """Adds to a call how to wait for it, as `measure` wants it."""
    return call, jax.block_until_ready


def main() -> None:
    """Times the variants, and cuDNN before and after them."""
    parser = make_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="hunyuan")
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.1])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    add_output(parser)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    qkv = random_inputs(shape)
    masks = [random_mask(shape.grid, 1, shape.num_heads, d) for d in options.densities]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        compile_one = functools.partial(compiled, shape, qkv, masks[0])
        configs = [VARIANTS[name] for name in options.variants]
        compiled_ones = pool.map(compile_one, configs)
        programs = dict(zip(options.variants, compiled_ones, strict=True))
    stored = ResultFile(options.output)

    def report(name, density, result):
        stored.add({"variant": name, "density": density, **result})

    def time_cudnn():
        make = functools.partial(cudnn_dense, shape, qkv)
        report("cudnn", 1.0, measure(make, shape.dense_flops, options.seconds))

    time_cudnn()
    for name, program in programs.items():
        for mask in masks:
            density = float(np.mean(np.asarray(mask.density)))
            call = functools.partial(program, *qkv, mask)
            timed = functools.partial(_with_wait, call)
            flops = shape.dense_flops * density
            result = measure(timed, flops, options.seconds)
            report(name, density, result)
    time_cudnn()


if __name__ == "__main__":
    main()
