"""Times denoising steps of a model as its pipeline compiles and runs them.

Each kind of step has its program; modes that differ in sparsity share one. What a
record says beside that:

  samples_ms       steps, until the result is there; each program has run once before
  kept_density     share of token pairs that self-attention computed
  peak_gb          that of the process so far
  cudnn            dense steps with cuDNN's attention, where "dense" is the library's;
                   `has_cudnn` says whether their program has it, and not ours
  outside          self-attention is what CUPTI says of its kernels, and of a draft's
                   that have names, in one more step of the sparsest mode; the rest of
                   that mode's median step is outside, idle time included;
                   `share_of_matmul` is its rate over that of the fastest product
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.common import kernel_account
from benchmarks.common.gpu_state import GpuState
from benchmarks.common.machine import GB, device_memory
from benchmarks.common.modes import Mode
from benchmarks.common.records import recorded
from draft_jax import AttentionPlan, DraftConfig, SparsitySchedule
from models.diffusion.interfaces import LatentShape, VideoModel
from models.diffusion.results import StepReport
from models.diffusion.sampler import (
    GuidanceBatching,
    Sampler,
    SamplerState,
    StepInputs,
)
from models.diffusion.schedulers import Solver
from pallas_kernels.attention.sm90 import dense_backend as hopper_dense

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """A model at one size, and what its steps are given.

    Attributes:
      model: The transformer.
      latent_shape: Shape of one item's latent.
      inputs: Text and guidance; two rows of text are guided.
      make_solver: Solver of a number of steps.
      guidance_batching: How guided steps run the model.
      flops_outside: Arithmetic of one call without self-attention's products, by part.
      draft: What sparse modes select, but for the sparsity.
    """

    model: VideoModel
    latent_shape: LatentShape
    inputs: StepInputs
    make_solver: Callable[[int], Solver]
    guidance_batching: GuidanceBatching = "one_call"
    flops_outside: Mapping[str, float]
    draft: DraftConfig = dataclasses.field(default_factory=DraftConfig.paper)

    @property
    def calls(self) -> int:
        """Calls of the model in a step; one with two rows counts as two."""
        return len(self.inputs.context.lengths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """What is measured at one size.

    Attributes:
      modes: Sparsest last.
      sparse: Steps of each sparse mode.
      dense: Steps of each dense mode.
      cudnn: Whether dense steps with cuDNN's attention are timed, too.
      profile: Whether the last mode runs once more under CUPTI.
    """

    modes: Sequence[Mode]
    sparse: int
    dense: int
    cudnn: bool
    profile: bool

    def count(self, mode: Mode) -> int:
        """Steps of a mode."""
        return self.dense if mode.sparsity is None else self.sparse

    @property
    def warm_ups(self) -> list[Mode]:
        """A mode for each program, to warm up: those that differ in sparsity share."""
        return list({mode.program: mode for mode in reversed(self.modes)}.values())

    @property
    def order(self) -> list[Mode]:
        """The mode of each step."""
        order = self.warm_ups
        for mode in self.modes:
            order += [mode] * self.count(mode)
        return order + [self.modes[-1]] * self.profile


def make_sampler(problem: Problem, modes: Sequence[Mode]) -> Sampler:
    """A sampler with one step for each mode."""
    sparsities = [mode.sparsity for mode in modes if mode.sparsity is not None]
    per_step = tuple(mode.sparsity or min(sparsities, default=0.0) for mode in modes)
    attention = AttentionPlan.dense()
    if sparsities:
        attention = AttentionPlan.draft(
            dataclasses.replace(problem.draft, sparsity=min(sparsities)),
            SparsitySchedule(sparsity=per_step),
        )
    sampler = Sampler.create(
        problem.model,
        latent_shape=problem.latent_shape,
        solver=problem.make_solver(len(modes)),
        attention=attention,
        guidance_batching=problem.guidance_batching,
        weight_only_steps=0,  # steps of a mode are alike
    )
    if sampler.plan is None:
        return sampler
    layers = np.arange(problem.model.num_layers)
    dense = [(m.sparsity is None) | np.isin(layers, m.dense_layers) for m in modes]
    refresh = np.array([not mode.reuse for mode in modes])
    plan = dataclasses.replace(sampler.plan, dense=np.stack(dense), refresh=refresh)
    return dataclasses.replace(sampler, plan=plan)


class Steps:
    """The compiled steps of a size, and where its run has got to."""

    def __init__(self, problem: Problem, modes: Sequence[Mode]) -> None:
        self.problem = problem
        self.sampler = make_sampler(problem, modes)
        guided = problem.calls > 1
        self.state: SamplerState = self.sampler.initial_state(1, seed=0, guided=guided)
        start = time.perf_counter()
        self.programs = self.sampler.compile(self.state, problem.inputs)
        self.compile_s = time.perf_counter() - start
        self.index = 0

    def run(self) -> StepReport:
        """The next step of the plan."""
        self.state, report = self.sampler.run_step(
            self.programs, self.state, self.problem.inputs, self.index
        )
        self.index += 1
        return report

    def text(self) -> str:
        """The programs as XLA writes them."""
        programs: Any = self.programs.values()
        return "\n".join(program.as_text() for program in programs)

    def describe(self) -> Record:
        """The programs, before they have run; of sizes, those of the largest."""
        sizes = ("argument", "output", "temp", "alias")
        programs: Any = self.programs.values()
        stats = [program.memory_analysis() for program in programs]
        grid = self.problem.model.grid(self.problem.latent_shape)
        return {
            "tokens": grid.num_tokens,
            "model_calls": self.problem.calls,
            "compile_s": self.compile_s,
            "programs": len(stats),
            "program_gb": {
                name: max(getattr(s, f"{name}_size_in_bytes") for s in stats) / GB
                for name in sizes
            },
            "after_compilation": device_memory(),
        }


def measure_steps(
    problem: Problem, samples: Samples, facts: Record, report: Callable[[Record], None]
) -> None:
    """Runs all modes at one size.

    Args:
      problem: The model and its inputs.
      samples: What is measured.
      facts: What the record begins with.
      report: Takes the record whenever it has grown.
    """
    time_steps(Steps(problem, samples.order), samples, facts, report)


def time_steps(
    steps: "Steps", samples: Samples, facts: Record, report: Callable[[Record], None]
) -> None:
    """Runs all modes of steps that are compiled; see `measure_steps`."""
    modes, problem = samples.modes, steps.problem
    record = facts | steps.describe() | {"modes": {}}
    report(record)
    warm_ups = {mode.name: steps.run().time_ms for mode in samples.warm_ups}
    record["warm_up_ms"] = warm_ups
    for mode in modes:
        with GpuState() as state:
            reports = [steps.run() for _ in range(samples.count(mode))]
        record["modes"][mode.name] = {
            **_times([step.time_ms for step in reports]),
            "kept_density": float(reports[-1].kept_density.mean()),
            **device_memory(),
            **state.summary,
        }
        report(record)
    if samples.cudnn:
        record["cudnn"] = measure_cudnn(problem, samples.dense)
    _compare(record["modes"], record.get("cudnn"))
    report(record)
    if samples.profile:
        median_ms = record["modes"][modes[-1].name]["median_ms"]
        record |= profile_step(steps.run, problem, median_ms)
        report(record)


def measure_cudnn(
    problem: Problem,
    num_samples: int,
    report: Callable[[Record], None] = lambda _: None,
) -> Record:
    """Dense steps with cuDNN's attention; the first is the one to warm up.

    Args:
      problem: The model and its inputs.
      num_samples: Steps that count.
      report: Takes the record after each of them, too.
    """
    return time_cudnn(cudnn_steps(problem, num_samples), num_samples, report)


def cudnn_steps(problem: Problem, num_samples: int) -> Steps:
    """Compiles dense steps with cuDNN's attention: one to warm up, and the samples.

    No other program may be traced meanwhile.
    """
    with cudnn_attention():
        return Steps(problem, [Mode.parse("dense")] * (num_samples + 1))


def time_cudnn(
    steps: Steps, num_samples: int, report: Callable[[Record], None] = lambda _: None
) -> Record:
    """Runs the steps of `cudnn_steps`; see `measure_cudnn`."""
    record: Record = {
        "has_cudnn": _has_cudnn(steps.text()),
        "compile_s": steps.compile_s,
        "warm_up_ms": steps.run().time_ms,
    }
    samples_ms: list[float] = []
    with GpuState() as state:
        for _ in range(num_samples):
            samples_ms.append(steps.run().time_ms)
            record |= _times(samples_ms) | device_memory()
            report(record)
    return record | state.summary


def _has_cudnn(program: str) -> bool:
    """Returns whether self-attention is cuDNN's, which text's may be anyway."""
    return "cudnn" in program and "block_sparse_attention" not in program


def cudnn_attention() -> contextlib.AbstractContextManager[Any]:
    """Lets dense attention take cuDNN's kernel in programs that are traced in it."""
    return mock.patch.object(
        hopper_dense, "why_unsupported", return_value="cuDNN is wanted"
    )


def _times(samples_ms: list[float]) -> Record:
    return {"median_ms": statistics.median(samples_ms), "samples_ms": samples_ms}


def _compare(modes: dict[str, Record], cudnn: Record | None) -> None:
    """Adds how much faster each mode is than each dense step."""
    for name, dense in (("speedup", modes.get("dense")), ("over_cudnn", cudnn)):
        if dense is None:
            continue
        for result in modes.values():
            result[name] = dense["median_ms"] / result["median_ms"]


def profile_step(
    run: Callable[[], StepReport], problem: Problem, median_ms: float
) -> Record:
    """One more step under CUPTI.

    Args:
      run: Runs the step, whose layers are all sparse.
      problem: Its model.
      median_ms: Of such steps.
    """
    try:
        report, launches = kernel_account.profile(run)
    except Exception as error:  # recorded: the times stand without it
        return {"profile": {"error": f"{type(error).__name__}: {error}"[:500]}}
    if not launches:
        return {"profile": {"error": "no GPU kernel was seen"}}
    num_blocks = problem.model.num_layers * problem.calls
    profile = kernel_account.account(launches, num_blocks=num_blocks)
    profile["step_ms"] = report.time_ms
    by_class = profile["by_class_ms"]
    attention = sum(by_class.get(kind, 0.0) for kind in kernel_account.ATTENTION)
    parts = {k: problem.calls * part for k, part in problem.flops_outside.items()}
    flops, outside = sum(parts.values()), median_ms - attention
    return {
        "profile": profile,
        "outside": {
            "self_attention_ms": attention,
            "outside_ms": outside,
            "tflop": flops / 1e12,
            "tflop_by_part": {name: part / 1e12 for name, part in parts.items()},
            "tflops": flops / outside / 1e9,
        },
    }


def add_shares(case: Record, matmul: Mapping[str, Record]) -> None:
    """Adds the rate outside attention over the measured ones."""
    if "outside" not in case or not matmul:
        return
    rates = {name: rate["tflops"] for name, rate in matmul.items()}
    rate = case["outside"]["tflops"]
    case["outside"]["share_of_matmul"] = rate / max(rates.values())
    case["outside"]["share_of_each"] = {
        name: rate / other for name, other in rates.items()
    }


def attempt(function: Callable[..., Record | None], *arguments: Any) -> Record:
    """Calls a function; an error becomes a record, so that other parts still run."""
    failure: Record = {}
    with recorded(failure):
        return function(*arguments) or {}
    return failure
