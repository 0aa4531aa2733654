"""The cost of copies row by row: one grid by TMA and by rows, taking turns.

    python -m benchmarks.attention.rows --output benchmarks/results/rows_h100.json

Grids whose blocks do not start at multiples of 8 tokens are read row by row
(`pallas_kernels/attention/sm90/row_copies.py`). Here a grid that TMA can read is read
both ways.
"""

import functools
from unittest import mock

import numpy as np

from benchmarks.attention import variants as hopper_variants
from benchmarks.common.inputs import random_inputs, random_mask
from benchmarks.common.options import add_output, add_turns, make_parser
from benchmarks.common.records import ResultFile
from benchmarks.common.shapes import SHAPES, Shape
from benchmarks.common.timing import slowdown, take_turns
from draft_jax import BlockMask, VideoGrid
from pallas_kernels.attention.sm90 import backend as hopper
from pallas_kernels.attention.sm90 import geometry as sm90_geometry
from pallas_kernels.common.interfaces import BlockGrid, Order

CASES: dict[str, tuple[Shape, Order]] = {
    "hunyuan, tiled": (SHAPES["hunyuan"], "tiled"),
    "hunyuan and text, raster": (
        Shape(grid=VideoGrid(33, 48, 80, text_length=256), num_heads=24, head_dim=128),
        "raster",
    ),
}


def by_rows(grid: BlockGrid, order: Order) -> sm90_geometry.Geometry:
    """The geometry of a grid as if TMA could not read it."""
    with mock.patch.object(sm90_geometry, "_runs", _no_runs):
        return sm90_geometry.geometry_of.__wrapped__(grid, order)


def _no_runs(grid, order):
    starts = grid.block_starts
    return sm90_geometry._Runs(
        starts, np.zeros_like(starts), sm90_geometry.BLOCK, "asked for"
    )


def compiled(shape: Shape, order: Order, qkv, mask: BlockMask, *, rows: bool):
    """The kernel for these arrays."""
    found = by_rows if rows else sm90_geometry.geometry_of
    with mock.patch.object(hopper, "geometry_of", found):
        # Its cache does not see the other geometry.
        hopper._run.clear_cache()  # type: ignore[attr-defined]
        return hopper_variants.compiled(shape, qkv, mask, {}, order)


def main() -> None:
    """Times all cases at all densities."""
    parser = make_parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.1, 0.25])
    add_turns(parser, rounds=3, settle=0.3, block=0.6)
    add_output(parser)
    options = parser.parse_args()
    stored = ResultFile(options.output)
    for name in options.cases:
        shape, order = CASES[name]
        qkv = random_inputs(shape)
        masks = {
            d: random_mask(shape.grid, 1, shape.num_heads, d) for d in options.densities
        }
        first = masks[options.densities[0]]
        programs = {
            way: compiled(shape, order, qkv, first, rows=way == "rows")
            for way in ("tma", "rows")
        }
        for density, mask in masks.items():
            calls = {w: functools.partial(p, *qkv, mask) for w, p in programs.items()}
            turns = take_turns(calls, options.rounds, options.settle, options.block)
            losses = slowdown(turns, "rows", over="tma")
            stored.add({"case": name, "density": density, **losses, "rounds": turns})


if __name__ == "__main__":
    main()
