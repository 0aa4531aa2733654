"""Videos of the lab's clips, and how close they come to those of dense attention.

A clip is a prompt with noise of its own: the noise follows from the clip's number, not
from the batch that it is sampled in.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from benchmarks.quality.prompts import Prompt
from benchmarks.quality.trials import Trial
from draft_jax import AttentionPlan, means_work
from models.diffusion.caches import StepCache
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.results import GenerationResult
from models.diffusion.sampling import Sampling
from models.media.metrics import flicker, gmsd, psnr, ssim

METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "psnr": psnr,
    "ssim": ssim,
    "gmsd": gmsd,
    "flicker": flicker,
}
FLOOR_DB = 120.0  # of equal videos, for means to be numbers
FRAMES_SHOWN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clips:
    """Prompts with their numbers.

    Attributes:
      prompts: What the videos show.
      first: Number of the first clip.
      batch: Clips that are sampled together.
    """

    prompts: tuple[Prompt, ...]
    first: int
    batch: int

    def batches(self) -> list[range]:
        """Returns places in `prompts` that are sampled together."""
        count = len(self.prompts)
        return [
            range(start, min(start + self.batch, count))
            for start in range(0, count, self.batch)
        ]

    def noise(
        self, places: Sequence[int], shape: tuple[int, ...], seed: int
    ) -> Float[Array, "B F H W C"]:
        """Returns the initial latents of some clips."""
        key = jax.random.key(seed)
        keys = [jax.random.fold_in(key, self.first + place) for place in places]
        return jnp.stack([jax.random.normal(key, shape) for key in keys])


def generate(
    pipeline: VideoPipeline,
    clips: Clips,
    sampling: Sampling,
    attention: AttentionPlan,
    cache: StepCache | None = None,
) -> list[GenerationResult]:
    """Samples all clips, a batch at a time."""
    shape = pipeline.latent_shape(sampling)
    return [
        pipeline.generate(
            [clips.prompts[place].text for place in places],
            sampling,
            noise=clips.noise(places, shape, sampling.seed),
            attention=attention,
            cache=cache,
        )
        for places in clips.batches()
    ]


def joined(results: Sequence[GenerationResult]) -> Float[np.ndarray, "B T Y X 3"]:
    """Returns the videos of all batches."""
    return np.concatenate([result.video for result in results])


def likeness(
    videos: Float[np.ndarray, "B T Y X 3"], dense: Float[np.ndarray, "B T Y X 3"]
) -> dict[str, list[float]]:
    """Returns each metric of each clip."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = {
            name: pool.map(metric, videos, dense) for name, metric in METRICS.items()
        }
        values = {name: list(each) for name, each in found.items()}
    values["psnr"] = [min(value, FLOOR_DB) for value in values["psnr"]]
    return {name: [round(v, 5) for v in each] for name, each in values.items()}


def describe(
    pipeline: VideoPipeline,
    trial: Trial,
    sampling: Sampling,
    results: Sequence[GenerationResult],
    dense: Float[np.ndarray, "B T Y X 3"],
) -> dict[str, Any]:
    """Returns the record of a trial.

    `kept_density` and `work` are of the steps and layers that are sparse; work counts
    the means, too. Times are of the steps, without compiling.
    """
    config = trial.attention.config
    kept, work = 1.0, 1.0
    if config is not None:
        shares = np.stack([result.kept_density for result in results])
        is_sparse = np.stack([~result.dense for result in results])
        is_sparse &= ~np.stack([result.skipped for result in results])[..., None]
        kept = float(shares[is_sparse].mean()) if is_sparse.any() else 1.0
        grid = pipeline.model.grid(pipeline.latent_shape(sampling))
        work = kept + means_work(grid, config)
    return {
        "part": trial.part,
        "name": trial.name,
        "density": trial.density,
        "kept_density": round(kept, 5),
        "work": round(work, 5),
        "steps_ms": [round(float(result.time_ms.sum()), 1) for result in results],
        "skipped_steps": [int(result.skipped.sum()) for result in results],
        "clips": likeness(joined(results), dense),
    }


def shown_frames(
    videos: Float[np.ndarray, "B T Y X 3"],
) -> np.ndarray:
    """Returns a few frames of the first two clips, in bytes, for the document."""
    length = videos.shape[1]
    places = np.unique(np.linspace(0, length - 1, FRAMES_SHOWN).round().astype(int))
    return np.rint(255 * videos[:2, places]).astype(np.uint8)
