"""Profiles single launches of the Hopper kernel, and cuDNN's, with Nsight Compute.

    python -m benchmarks.hopper_profile --output hopper_profile.json

A launch that is profiled alone, with pauses, runs at a higher clock than a benchmark's:
its times are not the benchmark's, its shares of cycles are what to read. Every metric
of `SECTIONS` that is a share, a rate or a time is stored under Nsight Compute's name.
"""

import argparse
import csv
import json
import os
import pathlib
import re
import sys
import tempfile

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks.programs import cache_in, run_limited

CALLS = 2  # the first one warms up
SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "WarpStateStats",
)
# The kernel's second launch, for repairs, is in every call too: the third is profiled.
KERNELS = {"ours": ("block_sparse", 2), "cudnn": ("cudnn|sdpa|fmha", 1)}
KEPT = re.compile(
    r"\.pct|_pct|hit_rate|time_duration\.sum$|per_cycle|cycles_elapsed|per_second|ratio"
)


def call(options: argparse.Namespace) -> None:
    """Calls one contender a few times: what the profiler looks at."""
    import jax

    from benchmarks import attention

    shape = attention.SHAPES[options.shape]
    qkv = attention.random_inputs(shape)
    if options.contender == "cudnn":
        run, wait = attention.cudnn_dense(shape, qkv)
    else:
        mask = attention.random_mask(
            shape.grid, 1, shape.num_heads, options.densities[0]
        )
        run, wait = attention.ours(shape, qkv, jax.block_until_ready(mask))
    for _ in range(CALLS):
        wait(run())


def profile(options: argparse.Namespace, contender: str, density: float) -> dict:
    """One launch's metrics, or what failed."""
    program = [sys.executable, "-m", "benchmarks.hopper_profile", "--call", contender]
    program += ["--shape", options.shape, "--densities", str(density)]
    pattern, skipped = KERNELS[contender]
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder, "report.csv")
        ncu = ["ncu", "--clock-control", "none", "--csv", "--page", "raw"]
        ncu += ["--log-file", str(report), "--kernel-name", f"regex:{pattern}"]
        ncu += ["--launch-skip", str(skipped), "--launch-count", "1"]
        for section in SECTIONS:
            ncu += ["--section", section]
        variables = cache_in(folder)
        for command in (program, [*ncu, *program]):
            status, output = run_limited(command, options.limit, variables)
            if status != 0:
                log = report.read_text() if report.exists() else ""
                return {"error": f"exit status {status}: {(output + log)[-500:]}"}
        return metrics(report.read_text())


def metrics(report: str) -> dict[str, object]:
    """Shares, rates and times of the one launch of ncu's comma-separated raw page.

    Lines before the table, which the profiler writes, are passed over.

    Raises:
      ValueError: there is no table, or no launch in it.
    """
    lines = [line for line in report.splitlines() if line.startswith('"')]
    rows = list(csv.reader(lines))
    if len(rows) < 3:
        raise ValueError(f"no launch was profiled: {report[-500:]}")
    names, units, values = rows[:3]
    found: dict[str, object] = {}
    for name, unit, value in zip(names, units, values, strict=True):
        if name == "Kernel Name":
            found["kernel"] = value[:80]
        elif KEPT.search(name):
            key = f"{name} [{unit}]" if unit else name
            found[key] = _number(value)
    return found


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    from benchmarks.attention import SHAPES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="hunyuan")
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.1])
    parser.add_argument("--contenders", nargs="+", choices=KERNELS, default=[*KERNELS])
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for each")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file")
    parser.add_argument("--call", dest="contender", choices=KERNELS, help=call.__doc__)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.contender is not None:
        call(options)
        return
    from benchmarks.attention import write_results

    results = []
    for contender in options.contenders:
        for density in options.densities if contender == "ours" else [1.0]:
            found = profile(options, contender, density)
            case = {"contender": contender, "shape": options.shape, "density": density}
            results.append(case | found)
            print(json.dumps(results[-1], indent=1), flush=True)
            if options.output is not None:
                write_results(options.output, results, sections=SECTIONS)
    if any("error" in result for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
