"""Times every stage of a draft-attention layer on one GPU, beside dense attention.

    python -m benchmarks.layer measure --output benchmarks/results/layer_h100.json
    python -m benchmarks.layer plot benchmarks/results/layer_h100.json
    python -m benchmarks.layer measure --shape long --only softmax --skip xla

All programs are compiled before the first is timed, and run on the same random normal
inputs. A sample is the mean of a few calls in a row, so that waiting for the GPU counts
little; figures are medians of samples. On a GPU, CUPTI also reports the time of every
GPU kernel in a run of its own.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import json
import math
import pathlib
import re
import statistics
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import qk_stages
from benchmarks.attention import SHAPES, Shape, environment, random_inputs
from draft_jax import (
    DraftConfig,
    DraftStep,
    VideoGrid,
    compute_mask,
    constant_step,
    draft_attention,
    initial_mask,
    pool_tokens,
    ranking,
    scheduled_attention,
    select_blocks,
)
from draft_jax.pooling import pool_queries_and_keys, tile_table
from pallas_kernels import block_sparse_attention, pool_tiles_sm90, rank_sm90

TINY = Shape(
    grid=VideoGrid(2, 16, 24, tile=(4, 8)), num_heads=2, head_dim=64, dtype="float32"
)
LONG = Shape(  # the longest rows that the selection kernels take: S = 8,192
    grid=VideoGrid(32, 128, 256, tile=(8, 16)),
    num_heads=2,
    head_dim=64,
    dtype="bfloat16",
)
OWN_SHAPES = {"tiny": TINY, "long": LONG}
SELECTIONS = ("percentile", "row_topk", "top_p")
MIN_SAMPLE_S = 2e-3  # of calls in a row
MOVES = (
    "gather",
    "scatter",
    "transpose",
    "copy",
    "concatenate",
    "pad",
    "reverse",
    "slice",
    "sort",
    "dynamic-slice",
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A program to time; `inputs` are the names of arrays made beforehand."""

    function: Callable
    inputs: tuple[str, ...]
    nbytes: float = 0.0  # that it must read and write, for its rate


# ------------------------------------------------------------------- programs


def pool_xla(q, k, *, grid, order):
    """Both tensors through the XLA path."""
    return pool_tokens(q, grid, order=order), pool_tokens(k, grid, order=order)


def pool_matmul(q, k, *, grid):
    """Tiled order: sums as products with ones."""
    ones = jnp.ones((1, grid.block_size), q.dtype)

    def pool(x):
        tiles = x.reshape(x.shape[0], grid.num_visual_blocks, grid.block_size, -1)
        sums = jnp.einsum(
            "op,bspc->bsoc", ones, tiles, preferred_element_type=jnp.float32
        )
        return sums / grid.block_size

    return pool(q), pool(k)


def pool_kernel(q, k, *, grid, order, reductions=("mean",)):
    table = tile_table(grid, order)
    return pool_tiles_sm90.pool_tiles(q, k, table, reductions=reductions)


def logits_of(q_pooled, k_pooled, precision=jax.lax.Precision.HIGHEST):
    return jnp.einsum("bqnd,bknd->bnqk", q_pooled, k_pooled, precision=precision)


def softmax_and_select(logits, *, shape: Shape, config):
    """What follows the logits: the map, the selection and the lists."""
    scores = jax.nn.softmax(logits * shape.head_dim**-0.5, axis=-1)
    return select_blocks(scores, grid=shape.grid, config=config)


def without_kernels(function, digit_bits: int):
    """The XLA path of a selection, whatever the device."""

    def run(*arguments):
        with (
            mock.patch.object(rank_sm90, "why_unsupported", return_value="unwanted"),
            mock.patch.object(ranking, "DIGIT_BITS", digit_bits),
        ):
            return function(*arguments)

    return run


def stages(shape: Shape, backend: str, dense: str) -> dict[str, Stage]:
    """Every program by name. Stages of one layer share a prefix."""
    grid = shape.grid
    size = grid.num_tokens * shape.num_heads * shape.head_dim
    tensor = size * jnp.dtype(shape.dtype).itemsize
    configs = {s: DraftConfig(sparsity=s) for s in (0.75, 0.9)}
    half = functools.partial
    table = {
        "copy": Stage(lambda q: -q, ("q",), 2 * tensor),
        "read": Stage(lambda q: q.astype(jnp.float32).sum(), ("q",), tensor),
    }
    qk = ("q", "k")
    for order in ("tiled", "raster"):
        pool = half(pool_xla, grid=grid, order=order)
        table[f"pool/xla/{order}"] = Stage(pool, qk, 2 * tensor)
        pool = half(pool_queries_and_keys, grid=grid, order=order)
        table[f"pool/default/{order}"] = Stage(pool, qk, 2 * tensor)
    if backend == "hopper":
        for order in ("tiled", "raster"):
            pool = half(pool_kernel, grid=grid, order=order)
            table[f"pool/kernel/{order}"] = Stage(pool, qk, 2 * tensor)
        pool = half(pool_kernel, grid=grid, order="tiled", reductions=("mean", "max"))
        table["pool/kernel/tiled-mean+max"] = Stage(pool, qk, 2 * tensor)
    if not grid.has_short_blocks:
        pool = half(pool_matmul, grid=grid)
        table["pool/matmul/tiled"] = Stage(pool, qk, 2 * tensor)
    prepared = qk_stages.entries(shape, backend == "hopper")
    table |= {name: Stage(*entry) for name, entry in prepared.items()}
    pooled = ("q_pooled", "k_pooled")
    for precision in ("highest", "high", "default"):
        logits = half(logits_of, precision=jax.lax.Precision(precision))
        table[f"logits/{precision}"] = Stage(logits, pooled)
    table["softmax"] = Stage(half(jax.nn.softmax, axis=-1), ("logits",))
    for name in SELECTIONS:
        config = DraftConfig(sparsity=0.9, selection=name)
        select = half(select_blocks, grid=grid, config=config)
        table[f"select/{name}"] = Stage(select, ("scores",))
        for bits in (1, 2, 4) if name == "percentile" else (2,):
            select_xla = without_kernels(select, bits)
            table[f"select-xla-{bits}/{name}"] = Stage(select_xla, ("scores",))
        select = half(softmax_and_select, shape=shape, config=config)
        table[f"softmax+select/{name}"] = Stage(select, ("logits",))
    for order in ("tiled", "raster"):
        mask = half(compute_mask, grid=grid, config=configs[0.9], order=order)
        table[f"mask/{order}"] = Stage(mask, qk)
    qkv = ("q", "k", "v")
    options = {"grid": grid, "backend": backend}
    for sparsity, config in configs.items():
        sparse = half(block_sparse_attention, **options)
        table[f"sparse/{sparsity}"] = Stage(sparse, (*qkv, f"mask_{sparsity}"))
        for order in ("tiled", "raster"):
            layer = half(draft_attention, config=config, order=order, **options)
            table[f"layer/{order}/{sparsity}"] = Stage(layer, qkv)

    def scheduled(step, q, k, v, mask):
        settings = {"config": configs[0.9], "order": "tiled", **options}
        return scheduled_attention(q, k, v, step=step, mask=mask, **settings)

    for name, step in steps(grid, configs[0.9]).items():
        # Known when it is traced, or an argument: then XLA waits on the host.
        arguments = (*qkv, "mask_0.9")
        table[f"scheduled/{name}"] = Stage(half(scheduled, step), arguments)
        arguments = (f"step_{name}", *arguments)
        table[f"scheduled-traced/{name}"] = Stage(scheduled, arguments)
    attend = half(jax.nn.dot_product_attention, implementation=dense)
    table["dense"] = Stage(attend, qkv)
    return table


def steps(grid, config) -> dict[str, DraftStep]:
    """The kinds of steps of a schedule."""
    refresh = constant_step(grid, config)
    reuse = dataclasses.replace(refresh, refresh=np.asarray(False))
    dense = constant_step(grid, config, dense=True)
    return {"refresh": refresh, "reuse": reuse, "dense": dense}


def make_inputs(shape: Shape) -> dict[str, object]:
    """The arrays that stages take, by name."""
    q, k, v = random_inputs(shape)
    grid = shape.grid
    pooled = jax.jit(functools.partial(pool_xla, grid=grid, order="tiled"))(q, k)
    logits = jax.jit(logits_of)(*pooled)
    scores = jax.jit(lambda x: jax.nn.softmax(x * shape.head_dim**-0.5, -1))(logits)
    config = DraftConfig(sparsity=0.9)
    inputs = {"q": q, "k": k, "v": v, "q_pooled": pooled[0], "k_pooled": pooled[1]}
    inputs |= {"logits": logits, "scores": scores}
    inputs |= {f"step_{name}": step for name, step in steps(grid, config).items()}
    inputs |= qk_stages.make_inputs(shape)
    for sparsity in (0.75, 0.9):
        config = DraftConfig(sparsity=sparsity)
        select = functools.partial(select_blocks, grid=grid, config=config)
        inputs[f"mask_{sparsity}"] = jax.jit(select)(scores)
    start = initial_mask(grid, config, batch=1, num_heads=shape.num_heads)
    assert start.capacity == inputs["mask_0.9"].capacity
    return inputs


# ---------------------------------------------------------------- measurements


def compile_all(table: dict[str, Stage], inputs) -> dict[str, object]:
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


def kernel_times(program, arguments, iterations: int) -> dict[str, object]:
    """GPU time by kernel as CUPTI reports it, in the order of launch."""
    from jax.experimental.mosaic.gpu import profiler

    measured = profiler.measure(program, aggregate=False, iterations=iterations)
    _, runs = measured(*arguments)
    if not runs:
        return {}
    names = [name for name, _ in runs[0]]
    medians = [statistics.median(run[i][1] for run in runs) for i in range(len(names))]
    return {
        "kernels_ms": statistics.median(sum(t for _, t in run) for run in runs),
        "num_kernels": len(names),
        "kernels": [
            {"name": name[:60], "ms": round(ms, 5)}
            for name, ms in zip(names, medians, strict=True)
        ],
    }


def memory_of(program) -> dict[str, float]:
    """Megabytes that a program needs besides its inputs and outputs."""
    stats = program.memory_analysis()
    return {
        "temp_mb": stats.temp_size_in_bytes / 1e6,
        "output_mb": stats.output_size_in_bytes / 1e6,
    }


def token_sized_moves(text: str, num_elements: int) -> list[str]:
    """Instructions of a compiled program that rearrange arrays as large as Q."""
    pattern = re.compile(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(")
    found = []
    for shape, name in pattern.findall(text):
        size = math.prod(int(n) for n in shape.split(","))
        if name in MOVES and size >= num_elements:
            found.append(f"{name} [{shape}]")
    return found


def measure(options: argparse.Namespace) -> None:
    """Runs every stage and writes the JSON file after each."""
    shape = (OWN_SHAPES | SHAPES)[options.shape]
    is_gpu = jax.default_backend() == "gpu"
    table = stages(shape, "hopper" if is_gpu else "xla", "cudnn" if is_gpu else "xla")
    table = {
        name: stage
        for name, stage in table.items()
        if re.search(options.only, name) and not re.search(options.skip, name)
    }
    start = time.perf_counter()
    inputs = make_inputs(shape)
    programs = compile_all(table, inputs)
    print(f"compiled in {time.perf_counter() - start:.1f} s", flush=True)
    size = shape.grid.num_tokens * shape.num_heads * shape.head_dim
    results: dict[str, dict[str, object]] = {}
    for name, program in programs.items():
        if isinstance(program, Exception):
            results[name] = {"error": f"{type(program).__name__}: {program}"[:800]}
            continue
        results[name] = memory_of(program)
        if name.startswith(("layer", "scheduled")):
            moves = token_sized_moves(program.as_text(), size)
            results[name]["token_sized_moves"] = moves
    runnable = {n: p for n, p in programs.items() if "error" not in results[n]}
    for name, program in runnable.items():
        arguments = [inputs[key] for key in table[name].inputs]
        try:
            samples = sample_times(lambda: program(*arguments), options.samples)  # noqa: B023
        except Exception as error:
            results[name]["error"] = f"{type(error).__name__}: {error}"[:800]
            continue
        median = statistics.median(samples)
        results[name] |= {
            "median_ms": median,
            "min_ms": min(samples),
            "max_ms": max(samples),
            "samples": len(samples),
        }
        if nbytes := table[name].nbytes:
            results[name]["gb_per_s"] = nbytes / median / 1e6
            if "gb_per_s" in (copy := results.get("copy", {})):
                rate = results[name]["gb_per_s"] / copy["gb_per_s"]
                results[name]["share_of_copy"] = rate
        report(name, results[name])
        write(options.output, shape, options.shape, results)
    for name in SELECTIONS:
        pair = [runnable.get(f"{kind}/{name}") for kind in ("select", "select-xla-2")]
        if None not in pair:
            first, second = (jax.tree.leaves(p(inputs["scores"])) for p in pair)
            equal = all(
                bool((a == b).all()) for a, b in zip(first, second, strict=True)
            )
            results[f"select/{name}"]["equals_xla"] = equal
            print(f"select/{name} equals its XLA path: {equal}", flush=True)
    for name, program in runnable.items() if is_gpu else ():
        arguments = [inputs[key] for key in table[name].inputs]
        try:
            results[name] |= kernel_times(program, arguments, options.samples)
        except Exception as error:
            results[name]["cupti_error"] = f"{type(error).__name__}: {error}"[:300]
        report(name, results[name])
    write(options.output, shape, options.shape, results)


def report(name: str, result: dict[str, object]) -> None:
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


def write(path: pathlib.Path | None, shape: Shape, name: str, results) -> None:
    if path is None:
        return
    packages = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin")
    packages += ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    problem = {
        "name": name,
        "tokens": shape.grid.num_tokens,
        "heads": shape.num_heads,
        "head_dim": shape.head_dim,
        "dtype": shape.dtype,
    }
    document = {
        "environment": {**environment(), "versions": versions},
        "shape": problem,
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


# ------------------------------------------------------------------------ plot


def plot(options: argparse.Namespace) -> None:
    """Draws where the time of a layer goes, from a JSON file, as a stacked bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    document = json.loads(options.results.read_text())
    results = document["results"]

    def time_of(name):
        return results[name]["median_ms"]

    bars = {"cuDNN dense": {"dense attention": time_of("dense")}}
    for sparsity in ("0.75", "0.9"):
        parts = {
            "sparse kernel": time_of(f"sparse/{sparsity}"),
            "pooling": time_of("pool/default/tiled"),
            "logits": time_of("logits/highest"),
            "softmax, selection, lists": time_of("softmax+select/percentile"),
        }
        total = time_of(f"layer/tiled/{sparsity}")
        parts["other"] = max(total - sum(parts.values()), 0.0)
        bars[f"layer at {float(sparsity):.0%}"] = parts
    bars["layer at 90%,\nmask reused"] = {
        "sparse kernel": time_of("sparse/0.9"),
        "other": max(time_of("scheduled/reuse") - time_of("sparse/0.9"), 0.0),
    }
    names = list(dict.fromkeys(part for parts in bars.values() for part in parts))
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, chosen in zip(axes, (list(bars), list(bars)[2:]), strict=True):
        left = [0.0] * len(chosen)
        for part in names:
            widths = [bars[bar].get(part, 0.0) for bar in chosen]
            axis.barh(chosen, widths, left=left, label=part)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for y, total in enumerate(left):
            axis.text(total, y, f" {total:.1f} ms", va="center")
        axis.invert_yaxis()
        axis.set_xlabel("ms")
        axis.margins(x=0.15)
    axes[0].legend(fontsize="small")
    shape, where = document["shape"], document["environment"]
    figure.suptitle(
        f"{shape['tokens']:,} tokens x {shape['heads']} heads x {shape['head_dim']}, "
        f"{shape['dtype']}, {where['device']}, jax {where['jax']}"
    )
    path = options.output or options.results.with_suffix(".png")
    figure.savefig(path, dpi=120)
    print(path)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("measure", help="time all stages on this device")
    command.add_argument("--shape", choices=[*OWN_SHAPES, *SHAPES], default="hunyuan")
    command.add_argument("--samples", type=int, default=20)
    command.add_argument("--only", default="", help="regular expression of stages")
    command.add_argument("--skip", default="^$", help="regular expression of stages")
    command.add_argument("--output", type=pathlib.Path, help="JSON file")
    command.set_defaults(run=measure)
    command = commands.add_parser("plot", help="draw a JSON file")
    command.add_argument("results", type=pathlib.Path)
    command.add_argument("--output", type=pathlib.Path, help="PNG file")
    command.set_defaults(run=plot)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    options.run(options)


if __name__ == "__main__":
    main()
