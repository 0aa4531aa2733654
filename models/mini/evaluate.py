"""Measures a trained small model.

It tells how uneven its attention is, and how close sparse videos come to dense ones:

    python -m models.mini.evaluate --checkpoint outputs/mini/weights \
        --output outputs/mini

writes a contact sheet of all prompts and `evaluation.json`. That file is written anew
after each result; a run that was stopped goes on where it ended, and further methods,
sparsities or means are added to it. `models.mini.quality` says what the methods are.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from draft_jax import DraftConfig, VideoGrid, compute_mask, constant_step
from models.diffusion.inspection import TOP_SHARE, block_masses
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.sampling import Sampling
from models.files import output_folder
from models.media.video import write_json
from models.mini.captions import SAMPLE_PROMPTS
from models.mini.pipeline import load_mini
from models.mini.quality import DENSE_FRACTION, METHODS, Trial, measure, trials
from models.mini.samples import draw_sheet

REPORT, DENSE_VIDEOS = "evaluation.json", "dense.npy"
ATTENTION_STEPS = (0, 2, 4, 8, 12, 15)
ATTENTION_PROMPTS = 4


def measure_quality(
    pipeline: VideoPipeline,
    asked: Sequence[Trial],
    report: dict[str, Any],
    sampling: Sampling,
    folder: Path,
) -> None:
    """Compares sparse videos with dense ones of the same noise.

    Args:
      pipeline: The model.
      asked: What to measure; what the report has is left out.
      report: Gets a row after each trial, and is written to the folder.
      sampling: Settings of all videos.
      folder: Where the report and the dense videos are.
    """
    dense = _dense_videos(pipeline, report["prompts"], sampling, folder)
    draw_sheet(folder / "samples_final.png", report["prompts"], dense)
    known = [row["trial"] for row in report["quality"]]
    for trial in asked:
        if trial.described() in known:
            continue
        row = measure(pipeline, trial, report["prompts"], sampling, dense)
        report["quality"].append(row)
        write_json(folder / REPORT, report)
        shown = ("work_of_sparse_steps", "psnr_db_mean", "psnr_db_min", "ssim_mean")
        print(row["trial"] | {name: row[name] for name in shown}, flush=True)


def _dense_videos(
    pipeline: VideoPipeline, prompts: Sequence[str], sampling: Sampling, folder: Path
) -> Float[np.ndarray, "B T Y X 3"]:
    """Generates the dense videos, or reads those of an earlier run."""
    path = folder / DENSE_VIDEOS
    if path.exists():
        return np.load(path)
    videos = pipeline.generate(list(prompts), sampling).video
    np.save(path, videos)
    return videos


def measure_attention(
    pipeline: VideoPipeline,
    prompts: Sequence[str],
    sampling: Sampling,
    steps: Sequence[int],
) -> list[dict[str, Any]]:
    """Measures how concentrated full self-attention is at some dense steps.

    Args:
      pipeline: The model.
      prompts: Means are over these, and over heads.
      sampling: Settings of the generations.
      steps: Steps to look at.

    Returns:
      One entry per step: for each layer the share of softmax mass in the strongest
      10 % of tile pairs, and in the pairs that the draft keeps.
    """
    sampler, state, inputs = pipeline.start(list(prompts), sampling)
    programs, _ = pipeline.compile(sampler, state, inputs)
    model = sampler.model
    grid = model.grid(sampler.latent_shape)
    look = jax.jit(
        lambda q, k: jax.lax.map(functools.partial(attention_shares, grid=grid), (q, k))
    )
    rows = []
    for index, timestep in enumerate(sampler.solver.timesteps):
        if index in steps:
            model_inputs = model.step_inputs(
                state.latents, timestep, inputs.context, inputs.image
            )
            captured = model.capture_qk(
                model_inputs, attention=sampler.attention, step=None, masks=None
            )
            # The second half of the rows is the negative prompt's.
            shares = look(*(part[:, : len(prompts)] for part in captured))
            per_layer = {
                name: np.asarray(value, np.float64).mean((1, 2)).round(4).tolist()
                for name, value in shares.items()
            }
            rows.append({"step": index, "timestep": float(timestep)} | per_layer)
            print(rows[-1], flush=True)
        state, _ = sampler.run_step(programs, state, inputs, index)
    return rows


def attention_shares(
    q_and_k: tuple[Float[Array, "B T N D"], Float[Array, "B T N D"]], grid: VideoGrid
) -> dict[str, Float[Array, "B N"]]:
    """Returns shares of one layer's softmax mass; see `measure_attention`."""
    q, k = q_and_k
    masses = block_masses(q, k, grid)
    total = masses.sum((-1, -2))
    flat = jnp.sort(masses.reshape(*masses.shape[:2], -1), axis=-1)
    num_top = max(1, round(TOP_SHARE * flat.shape[-1]))
    shares = {"top_10_percent": flat[..., -num_top:].sum(-1) / total}
    for sparsity in (0.75, 0.9):
        config = DraftConfig.paper(sparsity=sparsity)
        budget = constant_step(grid, config).budget
        mask = compute_mask(
            q, k, grid=grid, config=config, budget=budget, order="tiled"
        )
        kept = jnp.where(mask.to_dense(), masses, 0.0).sum((-1, -2))
        shares[f"kept_at_sparsity_{sparsity}"] = kept / total
    return shares


def begin_report(
    folder: Path,
    checkpoint: Path | None,
    prompts: Sequence[str],
    sampling: Sampling,
    tile: tuple[int, int],
) -> dict[str, Any]:
    """Returns the folder's report, or a new one that has no results yet.

    Args:
      folder: Where the report is, or will be.
      checkpoint: The model; None for the one that ships.
      prompts: One video each.
      sampling: Settings of all videos.
      tile: Rows and columns of the blocks of attention.

    Raises:
      ValueError: The folder has the report of another model, of other prompts, or of
        another device or version: its results would not compare.
    """
    head = {
        "checkpoint": "shipped" if checkpoint is None else str(checkpoint),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "prompts": list(prompts),
        "size": [sampling.width, sampling.height],
        "tile": list(tile),
        "num_steps": sampling.num_steps,
        "guidance": sampling.guidance,
        "shift": sampling.shift,
        "dense_fraction": DENSE_FRACTION,
    }
    path = folder / REPORT
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        return head | {"attention": [], "quality": []}
    report = json.loads(path.read_text())
    for name, value in head.items():
        if report.get(name) != value:
            raise ValueError(
                f"{path} is of {name}={report.get(name)!r}, this run of {value!r}: "
                "pass another folder as --output"
            )
    return report


def main(arguments: list[str] | None = None) -> None:
    """Measures as the command line asks."""
    options = make_parser().parse_args(arguments)
    prompts = SAMPLE_PROMPTS[: options.prompts]
    width, height = options.size
    asked = trials(
        options.methods,
        options.sparsities,
        draft_tile=options.draft_tile,
        sub_tiles=options.sub_tiles,
        mean_frames=options.mean_frames,
    )
    pipeline = load_mini(options.checkpoint)
    sampling = dataclasses.replace(pipeline.sampling, width=width, height=height)
    model: Any = pipeline.model
    if options.tile is not None:  # a choice of run time: weights do not depend on it
        model.config = dataclasses.replace(model.config, tile=options.tile)
    report = begin_report(
        options.output,
        options.checkpoint,
        prompts,
        sampling,
        model.config.tile,
    )
    if options.attention and not report["attention"]:
        report["attention"] = measure_attention(
            pipeline, prompts[:ATTENTION_PROMPTS], sampling, ATTENTION_STEPS
        )
        write_json(options.output / REPORT, report)
    measure_quality(pipeline, asked, report, sampling, options.output)


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    parser = argparse.ArgumentParser(description="Measures a small video model.")
    parser.add_argument("--checkpoint", type=Path, help="default: the one that ships")
    parser.add_argument("--output", type=output_folder, required=True)
    parser.add_argument("--prompts", type=int, default=len(SAMPLE_PROMPTS))
    parser.add_argument(
        "--size",
        type=_two_sides,
        default=(Sampling().width, Sampling().height),
        metavar="WxH",
        help="width and height in pixels",
    )
    parser.add_argument(
        "--tile",
        type=_two_sides,
        metavar="ROWSxCOLUMNS",
        help="tokens of a block of attention; default: the model's",
    )
    parser.add_argument(
        "--attention",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also measure how concentrated dense attention is",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["percentile", "row_topk", "spread"],
        help="how blocks are ranked and what stands for the others",
    )
    parser.add_argument(
        "--sparsities",
        nargs="+",
        type=float,
        default=[0.75, 0.9, 0.95],
        help="shares of block pairs that are skipped",
    )
    parser.add_argument(
        "--draft-tile",
        type=_two_sides,
        default=(2, 4),
        metavar="ROWSxCOLUMNS",
        help="tokens that drafts of sub-tiles pool together; not of the method default",
    )
    parser.add_argument(
        "--sub-tiles",
        nargs="+",
        type=_two_sides,
        default=[(2, 2)],
        metavar="ROWSxCOLUMNS",
        help="tokens that a mean is taken over in a frame, of the methods with means",
    )
    parser.add_argument(
        "--mean-frames",
        nargs="+",
        type=int,
        default=[4],
        help="latent frames that a mean is taken over",
    )
    return parser


def _two_sides(text: str) -> tuple[int, int]:
    first, second = map(int, text.split("x"))
    return first, second


if __name__ == "__main__":
    main()
