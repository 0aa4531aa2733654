"""What step caches skip and cost on the model that ships, against dense attention.

    python -m benchmarks.caches.run --output benchmarks/results/caches_cpu.json

Every video is compared with that of dense attention without a cache, of the same prompt
and noise. A rule is written as on the command line; "-" is none. Ratios of MagCache are
measured first, on another prompt, with the attention that they are used with. `work`
counts dense, sparse and skipped steps of the first prompt; times are medians of a step
of a kind there, and depend on what else the machine does.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
from typing import Any

import numpy as np

from benchmarks.common.options import add_output, make_parser
from benchmarks.common.records import environment, write_json
from draft_jax import AttentionPlan, DraftConfig
from models.cli.cache_options import CacheRequest, parse_cache
from models.diffusion.caches import EasyCache, MagCache, MagRatios, StepCache
from models.diffusion.calibration import measure_ratios
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.results import GenerationResult
from models.diffusion.sampling import Sampling
from models.loading import load_pipeline
from models.media.metrics import psnr

PROMPTS = (
    "a yellow star spins in front of a brick wall",
    "a white horse runs to the right in the snow",
    "a boat sails to the left over the sea at sunset",
)
CALIBRATION_PROMPT = "a red ball bounces on green grass"
RULES = (
    *("easy:0.05,4", "easy:0.1,4", "easy:0.2,4", "easy:0.4,4"),
    *("mag:0.06,2", "mag:0.12,2", "mag:0.12,4", "mag:0.24,6"),
)


def parse_rule(text: str) -> CacheRequest | None:
    """Reads a rule; "-" is none."""
    return None if text == "-" else parse_cache(text)


def make_cache(rule: CacheRequest | None, ratios: MagRatios | None) -> StepCache | None:
    """The cache of a rule."""
    if rule is None:
        return None
    if rule.rule == "easy":
        return EasyCache(**dict(rule.constants))
    assert ratios is not None  # they were measured for it
    return MagCache(ratios=ratios, **dict(rule.constants))


def attention_of(sparsity: float) -> AttentionPlan:
    """Dense attention for 0, else the paper's schedule."""
    if not sparsity:
        return AttentionPlan.dense()
    return AttentionPlan.draft(DraftConfig.paper(sparsity=sparsity))


def describe(
    results: list[GenerationResult], references: list[np.ndarray]
) -> dict[str, Any]:
    """PSNR of each prompt, and work and times of the first."""
    decibels = [
        psnr(result.video[0], reference)
        for result, reference in zip(results, references, strict=True)
    ]
    first = results[0]
    times: dict[str, list[float]] = {}
    for work, time_ms in zip(first.work, first.time_ms, strict=True):
        times.setdefault(work, []).append(float(time_ms))
    return {
        "psnr_db": [value if np.isfinite(value) else None for value in decibels],
        "skipped": [int(result.skipped.sum()) for result in results],
        "work": {work: len(values) for work, values in times.items()},
        "median_ms": {work: statistics.median(v) for work, v in times.items()},
    }


def measure(
    pipeline: VideoPipeline, sampling: Sampling, options: argparse.Namespace
) -> dict[str, Any]:
    """All rules with each sparsity; writes the file after each."""
    record: dict[str, Any] = {
        "environment": environment(),
        "sampling": dataclasses.asdict(sampling),
        "prompts": options.prompts,
        "calibration_prompt": CALIBRATION_PROMPT,
        "cases": [],
    }
    references: list[np.ndarray] = []
    for sparsity in (0.0, *options.sparsities):
        attention = attention_of(sparsity)
        ratios = None
        if any(rule is not None and rule.rule == "mag" for rule in options.rules):
            ratios = measure_ratios(
                pipeline,
                CALIBRATION_PROMPT,
                sampling,
                model="shipped",
                attention=attention,
            )
            record.setdefault("ratios", {})[str(sparsity)] = ratios.values
        for rule in (None, *options.rules):
            cache = make_cache(rule, ratios)
            results = [
                pipeline.generate(prompt, sampling, attention=attention, cache=cache)
                for prompt in options.prompts
            ]
            references = references or [result.video[0] for result in results]
            case = {
                "sparsity": sparsity,
                "rule": None if rule is None else str(rule),
                **describe(results, references),
            }
            record["cases"].append(case)
            print(json.dumps(case), flush=True)
            if options.output:
                write_json(options.output, record)
    return record


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=pathlib.Path, help="the model that ships if left out")
    add("--prompts", nargs="+", default=list(PROMPTS))
    rules = [parse_rule(rule) for rule in RULES]
    add("--rules", nargs="+", type=parse_rule, default=rules)
    add("--sparsities", nargs="*", type=float, default=[0.9], help="beside dense")
    add("--steps", type=int, default=Sampling().num_steps)
    add("--size", nargs=3, type=int, metavar=("FRAMES", "HEIGHT", "WIDTH"))
    add_output(parser)
    return parser.parse_args(arguments)


def main() -> None:
    """Measures."""
    options = parse()
    sampling = Sampling(num_steps=options.steps)
    if options.size:
        frames, height, width = options.size
        sampling = dataclasses.replace(
            sampling, frames=frames, height=height, width=width
        )
    measure(load_pipeline(options.checkpoint), sampling, options)


if __name__ == "__main__":
    main()
