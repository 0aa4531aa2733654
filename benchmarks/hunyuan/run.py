"""Times denoising steps of HunyuanVideo at full size, and its decoder, on one GPU.

    python -m benchmarks.hunyuan.run --output benchmarks/results/hunyuan_h200.json
    python -m benchmarks.hunyuan.run --model tiny        # any machine, seconds

Weights are random, made on the device. A step is the pipeline's own: Euler, embedded
guidance, one prompt of 60 valid text tokens of 256. Parts are a size each, 129 frames,
one of them with linear layers in FP8, too: beside a dense bfloat16 step with cuDNN's
attention of its own, and with the library's own selection beside the paper's; and the
decoder, which runs first and in a process of its own. The file is written anew
whenever a part has grown, and keeps the parts that are not asked for: so what a cut
run lacks is added with --parts.
`benchmarks.common.steps` says what a part's record holds, `benchmarks.hunyuan.summary`
what `summary` is. Beside these:

  vae_*            the decoder's first run is not counted; `vae_bf16_difference` is the
                   relative L2 distance of pixels in bfloat16 and in float32
  mask             GPU time of a new mask from pooled tokens, by kernel, in one layer
  time_by_part_ms  GPU time of the profiled step: `draft` is that of new masks in all
                   layers, `linears` every other product of matrices, `lists` puts
                   query blocks in an order for the kernel
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

# Read when JAX first uses the GPU. Grown piece by piece, its memory would break up.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.common import kernel_account
from benchmarks.common.linear_times import linear_times
from benchmarks.common.machine import GB, MatmulShape, device_memory, matmul_rates
from benchmarks.common.modes import Mode
from benchmarks.common.options import add_output, make_parser
from benchmarks.common.parts import Parts
from benchmarks.common.programs import run_limited
from benchmarks.common.random_weights import random_model
from benchmarks.common.records import provenance
from benchmarks.common.steps import (
    Problem,
    Samples,
    add_shares,
    attempt,
    measure_cudnn,
    measure_steps,
)
from benchmarks.hunyuan.account import flops_outside_attention
from benchmarks.hunyuan.summary import SHIFT, summarise
from draft_jax import DraftConfig, PooledTokens, VideoGrid, compute_mask
from models.diffusion.interfaces import LatentShape, TextContext
from models.diffusion.sampler import StepInputs
from models.diffusion.schedulers import FlowEuler
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.transformer import HunyuanTransformer
from models.hunyuan.vae.config import HunyuanVAEConfig

TINY = HunyuanConfig(
    dim=32,
    num_heads=2,
    num_double_blocks=3,
    num_single_blocks=2,
    num_refiner_blocks=1,
    rope_channels=(4, 6, 6),
    text_dim=16,
    text_length=8,
    pooled_dim=8,
    freq_dim=16,
    tile=(2, 4),
)
MODELS = {"tiny": TINY, "13b": HunyuanConfig.video_13b(param_dtype="bfloat16")}
FRAMES = {"tiny": 9, "13b": 129}
SIZES = {
    "tiny": {"544p": (64, 128), "720p": (80, 128), "768p": (96, 128)},
    "13b": {"544p": (544, 960), "720p": (720, 1280), "768p": (768, 1280)},
}
# 720p after 768p, with which it is compared: a GPU is slower when it has got warm.
MODES = {
    "544p": ("0.9",),
    "768p": ("dense", "0.75", "0.8", "0.9+layers0,1", "0.9"),
    "720p": ("0.9",),
}
# The same size and weights, with linear layers in FP8.
FLOAT8 = "768p_float8"
FLOAT8_MODES = ("dense", "0.9")
DEFAULT_MODES = ("0.9", "0.95")  # of the library's own selection, in FP8
PARTS = ("vae", *MODES, FLOAT8)
VAE = HunyuanVAEConfig.video(dtype="bfloat16")
VALID_TEXT = 60 / 256  # share of the text's rows
MASKS = 10  # made in a row under CUPTI

Record = dict[str, Any]


def latent_shape(size: tuple[int, int], frames: int) -> LatentShape:
    """Shape of the latent that Hunyuan's autoencoder makes of a video."""
    return VAE.latent_shape(frames=frames, height=size[0], width=size[1])


def make_inputs(config: HunyuanConfig) -> StepInputs:
    """Random text of a typical length."""
    keys = jax.random.split(jax.random.key(1))
    size = (1, config.text_length, config.text_dim)
    context = TextContext(
        jax.random.normal(keys[0], size, config.compute_dtype),
        jnp.asarray([int(VALID_TEXT * config.text_length)]),
        jax.random.normal(keys[1], (1, config.pooled_dim)),
    )
    return StepInputs(
        context, guidance=jnp.float32(1.0), embedded_guidance=jnp.float32(6.0)
    )


def make_problem(model: HunyuanTransformer, shape: LatentShape) -> Problem:
    """The steps of the pipeline at one size."""
    return Problem(
        model=model,
        latent_shape=shape,
        inputs=make_inputs(model.config),
        make_solver=lambda steps: FlowEuler(num_steps=steps, shift=SHIFT),
        flops_outside=flops_outside_attention(
            model.config, model.grid(shape).num_visual_tokens
        ),
    )


def matmul_shapes(config: HunyuanConfig, tokens: int) -> dict[str, MatmulShape]:
    """Rows, inner size and columns of the model's own products."""
    dim, hidden = config.dim, config.mlp_dim
    return {
        "projection": (tokens, dim, dim),
        "linear1": (tokens, dim, 3 * dim + hidden),
        "linear2": (tokens, dim + hidden, dim),
    }


def linear_shapes(config: HunyuanConfig, tokens: int) -> dict[str, MatmulShape]:
    """Rows, inner size and columns of the linear layers of a block."""
    dim, hidden = config.dim, config.mlp_dim
    return {
        "projection": (tokens, dim, dim),
        "mlp in": (tokens, dim, hidden),
        "mlp out": (tokens, hidden, dim),
    }


# ------------------------------------------------------------------- the parts


def load(config: HunyuanConfig) -> tuple[HunyuanTransformer, Record]:
    """Makes the model, and says how large it is."""
    start = time.perf_counter()
    model = random_model(lambda: HunyuanTransformer(config, rngs=nnx.Rngs(0)))
    leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    return model, {
        "seconds": time.perf_counter() - start,
        "parameters": sum(leaf.size for leaf in leaves),
        "gb": sum(leaf.nbytes for leaf in leaves) / GB,
        **device_memory(),
    }


def measure_size(model: HunyuanTransformer, part: str, options, report) -> None:
    """All modes at one size; `report` takes the record whenever it has grown."""
    size, frames = SIZES[options.model][part], FRAMES[options.model]
    problem = make_problem(model, latent_shape(size, frames))
    samples = Samples(
        modes=choose(MODES[part], options),
        sparse=options.samples,
        dense=options.dense_samples,
        cudnn=part != "720p",
        profile=part != "544p",
    )
    record: Record = {}

    def keep(grown: Record) -> None:
        record.update(grown)
        report(record)

    measure_steps(problem, samples, {"size": list(size), "frames": frames}, keep)
    if not samples.profile:
        return
    grid = model.grid(problem.latent_shape)
    shapes = matmul_shapes(model.config, grid.num_tokens)
    keep({"matmul": matmul_rates(shapes)})
    add_shares(record, record["matmul"])
    keep({"mask": attempt(profile_mask, grid, model.config)})
    if "error" not in {**record["profile"], **record["mask"]}:
        by_class = record["profile"]["by_class_ms"]
        parts = by_part(by_class, record["mask"], model.num_layers)
        keep({"time_by_part_ms": parts})


def measure_float8(config: HunyuanConfig, options, report) -> None:
    """Products and steps in FP8 at the largest size; see `measure_size`."""
    size, frames = SIZES[options.model]["768p"], FRAMES[options.model]

    def dense_bfloat16() -> Record:
        problem = make_problem(load(config)[0], latent_shape(size, frames))
        return measure_cudnn(problem, options.dense_samples)

    report({"cudnn": dense_bfloat16()})
    model, loaded = load(dataclasses.replace(config, linears="float8"))
    problem = make_problem(model, latent_shape(size, frames))
    grid = model.grid(problem.latent_shape)
    shapes = linear_shapes(config, grid.num_tokens)
    report({"load": loaded, "linears": attempt(linear_times, shapes)})
    samples = Samples(
        modes=choose(FLOAT8_MODES, options),
        sparse=options.samples,
        dense=options.dense_samples,
        cudnn=False,
        profile=True,
    )
    facts = {"size": list(size), "frames": frames}
    measure_steps(problem, samples, facts, report)
    problem = dataclasses.replace(problem, draft=DraftConfig.compensated())
    samples = dataclasses.replace(
        samples, modes=list(map(Mode.parse, DEFAULT_MODES)), profile=False
    )
    measure_steps(problem, samples, facts, lambda grown: report({"default": grown}))


def choose(modes: Sequence[str], options) -> list[Mode]:
    """Modes of a part that are asked for."""
    wanted = options.modes or modes
    return [Mode.parse(name) for name in modes if name in wanted]


def profile_mask(grid: VideoGrid, config: HunyuanConfig) -> Record:
    """GPU time of a new mask from pooled tokens, by class of kernel."""
    draft = DraftConfig.paper(sparsity=0.9)
    pooled_shape = (1, grid.num_visual_blocks, config.num_heads, config.head_dim)
    q_mean, k_mean = jax.random.normal(jax.random.key(2), (2, *pooled_shape))
    pooled = PooledTokens(q_mean=q_mean, k_mean=k_mean)

    @jax.jit
    def make(pooled):
        shape = (1, grid.num_tokens, config.num_heads, config.head_dim)
        q = jnp.zeros(shape, config.compute_dtype)  # for its shape
        return compute_mask(q, q, grid=grid, config=draft, order="tiled", pooled=pooled)

    jax.block_until_ready(make(pooled))

    def run() -> None:
        for _ in range(MASKS):
            jax.block_until_ready(make(pooled))

    _, launches = kernel_account.profile(run)
    mean = [(name, ms / MASKS) for name, ms in launches]
    if not mean:
        return {"error": "no GPU kernel was seen"}
    return kernel_account.account(mean, num_blocks=1)


def by_part(
    by_class: dict[str, float], mask: Record, num_layers: int
) -> dict[str, float]:
    """Milliseconds of a step by what they are for; they sum to those of all kernels."""
    lists = by_class.get("order of work", 0.0)
    draft = num_layers * mask["kernels_ms"]
    logits = num_layers * mask["by_class_ms"].get("matmul", 0.0)
    parts = {
        "attention": by_class.get("self-attention", 0.0),
        "lists": lists,
        "draft": draft,
        "linears": by_class.get("matmul", 0.0) - logits,
        "norm and rotation of q and k": by_class.get("norm and rotation", 0.0),
        "copies": by_class.get("copy", 0.0),
    }
    return parts | {"the rest": sum(by_class.values()) - sum(parts.values())}


def measure_vae(options) -> Record:
    """Decodes in a process of its own, which leaves the device free after it."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "vae.json"
        command = [sys.executable, "-m", "benchmarks.hunyuan.vae"]
        command += ["--convolutions", VAE.convolution, "--output", str(file)]
        command += ["--tiny"] * (options.model == "tiny")
        variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        status, output = run_limited(command, options.vae_limit, variables)
        found = json.loads(file.read_text()) if file.exists() else {"records": []}
    found |= found.pop("summary", {})  # where the other parts have theirs
    if status != 0:
        found["error"] = f"ended with {status}: {output[-1000:]}"
    return found


# ---------------------------------------------------------------- command line


def brief(record: Record) -> Record:
    """Returns what of a part's record is worth a line on the screen."""
    numbers = {k: v for k, v in record.items() if isinstance(v, (int, float, str))}
    for name in ("modes", "cudnn", "matmul"):
        found = record.get(name, {})
        cases = {name: found} if "median_ms" in found else found
        numbers |= {f"{case}_ms": round(x["median_ms"], 2) for case, x in cases.items()}
    errors = {
        f"{name}_error": value["error"]
        for name, value in record.items()
        if isinstance(value, dict) and "error" in value
    }
    return numbers | record.get("time_by_part_ms", {}) | errors


def measure_wide(sizes: list[str], options, results: Parts) -> None:
    """Measures parts of the bfloat16 model, whose memory is free after them."""
    if not sizes:
        return
    model, loaded = load(MODELS[options.model])
    results.document |= {"config": model.config.to_dict(), "load": loaded}
    for part in sizes:
        results.measure(part, measure_size, model, part, options)


def main(arguments: list[str] | None = None) -> None:
    """Measures the parts that are asked for."""
    options = parse(arguments)
    facts = {"model": options.model}
    results = Parts(options.output, facts, summarise=summarise, show=brief)
    if "vae" in options.parts:  # before JAX takes the device
        where = {"environment": provenance()}
        results.keep("vae", where | attempt(measure_vae, options))
    measure_wide([part for part in MODES if part in options.parts], options, results)
    if FLOAT8 in options.parts:
        results.measure(FLOAT8, measure_float8, MODELS[options.model], options)
    summary = results.document.get("summary", {})
    print(json.dumps(summary, indent=1), flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", choices=MODELS, default="13b")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    choices = list(dict.fromkeys((*MODES["768p"], *FLOAT8_MODES)))
    add("--modes", nargs="+", choices=choices, help="of 768p, those of all")
    add("--samples", type=int, default=3, help="steps of each sparse mode")
    add("--dense-samples", type=int, default=1, help="steps of each dense mode")
    add("--vae-limit", type=float, default=300, help="seconds for the decoder")
    add_output(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
