"""Loads a Wan2.1 transformer at full size and times denoising steps on one GPU.

    python -m benchmarks.wan.run write --model 14b
    python -m benchmarks.wan.run measure --model 14b --profile --decode \
        --output benchmarks/results/wan_14b_h100.json
    python -m benchmarks.wan.run measure --model tiny    # any machine; `write` it first

`write` makes a folder with random weights, which `measure` loads like published ones. A
step is the pipeline's own, UniPC with guidance, by default in two calls of the model.
Each kind of step has its program; modes that differ in sparsity share one. peak_gb
is that of the process so far. "dense" is the library's dense attention; --cudnn adds
steps with cuDNN's. Name small sizes first. The file is written anew after each part:

  samples_ms       steps, until the result is there; each program has run once before
  kept_density     share of token pairs that self-attention computed
  outside          self-attention is what CUPTI says of its kernels, and of a draft's
                   that have names, in one more step of the sparsest mode; the rest of
                   that mode's median step is outside, idle time included
  share_of_matmul  rate of the products outside, over that of the fastest matrix
                   product in `matmul`; each of those runs for a second

Modes: "dense", or a sparsity such as "0.9"; with "+layer0" layer 0 stays dense, with
"+reuse" the masks of the step before are used again.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import re
import statistics
import time
from typing import Any
from unittest import mock

# Read when JAX first uses the GPU. Grown piece by piece, its memory would break up.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.common.gpu_state import GpuState
from benchmarks.common.machine import GB, device_memory, host_peak_bytes, matmul_rate
from benchmarks.common.options import height_by_width, make_parser
from benchmarks.common.records import environment, write_json
from benchmarks.wan import account as wan_account
from benchmarks.wan import vae as wan_vae
from benchmarks.wan import weights as wan_weights
from draft_jax import AttentionPlan, DraftConfig, SparsitySchedule
from models.diffusion.interfaces import TextContext
from models.diffusion.sampler import Sampler, SamplerState, StepInputs
from models.diffusion.schedulers import make_solver
from models.wan.checkpoint import Part, open_wan_parts
from models.wan.config import WanConfig
from models.wan.transformer import WanTransformer
from models.wan.vae.autoencoder import WanVAE
from models.wan.vae.codec import WanVAECodec
from models.wan.vae.config import WanVAEConfig
from pallas_kernels.attention.sm90 import dense_backend as hopper_dense

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


@dataclasses.dataclass(frozen=True)
class Mode:
    """A way to run self-attention in a step; see the module's text."""

    name: str
    sparsity: float | None  # None is dense
    layer_0_dense: bool
    reuse: bool

    @property
    def program(self) -> tuple[bool, bool, bool]:
        """Properties that decide on a program: modes alike in them share one."""
        return self.sparsity is None, self.layer_0_dense, self.reuse

    @classmethod
    def parse(cls, name: str) -> "Mode":
        """Reads a name; the module says which there are."""
        match = re.fullmatch(r"(dense|0\.\d+)(\+layer0)?(\+reuse)?", name)
        if match is None or (match[1] == "dense" and name != "dense"):
            raise argparse.ArgumentTypeError(
                f"mode {name!r} must be 'dense', or a sparsity such as '0.9' with "
                "'+layer0' or '+reuse' or both after it"
            )
        sparsity = None if match[1] == "dense" else float(match[1])
        return cls(name, sparsity, match[2] is not None, match[3] is not None)


# ----------------------------------------------------------------- the loading


def load(folder: pathlib.Path) -> tuple[WanTransformer, dict[str, Any]]:
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
    model = open_wan_parts(folder, parts=parts).load_transformer()
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


def matmul_rates(config: WanConfig, num_tokens: int) -> dict[str, dict[str, Any]]:
    """TFLOP/s of bfloat16 products: a large square one, and the model's own."""
    dim, hidden = config.dim, config.ffn_dim
    side = 8192 if jax.default_backend() == "gpu" else 64
    shapes = {
        "square": (side, side, side),
        "projection": (num_tokens, dim, dim),
        "ffn.linear_1": (num_tokens, dim, hidden),
        "ffn.linear_2": (num_tokens, hidden, dim),
    }
    return {name: matmul_rate(*shape) for name, shape in shapes.items()}


# ------------------------------------------------------------------- the steps


@functools.cache
def latent_shape(size: tuple[int, int], frames: int) -> tuple[int, int, int, int]:
    """Shape of the latent that Wan's autoencoder makes of a video."""
    config = WanVAEConfig.wan2_1()
    abstract = nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    codec = WanVAECodec(model=abstract)
    return codec.latent_shape(frames=frames, height=size[0], width=size[1])


def make_sampler(
    model: WanTransformer, shape: tuple[int, int, int, int], modes: list[Mode], options
) -> Sampler:
    """A sampler with one step for each mode."""
    sparsities = [mode.sparsity for mode in modes if mode.sparsity is not None]
    per_step = tuple(mode.sparsity or min(sparsities, default=0.0) for mode in modes)
    attention = AttentionPlan.dense()
    if sparsities:
        attention = AttentionPlan.draft(
            DraftConfig(sparsity=min(sparsities)), SparsitySchedule(sparsity=per_step)
        )
    sampler = Sampler.create(
        model,
        latent_shape=shape,
        solver=make_solver("unipc", num_steps=len(modes), shift=5.0),
        attention=attention,
        guidance_batching="one_call" if options.guidance == "off" else options.guidance,
    )
    if sampler.plan is None:
        return sampler
    dense = np.stack(
        [np.full(model.config.num_layers, m.sparsity is None) for m in modes]
    )
    dense[:, 0] |= [mode.layer_0_dense for mode in modes]
    refresh = np.array([not mode.reuse for mode in modes])
    plan = dataclasses.replace(sampler.plan, dense=dense, refresh=refresh)
    return dataclasses.replace(sampler, plan=plan)


def make_inputs(config: WanConfig, guided: bool) -> StepInputs:
    """Random text; prompts of Wan's length and its negative prompt's."""
    rows = 2 if guided else 1
    size = (rows, config.text_length, config.text_dim)
    context = jax.random.normal(jax.random.key(1), size, config.compute_dtype)
    lengths = jnp.asarray([config.text_length // 4, config.text_length // 3][:rows])
    return StepInputs(TextContext(context, lengths), guidance=jnp.float32(5.0))


class Steps:
    """The compiled step of a size, and where its run has got to."""

    def __init__(self, model, size, modes: list[Mode], options) -> None:
        shape = latent_shape(size, options.frames)
        guided = options.guidance != "off"
        self.sampler = make_sampler(model, shape, modes, options)
        self.inputs = make_inputs(model.config, guided)
        self.state: SamplerState = self.sampler.initial_state(1, seed=0, guided=guided)
        start = time.perf_counter()
        self.programs = self.sampler.compile(self.state, self.inputs)
        self.compile_s = time.perf_counter() - start
        self.index = 0
        self.calls = 2 if guided else 1
        self.num_tokens = model.grid(shape).num_tokens

    def run(self):
        """The next step of the plan."""
        self.state, report = self.sampler.run_step(
            self.programs, self.state, self.inputs, self.index
        )
        self.index += 1
        return report

    def describe(self) -> dict[str, Any]:
        """The programs, before they have run; of sizes, those of the largest."""
        sizes = ("argument", "output", "temp", "alias")
        programs: Any = self.programs.values()
        stats = [program.memory_analysis() for program in programs]
        return {
            "tokens": self.num_tokens,
            "model_calls": self.calls,
            "compile_s": self.compile_s,
            "programs": len(stats),
            "program_gb": {
                name: max(getattr(s, f"{name}_size_in_bytes") for s in stats) / GB
                for name in sizes
            },
            "after_compilation": device_memory(),
        }


def measure_size(model, size, options, report) -> None:
    """All modes at one size; `report` takes the record whenever it has grown."""
    modes = options.modes
    # Each program once to warm up: modes that differ in sparsity share one.
    warm_ups = list({m.program: m for m in reversed(modes)}.values())
    order = list(warm_ups)
    counts = {
        mode: options.dense_samples if mode.sparsity is None else options.samples
        for mode in modes
    }
    for mode in modes:
        order += [mode] * counts[mode]
    order += [modes[-1]] * bool(options.profile)
    steps = Steps(model, size, order, options)
    record: dict[str, Any] = {"size": list(size), "frames": options.frames}
    record |= steps.describe() | {"modes": {}}
    report(record)
    record["warm_up_ms"] = {mode.name: steps.run().time_ms for mode in warm_ups}
    for mode in modes:
        with GpuState() as state:
            reports = [steps.run() for _ in range(counts[mode])]
        samples = [step.time_ms for step in reports]
        record["modes"][mode.name] = {
            "median_ms": statistics.median(samples),
            "samples_ms": samples,
            "kept_density": float(reports[-1].kept_density.mean()),
            **device_memory(),
            **state.summary,
        }
        report(record)
    if options.cudnn:
        record["cudnn"] = measure_cudnn(model, size, options)
    _compare(record["modes"], record.get("cudnn"))
    report(record)
    if options.profile:
        record |= profile_step(model.config, steps, record["modes"][modes[-1].name])
        report(record)


def measure_cudnn(model, size, options) -> dict[str, Any]:
    """Dense steps with cuDNN's attention; the first is the one to warm up."""
    dense = [Mode.parse("dense")] * (options.dense_samples + 1)
    unwanted = mock.patch.object(
        hopper_dense, "why_unsupported", return_value="cuDNN is wanted"
    )
    with unwanted:
        steps = Steps(model, size, dense, options)
    steps.run()
    with GpuState() as state:
        samples = [steps.run().time_ms for _ in dense[1:]]
    return {
        "median_ms": statistics.median(samples),
        "samples_ms": samples,
        **state.summary,
    }


def _compare(
    modes: dict[str, dict[str, Any]], cudnn: dict[str, Any] | None = None
) -> None:
    """Returns how much faster each mode is than each dense step."""
    for name, dense in (("speedup", modes.get("dense")), ("over_cudnn", cudnn)):
        if dense is None:
            continue
        for result in modes.values():
            result[name] = dense["median_ms"] / result["median_ms"]


def profile_step(
    config: WanConfig, steps: Steps, timed: dict[str, Any]
) -> dict[str, Any]:
    """One more step of the last mode under CUPTI."""
    try:
        report, launches = wan_account.profile(steps.run)
    except Exception as error:  # recorded: the times stand without it
        return {"profile": {"error": f"{type(error).__name__}: {error}"[:500]}}
    if not launches:
        return {"profile": {"error": "no GPU kernel was seen"}}
    num_blocks = config.num_layers * steps.calls
    profile = wan_account.account(launches, num_blocks=num_blocks)
    profile["step_ms"] = report.time_ms
    by_class = profile["by_class_ms"]
    attention = by_class.get("self-attention", 0.0) + by_class.get("draft", 0.0)
    parts = wan_account.flops_outside_attention(config, steps.num_tokens)
    flops = steps.calls * sum(parts.values())
    outside = timed["median_ms"] - attention
    return {
        "profile": profile,
        "outside": {
            "self_attention_ms": attention,
            "outside_ms": outside,
            "tflop": flops / 1e12,
            "tflop_by_part": {
                name: steps.calls * part / 1e12 for name, part in parts.items()
            },
            "tflops": flops / outside / 1e9,
        },
    }


def add_shares(results: dict[str, Any]) -> None:
    """The rate outside attention over the measured ones."""
    rates = {name: rate["tflops"] for name, rate in results["matmul"].items()}
    for case in results["cases"]:
        if "outside" in case:
            rate = case["outside"]["tflops"]
            case["outside"]["share_of_matmul"] = rate / max(rates.values())
            case["outside"]["share_of_each"] = {
                name: rate / other for name, other in rates.items()
            }


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


# ---------------------------------------------------------------- command line


def attempt(function, *arguments) -> dict[str, Any]:
    """Calls a function; an error becomes a record, so that other parts still run."""
    try:
        return function(*arguments) or {}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:1000]}


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
        if options.output:
            write_json(options.output, results)

    model, results["load"] = load(options.folder)
    config = model.config
    results["config"] = dataclasses.asdict(config)
    save("load", results["load"])
    largest = max(options.sizes, key=lambda size: size[0] * size[1])
    num_tokens = model.grid(latent_shape(largest, options.frames)).num_tokens
    results["matmul"] = matmul_rates(config, num_tokens)
    save("matmul", results["matmul"])
    for size in options.sizes:
        results["cases"].append({"size": list(size)})

        def report(record, size=size):
            results["cases"][-1] = record
            add_shares(results)
            save("x".join(map(str, size)), record)

        failure = attempt(measure_size, model, size, options, report)
        if failure:
            report(results["cases"][-1] | failure)
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
    add("--decode", action="store_true", help="decode a video of each size, too")
    add("--vae-dtype", default="float32", choices=("float32", "bfloat16"))
    add("--output", type=pathlib.Path, help="JSON file")
    options = parser.parse_args(arguments)
    options.folder = options.folder or pathlib.Path(f"/tmp/wan_{options.model}")
    if options.run is measure:
        is_tiny = options.model == "tiny"
        default_sizes = [(32, 48)] if is_tiny else [(480, 832), (768, 1280)]
        options.sizes = options.sizes or default_sizes
        options.frames = options.frames or (9 if is_tiny else 81)
        options.dense_samples = options.dense_samples or options.samples
        last = options.modes[-1]
        if options.profile and (last.sparsity is None or last.layer_0_dense):
            parser.error(
                f"--profile needs a last mode whose layers are all sparse, not "
                f"{last.name}: cuDNN's kernels count as cross-attention"
            )
    return options


def main() -> None:
    """Runs one command."""
    options = parse()
    options.run(options)


if __name__ == "__main__":
    main()
