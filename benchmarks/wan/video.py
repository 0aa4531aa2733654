"""A whole video of a Wan2.1 transformer against dense steps with cuDNN's attention.

    python -m benchmarks.wan.run write --model 14b
    python -m benchmarks.wan.video --model 14b --size 768x1280 --sparsity 0.9 \
        --cache mag:0.12,2 --output benchmarks/results/wan_14b_video_h100.json
    python -m benchmarks.wan.video --model tiny    # on any machine

From embeddings of text to an mp4, as users run it: `VideoPipeline.generate` with
guidance and UniPC, decoding, writing. Weights are random. Compilation is apart: a
later run finds its programs.

What the record has:

  cudnn        dense bfloat16 steps with cuDNN's attention, of the same run, afterwards
  video        seconds of steps, decoding and writing; work and median time by its kind
  published    the video by the published rules, worked out from steps measured here:
               dense while t > 925, layer 0 always dense, --published-cache
  summary      as many dense cuDNN steps over a whole video; peak memory

Ratios are those published for the model (of 1.3B for the tiny one), of dense attention.
"""

import argparse
import dataclasses
import os
import pathlib
import statistics
import tempfile
import time
from typing import Any

# Read when JAX first uses the GPU; see `benchmarks.wan.run`.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")

import numpy as np

from benchmarks.common.machine import device_memory
from benchmarks.common.options import add_output, height_by_width, make_parser
from benchmarks.common.records import environment, write_json
from benchmarks.common.steps import attempt, measure_cudnn
from benchmarks.wan import run as wan_run
from benchmarks.wan import vae as wan_vae
from draft_jax import AttentionPlan, DraftConfig, SparsitySchedule
from models.cli.cache_options import CacheRequest, parse_cache
from models.diffusion.caches import EasyCache, MagCache, StepCache, published_ratios
from models.diffusion.interfaces import TextContext
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.results import GenerationResult
from models.diffusion.sampling import Sampling
from models.media.video import write_mp4
from models.wan.transformer import WanTransformer
from models.wan.vae.codec import WanVAECodec
from models.wan.vae.config import WanVAEConfig

RATIOS = {"tiny": "wan2.1-t2v-1.3b", "1.3b": "wan2.1-t2v-1.3b", "14b": "wan2.1-t2v-14b"}
FPS = 16.0


def make_cache(request: CacheRequest | None, model: str) -> StepCache | None:
    """The cache of a rule, with the ratios published for the model."""
    if request is None:
        return None
    constants = dict(request.constants)
    if request.rule == "easy":
        return EasyCache(**constants)
    return MagCache(ratios=published_ratios(RATIOS[model]), **constants)


def sampling_of(options: argparse.Namespace) -> Sampling:
    """Wan's own settings at the size."""
    height, width = options.size
    return Sampling(
        frames=options.frames,
        height=height,
        width=width,
        num_steps=options.steps,
        guidance=5.0,
        shift=5.0,
        solver="unipc",
    )


def make_pipeline(model: WanTransformer, options: argparse.Namespace) -> VideoPipeline:
    """The transformer with an autoencoder of random weights."""
    config = WanVAEConfig.wan2_1(dtype=options.vae_dtype)
    if options.model == "tiny":
        config = dataclasses.replace(config, base_dim=8)
    codec = WanVAECodec(model=wan_vae.random_model(config))
    return VideoPipeline(model, None, codec, fps=FPS)


def make_video(pipeline: VideoPipeline, options: argparse.Namespace) -> dict[str, Any]:
    """Runs twice, to compile and to measure; the second video is written."""
    config: Any = pipeline.model.config
    context = wan_run.make_inputs(config, guided=True).context
    prompt, negative = (
        TextContext(context.embeddings[row : row + 1], context.lengths[row : row + 1])
        for row in range(2)
    )
    schedule = SparsitySchedule(dense_fraction=options.dense_fraction)
    attention = AttentionPlan.draft(DraftConfig(sparsity=options.sparsity), schedule)
    cache, sampling = make_cache(options.cache, options.model), sampling_of(options)

    def generate(steps: Sampling) -> GenerationResult:
        return pipeline.generate(
            prompt,
            steps,
            negative_context=negative,
            attention=attention,
            guidance_batching="two_calls",
            cache=cache,
        )

    start = time.perf_counter()
    first = generate(sampling)
    first_s = time.perf_counter() - start
    start = time.perf_counter()
    result = generate(sampling)
    with tempfile.TemporaryDirectory() as folder:
        write_mp4(pathlib.Path(folder) / "video.mp4", result.video[0], fps=FPS)
    return describe(result, time.perf_counter() - start) | {
        "first_s": first_s,
        "compile_s": first.compile_ms / 1e3,
        "cache": None if cache is None else cache.describe(),
        "sparsity": options.sparsity,
        "dense_fraction": options.dense_fraction,
    }


def describe(result: GenerationResult, seconds: float) -> dict[str, Any]:
    """What a finished video is made of."""
    times: dict[str, list[float]] = {}
    for work, time_ms in zip(result.work, result.time_ms, strict=True):
        times.setdefault(work, []).append(float(time_ms))
    steps_s = float(result.time_ms.sum()) / 1e3
    return {
        "seconds": seconds,
        "steps_s": steps_s,
        "decode_s": result.decode_ms / 1e3,
        "other_s": seconds - steps_s - result.decode_ms / 1e3,
        "work_per_step": list(result.work),
        "median_ms": {work: statistics.median(v) for work, v in times.items()},
        "finite": bool(np.isfinite(result.video).all()),
        **device_memory(),
    }


def published_video(
    pipeline: VideoPipeline, video: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of the video by the published rules, from the steps of another.

    A sparse step with one dense layer takes the share of its layers in between.
    """
    cache = make_cache(options.published_cache, options.model)
    assert isinstance(cache, MagCache)
    sampling, model = sampling_of(options), pipeline.model
    skipped = cache.skippable(sampling.num_steps)
    plan = SparsitySchedule.wan_published().plan(
        sampling.make_solver().timesteps,
        num_layers=model.num_layers,
        grid=model.grid(pipeline.latent_shape(sampling)),
        config=DraftConfig(sparsity=options.sparsity),
    )
    dense_share = np.asarray(plan.dense).mean(1)
    median = video["median_ms"]
    missing = {"dense", "sparse", "skipped"} - set(median)
    if missing:
        raise ValueError(f"no step of the video was {' or '.join(sorted(missing))}")
    computed = dense_share * median["dense"] + (1 - dense_share) * median["sparse"]
    steps_ms = np.where(skipped, median["skipped"], computed)
    return {
        "seconds": float(steps_ms.sum()) / 1e3 + video["decode_s"] + video["other_s"],
        "dense_steps": int((dense_share[~skipped] == 1).sum()),
        "sparse_steps": int((dense_share[~skipped] < 1).sum()),
        "skipped_steps": int(skipped.sum()),
        "cache": cache.describe(),
    }


def summarise(results: dict[str, Any], num_steps: int) -> dict[str, float]:
    """Flat figures, as far as their parts were measured."""
    summary: dict[str, float] = {}
    cudnn, video = results["cudnn"].get("median_ms"), results["video"]
    if cudnn is None:
        return summary
    dense_s = num_steps * cudnn / 1e3
    for name in ("video", "published"):
        if "seconds" in results.get(name, {}):
            speedup = "video" if name == "video" else "video_published"
            summary[f"{speedup}_speedup_over_cudnn"] = (
                dense_s / results[name]["seconds"]
            )
    if "peak_gb" in video:
        summary["peak_gb"] = video["peak_gb"]
    return summary


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measures all parts; the file is written after each."""
    model, loaded = wan_run.load(options.folder, linears=options.linears)
    pipeline = make_pipeline(model, options)
    results: dict[str, Any] = {
        "environment": environment(),
        "model": options.model,
        "size": list(options.size),
        "frames": options.frames,
        "steps": options.steps,
        "linears": options.linears,
        "load": loaded,
    }

    def save(name: str, record: dict[str, Any]) -> None:
        results[name] = record
        print(name, record, flush=True)
        if options.output:
            write_json(options.output, results)

    # First, so that its peak does not hide in that of the dense steps.
    save("video", attempt(make_video, pipeline, options))
    save("published", attempt(published_video, pipeline, results["video"], options))
    if options.linears != "bfloat16":
        del model, pipeline
        model, _ = wan_run.load(options.folder, linears="bfloat16")
    guided = argparse.Namespace(guidance="two_calls", **vars(options))
    problem = wan_run.make_problem(model, options.size, guided)
    save("cudnn", attempt(measure_cudnn, problem, options.dense_samples))
    save("summary", summarise(results, options.steps))
    return results


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", choices=wan_run.MODELS, default="14b")
    add("--folder", type=pathlib.Path, help="/tmp/wan_MODEL")
    add("--size", type=height_by_width, help="HEIGHTxWIDTH")
    add("--frames", type=int)
    add("--steps", type=int, default=50)
    add("--sparsity", type=float, default=0.9)
    add("--dense-fraction", type=float, default=0.1, help="first steps that are dense")
    add("--cache", type=parse_cache, default=parse_cache("mag:0.12,2"))
    add("--published-cache", type=parse_cache, default=parse_cache("mag:0.24,6"))
    add("--linears", default="bfloat16", choices=("bfloat16", "float8"))
    add("--dense-samples", type=int, default=2, help="dense steps with cuDNN")
    add("--vae-dtype", default="float32", choices=("float32", "bfloat16"))
    add_output(parser)
    options = parser.parse_args(arguments)
    is_tiny = options.model == "tiny"
    options.folder = options.folder or pathlib.Path(f"/tmp/wan_{options.model}")
    options.size = options.size or ((32, 48) if is_tiny else (768, 1280))
    options.frames = options.frames or (9 if is_tiny else 81)
    if options.published_cache.rule != "mag":
        parser.error(f"--published-cache {options.published_cache} must be of mag")
    return options


def main() -> None:
    """Measures."""
    measure(parse())


if __name__ == "__main__":
    main()
