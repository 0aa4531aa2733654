"""Measures whether a small model's videos show what their prompts say.

    python -m models.mini.prompt_scores --checkpoint outputs/mini/weights \
        --output outputs/mini

writes `faithfulness.json`: the shares of held-out prompts whose colour, kind of motion
and direction are found in the video, for dense attention and for the default selection
at each sparsity, from the same noise. `models.mini.faithfulness` finds them.
"""

import argparse
import concurrent.futures
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from draft_jax import AttentionPlan, DraftConfig, SparsitySchedule
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.sampling import Sampling
from models.files import output_folder
from models.media.video import write_json
from models.mini.faithfulness import Finding, detect
from models.mini.pipeline import load_mini
from models.mini.prompts import Prompt, held_out_prompts
from models.mini.quality import DENSE_FRACTION

REPORT = "faithfulness.json"


def find_all(videos: Float[np.ndarray, "B T Y X 3"]) -> list[Finding]:
    """Returns what is seen in some videos with values in [0, 1]."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(detect, videos))


def score(prompts: Sequence[Prompt], findings: Sequence[Finding]) -> dict[str, Any]:
    """Returns shares of prompts that were followed.

    Args:
      prompts: What the videos have to show.
      findings: What is seen in them.

    Returns:
      Shares of right colours, of right kinds of motion with their direction, and of
      right directions alone, of the prompts that say one; each also as a count.
    """
    pairs = list(zip(prompts, findings, strict=True))
    colours = [seen.colour == prompt.colour for prompt, seen in pairs]
    motions = [
        seen.kind == prompt.kind and prompt.way in (None, seen.way)
        for prompt, seen in pairs
    ]
    ways = [seen.way == prompt.way for prompt, seen in pairs if prompt.way is not None]
    calm = [
        right for right, prompt in zip(motions, prompts, strict=True) if prompt.calm
    ]
    return {
        "prompts": len(pairs),
        "colour": _share(colours),
        "motion": _share(motions),
        "motion_of_calm_prompts": _share(calm),
        "direction": _share(ways),
        "prompts_with_direction": len(ways),
    }


def _share(right: Sequence[bool]) -> float | None:
    return round(float(np.mean(right)), 4) if right else None


def measure_faithfulness(
    pipeline: VideoPipeline,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    plan: AttentionPlan,
    *,
    batch: int,
) -> dict[str, Any]:
    """Generates a video of each prompt and scores what is seen in it.

    Args:
      pipeline: The model.
      prompts: One video each, from the noise of its own seed.
      sampling: Settings of all videos.
      plan: Dense or sparse attention.
      batch: Videos made at once.

    Returns:
      `score`, and what was found for each prompt.
    """
    findings: list[Finding] = []
    for start in range(0, len(prompts), batch):
        texts = [prompt.text for prompt in prompts[start : start + batch]]
        seeded = dataclasses.replace(sampling, seed=sampling.seed + start)
        made = pipeline.generate(texts, seeded, attention=plan)
        findings += find_all(np.asarray(made.video))
    rows = [
        {"prompt": prompt.text, **dataclasses.asdict(seen)}
        for prompt, seen in zip(prompts, findings, strict=True)
    ]
    return score(prompts, findings) | {"found": rows}


def main(arguments: list[str] | None = None) -> None:
    """Measures as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, help="default: the one that ships")
    add("--output", type=output_folder, required=True)
    add("--prompts", type=int, default=64)
    add("--batch", type=int, default=16, help="videos made at once")
    add("--sparsities", nargs="*", type=float, default=[0.9])
    options = parser.parse_args(arguments)
    pipeline = load_mini(options.checkpoint)
    prompts = held_out_prompts(options.prompts)
    report: dict[str, Any] = {
        "checkpoint": str(options.checkpoint or "shipped"),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "sampling": dataclasses.asdict(pipeline.sampling),
        "dense_fraction": DENSE_FRACTION,
    }
    plans = {"dense": AttentionPlan.dense()}
    for sparsity in options.sparsities:
        schedule = SparsitySchedule(dense_fraction=DENSE_FRACTION, sparsity=sparsity)
        config = DraftConfig(sparsity=sparsity)
        plans[f"sparse_{sparsity}"] = AttentionPlan.draft(config, schedule)
    for name, plan in plans.items():
        report[name] = measure_faithfulness(
            pipeline, prompts, pipeline.sampling, plan, batch=options.batch
        )
        write_json(options.output / REPORT, report)
        shown = {key: value for key, value in report[name].items() if key != "found"}
        print(name, shown, flush=True)


if __name__ == "__main__":
    main()
