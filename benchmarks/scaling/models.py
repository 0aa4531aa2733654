"""Models whose steps are timed, and the ways in which several devices run them."""

import dataclasses
import functools
import math
from typing import Any
from unittest import mock

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from benchmarks.common.random_weights import random_model
from benchmarks.common.steps import Problem
from benchmarks.hunyuan import run as hunyuan
from benchmarks.scaling.bench import Bench
from benchmarks.scaling.links import exchange_by_permutes
from benchmarks.scaling.steps import ONE, Run, StepsPart, Way
from benchmarks.wan import run as wan_run
from models.diffusion.interfaces import LatentShape
from models.diffusion.mesh import DeviceMesh
from models.diffusion.transformer.token_shards import TokenShards
from models.hunyuan.transformer import HunyuanTransformer
from models.wan.config import WanConfig
from models.wan.transformer import WanTransformer

# Eight heads, for up to eight devices.
TINY = dataclasses.replace(wan_run.TINY, dim=192, num_heads=8)
TINY_HUNYUAN = dataclasses.replace(hunyuan.TINY, dim=128, num_heads=8)
# Name of the model, and the size of a video: height, width, frames.
WAN = {
    "tiny": (TINY, (64, 96), 9),
    "1.3b": (wan_run.MODELS["1.3b"], (480, 832), 81),
    "14b": (wan_run.MODELS["14b"], (768, 1280), 81),
}
SHORT = (64, 64), 1  # a video that costs what does not shrink with its tokens


def wan_ways(counts: list[int]) -> dict[str, Way]:
    """Returns the ways to run a guided step, by the name of their figure."""
    ways = {ONE: Way(batching="two_calls")}
    for count in counts:
        if count > 1:
            mesh = DeviceMesh(sequence=count)
            ways[f"step_sequence_{count}"] = Way(mesh=mesh, batching="two_calls")
        if count > 2 and count % 2 == 0:
            mesh = DeviceMesh(guidance=2, sequence=count // 2)
            ways[f"step_both_{count}"] = Way(mesh=mesh)
    if max(counts) > 1:
        spread = DeviceMesh(sequence=max(counts), shard_weights=True)
        ways["step_guidance_2"] = Way(mesh=DeviceMesh(guidance=2))
        ways["weights"] = Way(mesh=spread, batching="two_calls")
    return ways


def variants(count: int) -> dict[str, Way]:
    """Returns other ways to share tokens, which are no options of the library."""
    if count == 1:
        return {}
    way = Way(mesh=DeviceMesh(sequence=count), batching="two_calls")
    # XLA's own choice is to let one transfer at a time and work overlap.
    waiting: dict[str, Any] = {}
    in_flight: dict[str, Any] = {}
    engines: dict[str, Any] = {}
    if jax.default_backend() == "gpu":
        waiting["xla_gpu_enable_latency_hiding_scheduler"] = False
        in_flight["xla_gpu_experimental_parallel_collective_overlap_limit"] = 4
        # Copies of the driver in place of NCCL's kernels, which need multiprocessors
        # that a product beside them may hold to its end. Within one process.
        engines["xla_gpu_use_memcpy_local_p2p"] = True

    def exchange(self: TokenShards, x: jax.Array) -> jax.Array:
        return exchange_by_permutes(x, self.axis, self.count)

    patch = functools.partial(mock.patch.object, TokenShards, "_exchange", exchange)
    ways = {
        "in_flight": dataclasses.replace(way, options=in_flight),
        "engines": dataclasses.replace(way, options=engines),
        "permutes": dataclasses.replace(way, patch=patch),
        "permutes_in_flight": dataclasses.replace(way, patch=patch, options=in_flight),
        "waiting": dataclasses.replace(way, options=waiting),
    }
    return {f"step_sequence_{name}_{count}": way for name, way in ways.items()}


def hunyuan_ways(counts: list[int]) -> dict[str, Way]:
    """Returns the ways to run a step without guidance."""
    ways = {ONE: Way()}
    for count in counts:
        if count > 1:
            mesh = DeviceMesh(sequence=count)
            ways[f"hunyuan_step_{count}"] = Way(mesh=mesh)
    return ways


def everywhere(bench: Bench) -> Mesh:
    """Returns the devices of the largest mesh, which all hold the whole models."""
    return Mesh(np.array(jax.devices()[: max(bench.counts)]), ("devices",))


def wan_model(bench: Bench, name: str) -> WanTransformer:
    """Wan with random weights on every device."""
    config = dataclasses.replace(WAN[name][0], param_dtype="bfloat16")
    return random_model(
        lambda: WanTransformer(config, rngs=nnx.Rngs(0)), mesh=everywhere(bench)
    )


def wan_latents(name: str) -> LatentShape:
    """Shape of the latents of the video whose steps are timed."""
    _, size, frames = WAN[name]
    return wan_run.latent_shape(size, frames)


def layer_of(name: str) -> tuple[int, int, int]:
    """Returns tokens, heads and channels of a layer of the video."""
    config = WAN[name][0]
    frames, height, width, _ = wan_latents(name)
    tokens = frames * height * width // math.prod(config.patch_size)
    return tokens, config.num_heads, config.head_dim


def wan_problem(shape: LatentShape, model: Any, way: Way) -> Problem:
    """Guided steps of Wan."""
    config = model.config if isinstance(model.config, WanConfig) else model.config[0]
    return Problem(
        model=model,
        latent_shape=shape,
        inputs=wan_run.make_inputs(config, guided=True),
        make_solver=lambda steps: wan_run.make_solver(
            "unipc", num_steps=steps, shift=5.0
        ),
        guidance_batching=way.batching,
        flops_outside={},
    )


def wan_part(
    bench: Bench, part: str, model: WanTransformer, name: str, ways: dict[str, Way]
) -> StepsPart:
    """Steps of Wan in each way."""
    make = functools.partial(wan_problem, wan_latents(name))
    runs = {key: Run(bench, model, way, make) for key, way in ways.items()}
    return StepsPart(bench, part, model, runs)


def variants_part(bench: Bench, wan: StepsPart, ways: dict[str, Way]) -> StepsPart:
    """Steps of Wan with other exchanges, in turns with the library's own."""
    count = max(bench.counts)
    part = wan_part(bench, "variants", wan.whole, bench.options.wan, ways)
    own = {f"step_sequence_again_{count}": wan.runs[f"step_sequence_{count}"]}
    return StepsPart(bench, "variants", wan.whole, own | part.runs, like=wan)


def short_part(bench: Bench, wan: StepsPart) -> StepsPart:
    """Steps of a video of a few tokens on one device."""
    make = functools.partial(wan_problem, wan_run.latent_shape(*SHORT))
    runs = {ONE: Run(bench, wan.whole, Way(batching="two_calls"), make)}
    return StepsPart(bench, "short", wan.whole, runs)


def hunyuan_latents(name: str) -> LatentShape:
    """Shape of the latents of the video whose steps are timed."""
    return hunyuan.latent_shape(hunyuan.SIZES[name]["768p"], hunyuan.FRAMES[name])


def hunyuan_part(bench: Bench, part: str, name: str, ways: dict[str, Way]) -> StepsPart:
    """Steps of HunyuanVideo in each way."""
    config = TINY_HUNYUAN if name == "tiny" else hunyuan.MODELS[name]
    model = random_model(
        lambda: HunyuanTransformer(config, rngs=nnx.Rngs(0)), mesh=everywhere(bench)
    )
    shape = hunyuan_latents(name)
    inner: Any = nnx.eval_shape(lambda: HunyuanTransformer(config, rngs=nnx.Rngs(0)))
    of_model = hunyuan.make_problem(inner, shape)

    def make_problem(model: Any, way: Way) -> Problem:
        return dataclasses.replace(of_model, model=model)

    runs = {key: Run(bench, model, way, make_problem) for key, way in ways.items()}
    return StepsPart(bench, part, model, runs)
