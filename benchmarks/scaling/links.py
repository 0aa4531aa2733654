"""How fast devices exchange what a layer exchanges.

Arrays are those of Wan's attention at the size of the steps: on each device a part of
the tokens, all heads. Programs take turns. What is in a record:

  ms              a call
  sent_bytes      by each device to all others
  gb_per_s        these over the time, of one direction

"to heads" and "to tokens" are the all-to-all with what puts its parts together.
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.common.records import recorded
from benchmarks.common.timing import take_turns
from benchmarks.scaling.bench import Bench, Program, Record
from models.diffusion.transformer.token_shards import TokenShards

AXIS = "devices"
Function = Callable[[jax.Array], jax.Array]
SMALLER = (8, 64)  # times: transfers from which the cost of starting one follows


def exchange_by_permutes(x: jax.Array, axis: str, count: int) -> jax.Array:
    """Sends part i to device i and returns what came from each, as permutations.

    Of two devices each sends one part; an all-to-all sends all of them through the
    library, also those that stay.
    """
    own = jax.lax.axis_index(axis)
    parts = [jax.lax.dynamic_slice_in_dim(x, own, 1)]
    for shift in range(1, count):
        pairs = [(i, (i + shift) % count) for i in range(count)]
        part = jax.lax.dynamic_slice_in_dim(x, (own + shift) % count, 1)
        parts.append(jax.lax.ppermute(part, axis, pairs))
    # Part s came from device `own - s`.
    order = (own - jnp.arange(count)) % count
    return jnp.concatenate(parts)[order]


def functions(count: int, shape: tuple[int, ...]) -> dict[str, tuple[Function, tuple]]:
    """Returns what is timed, and the shape that each device gives it.

    Args:
      count: Number of devices.
      shape: Tokens of a device, heads and channels.
    """
    tokens, heads, dim = shape
    shards = TokenShards(axis=AXIS, count=count, num_tokens=count * tokens)
    parts = (count, 1, tokens, heads // count, dim)

    def exchange(x):
        return jax.lax.all_to_all(x, AXIS, split_axis=0, concat_axis=0, tiled=True)

    def permute(x):
        pairs = [(i, (i + 1) % count) for i in range(count)]
        return jax.lax.ppermute(x, AXIS, pairs)

    found: dict[str, tuple[Function, tuple]] = {
        "all-to-all": (exchange, parts),
        "ppermute": (permute, (1, *shape)),
        "exchange by permutes": (
            functools.partial(exchange_by_permutes, axis=AXIS, count=count),
            parts,
        ),
        "to heads": (shards.to_heads, (1, *shape)),
        "to tokens": (
            shards.to_tokens,
            (1, count * tokens, heads // count, dim),
        ),
    }
    for factor in SMALLER:
        few = (count, 1, max(tokens // factor, 1), heads // count, dim)
        found[f"all-to-all of 1/{factor}"] = (exchange, few)
    return found


class LinksPart:
    """Transfers between all devices of each number."""

    name = "links"

    def __init__(self, bench: Bench, shape: tuple[int, int, int]) -> None:
        """Starts to compile.

        Args:
          bench: The run.
          shape: Tokens of the whole video, heads and channels.
        """
        self.bench = bench
        self.programs: dict[str, tuple[int, tuple, Program, jax.Array]] = {}
        tokens, heads, dim = shape
        for count in bench.counts:
            if count == 1 or heads % count:
                continue
            mesh = Mesh(np.array(jax.devices()[:count]), (AXIS,))
            own = (tokens // count, heads, dim)
            for name, (function, size) in functions(count, own).items():
                mapped = jax.jit(
                    jax.shard_map(
                        function, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS)
                    )
                )
                x = jax.jit(
                    lambda size=size, count=count: jnp.ones(
                        (count * size[0], *size[1:]), jnp.bfloat16
                    ),
                    out_shardings=NamedSharding(mesh, P(AXIS)),
                )()
                lower = functools.partial(mapped.lower, x)
                program = bench.compile(lower)
                self.programs[f"{name}, {count}"] = (count, size, program, x)

    def measure(self) -> None:
        """Runs the programs in turns."""
        bench, options = self.bench, self.bench.options
        records: dict[str, Record] = {}
        calls: dict[str, Callable[[], Any]] = {}
        for name, (count, size, waiting, x) in self.programs.items():
            record = records[name] = {"devices": count, "sent_bytes": sent(name, size)}
            with recorded(record):
                program, record["compile_s"] = bench.program(waiting)
                jax.block_until_ready(program(x))
                calls[name] = functools.partial(program, x)
        turns = take_turns(calls, options.rounds, options.settle / 3, options.block / 3)
        for name, record in records.items():
            if name in turns:
                record["samples_ms"] = turns[name]["ms"]
                record["ms"] = statistics.median(turns[name]["ms"])
                record["gb_per_s"] = record["sent_bytes"] / record["ms"] / 1e6
            bench.keep(self.name, name, record, record)
        bench.summarise(**figures(records))


def sent(name: str, size: tuple[int, ...]) -> int:
    """Returns the bytes that a device sends to others in one call.

    Args:
      name: Of the program, and of how many devices.
      size: Shape of what a device gives it, in bfloat16.
    """
    count = int(name.rsplit(", ", 1)[1])
    num_bytes = 2 * int(np.prod(size))
    return num_bytes if "ppermute" in name else num_bytes * (count - 1) // count


def figures(records: dict[str, Record]) -> dict[str, float]:
    """Returns the figures of the summary."""
    found: dict[str, float] = {}
    for name, record in records.items():
        what, count = name.rsplit(", ", 1)
        key = what.replace("-", "_").replace(" ", "_").replace("/", "_")
        if "ms" in record and "1/" not in what:
            found[f"{key}_{count}_ms"] = record["ms"]
            found[f"{key}_{count}_gb_per_s"] = record["gb_per_s"]
    return found
