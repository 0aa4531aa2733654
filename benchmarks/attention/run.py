"""Times block-sparse attention against dense and sparse attention of other libraries.

    python -m benchmarks.attention.run --output benchmarks/results/attention_h100.json

Every contender gets the same random normal inputs in one process. Effective TFLOP/s
counts the work of the kept blocks: 4 * T^2 * N * D * density / time, with the density
in token pairs. Dense contenders run once for each shape. A contender that cannot run is
recorded with its cause, and so is one whose output is not this project's for the same
mask (`benchmarks.common.agreement`). If this project's kernel fails, the command does.
"""

import argparse
import functools
import math
import os
import sys
from collections.abc import Callable
from typing import Any

# PyTorch shares the GPU: take memory as it is needed.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import numpy as np

from benchmarks.attention.contenders import CONTENDERS, ours
from benchmarks.common import agreement
from benchmarks.common.inputs import (
    MaskKind,
    draft_mask,
    random_inputs,
    random_mask,
    smooth_inputs,
)
from benchmarks.common.options import add_output, make_parser
from benchmarks.common.records import ResultFile
from benchmarks.common.shapes import DENSITIES, SHAPES, Shape
from benchmarks.common.timing import measure
from draft_jax import BlockMask

Check = Callable[[Any], dict[str, object]]
Report = Callable[[dict[str, Any]], None]


def check_against_ours(shape: Shape, qkv, mask: BlockMask) -> Check | None:
    """A function that checks the others' outputs; None where ours fails."""
    tokens = agreement.one_token_of_each_block(shape.grid)
    try:
        call, _ = ours(shape, qkv, mask)
        want = agreement.rows_at(call(), tokens)
    except Exception as error:  # others are still timed
        print(f"outputs are not compared: {error}"[:500], file=sys.stderr)
        return None
    return functools.partial(agreement.compare, want=want, tokens=tokens)


class ShapeRun:
    """All contenders and masks of one shape."""

    def __init__(self, name: str, options: argparse.Namespace, report: Report) -> None:
        self.name, self.shape = name, SHAPES[name]
        self.options, self.report = options, report
        self.names = {
            is_sparse: [
                contender
                for contender in options.contenders
                if CONTENDERS[contender].is_sparse == is_sparse
            ]
            for is_sparse in (False, True)
        }

    def run(self) -> None:
        """Times dense contenders, then sparse ones at each density."""
        shape, dense = self.shape, self.names[False]
        qkv = random_inputs(shape)
        if dense:
            full = BlockMask.full(grid=shape.grid, batch=1, num_heads=shape.num_heads)
            check = check_against_ours(shape, qkv, full)
        for name in dense:
            self._time(name, (qkv,), "dense", 1.0, check)
        for kind in self.options.masks:
            self._run_masks(kind, qkv if kind == "random" else smooth_inputs(shape))
        if "cudnn" in dense:  # again, for the GPU has become warm
            self._time("cudnn", (qkv,), "dense, at the end", 1.0, check)

    def _run_masks(self, kind: MaskKind, qkv) -> None:
        shape = self.shape
        for density in self.options.densities:
            if kind == "draft" and density == 1.0:
                continue  # the same as a random mask of density 1
            if kind == "random":
                mask = random_mask(shape.grid, 1, shape.num_heads, density)
            else:
                mask = draft_mask(shape, qkv[0], qkv[1], density)
            kept = float(np.mean(np.asarray(mask.density)))
            check = check_against_ours(shape, qkv, mask)
            for name in self.names[True]:
                self._time(name, (qkv, mask), kind, kept, check)

    def _time(self, name: str, arguments, mask_kind: str, density: float, check):
        """Times and reports one contender; of dense ones the density is 1."""
        shape, contender = self.shape, CONTENDERS[name]
        if contender.is_installed:
            make = functools.partial(contender.make, shape, *arguments)
            flops = shape.dense_flops * density
            result = measure(make, flops, self.options.seconds, check)
        else:
            result = {"error": f"{contender.needs} is not installed"}
        self.report(
            {
                "shape": self.name,
                "tokens": shape.grid.num_tokens,
                "heads": shape.num_heads,
                "head_dim": shape.head_dim,
                "dtype": contender.dtype or shape.dtype,
                "contender": name,
                "mask": mask_kind,
                "density": density,
                **result,
            }
        )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--densities", nargs="+", type=float, default=[*DENSITIES])
    parser.add_argument(
        "--masks", nargs="+", choices=("random", "draft"), default=["random", "draft"]
    )
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=[*CONTENDERS]
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    add_output(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs all shapes; exits with an error where this project's kernel failed."""
    options = parse(arguments)
    stored = ResultFile(options.output)

    def report(result):
        stored.keep(result)
        rate = result.get("effective_tflops", math.nan)
        print(
            f"{result['shape']:14s} {result['contender']:15s} {result['mask']:7s}"
            f"{result['density']:7.3f} {result.get('median_ms', math.nan):9.2f} ms"
            f"{rate:8.0f} TFLOP/s  {result.get('error', '')}",
            flush=True,
        )

    for name in options.shapes:
        ShapeRun(name, options, report).run()
    failed = [r for r in stored.results if r["contender"] == "ours" and "error" in r]
    if failed:
        sys.exit(
            f"this project's kernel failed in {len(failed)} of {len(stored.results)}"
        )


if __name__ == "__main__":
    main()
