"""Steps of Wan2.2's models at full size, their memory, and the 5B model's decoder.

    python -m benchmarks.wan.wan22 --parts expert --samples 1 --output FILE
    python -m benchmarks.wan.wan22 --tiny    # any machine; no dense steps with cuDNN

Weights are random, made in memory. Steps have guidance in two calls, and the paper's
selection where nothing else is said. A part compiles its programs side by side, then
runs them in the order of its list. One that fails, or is not begun at --limit, says so
and stops no other. Parts:

  expert     an expert of A14B: sparse steps in FP8, dense ones in bfloat16 with cuDNN's
             attention, FP8 with the library's own selection, sparse ones in bfloat16;
             and a step of the other expert, by the same program
  ti2v       the 5B model at 85 %, with its own tile and with others
  held       the 5B model with an image as the first frame
  fp8_pair   a sparse step of each expert in FP8, both on the device
  streamed   sparse steps of each in bfloat16, the second's weights from the host;
             those around the switch of a run of 40
  vae        decoding of the 5B model's video, by --vae-dtype and --convolution

`peak_gb` is that of the process, with the search for algorithms: fp8_pair, streamed
and each case of vae are for processes of their own. Records of other parts stay in
--output.
`summary` has:

  expert_step_*_speedup_over_cudnn     by percent of sparsity, in FP8 at the first size
  expert_step_*_720p_speedup_over_cudnn   the same at the second size
  expert_step_default_90_speedup_over_cudnn   with the library's selection
  switch_s                      the switch and the step before, which sends weights
                                ahead, over the same steps without it
  peak_fp8_gb, peak_bfloat16_gb   of both experts' steps
  ti2v_step_85_speedup_over_cudnn, ti2v_step_85_fp8_speedup_over_cudnn
  ti2v_step_85_*tile_*          sparse steps with another tile, likewise
  vae_decode_s, vae_decode_bfloat16_s   in the faster form of convolutions
  vae_peak_gb                   of the faster form in float32
"""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

# Read when JAX first uses the GPU; see `benchmarks.wan.run`.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")

import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.common.machine import device_memory
from benchmarks.common.modes import Mode
from benchmarks.common.options import add_output, make_parser
from benchmarks.common.parts import Parts
from benchmarks.common.random_weights import random_model
from benchmarks.common.records import recorded
from benchmarks.common.steps import (
    Problem,
    Samples,
    Steps,
    attempt,
    cudnn_attention,
    make_sampler,
    time_cudnn,
    time_steps,
)
from benchmarks.wan import run as wan_run
from benchmarks.wan import vae as wan_vae
from benchmarks.wan.account import flops_outside_attention, kernel_work
from benchmarks.wan.wan22_summary import cases_of, summarise
from draft_jax import DraftConfig
from models.diffusion.experts import Experts, ResidentExperts, StreamedExperts
from models.diffusion.interfaces import ImageCondition, LatentShape
from models.diffusion.schedulers import make_solver
from models.wan.config import WanConfig
from models.wan.transformer import WanTransformer
from models.wan.vae.codec import WanVAECodec
from models.wan.vae.config import WanVAEConfig

Record = dict[str, Any]
Report = Callable[[Record], None]
CaseMaker = Callable[..., "Case"]

BOUNDARY = 875.0
NUM_STEPS = 40
SHIFTS = {"expert": 12.0, "ti2v": 5.0}
# Beside the 5B model's own, which makes 8 blocks of 120 and 80 tokens of a frame of
# 22 x 40: 9 blocks, and 8 of 110 tokens, which are copied row by row.
TILES = ((8, 16), (11, 10))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured.

    Attributes:
      expert: Sizes of one expert of A14B.
      ti2v: Sizes of the 5B model.
      latents: Shapes of the expert's latents, by name of a size.
      ti2v_latent: Shape of the 5B model's.
      vae: Sizes of the autoencoder of the 5B model.
    """

    expert: WanConfig
    ti2v: WanConfig
    latents: Mapping[str, LatentShape]
    ti2v_latent: LatentShape
    vae: WanVAEConfig


FULL = Sizes(
    expert=WanConfig.t2v_14b(param_dtype="bfloat16"),
    ti2v=WanConfig.ti2v_5b(param_dtype="bfloat16"),
    latents={"768x1280": (21, 96, 160, 16), "720x1280": (21, 90, 160, 16)},
    ti2v_latent=(31, 44, 80, 48),
    vae=WanVAEConfig.wan2_2(),
)
TINY = Sizes(
    expert=dataclasses.replace(wan_run.TINY, param_dtype="bfloat16"),
    ti2v=dataclasses.replace(
        wan_run.TINY, holds_first_frame=True, param_dtype="bfloat16"
    ),
    latents={"768x1280": (3, 4, 8, 16), "720x1280": (2, 4, 8, 16)},
    ti2v_latent=(3, 4, 8, 16),
    vae=WanVAEConfig.wan2_2(
        base_dim=4,
        decoder_base_dim=4,
        latent_channels=16,
        latents_mean=(0.0,) * 16,
        latents_std=(1.0,) * 16,
    ),
)


class Bench:
    """Options of a run, and its parts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.sizes = TINY if options.tiny else FULL
        self.parts = Parts(
            options.output,
            {"tiny": options.tiny},
            summarise=summarise,
            limit=options.limit,
        )

    def samples(self, *modes: str) -> Samples:
        """Steps of some modes."""
        return Samples(
            modes=[Mode.parse(name) for name in modes],
            sparse=self.options.samples,
            dense=self.options.samples,
            cudnn=False,
            profile=False,
        )


def make_model(config: WanConfig, linears: str, seed: int = 0) -> WanTransformer:
    """A transformer with random weights."""
    config = dataclasses.replace(config, linears=linears)
    return random_model(lambda: WanTransformer(config, rngs=nnx.Rngs(0)), seed)


def with_tile(model: WanTransformer, tile: tuple[int, int]) -> WanTransformer:
    """The same transformer with another tile."""
    config = dataclasses.replace(model.config, tile=tile)
    other = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.split(other)[0], nnx.state(model))


def make_problem(
    model: WanTransformer, shape: LatentShape, kind: str, *, held: bool = False
) -> Problem:
    """The guided steps of a model; with `held`, of a video whose first frame is."""
    inputs = wan_run.make_inputs(model.config, guided=True)
    if held:
        first = jnp.zeros((1, 1, *shape[1:]))
        inputs = inputs._replace(image=ImageCondition(first, None))
    return Problem(
        model=model,
        latent_shape=shape,
        inputs=inputs,
        make_solver=lambda steps: make_solver(
            "unipc", num_steps=steps, shift=SHIFTS[kind]
        ),
        guidance_batching="two_calls",
        flops_outside=flops_outside_attention(
            model.config, model.grid(shape).num_tokens
        ),
    )


# ------------------------------------------------------------- steps by name


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """Steps of one model at one size.

    Attributes:
      problem: The model and its inputs.
      modes: Sparse modes; none for dense steps with cuDNN's attention.
      other: Another expert, whose step in the last mode follows.
    """

    problem: Problem
    modes: tuple[str, ...] = ()
    other: WanTransformer | None = None

    @property
    def facts(self) -> Record:
        """The tile, and what the kernel computes for it beside what there is."""
        model, shape = self.problem.model, self.problem.latent_shape
        grid = model.grid(shape)
        return {
            "tile": list(grid.tile),
            "blocks_of_a_frame": grid.num_visual_blocks // grid.frames,
            "kernel_work": kernel_work(grid),
        }


def as_default(case: Case) -> Case:
    """The steps with the library's own selection."""
    problem = dataclasses.replace(case.problem, draft=DraftConfig.compensated())
    return dataclasses.replace(case, problem=problem)


def compile_cases(bench: Bench, cases: Mapping[str, Case]) -> dict[str, Steps | Record]:
    """Compiles steps side by side; one that fails gives its error."""

    def make(case: Case) -> Steps | Record:
        failure: Record = {}
        with recorded(failure):
            modes = [Mode.parse("dense")] * (bench.options.samples + 1)
            if case.modes:
                modes = bench.samples(*case.modes).order
                modes += modes[-1:] * (case.other is not None)
            return Steps(case.problem, modes)
        return failure

    def make_all(cases: Mapping[str, Case]) -> dict[str, Steps | Record]:
        with concurrent.futures.ThreadPoolExecutor(max(1, len(cases))) as pool:
            return dict(zip(cases, pool.map(make, cases.values()), strict=True))

    # Those with cuDNN first: while they are traced no other may be.
    with cudnn_attention():
        ready = make_all({name: case for name, case in cases.items() if not case.modes})
    return ready | make_all({name: case for name, case in cases.items() if case.modes})


def measure_cases(bench: Bench, cases: Mapping[str, Case], report: Report) -> None:
    """Compiles and runs steps; `report` takes all records whenever one has grown."""
    if not bench.options.cudnn:
        cases = {name: case for name, case in cases.items() if case.modes}
    record: Record = {}
    compiled = compile_cases(bench, cases)
    bench.parts.say(f"compiled {', '.join(cases)}")
    for name, case in cases.items():
        steps = compiled.pop(name)

        def keep(grown: Record, name=name) -> None:
            record[name] = record.get(name, {}) | grown
            report(record)

        if isinstance(steps, dict):
            keep(steps)
        elif bench.parts.left_s() <= 0:
            keep({"error": f"not begun: the limit was {bench.options.limit} s"})
        else:
            keep(attempt(time_case, bench, case, steps, keep))
        modes = record[name].get("modes", {"": record[name]})
        times = {mode: found.get("median_ms") for mode, found in modes.items()}
        bench.parts.say(f"{name}: {times} {record[name].get('error', '')}")


def time_case(bench: Bench, case: Case, steps: Steps, report: Report) -> Record | None:
    """Runs the steps of a case."""
    if not case.modes:
        return time_cudnn(steps, bench.options.samples, report)
    time_steps(steps, bench.samples(*case.modes), case.facts, report)
    if case.other is None:
        return None
    steps.sampler = dataclasses.replace(steps.sampler, model=case.other)
    return {"other_expert_ms": steps.run().time_ms}


# ------------------------------------------------------------------- the parts


def measure_expert(bench: Bench, report: Report) -> None:
    """One expert at each size; what counts most first."""
    wide, narrow = (make_model(bench.sizes.expert, p) for p in ("bfloat16", "float8"))
    other = make_model(bench.sizes.expert, "float8", seed=1)
    both, cases = ("0.75", "0.9"), {}
    for size, shape in bench.sizes.latents.items():
        in_float8 = make_problem(narrow, shape, "expert")
        cases[f"{size}, float8"] = Case(problem=in_float8, modes=both, other=other)
        cases[f"{size}, cudnn"] = Case(problem=make_problem(wide, shape, "expert"))
    for size, shape in bench.sizes.latents.items():
        problem = make_problem(wide, shape, "expert")
        cases[f"{size}, bfloat16"] = Case(problem=problem, modes=both)
    size, shape = next(iter(bench.sizes.latents.items()))
    default = Case(problem=make_problem(narrow, shape, "expert"), modes=("0.9",))
    cases[f"{size}, default"] = as_default(default)
    measure_cases(bench, cases, report)


def ti2v_cases(bench: Bench) -> tuple[dict[str, Case], CaseMaker]:
    """The 5B model's dense steps and sparse ones, and a function that makes others."""
    models = {
        name: make_model(bench.sizes.ti2v, name) for name in ("bfloat16", "float8")
    }
    shape = bench.sizes.ti2v_latent

    def make(
        name: str, *, tile: tuple[int, int] | None = None, held: bool = False
    ) -> Case:
        model = models[name] if tile is None else with_tile(models[name], tile)
        problem = make_problem(model, shape, "ti2v", held=held)
        return Case(problem=problem, modes=("0.85",))

    dense = Case(problem=make_problem(models["bfloat16"], shape, "ti2v"))
    return {"cudnn": dense} | {name: make(name) for name in models}, make


def measure_ti2v(bench: Bench, report: Report) -> None:
    """The 5B model, with its own tile and with others."""
    cases, make = ti2v_cases(bench)
    tiles = [(f"{rows}x{columns}", (rows, columns)) for rows, columns in TILES]
    for name, tile in tiles:
        for linears in ("bfloat16", "float8"):
            cases[f"{linears}, tile {name}"] = make(linears, tile=tile)
    cases["float8, default"] = as_default(cases["float8"])
    for name, _ in tiles:
        default = as_default(cases[f"float8, tile {name}"])
        cases[f"float8, default tile {name}"] = default
    measure_cases(bench, cases, report)


def measure_held(bench: Bench, report: Report) -> None:
    """The 5B model with an image as the first frame, beside its dense step."""
    cases, make = ti2v_cases(bench)
    held = {
        f"{name}, first frame held": make(name, held=True)
        for name in cases
        if name != "cudnn"
    }
    measure_cases(bench, {"cudnn": cases["cudnn"]} | held, report)


def measure_fp8_pair(bench: Bench, report: Report) -> None:
    """Both experts on the device in FP8."""
    config = bench.sizes.expert
    high, low = (make_model(config, "float8", seed) for seed in range(2))
    both = ResidentExperts(high, low, boundary=BOUNDARY)
    report(run_pair(bench, both, before=1, after=1))


def measure_streamed(bench: Bench, report: Report) -> None:
    """One expert on the device in bfloat16, the other's weights in its place."""
    model = make_model(bench.sizes.expert, "bfloat16")
    start = time.perf_counter()
    # The other has the same numbers: a second model would count in the peak.
    both = StreamedExperts(model, nnx.state(model), resident="high", boundary=BOUNDARY)
    facts = {"to_pinned_memory_s": time.perf_counter() - start}
    report(facts)
    start = time.perf_counter()
    for name in ("low", "high"):  # programs that overwrite are compiled
        both.take(name)
    facts["first_switches_s"] = time.perf_counter() - start
    report(facts | run_pair(bench, both, before=3, after=2))


def run_pair(bench: Bench, both: Experts, *, before: int, after: int) -> Record:
    """Runs the steps around the switch of a run of 40 steps, at Wan's own boundary.

    The first of them warms up. With three before and two after it, one is as the last
    before the switch and one as the first after it, without the switch.
    """
    shape = next(iter(bench.sizes.latents.values()))
    problem = make_problem(both.model, shape, "expert")  # type: ignore[arg-type]
    sampler = make_sampler(problem, [Mode.parse("0.9")] * NUM_STEPS)
    sampler = dataclasses.replace(sampler, experts=both)
    _, switch = sampler.expert_starts
    state = sampler.initial_state(1, seed=0, guided=True)
    programs = sampler.compile(state, problem.inputs)
    record: Record = {
        "switch_before_step": switch,
        "programs": len(programs),
        "after_compilation": device_memory(),
    }
    steps: list[float] = []
    for index in range(switch - before, switch + after):
        state, step = sampler.run_step(programs, state, problem.inputs, index)
        steps.append(step.time_ms)
        bench.parts.say(
            f"step {index}, {sampler.expert_names[index]} noise: {step.time_ms}"
        )
    record |= {"steps_ms": steps, **device_memory()}
    if before > 2 and after > 1:
        plain, sending, switching, settled = steps[-4:]
        record["switch_s"] = (sending - plain + switching - settled) / 1e3
    return record


def measure_vae(bench: Bench, report: Report) -> None:
    """Decoding in one dtype and one form of convolutions."""
    dtype, form = bench.options.vae_dtype, bench.options.convolution
    latents = np.random.default_rng(0).standard_normal(
        (1, *bench.sizes.ti2v_latent), np.float32
    )
    config = dataclasses.replace(bench.sizes.vae, dtype=dtype, convolution=form)
    codec = WanVAECodec(model=wan_vae.random_model(config))
    # Each case is of a process of its own.
    report(cases_of(bench.parts.parts.get("vae", {})))
    start = time.perf_counter()
    wan_vae.time_chunks(codec.decode_chunks(latents[:, :2]))
    record: Record = {
        "environment": bench.parts.environment,
        "compile_s": time.perf_counter() - start,
        "after_compilation": device_memory(),
        "chunks_ms": wan_vae.time_chunks(codec.decode_chunks(latents[:, :6])),
    }
    bench.parts.say(f"decoder compiled; ms of chunks: {record['chunks_ms']}")
    seconds: list[float] = []
    for _ in range(bench.options.samples):
        start = time.perf_counter()
        video = codec.decode_to_host(latents)
        seconds.append(time.perf_counter() - start)
        record |= {
            "samples_s": seconds,
            "seconds": statistics.median(seconds),
            "finite": bool(np.isfinite(video).all()),
            **device_memory(),
        }
        report({f"{dtype}, {form}": record})


PARTS: dict[str, Callable[[Bench, Report], None]] = {
    "expert": measure_expert,
    "ti2v": measure_ti2v,
    "held": measure_held,
    "fp8_pair": measure_fp8_pair,
    "streamed": measure_streamed,
    "vae": measure_vae,
}

# ---------------------------------------------------------------- command line


def measure(options: argparse.Namespace) -> Record:
    """Measures the parts that are asked for, and keeps those of the file."""
    bench = Bench(options)
    for part in options.parts:
        bench.parts.measure(part, PARTS[part], bench)
    print(json.dumps(bench.parts.document.get("summary", {}), indent=1), flush=True)
    return bench.parts.document


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--tiny", action="store_true", help="small models, for any machine")
    add("--no-cudnn", dest="cudnn", action="store_false", help="no dense steps")
    add("--samples", type=int, default=3, help="steps of each mode, or videos")
    add("--vae-dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--convolution", choices=("2d", "3d"), default=FULL.vae.convolution)
    add("--limit", type=float, default=math.inf, help="seconds; none is begun later")
    add_output(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Record:
    """Measures."""
    return measure(parse(arguments))


if __name__ == "__main__":
    main()
