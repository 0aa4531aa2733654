"""Times every stage of a draft-attention layer on one GPU, beside dense attention.

    python -m benchmarks.layer.run measure --output benchmarks/results/layer_h100.json
    python -m benchmarks.layer.run turns --output benchmarks/results/layer_h100.json
    python -m benchmarks.layer.run memory --output benchmarks/results/layer_h100.json
    python -m benchmarks.layer.run plot benchmarks/results/layer_h100.json
    python -m benchmarks.layer.run measure --shape long --only softmax --skip xla

`measure` compiles all programs before the first is timed and runs them on the same
random normal inputs. A sample is the mean of a few calls in a row, so that waiting for
the GPU counts little; figures are medians of samples. On a GPU, CUPTI also reports the
time of every GPU kernel in a run of its own; `benchmarks.layer.account` says how the
time of a layer is attributed. `temp_mb` is what XLA's buffer assignment sets aside for
intermediate values: not what the allocator holds, nor what cuDNN or the driver take for
themselves.

`turns` lets layers in tiled and in raster order take turns, as the edge benchmark does
(`benchmarks.attention.edges`): the GPU's clock moves by more between two stages of
`measure` than they differ by. `memory` asks the device what one layer needed. The
allocator's peak is of the process, so it takes one stage; run it again for another. The
file gets each part under its own key and keeps the others. `summary` says what means
for skipped blocks cost (`benchmarks.layer.means_stages`).
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import math
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common.inputs import random_inputs
from benchmarks.common.moves import token_sized_moves
from benchmarks.common.options import add_output, add_turns, make_parser
from benchmarks.common.records import environment, write_json
from benchmarks.common.shapes import Shape
from benchmarks.common.timing import slowdown, spread, take_turns
from benchmarks.layer import means_stages
from benchmarks.layer.account import (
    attention_account,
    groups,
    kernel_times,
)
from benchmarks.layer.plot import plot
from benchmarks.layer.stages import (
    LAYER_SHAPES,
    ORDERS,
    SELECTIONS,
    SPARSITIES,
    Stage,
    layer_of,
    make_inputs,
    stages,
)
from draft_jax import VideoGrid
from pallas_kernels import BackendName

MIN_SAMPLE_S = 2e-3  # of calls in a row
# Grids whose width the tile's does not divide, by the shape they go with in `turns`.
UNALIGNED = {
    "hunyuan": Shape(grid=VideoGrid(21, 30, 52), num_heads=40, head_dim=128),
    "tiny": Shape(
        grid=VideoGrid(2, 15, 20, tile=(4, 8)),
        num_heads=2,
        head_dim=64,
        dtype="float32",
    ),
}
Results = dict[str, dict[str, Any]]


# --------------------------------------------------------------------- measure


def compile_all(table: dict[str, Stage], inputs) -> dict[str, Any]:
    """Compiled programs by stage, or the error of those that do not compile."""

    def lower(stage):
        return jax.jit(stage.function).lower(*(inputs[name] for name in stage.inputs))

    def attempt(make, *args):
        try:
            return make(*args)
        except Exception as error:  # recorded: other stages still run
            return error

    def finish(lowered):
        if isinstance(lowered, Exception):
            return lowered
        return attempt(lowered.compile)

    lowered = [attempt(lower, stage) for stage in table.values()]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip(table, pool.map(finish, lowered), strict=True))


def sample_times(call: Callable[[], object], num_samples: int) -> list[float]:
    """Milliseconds of a call, each the mean of some in a row."""
    for _ in range(3):
        jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    once = time.perf_counter() - start
    in_a_row = max(1, min(20, math.ceil(MIN_SAMPLE_S / once)))
    samples = []
    for _ in range(num_samples):
        start = time.perf_counter()
        for _ in range(in_a_row):
            out = call()
        jax.block_until_ready(out)
        samples.append(1e3 * (time.perf_counter() - start) / in_a_row)
    return samples


def memory_of(program) -> dict[str, float]:
    """Megabytes that XLA plans for a program besides its inputs."""
    stats = program.memory_analysis()
    return {
        "temp_mb": stats.temp_size_in_bytes / 1e6,
        "output_mb": stats.output_size_in_bytes / 1e6,
    }


def describe(programs, shape: Shape) -> Results:
    """Describes programs without running them; of those that failed, the error."""
    size = shape.grid.num_tokens * shape.num_heads * shape.head_dim
    results: Results = {}
    for name, program in programs.items():
        if isinstance(program, Exception):
            results[name] = {"error": f"{type(program).__name__}: {program}"[:800]}
            continue
        results[name] = memory_of(program)
        if name.startswith(("layer", "scheduled")):
            moves = token_sized_moves(program.as_text(), size)
            results[name]["token_sized_moves"] = moves
    return results


def wall_times(call, stage: Stage, copy_rate: float, num_samples: int):
    """Times and rate of a stage, or the error that it raised."""
    try:
        samples = sample_times(call, num_samples)
    except Exception as error:  # recorded: other stages still run
        return {"error": f"{type(error).__name__}: {error}"[:800]}
    result: dict[str, Any] = {**spread(samples), "samples": len(samples)}
    if stage.nbytes:
        rate = stage.nbytes / result["median_ms"] / 1e6
        result |= {"gb_per_s": rate, "share_of_copy": rate / (copy_rate or rate)}
    return result


def gpu_times(call: functools.partial, num_samples: int) -> dict[str, Any]:
    """Time by kernel; of a program with the sparse kernel, also what is beside it."""
    try:
        result = kernel_times(call.func, call.args, num_samples)
        return result | attention_account(result.get("kernels", []))
    except Exception as error:
        return {"cupti_error": f"{type(error).__name__}: {error}"[:300]}


def add_groups(results: Results) -> None:
    """Adds `groups_ms` to every layer whose `sparse` stage was measured."""
    for name, result in results.items():
        last = name.split("/")[-1]
        sparsity = last if last in map(str, SPARSITIES) else "0.9"
        sparse = results.get(f"sparse/{sparsity}", {}).get("kernels", [])
        parts = groups(result.get("kernels", []), sparse)
        if parts is not None:
            result["groups_ms"] = parts


def compare_selections(programs, scores, results: Results) -> None:
    """Records whether the selection kernels give what XLA gives."""
    for name in SELECTIONS:
        pair = [programs.get(f"{kind}/{name}") for kind in ("select", "select-xla-2")]
        if None in pair:
            continue
        first, second = (jax.tree.leaves(p(scores)) for p in pair)
        equal = all(bool((a == b).all()) for a, b in zip(first, second, strict=True))
        results[f"select/{name}"]["equals_xla"] = equal
        print(f"select/{name} equals its XLA path: {equal}", flush=True)


def measure(options: argparse.Namespace) -> None:
    """Runs every stage and writes the JSON file after each."""
    shape = LAYER_SHAPES[options.shape]
    is_gpu = jax.default_backend() == "gpu"
    table = {
        name: stage
        for name, stage in stages(shape, *backends()).items()
        if re.search(options.only, name) and not re.search(options.skip, name)
    }
    start = time.perf_counter()
    inputs = make_inputs(shape)
    programs = compile_all(table, inputs)
    print(f"compiled in {time.perf_counter() - start:.1f} s", flush=True)
    results = describe(programs, shape)

    def save() -> None:
        facts = {"environment": environment(), "shape": problem(options.shape)}
        parts = {"results": results, "summary": means_stages.summary(results)}
        update(options.output, **facts, **parts)

    calls = {}
    for name, program in programs.items():
        if "error" in results[name]:
            continue
        arguments = [inputs[key] for key in table[name].inputs]
        call = functools.partial(program, *arguments)
        copy_rate = results.get("copy", {}).get("gb_per_s", 0.0)
        results[name] |= wall_times(call, table[name], copy_rate, options.samples)
        if "error" not in results[name]:
            calls[name] = call
        report(name, results[name])
        save()
    runnable = {name: call.func for name, call in calls.items()}
    compare_selections(runnable, inputs["scores"], results)
    for name, call in calls.items() if is_gpu else ():
        results[name] |= gpu_times(call, options.samples)
        report(name, results[name])
    add_groups(results)
    save()


def backends() -> tuple[BackendName, str]:
    """Backends of sparse and of dense attention on this device."""
    return ("hopper", "cudnn") if jax.default_backend() == "gpu" else ("xla", "xla")


def report(name: str, result: dict[str, Any]) -> None:
    """Prints a line about a stage."""
    rate = result.get("gb_per_s", math.nan)
    print(
        f"{name:32s}{result.get('median_ms', math.nan):9.3f} ms"
        f"{result.get('kernels_ms', math.nan):9.3f} ms in "
        f"{result.get('num_kernels', 0):3d} kernels{rate:8.0f} GB/s"
        f"{result.get('share_of_copy', math.nan):6.2f} of copy"
        f"{result.get('temp_mb', math.nan):8.0f} MB  "
        f"{result.get('error', '')}{result.get('cupti_error', '')}",
        flush=True,
    )


# ---------------------------------------------------------------------- results


def problem(name: str) -> dict[str, Any]:
    """Sizes of a shape, for the record."""
    shape = LAYER_SHAPES[name]
    return {
        "name": name,
        "tokens": shape.grid.num_tokens,
        "heads": shape.num_heads,
        "head_dim": shape.head_dim,
        "dtype": shape.dtype,
    }


def update(path: pathlib.Path | None, **parts: object) -> None:
    """Writes these keys of a JSON file and keeps its others."""
    if path is None:
        return
    document = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, document | parts)


# ------------------------------------------------------------- turns and memory


def turn_cases(name: str) -> dict[str, tuple[Shape, float]]:
    """Shape and sparsity of each pair of layers that take turns."""
    shape, unaligned = LAYER_SHAPES[name], UNALIGNED[name]
    text = dataclasses.replace(shape.grid, text_length=2 * shape.grid.block_size)
    cases = {f"{name}/{sparsity}": (shape, sparsity) for sparsity in (0.9, 0.75)}
    cases[f"{name}, {text.text_length} text tokens/0.9"] = (
        dataclasses.replace(shape, grid=text),
        0.9,
    )
    cases[f"{unaligned.grid.height}x{unaligned.grid.width}/0.9"] = (unaligned, 0.9)
    return cases


def turns(options: argparse.Namespace) -> None:
    """Runs layers in tiled and raster order in turns; losses are those of a round."""
    cases = turn_cases(options.shape)
    backend, _ = backends()
    table = {
        f"{case}/{order}": Stage(layer_of(shape, backend, order, sparsity), (case,) * 3)
        for case, (shape, sparsity) in cases.items()
        for order in ORDERS
    }
    programs = compile_all(table, {case: like_q(s) for case, (s, _) in cases.items()})
    records: list[dict[str, Any]] = []
    for case, (shape, sparsity) in cases.items():
        grid, qkv = shape.grid, random_inputs(shape)
        record = {
            "case": case,
            "grid": [grid.frames, grid.height, grid.width],
            "text_length": grid.text_length,
            "heads": shape.num_heads,
            "sparsity": sparsity,
        }
        pair: dict[str, Any] = {order: programs[f"{case}/{order}"] for order in ORDERS}
        failed = [p for p in pair.values() if isinstance(p, Exception)]
        if failed:
            record["error"] = f"{type(failed[0]).__name__}: {failed[0]}"[:800]
        else:
            calls = {o: functools.partial(program, *qkv) for o, program in pair.items()}
            times = take_turns(calls, options.rounds, options.settle, options.block)
            record |= slowdown(times, "raster", over="tiled") | {"rounds": times}
        records.append(record)
        print(json.dumps(record), flush=True)
        part = {"environment": environment(), "cases": records}
        update(options.output, turns=part)


def like_q(shape: Shape) -> jax.ShapeDtypeStruct:
    """Q, K or V without values."""
    size = (1, shape.grid.num_tokens, shape.num_heads, shape.head_dim)
    return jax.ShapeDtypeStruct(size, jnp.dtype(shape.dtype))


def memory(options: argparse.Namespace) -> None:
    """Device memory that one call of a layer needs beyond q, k, v and its output.

    The difference of the allocator's peak after the call and of what it held before,
    less the output. Only what goes through XLA's allocator is in it: not the program's
    code, nor what cuDNN or the driver hold. Where the call does not raise the peak that
    making the inputs left (`raised_peak`), the figure is an upper bound.
    """
    shape = LAYER_SHAPES[options.shape]
    stage = stages(shape, *backends())[options.stage]
    if stage.inputs != ("q", "k", "v"):
        raise SystemExit(f"{options.stage=} must take q, k and v: a layer/... or dense")
    like = {name: like_q(shape) for name in stage.inputs}
    program = compile_all({"": stage}, like)[""]
    if isinstance(program, Exception):
        raise program
    device = jax.local_devices()[0]
    qkv = jax.block_until_ready(random_inputs(shape))
    before = device.memory_stats()
    out = jax.block_until_ready(program(*qkv))
    after = device.memory_stats()
    result: dict[str, Any] = memory_of(program)
    if after is not None:
        extra = after["peak_bytes_in_use"] - before["bytes_in_use"] - out.nbytes
        result["device_peak_mb"] = extra / 1e6
        raised = after["peak_bytes_in_use"] > before["peak_bytes_in_use"]
        result["raised_peak"] = raised
    result |= {"shape": options.shape, "environment": environment()}
    print(options.stage, json.dumps(result, indent=1), flush=True)
    old: dict[str, Any] = {}
    if options.output is not None and options.output.exists():
        old = json.loads(options.output.read_text()).get("memory", {})
    update(options.output, memory=old | {options.stage: result})


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("measure", help="time all stages on this device")
    command.add_argument("--shape", choices=LAYER_SHAPES, default="hunyuan")
    command.add_argument("--samples", type=int, default=20)
    command.add_argument("--only", default="", help="regular expression of stages")
    command.add_argument("--skip", default="^$", help="regular expression of stages")
    add_output(command)
    command.set_defaults(run=measure)
    command = commands.add_parser("turns", help="tiled against raster order")
    command.add_argument("--shape", choices=UNALIGNED, default="hunyuan")
    add_turns(command, rounds=3, settle=0.3, block=0.7)
    add_output(command)
    command.set_defaults(run=turns)
    command = commands.add_parser("memory", help="peak of one layer on this device")
    command.add_argument("--shape", choices=LAYER_SHAPES, default="hunyuan")
    command.add_argument("--stage", default="layer/tiled/0.9")
    add_output(command)
    command.set_defaults(run=memory)
    command = commands.add_parser("plot", help="draw a JSON file")
    command.add_argument("results", type=pathlib.Path)
    add_output(command, "PNG file")
    command.set_defaults(run=draw)
    return parser.parse_args(arguments)


def draw(options: argparse.Namespace) -> None:
    """Draws a JSON file of `measure`."""
    path = options.output or options.results.with_suffix(".png")
    plot(options.results, path)
    print(path)


def main() -> None:
    """Runs one command."""
    options = parse()
    options.run(options)


if __name__ == "__main__":
    main()
