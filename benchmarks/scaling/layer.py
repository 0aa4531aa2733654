"""An attention layer on one device, and sharded by heads over several.

Layers take turns on the same inputs: one device; plain jit of inputs sharded by heads;
explicit mesh axes; `jax.shard_map` with its checks. What each program communicates is
counted in it: it must be nothing.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.common.inputs import random_inputs
from benchmarks.common.records import recorded
from benchmarks.common.shapes import Shape
from benchmarks.common.timing import take_turns
from benchmarks.layer.stages import LAYER_SHAPES
from benchmarks.scaling.bench import Bench, Program, Record
from benchmarks.scaling.traffic import traffic
from draft_jax import DraftConfig, draft_attention

HEADS = P(None, None, "heads", None)
ONE = "one device"
# Names in the summary, by how a program is sharded.
WAYS = {
    "plain jit": "layer",
    "explicit axes": "layer_explicit",
    "shard_map": "layer_shard_map",
}
Layer = tuple[Callable[..., jax.Array], NamedSharding | None]


def layers(shape: Shape, sparsity: float, counts: list[int]) -> dict[str, Layer]:
    """Returns each program, and how its inputs are sharded."""
    layer = functools.partial(
        draft_attention,
        grid=shape.grid,
        config=DraftConfig.paper(sparsity=sparsity),
        order="tiled",
    )
    found: dict[str, Layer] = {ONE: (layer, None)}
    for count in counts:
        devices = np.array(jax.devices()[:count])
        automatic = Mesh(devices, ("heads",), axis_types=(AxisType.Auto,))
        explicit = Mesh(devices, ("heads",), axis_types=(AxisType.Explicit,))
        mapped = jax.shard_map(
            layer, mesh=automatic, in_specs=(HEADS,) * 3, out_specs=HEADS
        )
        found |= {
            f"plain jit, {count}": (layer, NamedSharding(automatic, HEADS)),
            f"explicit axes, {count}": (layer, NamedSharding(explicit, HEADS)),
            f"shard_map, {count}": (mapped, NamedSharding(automatic, HEADS)),
        }
    return found


class LayerPart:
    """The layers, whose programs begin to be compiled at once."""

    name = "layer"

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.shape = LAYER_SHAPES[bench.options.shape]
        counts = [n for n in bench.counts if n > 1 and self.shape.num_heads % n == 0]
        self.counts = counts
        qkv = random_inputs(self.shape)
        self.inputs: dict[str, tuple[jax.Array, ...]] = {}
        self.programs: dict[str, Program] = {}
        for name, (layer, sharding) in layers(
            self.shape, bench.options.sparsity, counts
        ).items():
            inputs = qkv if sharding is None else jax.device_put(qkv, sharding)
            self.inputs[name] = inputs
            lower = functools.partial(jax.jit(layer).lower, *inputs)
            self.programs[name] = bench.compile(lower)

    def measure(self) -> None:
        """Compares results with one device's, and runs the programs in turns."""
        bench = self.bench
        calls: dict[str, Callable[[], Any]] = {}
        records: dict[str, Record] = {}
        expected: np.ndarray | None = None
        bench.document["layer_shape"] = {
            "name": bench.options.shape,
            **dataclasses.asdict(self.shape),
            "grid": str(self.shape.grid),
        }
        for name, waiting in self.programs.items():
            record = records[name] = {}
            with recorded(record):
                program, record["compile_s"] = bench.program(waiting)
                record["traffic"] = traffic(program.as_text() or "")
                out = program(*self.inputs[name])
                if expected is None:
                    expected = np.asarray(out, np.float32)
                record |= compare(out, expected)
                calls[name] = functools.partial(program, *self.inputs[name])
            bench.keep(self.name, name, record, record)
        options = bench.options
        for name, own in take_turns(
            calls, options.rounds, options.settle, options.block
        ).items():
            records[name] |= own
            bench.keep(self.name, name, records[name], {"ms": own["ms"]})
        bench.summarise(**self.figures(records))

    def figures(self, records: dict[str, Record]) -> dict[str, float]:
        """Returns how many times faster than one device each program is."""
        one = records.get(ONE, {}).get("ms")
        return {
            f"{key}_{count}": statistics.median(one)
            / statistics.median(records[f"{way}, {count}"]["ms"])
            for way, key in WAYS.items()
            for count in self.counts
            if one and "ms" in records[f"{way}, {count}"]
        }


def compare(out: jax.Array, expected: np.ndarray) -> Record:
    """Says whether an output is that of one device, and by how much it differs."""
    got = np.asarray(out, np.float32)
    return {
        "equals_one_device": bool((got == expected).all()),
        "relative_error": float(
            np.linalg.norm(got - expected) / np.linalg.norm(expected)
        ),
    }
