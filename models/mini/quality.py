"""How close sparse videos of the small model come to dense ones, at what work.

A trial is a method at a sparsity, with the means that it has. Its work is the share of
dense attention's products: the density of what is kept, and what means and exact rows
add.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from draft_jax import (
    AttentionPlan,
    Compensation,
    DraftConfig,
    SparsitySchedule,
    extra_work,
)
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.sampling import Sampling
from models.media.metrics import psnr, ssim

DENSE_FRACTION = 0.25

# What makes their configurations. All but `WHOLE_TILES` draft sub-tiles, and those of
# `WITH_MEANS` have means of several sizes. Only the library's default is corrected.
_ROWS = functools.partial(DraftConfig.paper, selection="row_topk")
METHODS: dict[str, Callable[..., DraftConfig]] = {
    "percentile": DraftConfig.paper,
    "row_topk": _ROWS,
    "sub_tiles": _ROWS,
    "mass": functools.partial(_ROWS, ranking="mass"),
    "spread": functools.partial(_ROWS, ranking="spread"),
    "exact_spread": functools.partial(_ROWS, ranking="exact_spread"),
    "default": DraftConfig,
}
WHOLE_TILES = ("percentile", "row_topk")
WITH_MEANS = ("mass", "spread", "exact_spread", "default")

DraftTile = tuple[int, int] | Literal["eighths"] | None  # of `DraftConfig`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """A method at a sparsity.

    Attributes:
      method: A name of `METHODS`.
      sparsity: Share of block pairs that are skipped.
      least_sparsity: The smallest sparsity of the trials of the method. It sets the
        capacity of masks, so that all sparsities share a program.
      draft_tile: What the draft pools; None for whole tiles.
      compensation: The means; None for a method without.
    """

    method: str
    sparsity: float
    least_sparsity: float
    draft_tile: DraftTile = None
    compensation: Compensation | None = None

    def config(self) -> DraftConfig:
        """Returns what sparse layers compute, at the least sparsity."""
        return METHODS[self.method](
            sparsity=self.least_sparsity,
            draft_tile=self.draft_tile,
            compensation=self.compensation,
        )

    def described(self) -> dict[str, Any]:
        """Returns what tells the trial from others, as JSON would."""
        draft, means = self.draft_tile, self.compensation
        return {
            "method": self.method,
            "sparsity": self.sparsity,
            "draft_tile": list(draft) if isinstance(draft, tuple) else draft,
            "sub_tile": None if means is None else list(means.sub_tile),
            "mean_frames": None if means is None else means.frames,
        }


def trials(
    methods: Sequence[str],
    sparsities: Sequence[float],
    *,
    draft_tile: tuple[int, int],
    sub_tiles: Sequence[tuple[int, int]],
    mean_frames: Sequence[int],
) -> list[Trial]:
    """Returns all methods at all sparsities, those with means with all of these.

    Args:
      methods: Names of `METHODS`.
      sparsities: Shares of block pairs that are skipped.
      draft_tile: Rows and columns of what drafts of sub-tiles pool. The default has
        its own.
      sub_tiles: Rows and columns of what a mean is taken over in a frame.
      mean_frames: Frames that a mean is taken over.

    Raises:
      ValueError: A sparsity or a size is out of range.
    """
    asked = []
    for method in methods:
        sizes: list[Compensation | None] = [None]
        if method in WITH_MEANS:
            pairs = itertools.product(sub_tiles, mean_frames)
            sizes = [Compensation(sub_tile=s, frames=f) for s, f in pairs]
        for compensation, sparsity in itertools.product(sizes, sparsities):
            trial = Trial(
                method=method,
                sparsity=sparsity,
                least_sparsity=min(sparsities),
                draft_tile=_draft_tile_of(method, draft_tile),
                compensation=compensation,
            )
            trial.config()  # a wrong field is told before an hour of work
            asked.append(trial)
    return asked


def _draft_tile_of(method: str, sub_tile: tuple[int, int]) -> DraftTile:
    """Returns what a method's draft pools, where drafts of sub-tiles pool these."""
    if method in WHOLE_TILES:
        return None
    return DraftConfig().draft_tile if method == "default" else sub_tile


def measure(
    pipeline: VideoPipeline,
    trial: Trial,
    prompts: Sequence[str],
    sampling: Sampling,
    dense: Float[np.ndarray, "B T Y X 3"],
) -> dict[str, Any]:
    """Generates the videos of a trial and compares them with dense ones.

    Args:
      pipeline: The model.
      trial: What sparse steps compute.
      prompts: One video each.
      sampling: Settings of all videos.
      dense: The videos of dense attention.

    Returns:
      The trial, the work of its sparse steps, and measures of likeness.
    """
    config = trial.config()
    schedule = SparsitySchedule(dense_fraction=DENSE_FRACTION, sparsity=trial.sparsity)
    plan = AttentionPlan.draft(config, schedule)
    sparse = pipeline.generate(list(prompts), sampling, attention=plan)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        decibels = list(pool.map(psnr, sparse.video, dense))
        likeness = list(pool.map(ssim, sparse.video, dense))
    is_sparse = ~sparse.dense.all(axis=1)
    kept = float(sparse.kept_density[is_sparse].mean())
    grid = pipeline.model.grid(pipeline.latent_shape(sampling))
    extra = extra_work(grid, config)
    return {
        "trial": trial.described(),
        "config": dataclasses.asdict(config),
        "kept_share_of_sparse_steps": kept,
        "extra_work": extra,
        "work_of_sparse_steps": kept + extra,
        "kept_share": float(sparse.kept_density.mean()),
        "psnr_db_mean": float(np.mean(decibels)),
        "psnr_db_min": float(np.min(decibels)),
        "ssim_mean": float(np.mean(likeness)),
        "ssim_min": float(np.min(likeness)),
        "psnr_db": [round(value, 2) for value in decibels],
        "ssim": [round(value, 4) for value in likeness],
    }
