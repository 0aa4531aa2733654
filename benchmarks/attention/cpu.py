"""Time and memory of the XLA backend on CPU, by density, next to dense attention.

    python -m benchmarks.attention.cpu

prints three tables and writes `benchmarks/results/block_sparse_cpu.json`:

  long    16,384 tokens in 128-token blocks: time and memory must fall with density,
          and no N x N array may exist.
  mini    An attention layer like the small model's: 2,304 tokens in 32-token blocks,
          batch 2 for classifier-free guidance.
  whole   `draft_attention` on the layer of `mini`: what the draft and the selection
          add to the attention itself.

Masks keep the same number of random key blocks in every row. Variants are timed in
turns, so that other load on the machine meets all of them; the minimum of the turns
is the least disturbed value, and the median and quartiles show the disturbance.
Needs Linux, whose /proc tells the peak memory.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common.machine import host_peak_bytes
from benchmarks.common.records import ROOT, provenance, write_json
from draft_jax import BlockMask, DraftConfig, VideoGrid, compute_mask, draft_attention
from models.files import output_file
from pallas_kernels import block_sparse_attention, dense_attention

RESULTS = ROOT / "benchmarks" / "results" / "block_sparse_cpu.json"
MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One attention layer in float32 and the densities to time it at."""

    grid: VideoGrid
    batch: int
    num_heads: int
    head_dim: int
    densities: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape [B, T, N, D] of Q, of K and of V."""
        return self.batch, self.grid.num_tokens, self.num_heads, self.head_dim


CASES = {
    "long": Case(
        grid=VideoGrid(4, 64, 64),  # 128 blocks of 128
        batch=1,
        num_heads=1,
        head_dim=128,
        densities=(1.0, 0.5, 0.25, 0.1),
    ),
    "mini": Case(
        grid=VideoGrid(12, 12, 16, tile=(4, 8)),  # 72 blocks of 32
        batch=2,
        num_heads=3,
        head_dim=128,
        densities=(1.0, 0.5, 0.25, 0.1),
    ),
}

# Issue 2: time at density 0.1 over time at density 1.0 of the same backend.
LARGEST_RATIO = 0.25


def random_qkv(case: Case) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Standard normal q, k and v."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, *case.shape))
    return q, k, v


def random_mask(case: Case, density: float) -> BlockMask:
    """Keeps `density` of the key blocks in every row, at random places."""
    num_blocks = case.grid.num_blocks
    num_kept = max(1, round(density * num_blocks))
    shape = (case.batch, case.num_heads, num_blocks, num_blocks)
    draws = np.random.default_rng(0).random(shape)
    kept = draws.argsort(-1).argsort(-1) < num_kept
    return BlockMask.from_dense(
        jnp.asarray(kept), grid=case.grid, capacity=num_blocks * num_kept
    )


def compile_attention(case: Case, mask: BlockMask | None) -> jax.stages.Compiled:
    """Sparse attention for masks of this capacity; dense attention for None."""
    qkv = (jax.ShapeDtypeStruct(case.shape, jnp.float32),) * 3
    if mask is None:
        dense = functools.partial(dense_attention, grid=case.grid)
        return jax.jit(dense).lower(*qkv).compile()
    sparse = functools.partial(
        block_sparse_attention, grid=case.grid, order="tiled", backend="xla"
    )
    return jax.jit(sparse).lower(*qkv, jax.eval_shape(lambda: mask)).compile()


def time_in_turns(
    variants: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, dict[str, Any]]:
    """Runs every variant once to warm up, then all of them `repeats` times in turns."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        jax.block_until_ready(call())
    for _ in range(repeats):
        for name, call in variants.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: summary(values) for name, values in times.items()}


def summary(times_ms: list[float]) -> dict[str, Any]:
    """Minimum, median and quartiles of milliseconds."""
    low, median, high = np.percentile(times_ms, (25, 50, 75))
    return {
        "min_ms": round(min(times_ms), 3),
        "median_ms": round(float(median), 3),
        "quartiles_ms": [round(float(low), 3), round(float(high), 3)],
        "repeats": len(times_ms),
    }


def measure_attention(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Times of dense attention and of the XLA backend at each density."""
    q, k, v = random_qkv(case)
    masks = {density: random_mask(case, density) for density in case.densities}
    compiled = {"dense_attention": compile_attention(case, None)}
    variants = {"dense_attention": lambda: compiled["dense_attention"](q, k, v)}
    for density, mask in masks.items():
        name = f"xla {density:g}"
        compiled[name] = compile_attention(case, mask)
        variants[name] = functools.partial(compiled[name], q, k, v, mask)
    rows = []
    times = time_in_turns(variants, repeats)
    for name, program in compiled.items():
        memory = program.memory_analysis()
        assert memory is not None, "XLA:CPU always has one"
        temporary = round(memory.temp_size_in_bytes / MIB, 1)
        rows.append(
            {"name": name} | times[name] | {"compiled_temporary_mib": temporary}
        )
    for density, row in zip(case.densities, rows[1:], strict=True):
        row["density"] = round(float(masks[density].density.mean()), 6)
    return rows


def measure_whole(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Times of `draft_attention` and of its parts, at sparsity 0.5, 0.75 and 0.9."""
    q, k, v = random_qkv(case)
    dense = jax.jit(functools.partial(dense_attention, grid=case.grid))
    variants: dict[str, Callable[[], Any]] = {
        "dense_attention": functools.partial(dense, q, k, v)
    }
    for sparsity in (0.5, 0.75, 0.9):
        options: dict[str, Any] = {
            "grid": case.grid,
            "config": DraftConfig.paper(sparsity=sparsity),
        }
        draft = jax.jit(functools.partial(compute_mask, order="tiled", **options))
        mask = draft(q, k)
        given = functools.partial(
            block_sparse_attention, grid=case.grid, order="tiled", backend="xla"
        )
        variants |= {
            f"pool, scores, selection {sparsity:g}": functools.partial(draft, q, k),
            f"attention with that mask {sparsity:g}": functools.partial(
                jax.jit(given), q, k, v, mask
            ),
        }
        for order in ("tiled", "raster"):
            whole = jax.jit(
                functools.partial(
                    draft_attention, order=order, backend="xla", **options
                )
            )
            name = f"draft_attention, {order} {sparsity:g}"
            variants[name] = functools.partial(whole, q, k, v)
    times = time_in_turns(variants, repeats)
    return [{"name": name} | values for name, values in times.items()]


def measure_memory(name: str) -> dict[str, Any]:
    """Peak resident memory of one call at density 1.0, in a process of its own.

    The peak of the process includes Python, JAX, compilation and the inputs.
    """
    module = "benchmarks.attention.cpu"
    command = [sys.executable, "-m", module, "--peak-memory-of", name]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    before, after, whole = json.loads(done.stdout.splitlines()[-1])
    num_tokens = CASES[name].grid.num_tokens
    return {
        "density": 1.0,
        "added_by_call_mib": round((after - before) / MIB, 1),
        "process_peak_mib": round(whole / MIB, 1),
        "one_n_by_n_float32_array_mib": round(4 * num_tokens**2 / MIB, 1),
    }


def print_peak_memory(name: str) -> None:
    """Prints the peaks of one call: the child process of `measure_memory`."""
    case = CASES[name]
    qkv, mask = random_qkv(case), random_mask(case, 1.0)
    call = compile_attention(case, mask)
    jax.block_until_ready((qkv, mask))
    whole_peak = host_peak_bytes()
    before = host_peak_bytes(reset=True)
    jax.block_until_ready(call(*qkv, mask))
    after = host_peak_bytes()
    print(json.dumps([before, after, max(whole_peak, after)]))


def describe_run() -> dict[str, Any]:
    """Returns the machine, date and versions of the numbers."""
    return {
        **provenance(),
        "cpu": cpu_model(),
        "cpus_usable": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "flags": os.environ.get("XLA_FLAGS", ""),
        "dtype": "float32",
    }


def cpu_model() -> str:
    """Name of the processor."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def describe_case(case: Case) -> dict[str, Any]:
    """Sizes of a case, for its record."""
    grid = case.grid
    return {
        "shape": list(case.shape),
        "axes": "batch, tokens, heads, head_dim",
        "grid": [grid.frames, grid.height, grid.width],
        "tile": list(grid.tile),
        "blocks": grid.num_blocks,
        "block_tokens": grid.block_size,
    }


def find_row(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The row of a variant."""
    return next(row for row in rows if row["name"] == name)


def check(results: dict[str, Any]) -> dict[str, Any]:
    """Compares the results with what is promised."""
    rows, memory = results["long"]["rows"], results["long"]["memory"]
    sparse, full = (find_row(rows, f"xla {d:g}") for d in (0.1, 1.0))
    mini = results["mini"]["rows"]
    at_quarter, dense = (find_row(mini, n) for n in ("xla 0.25", "dense_attention"))
    limit = memory["one_n_by_n_float32_array_mib"]
    ratio = sparse["median_ms"] / full["median_ms"]
    return {
        "long_time_ratio_0.1_to_1.0": round(ratio, 4),
        "long_time_ratio_of_minima": round(sparse["min_ms"] / full["min_ms"], 4),
        "long_ratio_is_below_0.25": ratio < LARGEST_RATIO,
        "no_n_by_n_array_compiled": full["compiled_temporary_mib"] < limit,
        "no_n_by_n_array_in_process": memory["process_peak_mib"] < limit,
        "mini_speedup_over_dense_at_0.25": round(
            dense["median_ms"] / at_quarter["median_ms"], 2
        ),
        "mini_is_faster_than_dense_at_0.25": at_quarter["median_ms"]
        < dense["median_ms"],
    }


def print_rows(title: str, rows: list[dict[str, Any]], reference: str) -> None:
    """Prints a table with times relative to one row's."""
    print(f"\n{title}")
    print(f"{'':34}{'median':>10}{'min':>10}{'quartiles':>20}{'time':>8}")
    full = find_row(rows, reference)["median_ms"]
    for row in rows:
        low, high = row["quartiles_ms"]
        print(
            f"{row['name']:34}{row['median_ms']:>8.1f}ms{row['min_ms']:>8.1f}ms"
            f"{f'{low:.1f} to {high:.1f}':>20}{row['median_ms'] / full:>8.2f}"
        )
    print(f"{'':34}time is the median relative to {reference!r}")


def main() -> int:
    """Runs the benchmark; the exit status says whether the promises hold."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15, help="turns (15)")
    parser.add_argument("--output", type=output_file, default=RESULTS)
    parser.add_argument("--peak-memory-of", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats={options.repeats} must be at least 1")
    if options.peak_memory_of:
        print_peak_memory(options.peak_memory_of)
        return 0
    results: dict[str, Any] = {"run": describe_run()}
    for name, case in CASES.items():
        rows = measure_attention(case, options.repeats)
        results[name] = {"case": describe_case(case), "rows": rows}
        print_rows(f"{name}: {case.shape}, {case.grid}", rows, "xla 1")
    results["long"]["memory"] = memory = measure_memory("long")
    whole = measure_whole(CASES["mini"], options.repeats)
    results["whole"] = {"case": describe_case(CASES["mini"]), "rows": whole}
    print_rows("whole, by sparsity", whole, "dense_attention")
    print(f"\nmemory: {json.dumps(memory, indent=2)}")
    results["run"]["load_after"] = round(os.getloadavg()[0], 2)
    results["checks"] = checks = check(results)
    print(f"\nchecks: {json.dumps(checks, indent=2)}")
    write_json(options.output, results)
    print(f"\nwrote {options.output}")
    return 0 if all(v for v in checks.values() if isinstance(v, bool)) else 1


if __name__ == "__main__":
    sys.exit(main())
