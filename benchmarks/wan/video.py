"""A whole video of a Wan2.1 transformer, as users make it, and its single steps.

From embeddings of text to an mp4: `VideoPipeline.generate` with guidance and UniPC,
decoding, writing. Weights are random. Ratios of the step cache are those published for
the model (of 1.3B for the tiny one), of dense attention.
"""

import argparse
import dataclasses
import functools
import importlib
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.common.machine import device_memory
from benchmarks.wan import run as wan_run
from benchmarks.wan import vae as wan_vae
from draft_jax import AttentionPlan, DraftConfig, SparsitySchedule
from models.cli.cache_options import CacheRequest
from models.diffusion.caches import EasyCache, MagCache, StepCache, published_ratios
from models.diffusion.interfaces import ImageCondition, ImageEncoder, TextContext
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.recording import choose_looks, look_at_step
from models.diffusion.results import GenerationResult, StepReport, StopGeneration
from models.diffusion.sampler import Sampler, SamplerState, StepInputs
from models.diffusion.sampling import Sampling
from models.media.video import MissingExtraError, write_mp4
from models.wan.transformer import WanTransformer
from models.wan.vae.codec import WanVAECodec
from models.wan.vae.config import WanVAEConfig

RATIOS = {"tiny": "wan2.1-t2v-1.3b", "1.3b": "wan2.1-t2v-1.3b", "14b": "wan2.1-t2v-14b"}
FPS = 16.0
LAST = "last"  # the last computed step, in which weights alone are in FP8

Record = dict[str, Any]


def make_cache(request: CacheRequest | None, model: str) -> StepCache | None:
    """The cache of a rule, with the ratios published for the model."""
    if request is None:
        return None
    constants = dict(request.constants)
    if request.rule == "easy":
        return EasyCache(**constants)
    return MagCache(ratios=published_ratios(RATIOS[model]), **constants)


def make_pipeline(model: WanTransformer, options: argparse.Namespace) -> VideoPipeline:
    """The transformer with an autoencoder of random weights."""
    return VideoPipeline(model, None, make_codec(options), fps=FPS)


def make_codec(options: argparse.Namespace) -> WanVAECodec:
    """An autoencoder of random weights that decodes as the command line says."""
    config = WanVAEConfig.wan2_1(dtype=options.vae_dtype)
    if options.model == "tiny":
        config = dataclasses.replace(config, base_dim=8)
    codec = WanVAECodec(model=wan_vae.random_model(config))
    return codec.tiled(options.vae_tile) if options.vae_tile else codec


class Video:
    """The video, its settings and its compiled programs."""

    def __init__(self, model: WanTransformer, options: argparse.Namespace) -> None:
        """Takes settings from the command line; Wan's own where there are none."""
        self.options = options
        self.pipeline = make_pipeline(model, options)
        height, width = options.size
        self.sampling = Sampling(
            frames=options.frames,
            height=height,
            width=width,
            num_steps=options.steps,
            guidance=5.0,
            shift=5.0,
            solver="unipc",
        )
        self.cache = make_cache(options.cache, options.model)
        self.draft = DraftConfig.paper(sparsity=options.sparsity)
        self.image: ImageCondition | None = None

    def start_from_image(self, encoder: ImageEncoder) -> None:
        """Encodes a random image of the video's size as its first frame."""
        size = (1, *self.options.size, 3)
        pixels = np.random.default_rng(0).uniform(-1, 1, size).astype(np.float32)
        pipeline = dataclasses.replace(self.pipeline, image_encoder=encoder)
        image = pipeline.encode_images(pixels, self.sampling)
        self.image = jax.block_until_ready(image)

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """What `generate` and `start` take alike."""
        config: Any = self.pipeline.model.config
        context = wan_run.make_inputs(config, guided=True).context
        prompt, negative = (
            TextContext(context.embeddings[i : i + 1], context.lengths[i : i + 1])
            for i in range(2)
        )
        schedule = SparsitySchedule(dense_fraction=self.options.dense_fraction)
        return {
            "prompts": prompt,
            "sampling": self.sampling,
            "image": self.image,
            "negative_context": negative,
            "attention": AttentionPlan.draft(self.draft, schedule),
            "guidance_batching": "two_calls",
            "cache": self.cache,
        }

    def generate(self, callback: Callable[[StepReport], None]) -> GenerationResult:
        """Makes the video."""
        return self.pipeline.generate(**self.arguments, callback=callback)

    def start(self) -> tuple[Sampler, SamplerState, StepInputs]:
        """What the first step runs with."""
        return self.pipeline.start(**self.arguments)

    def warm_up_decoder(self) -> float:
        """Decodes the first chunks of a video; returns the seconds that takes."""
        frames, *rest = self.pipeline.latent_shape(self.sampling)
        start = time.perf_counter()
        codec: Any = self.pipeline.codec
        codec.decode_to_host(np.zeros((1, min(frames, 2), *rest), np.float32))
        return time.perf_counter() - start


class SingleSteps:
    """Steps of a video by their work, out of their order.

    Values mean nothing then, but times do.
    """

    def __init__(self, video: Video) -> None:
        """Compiles the programs of the video, unless they are."""
        self.sampler, self.state, self.inputs = video.start()
        programs, compile_ms = video.pipeline.compile(
            self.sampler, self.state, self.inputs
        )
        self.programs, self.compile_s = programs, compile_ms / 1e3
        is_dense, skipped = self.sampler.dense.all(1), self.sampler.skippable
        works = np.where(skipped, "skipped", np.where(is_dense, "dense", "sparse"))
        works = np.where(self.sampler.weight_only, LAST, works)
        self.works: list[str] = works.tolist()

    def run(self, work: str) -> StepReport:
        """Runs a step that is "dense", "sparse", "skipped" or the last one.

        Raises:
          ValueError: The video has no such step.
        """
        if work not in self.works:
            raise ValueError(f"{work=} must be one of {sorted(set(self.works))}")
        self.state, report = self.sampler.run_step(
            self.programs, self.state, self.inputs, self.works.index(work)
        )
        return report


def measure_steps(video: Video, report: Callable[[Record], None]) -> None:
    """Times sparse steps, a skipped one and the last that is computed.

    `report` takes the record as it grows.
    """
    steps = SingleSteps(video)
    record: Record = {"compile_s": steps.compile_s, **device_memory(), "samples_ms": {}}
    report(record)
    for work, count in (("sparse", video.options.samples), ("skipped", 1), (LAST, 1)):
        if work not in steps.works:
            continue  # a video without a cache, or of a model without FP8
        steps.run(work)
        samples = [steps.run(work).time_ms for _ in range(count)]
        record["samples_ms"][work] = samples
        record.setdefault("median_ms", {})[work] = statistics.median(samples)
        report(record | device_memory())


def make_video(
    video: Video,
    report: Callable[[Record], None],
    known_ms: Mapping[str, float],
    left_s: Callable[[], float],
) -> None:
    """Makes the video once, after everything is compiled.

    Args:
      video: Its settings.
      report: Takes the record as it grows.
      known_ms: Times of steps that were measured, by their work.
      left_s: Says how much time there is; where the video needs more, it stops.
    """
    options, steps = video.options, SingleSteps(video)
    works, known_ms = steps.works, dict(known_ms)
    record: Record = {
        "cache": None if video.cache is None else video.cache.describe(),
        "sparsity": options.sparsity,
        "dense_fraction": options.dense_fraction,
        "vae_dtype": options.vae_dtype,
        "vae_tile": options.vae_tile,
        "compile_s": steps.compile_s,
        "before_decoder": device_memory(),
        "first_chunks_s": video.warm_up_decoder(),
        "after_decoder": device_memory(),
        "work_per_step": [],
        "time_ms": [],
    }
    del steps  # its arrays are as many as the video's own

    def keep(step: StepReport) -> None:
        work = LAST if step.weight_only else step.work
        record["work_per_step"].append(work)
        record["time_ms"].append(step.time_ms)
        record.update(medians(record["work_per_step"], record["time_ms"]))
        report(record | {"after_steps": device_memory()})
        known_ms[work] = step.time_ms
        if sum(known_ms.get(w, 0.0) for w in works[step.index + 1 :]) > 1e3 * left_s():
            raise StopGeneration

    start = time.perf_counter()
    result = video.generate(keep)
    made_s = time.perf_counter() - start
    record |= describe(result)
    report(record)
    start = time.perf_counter()
    record["encoder"] = write(result, video.pipeline.fps)
    record["mp4_s"] = time.perf_counter() - start
    record["other_s"] = made_s - record["steps_s"] - record["decode_s"]
    record["other_s"] += record["mp4_s"]
    if not result.stopped:
        record["seconds"] = made_s + record["mp4_s"]
    report(record)


def time_looks(video: Video) -> Record:
    """Times looks at attention, of which the command line has some for its page.

    The first has its program compiled.
    """
    sampler, state, inputs = video.start()
    model = sampler.model
    assert sampler.plan is not None, "the video is sparse"
    looks = choose_looks(
        sampler.plan,
        num_heads=model.num_heads,
        num_tiles=model.grid(sampler.latent_shape).num_visual_blocks,
        skippable=sampler.skippable,
    )
    assert looks is not None, "some steps make masks"
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        look_at_step(sampler, state, inputs, looks.steps[0], looks)
        seconds.append(time.perf_counter() - start)
    return {
        **dataclasses.asdict(looks),
        "first_s": seconds[0],
        "seconds": seconds[1],
        **device_memory(),
    }


def write(result: GenerationResult, fps: float) -> str:
    """Writes the video; returns which encoder has.

    That of OpenCV stands in where the library's is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "video.mp4"
        try:
            write_mp4(path, result.video[0], fps=fps)
            return "libx264"
        except MissingExtraError:
            cv2: Any = importlib.import_module("cv2")
        frames = (255 * result.video[0] + 0.5).astype(np.uint8)
        _, height, width, _ = frames.shape
        code = cv2.VideoWriter_fourcc(*"mp4v")
        writer = cv2.VideoWriter(str(path), code, fps, (width, height))
        for frame in frames[..., ::-1]:
            writer.write(np.ascontiguousarray(frame))
        writer.release()
        return "OpenCV's MPEG-4"


def medians(works: Sequence[str], times_ms: Iterable[float]) -> Record:
    """Median times of steps by their work."""
    times: dict[str, list[float]] = {}
    for work, time_ms in zip(works, times_ms, strict=True):
        times.setdefault(work, []).append(float(time_ms))
    return {"median_ms": {work: statistics.median(v) for work, v in times.items()}}


def describe(result: GenerationResult) -> Record:
    """What a finished video is made of."""
    return {
        "steps_s": float(result.time_ms.sum()) / 1e3,
        "decode_s": result.decode_ms / 1e3,
        "kept_density": float(result.kept_density[-1].mean()),
        "finite": bool(np.isfinite(result.video).all()),
        "stopped": result.stopped,
        **device_memory(),
    }


def published_video(video: Video, record: Record) -> Record:
    """Seconds of the video by the published rules, from the steps of another.

    They are: dense while t > 925, layer 0 always dense, and a cache of its own; the
    sparsity is the video's. A sparse step with one dense layer takes the share of its
    layers in between.

    Args:
      video: Its settings.
      record: Of the video that was measured.

    Raises:
      ValueError: A kind of step was not measured.
    """
    options, sampling = video.options, video.sampling
    cache, model = (
        make_cache(options.published_cache, options.model),
        video.pipeline.model,
    )
    assert isinstance(cache, MagCache)
    skipped = cache.skippable(sampling.num_steps)
    rule = dataclasses.replace(SparsitySchedule.wan_published(), sparsity=None)
    plan = rule.plan(
        sampling.make_solver().timesteps,
        num_layers=model.num_layers,
        grid=model.grid(video.pipeline.latent_shape(sampling)),
        config=video.draft,
    )
    dense_share = np.asarray(plan.dense).mean(1)
    median = record.get("median_ms", {})
    missing = {"dense", "sparse", "skipped"} - set(median)
    if missing:
        raise ValueError(f"no step of the video was {' or '.join(sorted(missing))}")
    computed = dense_share * median["dense"] + (1 - dense_share) * median["sparse"]
    steps_ms = np.where(skipped, median["skipped"], computed)
    if LAST in median:  # a sparse step but for its linear layers, as here
        steps_ms[np.flatnonzero(~skipped)[-1]] += median[LAST] - median["sparse"]
    return {
        "seconds": float(steps_ms.sum()) / 1e3 + record["decode_s"] + record["other_s"],
        "dense_steps": int((dense_share[~skipped] == 1).sum()),
        "sparse_steps": int((dense_share[~skipped] < 1).sum()),
        "skipped_steps": int(skipped.sum()),
        "cache": cache.describe(),
    }
