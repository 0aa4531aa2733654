"""Measures a trained small model.

It tells how uneven its attention is, and how close sparse videos come to dense ones.

    python -m models.mini.evaluate --checkpoint run/weights --output run

writes `evaluation.json` and a contact sheet of all prompts.
"""

import argparse
import concurrent.futures
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from draft_jax import (
    AttentionPlan,
    DraftConfig,
    SparsitySchedule,
    VideoGrid,
    compute_mask,
    constant_step,
)
from draft_jax.config import Selection
from models.diffusion.inspection import TOP_SHARE, block_masses
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.sampling import Sampling
from models.media.metrics import psnr, ssim
from models.media.video import write_json
from models.mini.captions import SAMPLE_PROMPTS
from models.mini.pipeline import load_mini
from models.mini.samples import draw_sheet

SELECTIONS: tuple[Selection, ...] = ("percentile", "row_topk")
SPARSITIES = (0.5, 0.75, 0.9)
DENSE_FRACTION = 0.25
ATTENTION_STEPS = (0, 2, 4, 8, 12, 15)
ATTENTION_PROMPTS = 4


def measure_quality(
    pipeline: VideoPipeline, prompts: Sequence[str], sampling: Sampling
) -> tuple[Float[np.ndarray, "B T Y X 3"], list[dict[str, Any]]]:
    """Generates dense and sparse videos from the same noise and compares them.

    Args:
      pipeline: The model.
      prompts: One video each.
      sampling: Settings of all videos.

    Returns:
      The dense videos, and one row per selection and sparsity.
    """
    dense = pipeline.generate(list(prompts), sampling)
    rows = []
    for selection in SELECTIONS:
        # The smallest sparsity sets the capacity of the masks: one compilation.
        draft = DraftConfig(selection=selection, sparsity=min(SPARSITIES))
        for sparsity in SPARSITIES:
            schedule = SparsitySchedule(
                dense_fraction=DENSE_FRACTION, sparsity=sparsity
            )
            attention = AttentionPlan.draft(draft, schedule)
            sparse = pipeline.generate(list(prompts), sampling, attention=attention)
            with concurrent.futures.ThreadPoolExecutor() as pool:
                decibels = list(pool.map(psnr, sparse.video, dense.video))
                likeness = list(pool.map(ssim, sparse.video, dense.video))
            sparse_steps = ~sparse.dense.all(axis=1)
            rows.append(
                {
                    "selection": selection,
                    "sparsity": sparsity,
                    "kept_share_of_sparse_steps": float(
                        sparse.kept_density[sparse_steps].mean()
                    ),
                    "kept_share": float(sparse.kept_density.mean()),
                    "psnr_db_mean": float(np.mean(decibels)),
                    "psnr_db_min": float(np.min(decibels)),
                    "ssim_mean": float(np.mean(likeness)),
                    "ssim_min": float(np.min(likeness)),
                    "psnr_db": [round(value, 2) for value in decibels],
                    "ssim": [round(value, 4) for value in likeness],
                }
            )
            print({name: rows[-1][name] for name in list(rows[-1])[:7]}, flush=True)
    return dense.video, rows


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
        config = DraftConfig(sparsity=sparsity)
        budget = constant_step(grid, config).budget
        mask = compute_mask(
            q, k, grid=grid, config=config, budget=budget, order="tiled"
        )
        kept = jnp.where(mask.to_dense(), masses, 0.0).sum((-1, -2))
        shares[f"kept_at_sparsity_{sparsity}"] = kept / total
    return shares


def main(arguments: list[str] | None = None) -> None:
    """Measures as the command line asks."""
    parser = argparse.ArgumentParser(description="Measures a small video model.")
    parser.add_argument("--checkpoint", type=Path, help="default: the one that ships")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=len(SAMPLE_PROMPTS))
    options = parser.parse_args(arguments)
    prompts, sampling = SAMPLE_PROMPTS[: options.prompts], Sampling()
    pipeline = load_mini(options.checkpoint)
    attention = measure_attention(
        pipeline, prompts[:ATTENTION_PROMPTS], sampling, ATTENTION_STEPS
    )
    videos, quality = measure_quality(pipeline, prompts, sampling)
    draw_sheet(options.output / "samples_final.png", prompts, videos)
    report = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "prompts": list(prompts),
        "num_steps": sampling.num_steps,
        "guidance": sampling.guidance,
        "shift": sampling.shift,
        "dense_fraction": DENSE_FRACTION,
        "attention": attention,
        "quality": quality,
    }
    write_json(options.output / "evaluation.json", report)


if __name__ == "__main__":
    main()
