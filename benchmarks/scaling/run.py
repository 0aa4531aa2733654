"""Times an attention layer, and steps of whole models, on one device and several.

    python -m benchmarks.scaling.run --output scaling.json
    python -m benchmarks.scaling.run --devices 2 4 8 --limit 550 --output scaling.json
    python -m benchmarks.scaling.run --parts layer --shape wan --sparsity 0.75
    python -m benchmarks.scaling.run --parts wan profile --steps step_sequence_2

Any number of devices is measured, or several numbers in one run. Parts, in this order:

  smoke     steps of a tiny model: whether devices can talk at all, in seconds
  layer     an attention layer; see `benchmarks.scaling.layer`
  wan       steps of Wan by `DeviceMesh`: `sequence`, `guidance`, both, and spread
            weights; see `benchmarks.scaling.steps`
  hunyuan   steps of HunyuanVideo
  links     what devices exchange in a layer; see `benchmarks.scaling.links`
  gather    spread weights of a layer made whole
  variants  steps of Wan with several transfers in flight, with copies by the driver or
            permutations in place of all-to-all, and with devices that wait for every
            transfer
  short     a step of Wan whose video has a few tokens: what does not shrink with them
  profile   a step on one device and one with `sequence`, by kernel

All programs are compiled side by side before the first is timed. The file is written
anew after every measurement. No part begins after --limit seconds, and a part ends
after --part-limit; what fails is recorded, and other parts still run. --steps names
the steps on several devices to run, instead of all.

The summary has how many times as fast as one device a layer is under plain jit
(`layer_N`), and steps (`step_sequence_N`, `step_guidance_2`, `step_both_N`,
`hunyuan_step_N`); the share of the weights that a device holds when they are spread
(`weights_memory_ratio`), and the time of a step then over that without
(`weights_time_ratio`); times and rates of transfers.

Without GPUs it runs on simulated devices, where times say nothing:

    XLA_FLAGS=--xla_force_host_platform_device_count=2 \
        python -m benchmarks.scaling.run --shape tiny --wan tiny --sparsity 0.5
"""

import argparse
import json
import math
import os
from collections.abc import Callable
from typing import Any

# Read when JAX first uses the GPU. NCCL's own memory is outside of this share.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.88")

import jax

from benchmarks.common import kernel_account
from benchmarks.common.options import add_output, add_turns, make_parser
from benchmarks.common.records import recorded
from benchmarks.layer.stages import LAYER_SHAPES
from benchmarks.scaling import models
from benchmarks.scaling.bench import Bench, Record
from benchmarks.scaling.gathers import GatherPart
from benchmarks.scaling.layer import LayerPart
from benchmarks.scaling.links import LinksPart
from benchmarks.scaling.steps import ONE, StepsPart, Way

OF_WAN = {"gather", "variants", "short", "profile"}
OF_SEVERAL = {"gather", "variants"}


class ProfilePart:
    """A step of one device and one with the most of `sequence`, under CUPTI."""

    name = "profile"

    def __init__(self, bench: Bench, wan: StepsPart) -> None:
        self.bench, self.wan = bench, wan

    def measure(self) -> None:
        """Runs both once more."""
        for name in (ONE, f"step_sequence_{max(self.bench.counts)}"):
            run = self.wan.runs.get(name)
            if run is None or not run.programs or self.bench.left_s() < 0:
                continue
            mesh = run.way.mesh
            record: Record = {"devices": 1 if mesh is None else mesh.num_devices}
            with recorded(record):
                report, launches = kernel_account.profile(run.step)
                calls = run.problem.calls * run.problem.model.num_layers
                record |= kernel_account.account(launches, num_blocks=calls)
                record["step_ms"] = report.time_ms
            shown = {k: v for k, v in record.items() if k != "costliest"}
            self.bench.keep(self.name, name, record, shown)


def _asked(bench: Bench, ways: dict[str, Way]) -> dict[str, Way]:
    """Returns the ways that --steps names, and that of one device."""
    names = bench.options.steps
    if names is None:
        return ways
    return {name: way for name, way in ways.items() if name in {ONE, *names}}


def _smoke(bench: Bench, _: dict[str, Any]) -> StepsPart:
    ways = models.wan_ways(bench.counts) | models.variants(max(bench.counts))
    model = models.wan_model(bench, "tiny")
    return models.wan_part(bench, "smoke", model, "tiny", _asked(bench, ways))


def _wan(bench: Bench, _: dict[str, Any]) -> StepsPart:
    name, ways = bench.options.wan, _asked(bench, models.wan_ways(bench.counts))
    return models.wan_part(bench, "wan", models.wan_model(bench, name), name, ways)


def _hunyuan(bench: Bench, _: dict[str, Any]) -> StepsPart:
    name = "tiny" if bench.options.wan == "tiny" else "13b"
    ways = _asked(bench, models.hunyuan_ways(bench.counts))
    return models.hunyuan_part(bench, "hunyuan", name, ways)


def _variants(bench: Bench, made: dict[str, Any]) -> StepsPart:
    ways = _asked(bench, models.variants(max(bench.counts)))
    return models.variants_part(bench, made["wan"], ways)


def _gather(bench: Bench, made: dict[str, Any]) -> GatherPart:
    return GatherPart(bench, made["wan"].runs["weights"].problem.model)


MAKE: dict[str, Callable[[Bench, dict[str, Any]], Any]] = {
    "smoke": _smoke,
    "layer": lambda bench, _: LayerPart(bench),
    "wan": _wan,
    "hunyuan": _hunyuan,
    "links": lambda bench, _: LinksPart(bench, models.layer_of(bench.options.wan)),
    "gather": _gather,
    "variants": _variants,
    "short": lambda bench, made: models.short_part(bench, made["wan"]),
    "profile": lambda bench, made: ProfilePart(bench, made["wan"]),
}


def make_parts(bench: Bench) -> dict[str, Any]:
    """Makes the parts that are asked for; their programs begin to be compiled."""
    made: dict[str, Any] = {}
    for name in MAKE:
        one_device = max(bench.counts) == 1
        if name not in bench.options.parts or (one_device and name in OF_SEVERAL):
            continue
        record: Record = {}
        with recorded(record):
            made[name] = MAKE[name](bench, made)
        if record:
            bench.keep(name, "preparation", record, record)
    return made


def measure(options: argparse.Namespace) -> Record:
    """Measures all parts."""
    counts = device_counts(options)
    check_steps(options, counts)
    bench = Bench(options, counts)
    try:
        parts = make_parts(bench)
        bench.wait_for_programs(options.compile_limit)
        for name, part in parts.items():
            bench.begin()
            failure: Record = {}
            if bench.left_s() <= 0:
                failure["error"] = f"not begun: the limit was {options.limit} s"
            else:
                with recorded(failure):
                    part.measure()
            if failure:
                bench.keep(name, "failure", failure, failure)
    finally:
        bench.close()
    return bench.document


def device_counts(options: argparse.Namespace) -> list[int]:
    """Returns the numbers of devices to measure.

    Exits with a message if there are fewer, or the layer's heads cannot be shared.
    """
    available = jax.device_count()
    counts = sorted(set(options.devices or [available]))
    if not 1 <= counts[0] <= counts[-1] <= available:
        raise SystemExit(f"--devices {counts} must be within 1 and {available}")
    heads = LAYER_SHAPES[options.shape].num_heads
    for count in counts:
        if "layer" in options.parts and heads % count:
            fitting = [n for n in range(1, available + 1) if heads % n == 0]
            raise SystemExit(
                f"--devices {count} does not divide {heads} heads; these do: {fitting}"
            )
    return counts


def check_steps(options: argparse.Namespace, counts: list[int]) -> None:
    """Exits with a message if --steps names a step that no part has."""
    makers = models.wan_ways, models.hunyuan_ways
    known = {name for make in makers for name in make(counts)} | {
        *models.variants(max(counts))
    }
    unknown = sorted(set(options.steps or ()) - known)
    if unknown:
        raise SystemExit(f"--steps {unknown} must be among {sorted(known)}")
    needed = {"variants": f"step_sequence_{max(counts)}", "gather": "weights"}
    for part, name in needed.items():
        if options.steps and part in options.parts and name not in options.steps:
            raise SystemExit(f"--parts {part} needs --steps {name}, too")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--shape", choices=LAYER_SHAPES, default="hunyuan", help="of the layer")
    add("--sparsity", type=float, default=0.9)
    add("--devices", type=int, nargs="+", help="numbers of them; all by default")
    add("--parts", nargs="+", choices=MAKE, default=list(MAKE))
    add("--wan", choices=models.WAN, default="14b", help="tiny: HunyuanVideo is, too")
    add("--steps", nargs="+", metavar="STEP", help="such as step_sequence_2")
    add("--samples", type=int, default=3, help="steps that are timed in each way")
    add("--limit", type=float, default=math.inf, help="seconds")
    add("--part-limit", type=float, default=math.inf, help="seconds of each part")
    add("--compile-limit", type=float, default=math.inf, help="seconds to wait")
    add_turns(parser, rounds=5, settle=0.3, block=1.0)
    add_output(parser)
    options = parser.parse_args(arguments)
    alone = OF_WAN.intersection(options.parts)
    if alone and "wan" not in options.parts:
        parser.error(f"--parts {sorted(alone)} need the part wan, too")
    return options


def main() -> None:
    """Measures, and prints the summary."""
    document = measure(parse())
    print(json.dumps(document["summary"], indent=1), flush=True)


if __name__ == "__main__":
    main()
