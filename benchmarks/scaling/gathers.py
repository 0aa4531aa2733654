"""Times what spread weights cost by themselves: a layer of a stack made whole."""

import functools
import statistics

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from benchmarks.common.records import recorded
from benchmarks.common.timing import take_turns
from benchmarks.scaling.bench import Bench, Program, Record
from models.diffusion.transformer.sharded import ShardedTransformer, spread_weights
from models.diffusion.transformer.weight_shards import state_paths

STACK = "blocks"


class GatherPart:
    """The first layer of the spread model, gathered on every device."""

    name = "gather"

    def __init__(self, bench: Bench, model: ShardedTransformer) -> None:
        self.bench = bench
        self.state = nnx.state(getattr(model.model, STACK))
        paths = {(STACK, *path): leaf for path, leaf in state_paths(self.state).items()}
        shapes = {path: leaf.shape for path, leaf in paths.items()}
        weights = spread_weights(shapes, model.layout, (STACK,))
        assert weights is not None  # a mesh that spreads weights
        specs = [weights.spec(path) for path in paths]
        tree = jax.tree.structure(self.state)

        def gather(state):
            first = jax.tree.map(lambda leaf: leaf[0], state)
            return weights.gather_layer(STACK, first)

        mapped = jax.shard_map(
            gather,
            mesh=model.mesh,
            in_specs=(jax.tree.unflatten(tree, specs),),
            out_specs=P(),
            check_vma=False,
        )
        own = sum(leaf.addressable_data(0).nbytes for leaf in paths.values())
        layers = next(iter(shapes.values()))[0]
        whole = sum(leaf.nbytes for leaf in paths.values()) / layers
        self.received_bytes = whole - own / layers
        lower = functools.partial(jax.jit(mapped).lower, self.state)
        self.program: Program = bench.compile(lower)

    def measure(self) -> None:
        """Times it."""
        bench, options = self.bench, self.bench.options
        record: Record = {"received_bytes": self.received_bytes}
        with recorded(record):
            program, _ = bench.program(self.program)
            jax.block_until_ready(program(self.state))
            calls = {self.name: functools.partial(program, self.state)}
            turns = take_turns(
                calls, options.rounds, options.settle / 3, options.block / 3
            )
            record["samples_ms"] = turns[self.name]["ms"]
            record["ms"] = statistics.median(turns[self.name]["ms"])
            record["gb_per_s"] = self.received_bytes / record["ms"] / 1e6
            bench.summarise(
                gather_layer_ms=record["ms"], gather_gb_per_s=record["gb_per_s"]
            )
        bench.keep(self.name, "layer", record, record)
