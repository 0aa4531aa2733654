"""Denoising steps of Wan and HunyuanVideo on one device, and on several.

Weights are random, of full size, and in memory. Each program runs once before it is
timed. What is in a record:

  samples_ms         steps, until the result is there
  relative_error     of the first step's estimate of the clean latents, against that of
                     one device
  collectives        what the programs send, and how often it stands in their text;
                     those within the loop over layers run once for each
  weights_gb         weights that the first device holds
  memory             what JAX says of the first device
"""

import collections
import dataclasses
import functools
import re
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.common.machine import GB, device_memory
from benchmarks.common.modes import Mode
from benchmarks.common.random_weights import random_model
from benchmarks.common.steps import Problem, Steps
from benchmarks.hunyuan import run as hunyuan
from benchmarks.wan import run as wan
from models.diffusion.mesh import DeviceMesh
from models.diffusion.sampler import GuidanceBatching
from models.diffusion.transformer.sharded import ShardedTransformer
from models.hunyuan.transformer import HunyuanTransformer
from models.wan.transformer import WanTransformer

Record = dict[str, Any]
Report = Callable[[str, Record], None]

# Name of the model, and the size of a video: height, width, frames.
WAN = {"tiny": ((64, 96), 9), "1.3b": ((480, 832), 81), "14b": ((768, 1280), 81)}
ONE = "one device"
# The name of one as its result is made: not that of where a result is read.
COLLECTIVES = r"[)}\]] (all-[a-z-]+|collective-\w+|reduce-scatter)\("


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run a step.

    Attributes:
      mesh: The devices; None for one.
      batching: How a guided step runs the model.
    """

    mesh: DeviceMesh | None = None
    batching: GuidanceBatching = "one_call"


def wan_ways(num_devices: int) -> dict[str, Way]:
    """Returns the ways to run a guided step, by the name of their figure."""
    ways = {
        ONE: Way(batching="two_calls"),
        f"step_sequence_{num_devices}": Way(
            mesh=DeviceMesh(sequence=num_devices), batching="two_calls"
        ),
        "step_guidance_2": Way(mesh=DeviceMesh(guidance=2)),
    }
    if num_devices > 2 and num_devices % 2 == 0:
        both = DeviceMesh(guidance=2, sequence=num_devices // 2)
        ways[f"step_both_{num_devices}"] = Way(mesh=both)
    spread = DeviceMesh(sequence=num_devices, shard_weights=True)
    return ways | {"weights": Way(mesh=spread, batching="two_calls")}


def hunyuan_ways(num_devices: int) -> dict[str, Way]:
    """Returns the ways to run a step without guidance."""
    mesh = DeviceMesh(sequence=num_devices)
    return {ONE: Way(), f"hunyuan_step_{num_devices}": Way(mesh=mesh)}


def measure_wan(options: Any, num_devices: int, report: Report) -> None:
    """Times steps of Wan in each way; `report` takes each record."""
    size, frames = WAN[options.wan]
    config = dataclasses.replace(wan.MODELS[options.wan], param_dtype="bfloat16")
    model = random_model(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    shape = wan.latent_shape(size, frames)

    def make_problem(model: Any, way: Way) -> Problem:
        return Problem(
            model=model,
            latent_shape=shape,
            inputs=wan.make_inputs(config, guided=True),
            make_solver=lambda steps: wan.make_solver(
                "unipc", num_steps=steps, shift=5.0
            ),
            guidance_batching=way.batching,
            flops_outside={},
        )

    _measure(model, wan_ways(num_devices), make_problem, options, report)


def measure_hunyuan(options: Any, num_devices: int, report: Report) -> None:
    """Times steps of HunyuanVideo in each way; `report` takes each record."""
    name = "tiny" if options.wan == "tiny" else "13b"
    model = random_model(
        lambda: HunyuanTransformer(hunyuan.MODELS[name], rngs=nnx.Rngs(0))
    )
    size, frames = hunyuan.SIZES[name]["768p"], hunyuan.FRAMES[name]
    of_one_device = hunyuan.make_problem(model, hunyuan.latent_shape(size, frames))

    def make_problem(model: Any, way: Way) -> Problem:
        return dataclasses.replace(of_one_device, model=model)

    _measure(model, hunyuan_ways(num_devices), make_problem, options, report)


def _measure(
    model: Any,
    ways: dict[str, Way],
    make_problem: Callable[[Any, Way], Problem],
    options: Any,
    report: Report,
) -> None:
    """Times a model in each way; its weights are moved from one to the next."""
    expected: np.ndarray | None = None
    for name, way in ways.items():
        record: Record = {"mesh": None if way.mesh is None else str(way.mesh)}
        try:
            own = model if way.mesh is None else ShardedTransformer(model, way.mesh)
            record |= held(nnx.state(own))
            problem = make_problem(own, way)
            if isinstance(own, ShardedTransformer):
                inputs = own.put_everywhere(problem.inputs)
                problem = dataclasses.replace(problem, inputs=inputs)
            estimate, timed = _time(problem, options)
            record |= timed
            if expected is None:
                expected = estimate
            record["relative_error"] = float(
                np.linalg.norm(estimate - expected) / np.linalg.norm(expected)
            )
        except Exception as error:  # recorded: other ways still run
            record["error"] = f"{type(error).__name__}: {error}"[:800]
        report(name, record)


def _time(problem: Problem, options: Any) -> tuple[np.ndarray, Record]:
    """Returns the first step's estimate, and what is measured of the others."""
    mode = Mode.parse(str(options.sparsity))
    steps = Steps(problem, [mode] * (1 + options.samples))
    sent = collections.Counter(re.findall(COLLECTIVES, steps.text()))
    estimate = np.asarray(steps.run().estimate, np.float32)
    samples = [steps.run().time_ms for _ in range(options.samples)]
    return estimate, {
        "samples_ms": samples,
        "median_ms": statistics.median(samples),
        "compile_s": steps.compile_s,
        "collectives": dict(sent),
        "memory": device_memory(),
    }


def held(state: Any) -> Record:
    """Returns how much of the weights the first device holds."""
    leaves = jax.tree.leaves(state)
    own = sum(x.addressable_data(0).nbytes for x in leaves)
    return {
        "weights_gb": own / GB,
        "all_weights_gb": sum(x.nbytes for x in leaves) / GB,
    }


def summarise(steps: dict[str, Record], num_devices: int) -> dict[str, float]:
    """Returns flat figures, as far as their parts were measured.

    Those of a step say how many times as fast it is as on one device.
    """
    found: dict[str, float] = {}
    for model in ("wan", "hunyuan"):
        records = steps.get(model, {})
        one = records.get(ONE, {}).get("median_ms")
        for name, record in records.items():
            if one and "median_ms" in record and "step" in name:
                found[name] = one / record["median_ms"]
    records = steps.get("wan", {})
    spread, whole = (
        records.get(name, {}) for name in ("weights", f"step_sequence_{num_devices}")
    )
    for key, name in (("weights_gb", "memory"), ("median_ms", "time")):
        if key in spread and key in whole:
            found[f"weights_{name}_ratio"] = spread[key] / whole[key]
    return found


MODELS = {"wan": measure_wan, "hunyuan": measure_hunyuan}


def measure(
    options: Any, num_devices: int, report: Callable[[dict[str, Any]], None]
) -> None:
    """Measures the models that are asked for; `report` takes all records so far."""
    found: dict[str, Any] = {}

    def keep(model: str, name: str, record: Record) -> None:
        found.setdefault(model, {})[name] = record
        report(found)

    for model in options.parts:
        if model in MODELS:
            MODELS[model](options, num_devices, functools.partial(keep, model))
