"""Denoising steps of Wan and HunyuanVideo on one device, and on several.

Weights are random, of full size, and in memory: whole on every device, and beside that
spread over them. Programs of all ways are compiled before the first is timed. First
each way runs the first step, from the same noise; then ways take turns. What is in a
record:

  samples_ms         steps, until the result is there
  relative_error     of the first step's estimate of the clean latents, against that of
                     one device
  kept_density       share of computed pairs of all layers, as the report has it
  masks              of three layers after that step: the share of heads whose mask is
                     that of one device, and of one device's pairs that are kept, too
  traffic, sent      what the program sends; see `benchmarks.scaling.traffic`
  weights_gb         weights that the first device holds for it
  program_gb         memory of the program on a device
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.common.gpu_state import GpuState
from benchmarks.common.machine import GB, device_memory
from benchmarks.common.modes import Mode
from benchmarks.common.records import recorded
from benchmarks.common.steps import Problem, make_sampler
from benchmarks.scaling.bench import Bench, Program, Record
from benchmarks.scaling.traffic import totals, traffic
from draft_jax import BlockMask
from models.diffusion.mesh import DeviceMesh
from models.diffusion.results import StepReport
from models.diffusion.sampler import GuidanceBatching, Sampler, SamplerState
from models.diffusion.transformer.sharded import ShardedTransformer

ONE = "one device"
EXTRA_STEPS = 2  # the first, which is compared, and one that is profiled
TURNS = 2  # parts that may time the same program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run a step.

    Attributes:
      mesh: The devices; None for one.
      batching: How a guided step runs the model.
      options: XLA's, for its program.
      patch: Changes the code while its program is traced.
    """

    mesh: DeviceMesh | None = None
    batching: GuidanceBatching = "one_call"
    options: Mapping[str, Any] | None = None
    patch: Callable[[], Any] | None = None


class Run:
    """The steps of one way: a model on its devices, a program and a state."""

    def __init__(
        self,
        bench: Bench,
        whole: nnx.Module,
        way: Way,
        make_problem: Callable[[Any, Way], Problem],
    ) -> None:
        """Starts to compile the program.

        Args:
          bench: The run of the benchmark.
          whole: The model, which every device has.
          way: How it runs.
          make_problem: Makes the steps of a model that is where the way wants it.
        """
        self.bench, self.way, self.index = bench, way, 0
        model = model_of(whole, way.mesh)
        self.problem = make_problem(model, way)
        if isinstance(model, ShardedTransformer):
            inputs = model.put_everywhere(self.problem.inputs)
            self.problem = dataclasses.replace(self.problem, inputs=inputs)
        self.state: SamplerState | None = None
        self.sampler: Sampler | None = None
        options = None if way.options is None else dict(way.options)
        self.waiting: Program = bench.compile(self._lower, options)
        self.programs: dict[Any, Any] = {}

    def _lower(self) -> Any:
        mode = Mode.parse(str(self.bench.options.sparsity))
        count = EXTRA_STEPS + TURNS * self.bench.options.samples
        self.sampler = make_sampler(self.problem, [mode] * count)
        guided = self.problem.calls > 1
        self.state = self.sampler.initial_state(1, seed=0, guided=guided)
        patch = mock.MagicMock() if self.way.patch is None else self.way.patch()
        with patch:
            (lowered,) = self.sampler.lower(self.state, self.problem.inputs).values()
        return lowered

    def wait(self) -> Record:
        """Waits for the program, and says what it is."""
        program, seconds = self.bench.program(self.waiting)
        assert self.sampler is not None  # the program was made with it
        self.programs = {self.sampler.kinds[0]: program}
        sends = traffic(program.as_text() or "")
        stats = program.memory_analysis()
        sizes = ("argument", "output", "temp", "alias")
        return {
            "compile_s": seconds,
            "sent": totals(sends),
            "traffic": sends,
            **held(nnx.state(self.problem.model)),
            "program_gb": {
                name: getattr(stats, f"{name}_size_in_bytes") / GB for name in sizes
            },
        }

    def step(self) -> StepReport:
        """Runs the next step."""
        assert self.sampler is not None  # see `wait`
        assert self.state is not None
        self.state, report = self.sampler.run_step(
            self.programs, self.state, self.problem.inputs, self.index
        )
        self.index += 1
        return report

    def masks(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns row offsets and block ids of some layers' masks: layers, rows, heads.

        None if there are none.
        """
        assert self.state is not None  # see `wait`
        masks: BlockMask | None = self.state.masks
        if masks is None:
            return None
        of_all = masks.row_offsets, masks.block_ids
        offsets, ids = (_by_layer(np.asarray(leaf)) for leaf in of_all)
        layers = sorted({0, len(offsets) // 2, len(offsets) - 1})
        return offsets[layers], ids[layers]


def model_of(whole: nnx.Module, mesh: DeviceMesh | None) -> Any:
    """Returns a model of the same arrays for a mesh, whose whole weights are shared."""
    structure, state = nnx.split(whole)
    if mesh is None:
        return nnx.merge(
            structure, jax.tree.map(lambda x: x.addressable_data(0), state)
        )
    where = NamedSharding(mesh.make(), P())

    def place(x: jax.Array) -> jax.Array:
        parts = [part.data for part in x.addressable_shards[: mesh.num_devices]]
        return jax.make_array_from_single_device_arrays(x.shape, where, parts)

    model: Any = nnx.merge(structure, jax.tree.map(place, state))
    return ShardedTransformer(model, mesh)


class StepsPart:
    """The ways of one model, of which the first is that of one device."""

    def __init__(
        self,
        bench: Bench,
        name: str,
        whole: Any,
        runs: dict[str, Run],
        like: "StepsPart | None" = None,
    ) -> None:
        """Takes the ways.

        Args:
          bench: The run of the benchmark.
          name: Of the part.
          whole: The model, which every device has.
          runs: The ways; those that have run before are timed once more.
          like: A part that has run the model on one device.
        """
        self.bench, self.name, self.whole = bench, name, whole
        self.runs, self.like = runs, like
        self.records: dict[str, Record] = {}
        self.first: tuple[np.ndarray, Any] | None = None

    def measure(self) -> None:
        """Compares first steps, and times others in turns."""
        if self.like is not None:
            self.first = self.like.first
        for name, run in self.runs.items():
            mesh = run.way.mesh
            record = self.records[name] = {"mesh": None if mesh is None else str(mesh)}
            if not run.index:
                with recorded(record):
                    self._compare(run, record)
                self._keep(name)
        for _ in range(self.bench.options.samples):
            for name, run in self.runs.items():
                self._sample(name, run)

    def _compare(self, run: Run, record: Record) -> None:
        """Runs the first step, and compares it with that of one device."""
        record |= run.wait()
        start = time.perf_counter()
        report = run.step()
        record["first_step_s"] = time.perf_counter() - start
        record["kept_density"] = float(report.kept_density.mean())
        estimate = np.asarray(report.estimate, np.float32)
        record["memory"] = device_memory()
        masks = run.masks()
        self.first = self.first or (estimate, masks)
        error = np.linalg.norm(estimate - self.first[0])
        record["relative_error"] = float(error / np.linalg.norm(self.first[0]))
        record["masks"] = compare_masks(masks, self.first[1])

    def _sample(self, name: str, run: Run) -> None:
        """Times one more step, unless the time is over."""
        record = self.records[name]
        last_s = record.get("median_ms", 0.0) / 1e3 or record.get("first_step_s", 0.0)
        if "error" in record or last_s > self.bench.left_s():
            return
        with recorded(record):
            with GpuState() as state:
                time_ms = run.step().time_ms
            record.setdefault("samples_ms", []).append(time_ms)
            record["median_ms"] = statistics.median(record["samples_ms"])
            record |= state.summary
        self._keep(name)

    def _keep(self, name: str) -> None:
        record = self.records[name]
        shown = {k: v for k, v in record.items() if k != "traffic"}
        if "samples_ms" in record:
            shown = {k: record[k] for k in ("samples_ms", "error") if k in record}
        self.bench.keep(self.name, name, record, shown)
        if self.name != "smoke":
            records = {} if self.like is None else self.like.records
            self.bench.summarise(**figures(records | self.records))


def figures(records: dict[str, Record]) -> dict[str, float]:
    """Returns flat figures of one model, as far as their parts were measured.

    Those of a step say how many times as fast it is as on one device.
    """
    found: dict[str, float] = {}
    one = records.get(ONE, {}).get("median_ms")
    for name, record in records.items():
        if one and "median_ms" in record and "step" in name:
            found[name] = one / record["median_ms"]
    spread = records.get("weights", {})
    whole = next(
        (r for r in records.values() if r["mesh"] == spread.get("mesh", "")), {}
    )
    for key, name in (("weights_gb", "memory"), ("median_ms", "time")):
        if key in spread and key in whole:
            found[f"weights_{name}_ratio"] = spread[key] / whole[key]
    return found


def held(state: Any) -> Record:
    """Returns how much of the weights the first device holds."""
    leaves = jax.tree.leaves(state)
    own = sum(x.addressable_data(0).nbytes for x in leaves)
    return {
        "weights_gb": own / GB,
        "all_weights_gb": sum(x.nbytes for x in leaves) / GB,
    }


def compare_masks(
    got: tuple[np.ndarray, np.ndarray] | None,
    expected: tuple[np.ndarray, np.ndarray] | None,
) -> Record:
    """Returns how far masks agree; nothing without masks."""
    if got is None or expected is None:
        return {}
    by_head = [leaf.reshape(-1, leaf.shape[-1]) for leaf in (*got, *expected)]
    equal, common, kept = 0, 0, 0
    for own_offsets, own_ids, *of_one in zip(*by_head, strict=True):
        own, one = _pairs(own_offsets, own_ids), _pairs(*of_one)
        both = np.intersect1d(own, one, assume_unique=True).size
        equal += own.size == one.size == both
        common, kept = common + both, kept + one.size
    return {"equal_heads": equal / len(by_head[0]), "common_pairs": common / kept}


def _pairs(offsets: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Returns the kept pairs of a head as numbers."""
    rows = len(offsets) - 1
    return np.repeat(np.arange(rows), np.diff(offsets)) * rows + ids[: offsets[-1]]


def _by_layer(leaf: np.ndarray) -> np.ndarray:
    """Returns leaves of masks as layers, rows, heads, entries."""
    if leaf.ndim == 4:
        return leaf
    return np.concatenate(list(leaf), axis=1)  # two calls of one row each
