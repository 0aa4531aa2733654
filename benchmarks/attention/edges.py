"""The cost of edge blocks: grids that tiles divide, and do not, take turns.

    python -m benchmarks.attention.edges --output benchmarks/results/edges_h100.json

Every program runs for a second at a time, after half a second that does not count, and
the next takes over: six rounds of it (`benchmarks.common.timing.take_turns` says why).
Losses are those of each round, per useful FLOP.
"""

import concurrent.futures
import dataclasses
import functools
import statistics
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from benchmarks.attention.variants import VARIANTS, compiled
from benchmarks.common.inputs import (
    draft_mask,
    random_inputs,
    random_mask,
    smooth_inputs,
)
from benchmarks.common.options import add_output, add_turns, make_parser
from benchmarks.common.records import ResultFile
from benchmarks.common.shapes import DENSITIES, SHAPES, Shape
from benchmarks.common.timing import take_turns
from draft_jax import BlockMask

# Name, shape and variant of each program; losses are over the first.
PROGRAMS = (
    ("divisible", "hunyuan", "default"),
    ("edges", "hunyuan-edges", "default"),
    ("edges, all rows", "hunyuan-edges", "all-rows"),
)


def main() -> None:
    """Times all programs at all densities."""
    parser = make_parser(__doc__)
    parser.add_argument("--densities", nargs="+", type=float, default=[*DENSITIES])
    parser.add_argument("--masks", nargs="+", default=["random", "draft"])
    add_turns(parser, rounds=6, settle=0.5, block=1.0)
    add_output(parser)
    options = parser.parse_args()
    shapes = {name: SHAPES[name] for _, name, _ in PROGRAMS}
    stored = ResultFile(options.output)
    programs = None
    for kind in options.masks:
        make = random_inputs if kind == "random" else smooth_inputs
        qkv = {name: make(shape) for name, shape in shapes.items()}
        for density in options.densities:
            if kind == "draft" and density == 1.0:
                continue  # the same as a random mask of density 1
            masks = {
                name: make_mask(kind, shape, qkv[name], density)
                for name, shape in shapes.items()
            }
            if programs is None:
                programs = compile_all(shapes, qkv, masks)
            calls = {
                label: functools.partial(programs[label], *qkv[name], masks[name])
                for label, name, _ in PROGRAMS
            }
            turns = take_turns(calls, options.rounds, options.settle, options.block)
            for result in summaries(kind, density, shapes, masks, turns):
                stored.add(result)


def make_mask(kind: str, shape: Shape, qkv, density: float) -> BlockMask:
    """A mask with room for every pair: so one program takes all of them."""
    if kind == "random":
        return random_mask(shape.grid, 1, shape.num_heads, density)
    q, k, _ = qkv
    mask = draft_mask(shape, q, k, density)
    missing = shape.grid.num_blocks**2 - mask.capacity
    block_ids = jnp.pad(mask.block_ids, ((0, 0), (0, 0), (0, missing)))
    return dataclasses.replace(mask, block_ids=block_ids)


def compile_all(shapes, qkv, masks) -> dict[str, Callable[..., object]]:
    """The programs by label."""

    def one(program):
        _, name, variant = program
        return compiled(shapes[name], qkv[name], masks[name], VARIANTS[variant])

    with concurrent.futures.ThreadPoolExecutor(len(PROGRAMS)) as pool:
        labels = (label for label, _, _ in PROGRAMS)
        return dict(zip(labels, pool.map(one, PROGRAMS), strict=True))


def summaries(kind, density, shapes, masks, turns) -> list[dict[str, object]]:
    """A record for each program; rates count the pairs of real tokens."""
    records = []
    first: list[float] = []
    for label, name, variant in PROGRAMS:
        shape, turn = shapes[name], turns[label]
        kept = float(np.mean(np.asarray(masks[name].density)))
        rates = [shape.dense_flops * kept / ms / 1e9 for ms in turn["ms"]]
        first = first or rates
        losses = [1 - own / other for own, other in zip(rates, first, strict=True)]
        records.append(
            {
                "program": label,
                "grid": [shape.grid.frames, shape.grid.height, shape.grid.width],
                "text_length": shape.grid.text_length,
                "variant": variant,
                "mask": kind,
                "density": kept,
                "asked_density": density,
                "median_ms": statistics.median(turn["ms"]),
                "effective_tflops": statistics.median(rates),
                "loss": statistics.median(losses),
                "losses": [round(loss, 4) for loss in losses],
                "rounds": turn,
            }
        )
    return records


if __name__ == "__main__":
    main()
