"""Times an attention layer, and steps of whole models, on one device and several.

    python -m benchmarks.scaling.run --output scaling.json
    python -m benchmarks.scaling.run --devices 2 --shape hunyuan --sparsity 0.9
    python -m benchmarks.scaling.run --parts wan --devices 4

Part "layer": layers take turns on the same inputs: one device; plain jit of inputs
sharded by heads; explicit mesh axes; `jax.shard_map` with its checks. What each program
communicates is counted in it: it must be nothing. The file is written after every
measurement. Its `summary` has `layer_N`, how many times faster N devices are under
plain jit, and the same of the other programs.

Parts "wan" and "hunyuan": steps with `DeviceMesh`; see `benchmarks.scaling.steps`. The
summary has how many times faster they are (`step_sequence_N`, `step_guidance_2`,
`hunyuan_step_N`), the share of the weights that a device holds when they are spread
(`weights_memory_ratio`), and the time of a step then over that without
(`weights_time_ratio`).

Without GPUs it runs on simulated devices, where times say nothing:

    XLA_FLAGS=--xla_force_host_platform_device_count=2 \
        python -m benchmarks.scaling.run --shape tiny --wan tiny --sparsity 0.5
"""

import argparse
import dataclasses
import functools
import json
import re
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.common.inputs import random_inputs
from benchmarks.common.options import add_output, add_turns, make_parser
from benchmarks.common.records import environment, write_json
from benchmarks.common.shapes import Shape
from benchmarks.common.timing import take_turns
from benchmarks.layer.stages import LAYER_SHAPES
from benchmarks.scaling import steps
from draft_jax import DraftConfig, draft_attention

HEADS = P(None, None, "heads", None)
COLLECTIVES = r"\b(all-\w+|collective-\w+|reduce-scatter)(?:-start)?\("
ONE = "one device"
PARTS = ("layer", *steps.MODELS)
# Names in the summary, by program.
PROGRAMS = {
    "plain jit": "layer",
    "explicit axes": "layer_explicit",
    "shard_map": "layer_shard_map",
}


def programs(
    shape: Shape, sparsity: float, num_devices: int
) -> dict[str, tuple[Callable[..., jax.Array], NamedSharding | None]]:
    """Returns each program, and how its inputs are sharded."""
    layer = functools.partial(
        draft_attention,
        grid=shape.grid,
        config=DraftConfig.paper(sparsity=sparsity),
        order="tiled",
    )
    devices = np.array(jax.devices()[:num_devices])
    automatic = Mesh(devices, ("heads",), axis_types=(AxisType.Auto,))
    explicit = Mesh(devices, ("heads",), axis_types=(AxisType.Explicit,))
    mapped = jax.shard_map(
        layer, mesh=automatic, in_specs=(HEADS,) * 3, out_specs=HEADS
    )
    return {
        ONE: (layer, None),
        "plain jit": (layer, NamedSharding(automatic, HEADS)),
        "explicit axes": (layer, NamedSharding(explicit, HEADS)),
        "shard_map": (mapped, NamedSharding(automatic, HEADS)),
    }


def communicates(text: str) -> list[str]:
    """Names the collectives of a compiled program."""
    return sorted(re.findall(COLLECTIVES, text))


def compare(out: jax.Array, expected: np.ndarray) -> dict[str, Any]:
    """Says whether an output is that of one device, and by how much it differs."""
    got = np.asarray(out, np.float32)
    return {
        "equals_one_device": bool((got == expected).all()),
        "relative_error": float(
            np.linalg.norm(got - expected) / np.linalg.norm(expected)
        ),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measures all parts, and writes the file whenever something is known."""
    shape = LAYER_SHAPES[options.shape]
    num_devices = options.devices or jax.device_count()
    check(shape, num_devices, jax.device_count())
    document: dict[str, Any] = {
        "environment": environment(),
        "sparsity": options.sparsity,
        "devices": num_devices,
        "summary": {},
    }
    if "layer" in options.parts:
        measure_layer(document, shape, num_devices, options)

    def keep(found: dict[str, Any]) -> None:
        document["steps"] = found
        document["summary"] |= steps.summarise(found, num_devices)
        save(document, options)

    steps.measure(options, num_devices, keep)
    return document


def measure_layer(
    document: dict[str, Any],
    shape: Shape,
    num_devices: int,
    options: argparse.Namespace,
) -> None:
    """Runs all programs of a layer, in turns."""
    qkv = random_inputs(shape)
    document |= {
        "shape": dataclasses.asdict(shape) | {"grid": str(shape.grid)},
        "name": options.shape,
        "programs": {},
    }
    calls: dict[str, Callable[[], Any]] = {}
    expected: np.ndarray | None = None
    for name, (layer, sharding) in programs(
        shape, options.sparsity, num_devices
    ).items():
        inputs = qkv if sharding is None else jax.device_put(qkv, sharding)
        record: dict[str, Any] = {}
        document["programs"][name] = record
        try:
            program = jax.jit(layer).lower(*inputs).compile()
            record["collectives"] = communicates(program.as_text() or "")
            out = program(*inputs)
            if expected is None:
                expected = np.asarray(out, np.float32)
            record |= compare(out, expected)
            calls[name] = functools.partial(program, *inputs)
        except Exception as error:  # recorded: the others still run
            record["error"] = f"{type(error).__name__}: {error}"[:800]
        save(document, options)
    times = take_turns(calls, options.rounds, options.settle, options.block)
    for name, own in times.items():
        document["programs"][name] |= own
    document["summary"] |= summary(document["programs"], num_devices)
    save(document, options)


def check(shape: Shape, num_devices: int, available: int) -> None:
    """Exits with a message unless the heads can be shared by so many devices."""
    if not 2 <= num_devices <= available:
        raise SystemExit(f"--devices {num_devices} must be within 2 and {available}")
    if shape.num_heads % num_devices:
        fitting = [n for n in range(2, available + 1) if shape.num_heads % n == 0]
        raise SystemExit(
            f"--devices {num_devices} does not divide {shape.num_heads} heads; "
            f"these do: {fitting}"
        )


def summary(records: dict[str, Any], num_devices: int) -> dict[str, float]:
    """Returns how many times faster than one device each program is."""
    one = records[ONE].get("ms")
    if not one:
        return {}
    return {
        f"{key}_{num_devices}": statistics.median(one)
        / statistics.median(records[name]["ms"])
        for name, key in PROGRAMS.items()
        if records.get(name, {}).get("ms")
    }


def save(document: dict[str, Any], options: argparse.Namespace) -> None:
    """Writes what is known so far."""
    if options.output is not None:
        write_json(options.output, document)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--shape", choices=LAYER_SHAPES, default="hunyuan")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--devices", type=int, help="all by default")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--wan", choices=steps.WAN, default="14b", help="tiny: HunyuanVideo is, too"
    )
    parser.add_argument("--samples", type=int, default=5, help="steps that are timed")
    add_turns(parser, rounds=5, settle=0.3, block=1.0)
    add_output(parser)
    return parser.parse_args(arguments)


def main() -> None:
    """Measures, and prints the summary."""
    document = measure(parse())
    programs = document.get("programs", {})
    found = {name: r.get("collectives", r) for name, r in programs.items()}
    print(json.dumps({"summary": document["summary"], "collectives": found}, indent=1))


if __name__ == "__main__":
    main()
