"""What edge blocks cost: a grid that tiles divide and one they do not take turns.

    python -m benchmarks.attention.edges --output benchmarks/results/edges_h100.json

The card moves its clock by several percent within seconds, with what ran before, so
figures of shapes that were timed one after the other cannot be subtracted. Here every
program runs for a second at a time, after half a second that does not count, and the
next takes over: six rounds of it. Losses are those of each round, per useful FLOP.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention.run import (
    DENSITIES,
    SHAPES,
    Shape,
    draft_mask,
    random_inputs,
    random_mask,
    smooth_inputs,
)
from benchmarks.attention.variants import VARIANTS, compiled
from benchmarks.common.gpu_state import GpuState
from benchmarks.common.records import write_results
from draft_jax import BlockMask

# Name, shape and variant of each program; losses are over the first.
PROGRAMS = (
    ("divisible", "hunyuan", "default"),
    ("edges", "hunyuan-edges", "default"),
    ("edges, all rows", "hunyuan-edges", "all-rows"),
)


def run_for(call: Callable[[], object], seconds: float) -> tuple[int, float]:
    """How many calls, two in flight at a time, were made, and in what time."""
    start, calls, last = time.perf_counter(), 0, None
    while time.perf_counter() - start < seconds:
        out = call()
        jax.block_until_ready(last)  # one call behind: the card never waits
        last, calls = out, calls + 1
    jax.block_until_ready(last)
    return calls, time.perf_counter() - start


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    settle_s: float,
    block_s: float,
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of a call and the card's state in each round, by name."""
    turns: dict[str, dict[str, list[float]]] = {
        name: {"ms": [], "sm_clock_mhz": [], "power_w": []} for name in calls
    }
    for _ in range(rounds):
        for name, call in calls.items():
            run_for(call, settle_s)
            with GpuState() as state:
                number, seconds = run_for(call, block_s)
            turns[name]["ms"].append(1e3 * seconds / number)
            for key in ("sm_clock_mhz", "power_w"):
                if key in state.summary:
                    turns[name][key].append(state.summary[key])
    return turns


def slowdown(
    turns: dict[str, dict[str, list[float]]], own: str, *, over: str
) -> dict[str, object]:
    """By how much a program takes longer than another, as a share, by round."""
    rounds = zip(turns[own]["ms"], turns[over]["ms"], strict=True)
    losses = [round(ms / other - 1, 4) for ms, other in rounds]
    return {"loss": statistics.median(losses), "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--densities", nargs="+", type=float, default=[*DENSITIES])
    parser.add_argument("--masks", nargs="+", default=["random", "draft"])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--settle", type=float, default=0.5, help="seconds")
    parser.add_argument("--block", type=float, default=1.0, help="seconds")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file")
    options = parser.parse_args()
    shapes = {name: SHAPES[name] for _, name, _ in PROGRAMS}
    results: list[dict[str, object]] = []
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
            results += summaries(kind, density, shapes, masks, turns)
            for result in results[-len(PROGRAMS) :]:
                print(json.dumps(result), flush=True)
            if options.output is not None:
                write_results(options.output, results)


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
