"""Measures Wan2.2 at full size on one GPU: an expert's steps, the switch, the 5B model.

    python -m benchmarks.wan.wan22 --parts expert --output wan22.json
    python -m benchmarks.wan.wan22 --parts fp8_pair --output wan22.json
    python -m benchmarks.wan.wan22 --tiny    # any machine, minutes

Weights are random, made in memory. Steps have guidance in two calls, and the paper's
selection where nothing else is said. Parts:

  expert      a step of one expert of A14B at each size: dense bfloat16 with cuDNN's
              attention, and sparse ones in bfloat16 and in FP8; in FP8 the library's
              own selection, too
  fp8_pair    a sparse step of each expert in FP8, both on the device
  streamed    a sparse step of each in bfloat16, the second's weights from the host
  ti2v        a step of the 5B model: dense with cuDNN's attention, sparse in bfloat16
              and in FP8, from text and with a first frame that is held
  vae         decoding of the 5B model's video, in float32 and in bfloat16

`peak_gb` is that of the process so far: run a part whose peak counts by itself. Records
of other parts stay in --output. `summary` has:

  expert_step_*_speedup_over_cudnn     by percent of sparsity, in FP8 at the first size
  expert_step_*_720p_speedup_over_cudnn   the same at the second size
  expert_step_default_90_speedup_over_cudnn   with the library's selection
  switch_s                      the step of the switch, over the same step without it
  peak_fp8_gb, peak_bfloat16_gb   of both experts' steps
  ti2v_step_85_speedup_over_cudnn, ti2v_step_85_fp8_speedup_over_cudnn
  vae_decode_s, vae_decode_bfloat16_s, vae_peak_gb
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

# Read when JAX first uses the GPU; see `benchmarks.wan.run`.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.common.machine import device_memory
from benchmarks.common.modes import Mode
from benchmarks.common.options import add_output, make_parser
from benchmarks.common.random_weights import random_model
from benchmarks.common.records import environment, write_json
from benchmarks.common.steps import (
    Problem,
    Samples,
    attempt,
    make_sampler,
    measure_cudnn,
    measure_steps,
)
from benchmarks.wan import run as wan_run
from benchmarks.wan import vae as wan_vae
from benchmarks.wan.account import flops_outside_attention
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

BOUNDARY = 875.0
SHIFTS = {"expert": 12.0, "ti2v": 5.0}


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


def make_model(config: WanConfig, linears: str, seed: int = 0) -> WanTransformer:
    """A transformer with random weights."""
    config = dataclasses.replace(config, linears=linears)
    return random_model(lambda: WanTransformer(config, rngs=nnx.Rngs(0)), seed)


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


def time_modes(
    problem: Problem, modes: list[str], options: argparse.Namespace, report: Report
) -> None:
    """Steps of some modes."""
    samples = Samples(
        modes=[Mode.parse(name) for name in modes],
        sparse=options.samples,
        dense=options.samples,
        cudnn=False,
        profile=False,
    )
    measure_steps(problem, samples, {}, report)


# ------------------------------------------------------------------- the parts


def measure_expert(sizes: Sizes, options: argparse.Namespace, report: Report) -> None:
    """One expert at each size; models are made one after the other."""
    record: Record = {name: {} for name in sizes.latents}

    def keep(size: str, name: str, grown: Record) -> None:
        record[size][name] = grown
        report(record)

    for linears in ("bfloat16", "float8"):
        model = make_model(sizes.expert, linears)
        for size, shape in sizes.latents.items():
            problem = make_problem(model, shape, "expert")
            if linears == "bfloat16" and options.cudnn:
                keep(size, "cudnn", measure_cudnn(problem, options.samples))

            def save(grown, size=size, linears=linears):
                keep(size, linears, grown)

            time_modes(problem, ["0.75", "0.9"], options, save)
        if linears == "float8":
            size = next(iter(sizes.latents))
            problem = make_problem(model, sizes.latents[size], "expert")
            problem = dataclasses.replace(problem, draft=DraftConfig.compensated())

            def save_default(grown, size=size):
                keep(size, "default", grown)

            time_modes(problem, ["0.9"], options, save_default)


def measure_fp8_pair(sizes: Sizes, options: argparse.Namespace, report: Report) -> None:
    """Both experts on the device in FP8."""
    high, low = (make_model(sizes.expert, "float8", seed) for seed in range(2))
    both = ResidentExperts(high, low, boundary=BOUNDARY)
    measure_pair(both, sizes, options, report)


def measure_streamed(sizes: Sizes, options: argparse.Namespace, report: Report) -> None:
    """One expert on the device in bfloat16, the other's weights in its place."""
    states: dict[str, Any] = {}
    for seed, name in enumerate(("low", "high")):
        model = make_model(sizes.expert, "bfloat16", seed)
        states[name] = jax.tree.map(np.asarray, nnx.state(model))
        if name == "low":
            del model
    start = time.perf_counter()
    both = StreamedExperts(
        model,
        states,  # type: ignore[arg-type]
        resident="high",
        boundary=BOUNDARY,
    )
    del states
    facts = {"to_pinned_memory_s": time.perf_counter() - start}
    measure_pair(both, sizes, options, lambda record: report(facts | record))


def measure_pair(
    both: Experts, sizes: Sizes, options: argparse.Namespace, report: Report
) -> None:
    """Steps around the switch: the second of each expert is without it."""
    shape = next(iter(sizes.latents.values()))
    problem = make_problem(both.model, shape, "expert")  # type: ignore[arg-type]
    # The second run is that which is measured: buffers and copies have been made.
    count = options.samples + 1
    sampler = make_sampler(problem, [Mode.parse("0.9")] * (2 * count))
    # Few steps: the switch is put in their middle.
    both.boundary = float(sampler.solver.timesteps[count - 1])
    sampler = dataclasses.replace(sampler, experts=both)
    state = sampler.initial_state(1, seed=0, guided=True)
    programs = sampler.compile(state, problem.inputs)
    runs = []
    for _ in range(2):
        state = sampler.initial_state(1, seed=0, guided=True)
        steps = []
        for index in range(2 * count):
            state, step = sampler.run_step(programs, state, problem.inputs, index)
            steps.append(step.time_ms)
        runs.append(steps)
        median = statistics.median(steps[count + 1 :])
        report(
            {
                "steps_ms": runs,
                "programs": len(programs),
                "switch_s": (steps[count] - median) / 1e3,
                **device_memory(),
            }
        )


def measure_ti2v(sizes: Sizes, options: argparse.Namespace, report: Report) -> None:
    """The 5B model."""
    record: Record = {}

    def keep(name: str, grown: Record) -> None:
        record[name] = grown
        report(record)

    for linears in ("bfloat16", "float8"):
        model = make_model(sizes.ti2v, linears)
        for held in (False, True):
            problem = make_problem(model, sizes.ti2v_latent, "ti2v", held=held)
            if linears == "bfloat16" and not held and options.cudnn:
                keep("cudnn", measure_cudnn(problem, options.samples))
            name = f"{linears}, first frame held" if held else linears

            def save(grown, name=name):
                keep(name, grown)

            time_modes(problem, ["0.85"], options, save)


def measure_vae(sizes: Sizes, options: argparse.Namespace, report: Report) -> None:
    """Decoding; float32 last, whose peak is the larger."""
    record: Record = {}
    latents = np.random.default_rng(0).standard_normal(
        (1, *sizes.ti2v_latent), np.float32
    )
    for dtype in ("bfloat16", "float32"):
        config = dataclasses.replace(sizes.vae, dtype=dtype)
        codec = WanVAECodec(model=wan_vae.random_model(config))
        start = time.perf_counter()
        codec.decode_to_host(latents[:, :2])
        compile_s = time.perf_counter() - start
        seconds = []
        for _ in range(options.samples):
            start = time.perf_counter()
            video = codec.decode_to_host(latents)
            seconds.append(time.perf_counter() - start)
        record[dtype] = {
            "compile_s": compile_s,
            "samples_s": seconds,
            "seconds": statistics.median(seconds),
            "finite": bool(np.isfinite(video).all()),
            **device_memory(),
        }
        report(record)


PARTS: dict[str, Callable[[Sizes, argparse.Namespace, Report], None]] = {
    "expert": measure_expert,
    "fp8_pair": measure_fp8_pair,
    "streamed": measure_streamed,
    "ti2v": measure_ti2v,
    "vae": measure_vae,
}

# ----------------------------------------------------------------- the figures


def summarise(parts: Mapping[str, Record]) -> dict[str, float]:
    """Returns the figures that records give; one without its records is left out."""
    figures: dict[str, float] = {}

    def ratio(name: str, record: Record, mode: str, cudnn: Record) -> None:
        found = record.get("modes", {}).get(mode)
        if found and cudnn.get("median_ms"):
            figures[name] = cudnn["median_ms"] / found["median_ms"]

    for index, (_, case) in enumerate(parts.get("expert", {}).items()):
        if not isinstance(case, dict):
            continue
        cudnn, place = case.get("cudnn", {}), "_720p" if index else ""
        for mode, percent in (("0.75", 75), ("0.9", 90)):
            name = f"expert_step_{percent}{place}"
            ratio(f"{name}_speedup_over_cudnn", case.get("float8", {}), mode, cudnn)
            wide = case.get("bfloat16", {})
            ratio(f"{name}_bfloat16_speedup_over_cudnn", wide, mode, cudnn)
        name = "expert_step_default_90_speedup_over_cudnn"
        ratio(name, case.get("default", {}), "0.9", cudnn)
    for part, name in (("fp8_pair", "fp8"), ("streamed", "bfloat16")):
        if "peak_gb" in parts.get(part, {}):
            figures[f"peak_{name}_gb"] = parts[part]["peak_gb"]
    if "switch_s" in parts.get("streamed", {}):
        figures["switch_s"] = parts["streamed"]["switch_s"]
    ti2v = parts.get("ti2v", {})
    cudnn = ti2v.get("cudnn", {})
    name = "ti2v_step_85"
    ratio(f"{name}_speedup_over_cudnn", ti2v.get("bfloat16", {}), "0.85", cudnn)
    ratio(f"{name}_fp8_speedup_over_cudnn", ti2v.get("float8", {}), "0.85", cudnn)
    vae = parts.get("vae", {})
    for dtype, suffix in (("float32", ""), ("bfloat16", "bfloat16_")):
        if dtype in vae:
            figures[f"vae_decode_{suffix}s"] = vae[dtype]["seconds"]
    if "peak_gb" in vae.get("float32", {}):
        figures["vae_peak_gb"] = vae["float32"]["peak_gb"]
    return figures


# ---------------------------------------------------------------- command line


def measure(options: argparse.Namespace) -> Record:
    """Measures the parts that are asked for, and keeps those of the file."""
    results: Record = {"environment": environment(), "tiny": options.tiny, "parts": {}}
    if options.output and options.output.exists():
        results["parts"] = json.loads(options.output.read_text())["parts"]
    sizes = TINY if options.tiny else FULL
    for part in options.parts:

        def report(record: Record, part=part) -> None:
            results["parts"][part] = record
            results["summary"] = summarise(results["parts"])
            print(f"{part}: {json.dumps(results['summary'])}", flush=True)
            if options.output:
                write_json(options.output, results)

        failure = attempt(PARTS[part], sizes, options, report)
        if failure:
            report(results["parts"].get(part, {}) | failure)
    return results


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--tiny", action="store_true", help="small models, for any machine")
    add("--no-cudnn", dest="cudnn", action="store_false", help="no dense steps")
    add("--samples", type=int, default=3, help="steps of each mode, or videos")
    add_output(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Record:
    """Measures."""
    return measure(parse(arguments))


if __name__ == "__main__":
    main()
