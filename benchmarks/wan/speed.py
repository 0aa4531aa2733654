"""Measures what a Wan2.1 video gains by everything together, in one run on one GPU.

    python -m benchmarks.wan.speed --output benchmarks/results/wan_14b_speed_h200.json
    python -m benchmarks.wan.speed --model tiny    # any machine, a minute

Weights are random, made on the device: linear layers in FP8 and, for what is compared
with, in bfloat16. Steps have guidance in two calls. Parts, in this order:

  steps     sparse and skipped steps of the video, by the programs of the video
  video     the whole video, once, with a step cache; each program is there before
  published  the video by the published rules, worked out from steps that were measured
  cudnn     dense bfloat16 steps with cuDNN's attention
  linears   linear layers by themselves and in a block, in both precisions
  default   steps with the library's own selection, at 90 and 95 %
  480p      a sparse step at the small size, and a dense one with cuDNN's attention
  outside   sparse steps in bfloat16 and in FP8, each once more under CUPTI
  look      a look at attention; the command line has three in a video, for its page
  image     image-to-video from pixels to an mp4, few steps, in FP8
  720p      the text-to-video model at 720 x 1280, few steps, in FP8

`peak_gb` is that of the process: nothing but the model comes before the video. For the
last two, too, if each has a process of its own.
The file is written anew whenever something was measured, and no part begins after
--limit seconds; a video that would end after them stops. Parts that are not asked for
stay in the file; what is compared is of one run. Parts after `linears` are compiled
side by side before the first of them. `benchmarks.wan.summary` says what `summary` is,
`benchmarks.common.steps` what a record of steps holds.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable
from typing import Any

# Read when JAX first uses the GPU; see `benchmarks.wan.run`.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")

import jax
from flax import nnx

from benchmarks.common.machine import GB, device_memory
from benchmarks.common.modes import Mode
from benchmarks.common.options import add_output, height_by_width, make_parser
from benchmarks.common.parts import Parts
from benchmarks.common.random_weights import random_model
from benchmarks.common.steps import (
    Problem,
    Samples,
    Steps,
    measure_cudnn,
    profile_step,
    time_steps,
)
from benchmarks.wan import run as wan_run
from benchmarks.wan import video as wan_video
from benchmarks.wan.linears import measure_linears as linears_of_model
from benchmarks.wan.summary import sparse_ms, speed_figures
from draft_jax import DraftConfig
from models.cli.cache_options import parse_cache
from models.clip.config import CLIPVisionConfig
from models.clip.encoder import CLIPVisionEncoder
from models.clip.image_encoder import CLIPImageEncoder
from models.wan.config import WanConfig
from models.wan.transformer import WanTransformer

Record = dict[str, Any]
Report = Callable[[Record], None]

DEFAULT_MODES = ("0.9", "0.95")
NOT_SHOWN = ("cache", "profile", "environment")  # of a record, on the screen
PUBLISHED_IMAGE_MODEL = (WanConfig.i2v_14b(), CLIPVisionConfig.vit_h_14())
IMAGE_MODELS = {
    "tiny": (
        dataclasses.replace(wan_run.TINY, in_channels=36, image_dim=24),
        CLIPVisionConfig.vit_h_14(
            dim=24, ffn_dim=32, num_heads=2, num_layers=2, image_size=28
        ),
    ),
    "1.3b": PUBLISHED_IMAGE_MODEL,  # there is none of its size
    "14b": PUBLISHED_IMAGE_MODEL,
}


class Bench:
    """Models and results of a run; both are made when they are asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.records = Parts(
            options.output,
            {
                "model": options.model,
                "size": list(options.size),
                "small_size": list(options.small_size),
                "hd_size": list(options.hd_size),
                "frames": options.frames,
                "steps_of_video": options.steps,
            },
            summarise=lambda parts: speed_figures(parts, options.steps),
            show=brief,
            limit=options.limit,
        )
        self._models: dict[str, WanTransformer] = {}
        self._ready: dict[str, Steps] = {}

    @functools.cached_property
    def video(self) -> wan_video.Video:
        """The video, of the model in FP8."""
        return wan_video.Video(self.model("float8"), self.options)

    def model(self, linears: str) -> WanTransformer:
        """The model with its linear layers in a precision."""
        if linears not in self._models:
            config = wan_run.MODELS[self.options.model]
            self._models[linears] = self.make_model(config, linears)
        return self._models[linears]

    def make_model(
        self, config: WanConfig, linears: str, name: str = "model"
    ) -> WanTransformer:
        """A model with random weights; says what that took under a name."""
        config = dataclasses.replace(config, param_dtype="bfloat16", linears=linears)
        start = time.perf_counter()
        model = random_model(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
        leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
        self.records.keep(
            f"{name}, {linears}",
            {
                "seconds": time.perf_counter() - start,
                "gb": sum(leaf.nbytes for leaf in leaves) / GB,
                **device_memory(),
            },
        )
        return model

    def problem(self, linears: str, size: tuple[int, int]) -> Problem:
        """The guided steps of a model at a size."""
        options = argparse.Namespace(guidance="two_calls", **vars(self.options))
        return wan_run.make_problem(self.model(linears), size, options)

    def short(self, size: tuple[int, int]) -> argparse.Namespace:
        """Settings of a video of few steps, all of them sparse."""
        changes: Record = {"size": size, "steps": self.options.short_steps}
        changes |= {"dense_fraction": 0.0, "cache": None}
        return argparse.Namespace(**vars(self.options) | changes)

    def samples(self, *modes: str, profile: bool = False) -> Samples:
        """Steps of some modes."""
        return Samples(
            modes=[Mode.parse(name) for name in modes],
            sparse=self.options.samples,
            dense=self.options.dense_samples,
            cudnn=False,
            profile=profile,
        )

    def steps(self, part: str) -> Steps:
        """The compiled steps of a part, with those of the parts after it.

        They are compiled side by side: XLA needs one core for a program.
        """
        if part not in self._ready:
            wanted = [name for name in SAMPLES if name in self.options.parts]
            for linears in ("float8", "bfloat16"):
                self.model(linears)  # before threads ask for it
            with concurrent.futures.ThreadPoolExecutor(len(wanted)) as pool:
                made = pool.map(lambda name: SAMPLES[name](self), wanted)
                self._ready |= zip(wanted, made, strict=True)
        return self._ready.pop(part)


def brief(record: Record) -> Record:
    """Returns what of a record is worth a line: of lists the last item."""
    shown: Record = {}
    for name, value in record.items():
        if isinstance(value, list) and value:
            shown[name] = value[-1]
        elif isinstance(value, dict) and name not in NOT_SHOWN:
            shown[name] = brief(value)
        elif isinstance(value, (float, int, str)):
            shown[name] = round(value, 4) if isinstance(value, float) else value
    return shown


def _steps_of_default(bench: Bench) -> Steps:
    problem = bench.problem("float8", bench.options.size)
    problem = dataclasses.replace(problem, draft=DraftConfig.compensated())
    return Steps(problem, bench.samples(*DEFAULT_MODES).order)


def _steps_of_480p(bench: Bench) -> Steps:
    problem = bench.problem("float8", bench.options.small_size)
    return Steps(problem, bench.samples("0.9").order)


def _steps_outside(bench: Bench) -> Steps:
    problem = bench.problem("bfloat16", bench.options.size)
    return Steps(problem, bench.samples("0.9", profile=True).order)


SAMPLES = {
    "default": _steps_of_default,
    "480p": _steps_of_480p,
    "outside": _steps_outside,
}

# ------------------------------------------------------------------- the parts


def measure_steps(bench: Bench, report: Report) -> None:
    """Sparse and skipped steps of the video."""
    wan_video.measure_steps(bench.video, report)


def measure_video(bench: Bench, report: Report) -> None:
    """The whole video."""
    known_ms = bench.records.measured.get("steps", {}).get("median_ms", {})
    wan_video.make_video(bench.video, report, known_ms, bench.records.left_s)


def work_out_published(bench: Bench, report: Report) -> None:
    """The video by the published rules; its steps are those of the file's video."""
    record = bench.records.parts.get("video", {})
    published = wan_video.published_video(bench.video, record)
    report({"environment": record["environment"], **published})


def measure_dense(bench: Bench, report: Report) -> None:
    """Dense bfloat16 steps with cuDNN's attention."""
    problem = bench.problem("bfloat16", bench.options.size)
    report(measure_cudnn(problem, bench.options.dense_samples, report))


def measure_linears(bench: Bench, report: Report) -> None:
    """Linear layers of a block at the size of the video."""
    options = bench.options
    config = wan_run.MODELS[options.model]
    model = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    grid = model.grid(wan_run.latent_shape(options.size, options.frames))
    report(linears_of_model(config, grid.num_tokens))


def measure_default(bench: Bench, report: Report) -> None:
    """Steps with the library's own selection."""
    steps = bench.steps("default")
    time_steps(steps, bench.samples(*DEFAULT_MODES), {}, report)


def measure_small(bench: Bench, report: Report) -> None:
    """Steps at the small size."""
    time_steps(bench.steps("480p"), bench.samples("0.9"), {}, report)
    problem = bench.problem("bfloat16", bench.options.small_size)
    report({"cudnn": measure_cudnn(problem, bench.options.dense_samples)})


def measure_outside(bench: Bench, report: Report) -> None:
    """Sparse steps in both precisions under CUPTI."""
    samples = bench.samples("0.9", profile=True)
    time_steps(bench.steps("outside"), samples, {}, lambda x: report({"bfloat16": x}))
    steps = wan_video.SingleSteps(bench.video)
    steps.run("sparse")
    problem = bench.problem("float8", bench.options.size)
    median_ms = sparse_ms(bench.records.measured)
    if median_ms is None:
        raise ValueError("no sparse step in FP8 was measured: add --parts steps")
    profiled = profile_step(lambda: steps.run("sparse"), problem, median_ms)
    report({"float8": profiled})


def measure_look(bench: Bench, report: Report) -> None:
    """Looks at the attention of a step of the video."""
    report(wan_video.time_looks(bench.video))


def measure_image(bench: Bench, report: Report) -> None:
    """A short video from an image at the size of the video."""
    config, tower = IMAGE_MODELS[bench.options.model]
    model = bench.make_model(config, "float8", "image model")
    # In the model's dtypes, and on the device to the end, as the library loads it.
    tower = dataclasses.replace(tower, dtype=config.dtype, param_dtype="bfloat16")
    made = random_model(lambda: CLIPVisionEncoder(tower, rngs=nnx.Rngs(0)))
    video = wan_video.Video(model, bench.short(bench.options.size))
    start = time.perf_counter()
    video.start_from_image(CLIPImageEncoder(model=made))
    report({"encode_s": time.perf_counter() - start, "after_encoder": device_memory()})
    wan_video.make_video(video, report, {}, bench.records.left_s)


def measure_hd(bench: Bench, report: Report) -> None:
    """A short video from text at 720p."""
    options = bench.short(bench.options.hd_size)
    video = wan_video.Video(bench.model("float8"), options)
    wan_video.make_video(video, report, {}, bench.records.left_s)


PARTS: dict[str, Callable[[Bench, Report], None]] = {
    "steps": measure_steps,
    "video": measure_video,
    "published": work_out_published,
    "cudnn": measure_dense,
    "linears": measure_linears,
    "default": measure_default,
    "480p": measure_small,
    "outside": measure_outside,
    "look": measure_look,
    "image": measure_image,
    "720p": measure_hd,
}

# ---------------------------------------------------------------- command line


def measure(options: argparse.Namespace) -> Record:
    """Measures the parts that are asked for, until the limit."""
    bench = Bench(options)
    for part in PARTS:
        if part in options.parts:
            bench.records.measure(part, PARTS[part], bench)
    summary = bench.records.document.get("summary", {})
    print(json.dumps(summary, indent=1), flush=True)
    return bench.records.document


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", choices=wan_run.MODELS, default="14b")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--size", type=height_by_width, help="of the video, HEIGHTxWIDTH")
    add("--small-size", type=height_by_width, help="of the part 480p")
    add("--hd-size", type=height_by_width, help="of the part 720p")
    add("--frames", type=int)
    add("--steps", type=int, default=50, help="of the video")
    add("--short-steps", type=int, default=3, help="of the parts image and 720p")
    add("--sparsity", type=float, default=0.9, help="of the video")
    add("--dense-fraction", type=float, default=0.1, help="first steps that are dense")
    add("--cache", type=parse_cache, default=parse_cache("mag:0.12,2"))
    add("--published-cache", type=parse_cache, default=parse_cache("mag:0.24,6"))
    add("--samples", type=int, default=2, help="steps of each sparse mode")
    add("--dense-samples", type=int, default=2, help="dense steps with cuDNN")
    add("--vae-dtype", default="bfloat16", choices=("float32", "bfloat16"))
    add("--vae-tile", type=int, default=256, help="side of tiles, pixels; 0 for none")
    add("--limit", type=float, default=math.inf, help="seconds")
    add_output(parser)
    options = parser.parse_args(arguments)
    is_tiny = options.model == "tiny"
    options.size = options.size or ((32, 48) if is_tiny else (768, 1280))
    options.small_size = options.small_size or ((32, 32) if is_tiny else (480, 832))
    options.hd_size = options.hd_size or ((32, 64) if is_tiny else (720, 1280))
    options.frames = options.frames or (9 if is_tiny else 81)
    if options.published_cache.rule != "mag":
        parser.error(f"--published-cache {options.published_cache} must be of mag")
    return options


def main(arguments: list[str] | None = None) -> Record:
    """Measures."""
    return measure(parse(arguments))


if __name__ == "__main__":
    main()
