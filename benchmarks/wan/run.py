"""Loads a Wan2.1 transformer at full size and times denoising steps on one GPU.

    python -m benchmarks.wan.run write --model 14b
    python -m benchmarks.wan.run measure --model 14b --profile --decode \
        --output benchmarks/results/wan_14b_h100.json
    python -m benchmarks.wan.run measure --model tiny    # any machine; `write` it first

`write` makes a folder with random weights, which `measure` loads like published ones. A
step is the pipeline's own, UniPC with guidance, by default in two calls of the model.
Each kind of step has its program; modes that differ in sparsity share one. peak_gb
is that of the process so far. "dense" is the library's dense attention; --cudnn adds
steps with cuDNN's. --float8 then loads the model with linear layers in FP8 and measures
the same: `float8`. Name small sizes first. The file is written anew after each part.

`benchmarks.common.steps` says what else is in a record, `benchmarks.common.modes` what
modes there are, and `benchmarks.wan.summary` what `summary` is.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

# Read when JAX first uses the GPU. Grown piece by piece, its memory would break up.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.common.machine import (
    GB,
    device_memory,
    host_peak_bytes,
    matmul_rates,
)
from benchmarks.common.modes import Mode
from benchmarks.common.options import height_by_width, make_parser
from benchmarks.common.records import environment, write_json
from benchmarks.common.steps import (
    Problem,
    Samples,
    add_shares,
    attempt,
    measure_steps,
)
from benchmarks.wan import vae as wan_vae
from benchmarks.wan import weights as wan_weights
from benchmarks.wan.account import flops_outside_attention
from benchmarks.wan.linears import matmul_shapes, measure_linears
from benchmarks.wan.summary import summarise
from models.diffusion.interfaces import TextContext
from models.diffusion.sampler import StepInputs
from models.diffusion.schedulers import make_solver
from models.files import output_file
from models.wan.checkpoint import Part, open_wan_parts
from models.wan.config import WanConfig
from models.wan.transformer import WanTransformer
from models.wan.vae.autoencoder import WanVAE
from models.wan.vae.codec import WanVAECodec
from models.wan.vae.config import WanVAEConfig

TINY = WanConfig(
    dim=48,
    ffn_dim=64,
    num_heads=2,
    num_layers=3,
    text_dim=16,
    text_length=8,
    freq_dim=16,
    tile=(2, 4),
)
MODELS = {"tiny": TINY, "1.3b": WanConfig.t2v_1_3b(), "14b": WanConfig.t2v_14b()}
GUIDANCE = ("two_calls", "one_call", "off")


# ----------------------------------------------------------------- the loading


def load(folder: pathlib.Path, linears: str) -> tuple[WanTransformer, dict[str, Any]]:
    """Loads the model as users do, and measures what that takes."""
    shards = [file.stat().st_size for file in folder.glob("transformer/*.safetensors")]
    if not shards:
        raise SystemExit(
            f"{folder} has no weights: run `benchmarks.wan.run write` first"
        )
    jax.block_until_ready(jnp.zeros(8) + 1)  # what JAX loads when it is first used
    before = host_peak_bytes(reset=True)
    start = time.perf_counter()
    parts: tuple[Part, ...] = ("transformer",)
    model = open_wan_parts(folder, parts=parts, linears=linears).load_transformer()
    state = jax.block_until_ready(nnx.state(model))
    seconds = time.perf_counter() - start
    growth = host_peak_bytes() - before
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    if jax.default_backend() == "cpu":
        growth -= nbytes  # the device is the host
    return model, {
        "seconds": seconds,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state)),
        "gb": nbytes / GB,
        "shards_gb": [size / GB for size in sorted(shards)],
        "host_peak_growth_gb": growth / GB,
        "host_growth_over_largest_shard": growth / max(shards),
        **device_memory(),
    }


# ------------------------------------------------------------------- the steps


@functools.cache
def latent_shape(size: tuple[int, int], frames: int) -> tuple[int, int, int, int]:
    """Shape of the latent that Wan's autoencoder makes of a video."""
    config = WanVAEConfig.wan2_1()
    abstract = nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    codec = WanVAECodec(model=abstract)
    return codec.latent_shape(frames=frames, height=size[0], width=size[1])


def make_inputs(config: WanConfig, guided: bool) -> StepInputs:
    """Random text; prompts of Wan's length and its negative prompt's."""
    rows = 2 if guided else 1
    size = (rows, config.text_length, config.text_dim)
    context = jax.random.normal(jax.random.key(1), size, config.compute_dtype)
    lengths = jnp.asarray([config.text_length // 4, config.text_length // 3][:rows])
    return StepInputs(TextContext(context, lengths), guidance=jnp.float32(5.0))


def make_problem(model: WanTransformer, size: tuple[int, int], options) -> Problem:
    """The steps of the pipeline at one size."""
    shape = latent_shape(size, options.frames)
    guided = options.guidance != "off"
    num_tokens = model.grid(shape).num_tokens
    return Problem(
        model=model,
        latent_shape=shape,
        inputs=make_inputs(model.config, guided),
        make_solver=lambda steps: make_solver("unipc", num_steps=steps, shift=5.0),
        guidance_batching=options.guidance if guided else "one_call",
        flops_outside=flops_outside_attention(model.config, num_tokens),
    )


def measure_size(model, size: tuple[int, int], options, report) -> None:
    """All modes at one size; `report` takes the record whenever it has grown."""
    samples = Samples(
        modes=options.modes,
        sparse=options.samples,
        dense=options.dense_samples,
        cudnn=options.cudnn,
        profile=options.profile,
    )
    facts = {"size": list(size), "frames": options.frames}
    measure_steps(make_problem(model, size, options), samples, facts, report)


def decode(size: tuple[int, int], options) -> dict[str, Any]:
    """The video of a random latent, beside the transformer."""
    config = WanVAEConfig.wan2_1(dtype=options.vae_dtype)
    if options.model == "tiny":
        config = dataclasses.replace(config, base_dim=8)
    codec = WanVAECodec(model=wan_vae.random_model(config))
    shape = codec.latent_shape(frames=options.frames, height=size[0], width=size[1])
    latents = np.random.default_rng(0).standard_normal((1, *shape), np.float32)
    start = time.perf_counter()
    codec.decode_to_host(latents[:, :2])
    record: dict[str, Any] = {"compile_s": time.perf_counter() - start}
    start = time.perf_counter()
    video = codec.decode_to_host(latents)
    return record | {
        "size": list(size),
        "frames": options.frames,
        "dtype": options.vae_dtype,
        "convolution": config.convolution,
        "seconds": time.perf_counter() - start,
        "finite": bool(np.isfinite(video).all()),
        **device_memory(),
    }


def measure_steps_of_model(
    linears: str, results: dict[str, Any], options, save: Callable[[str, Any], None]
) -> None:
    """Loads the model and measures its products and steps, which go to `results`.

    Args:
      linears: Precision of the model's linear layers.
      results: Takes what is measured, as it comes.
      options: Of the command line.
      save: Takes what was measured by name whenever there is more.
    """
    model, results["load"] = load(options.folder, linears)
    config = model.config
    results["config"] = dataclasses.asdict(config)
    save(f"load, {linears}", results["load"])
    largest = max(options.sizes, key=lambda size: size[0] * size[1])
    num_tokens = model.grid(latent_shape(largest, options.frames)).num_tokens
    if linears == "float8":
        results["linears"] = attempt(measure_linears, config, num_tokens)
        save("linears", results["linears"])
        # Those with cuDNN's attention are the wide model's.
        options = argparse.Namespace(**{**vars(options), "cudnn": False})
    else:
        results["matmul"] = matmul_rates(matmul_shapes(config, num_tokens))
        save("matmul", results["matmul"])
    for size in options.sizes:
        results["cases"].append({"size": list(size)})

        def report(record, size=size):
            results["cases"][-1] = record
            add_shares(record, results.get("matmul", {}))
            save(f"{'x'.join(map(str, size))}, {linears}", record)

        failure = attempt(measure_size, model, size, options, report)
        if failure:
            report(results["cases"][-1] | failure)


# ---------------------------------------------------------------- command line


def write(options: argparse.Namespace) -> None:
    """Writes a folder of random weights."""
    start = time.perf_counter()
    sizes = wan_weights.write_folder(
        MODELS[options.model], options.folder, max_shard_bytes=options.shard_bytes
    )
    seconds = time.perf_counter() - start
    print(
        f"{options.folder}: {sum(sizes) / GB:.2f} GB in {len(sizes)} files, "
        f"{seconds:.1f} s",
        flush=True,
    )


def measure(options: argparse.Namespace) -> None:
    """Loads, times, and writes the JSON file after each part."""
    start = time.perf_counter()
    results: dict[str, Any] = {
        "environment": environment(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "model": options.model,
        "guidance": options.guidance,
        "cases": [],
    }

    def save(what: str, record: Any) -> None:
        now = time.perf_counter() - start
        shown = {k: v for k, v in record.items() if k != "profile" or "error" in v}
        print(f"[{now:6.1f} s] {what}: {json.dumps(shown)}", flush=True)
        results["summary"] = summarise(results)
        if options.output:
            write_json(options.output, results)

    measure_steps_of_model("bfloat16", results, options, save)
    if options.float8:
        results["float8"] = {"cases": []}
        measure_steps_of_model("float8", results["float8"], options, save)
    for size in options.sizes if options.decode else ():
        results.setdefault("decode", []).append(attempt(decode, size, options))
        save("decode", results["decode"][-1])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(required=True)
    for function in (write, measure):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.add_argument("--model", choices=MODELS, default="1.3b")
        command.add_argument("--folder", type=pathlib.Path, help="/tmp/wan_MODEL")
        command.set_defaults(run=function)
    add = commands.choices["write"].add_argument
    add("--shard-bytes", type=int, default=wan_weights.MAX_SHARD_BYTES)
    add = commands.choices["measure"].add_argument
    add(
        "--sizes",
        nargs="+",
        type=height_by_width,
        help="HEIGHTxWIDTH, small ones first",
    )
    add("--frames", type=int, help="of the video")
    default = [Mode.parse(name) for name in ("dense", "0.75", "0.9")]
    add("--modes", nargs="+", type=Mode.parse, default=default, help="sparsest last")
    add("--samples", type=int, default=3, help="steps of each mode")
    add("--dense-samples", type=int, help="of dense steps, if others")
    add("--guidance", choices=GUIDANCE, default="two_calls")
    add("--cudnn", action="store_true", help="dense steps with cuDNN's kernel, too")
    add("--profile", action="store_true", help="one more step, by kernels")
    add("--float8", action="store_true", help="the same steps with linears in FP8, too")
    add("--decode", action="store_true", help="decode a video of each size, too")
    add("--vae-dtype", default="float32", choices=("float32", "bfloat16"))
    add("--output", type=output_file, help="JSON file")
    options = parser.parse_args(arguments)
    options.folder = options.folder or pathlib.Path(f"/tmp/wan_{options.model}")
    if options.run is measure:
        is_tiny = options.model == "tiny"
        default_sizes = [(32, 48)] if is_tiny else [(480, 832), (768, 1280)]
        options.sizes = options.sizes or default_sizes
        options.frames = options.frames or (9 if is_tiny else 81)
        options.dense_samples = options.dense_samples or options.samples
        last = options.modes[-1]
        if options.profile and (last.sparsity is None or last.dense_layers):
            parser.error(
                f"--profile needs a last mode whose layers are all sparse, not "
                f"{last.name}: dense layers count as sparse ones"
            )
    return options


def main() -> None:
    """Runs one command."""
    options = parse()
    options.run(options)


if __name__ == "__main__":
    main()
