"""Profiles single launches of the Hopper kernel, and cuDNN's, with Nsight Compute.

    python -m benchmarks.attention.profile --output hopper_profile.json

A launch that is profiled alone, with pauses, runs at a higher clock than a benchmark's:
its times are not the benchmark's, its shares of cycles are what to read.
"""

import argparse
import csv
import os
import pathlib
import sys
import tempfile

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks.common.options import add_output, make_parser
from benchmarks.common.programs import cache_in, run_limited
from benchmarks.common.records import ResultFile
from benchmarks.common.shapes import SHAPES

CALLS = 2  # the first one warms up
OF_PEAK = ".avg.pct_of_peak_sustained_elapsed"
# Nsight Compute's names, and what to multiply its base units with.
METRICS = {
    "duration_ms": ("gpu__time_duration.sum", 1e-6),
    "clock_mhz": ("gpc__cycles_elapsed.avg.per_second", 1e-6),
    "cycles": ("gpc__cycles_elapsed.max", 1.0),
    "instructions_per_cycle": ("sm__inst_executed.avg.per_cycle_active", 1.0),
    "tensor_cores_pct": (f"sm__pipe_tensor_cycles_active{OF_PEAK}", 1.0),
    "exponentials_pct": (f"sm__inst_executed_pipe_xu{OF_PEAK}", 1.0),
    "fma_pct": (f"sm__pipe_fma_cycles_active{OF_PEAK}", 1.0),
    "alu_pct": (f"sm__pipe_alu_cycles_active{OF_PEAK}", 1.0),
    "shared_memory_pct": (f"l1tex__data_pipe_lsu_wavefronts{OF_PEAK}", 1.0),
    "l2_pct": (f"lts__throughput{OF_PEAK}", 1.0),
    "l2_hit_pct": ("lts__t_sector_hit_rate.pct", 1.0),
    "dram_pct": (f"gpu__dram_throughput{OF_PEAK}", 1.0),
}
# The kernel's second launch, for repairs, is in every call too: the third is profiled.
KERNELS = {"ours": ("block_sparse", 2), "cudnn": ("cudnn|sdpa|fmha", 1)}


def call(options: argparse.Namespace) -> None:
    """Calls one contender a few times: what the profiler looks at."""
    import jax

    from benchmarks.attention.contenders import CONTENDERS
    from benchmarks.common.inputs import random_inputs, random_mask

    shape = SHAPES[options.shape]
    qkv = random_inputs(shape)
    arguments: tuple = (shape, qkv)
    contender = CONTENDERS[options.contender]
    if contender.is_sparse:
        density = options.densities[0]
        mask = random_mask(shape.grid, 1, shape.num_heads, density)
        arguments += (jax.block_until_ready(mask),)
    run, wait = contender.make(*arguments)
    for _ in range(CALLS):
        wait(run())


def profile(options: argparse.Namespace, contender: str, density: float) -> dict:
    """One launch's metrics, or what failed."""
    program = [
        sys.executable,
        "-m",
        "benchmarks.attention.profile",
        "--call",
        contender,
    ]
    program += ["--shape", options.shape, "--densities", str(density)]
    pattern, skipped = KERNELS[contender]
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder, "report.csv")
        ncu = ["ncu", "--clock-control", "none", "--csv", "--page", "raw"]
        ncu += ["--print-units", "base"]
        ncu += ["--log-file", str(report), "--kernel-name", f"regex:{pattern}"]
        ncu += ["--launch-skip", str(skipped), "--launch-count", "1"]
        ncu += ["--metrics", ",".join(name for name, _ in METRICS.values())]
        variables = cache_in(folder)
        for command in (program, [*ncu, *program]):
            status, output = run_limited(command, options.limit, variables)
            if status != 0:
                log = report.read_text() if report.exists() else ""
                return {"error": f"exit status {status}: {(output + log)[-500:]}"}
        try:
            return metrics(report.read_text())
        except ValueError as error:
            return {"error": str(error)}


def metrics(report: str) -> dict[str, object]:
    """`METRICS` of the one launch in ncu's comma-separated raw page, in base units.

    Lines before the table, which the profiler writes, are passed over.

    Raises:
      ValueError: there is no table, no launch in it, or no number for a metric.
    """
    lines = [line for line in report.splitlines() if line.startswith('"')]
    rows = list(csv.reader(lines))
    if len(rows) < 3:
        raise ValueError(f"no launch was profiled: {report[-500:]}")
    names, _, values = rows[:3]
    found = dict(zip(names, values, strict=True))
    missing = [name for name, _ in METRICS.values() if name not in found]
    if missing:
        raise ValueError(f"ncu says nothing of {missing}")
    return {"kernel": found["Kernel Name"][:80]} | {
        key: float(f"{float(found[name].replace(',', '')) * scale:.4g}")
        for key, (name, scale) in METRICS.items()
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="hunyuan")
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.1])
    parser.add_argument("--contenders", nargs="+", choices=KERNELS, default=[*KERNELS])
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for each")
    add_output(parser)
    parser.add_argument("--call", dest="contender", choices=KERNELS, help=call.__doc__)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Profiles each contender; exits with an error if one could not be."""
    options = parse(arguments)
    if options.contender is not None:
        call(options)
        return
    stored = ResultFile(options.output)
    for contender in options.contenders:
        for density in options.densities if contender == "ours" else [1.0]:
            found = profile(options, contender, density)
            case = {"contender": contender, "shape": options.shape, "density": density}
            stored.add(case | found)
    if any("error" in result for result in stored.results):
        sys.exit(1)


if __name__ == "__main__":
    main()
