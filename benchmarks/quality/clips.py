"""Clips of the lab: prompts, each with noise of its own.

The noise follows from the clip's number, not from the batch that it is sampled in.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from benchmarks.quality.prompts import Prompt

FRAMES_SHOWN = 5
LEAST_COLUMNS = 112  # of a frame that is shown; it may have nearly twice as many


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

    def batches(self) -> list["Clips"]:
        """Returns clips that are sampled together."""
        return [
            dataclasses.replace(
                self,
                prompts=self.prompts[start : start + self.batch],
                first=self.first + start,
            )
            for start in range(0, len(self.prompts), self.batch)
        ]

    @property
    def texts(self) -> list[str]:
        """What a text encoder takes."""
        return [prompt.text for prompt in self.prompts]

    def noise(self, shape: Sequence[int], seed: int) -> Float[Array, "B F H W C"]:
        """Returns the initial latents of all clips."""
        key = jax.random.key(seed)
        numbers = range(self.first, self.first + len(self.prompts))
        keys = [jax.random.fold_in(key, number) for number in numbers]
        return jnp.stack([jax.random.normal(key, shape) for key in keys])


def shown_frames(videos: Float[Array, "B T Y X 3"]) -> np.ndarray:
    """Returns a few small frames of the first two clips, in bytes, for the document."""
    length = videos.shape[1]
    places = np.unique(np.linspace(0, length - 1, FRAMES_SHOWN).round().astype(int))
    frames = np.asarray(videos[:2, places])
    side = max(1, frames.shape[3] // LEAST_COLUMNS)
    rows, columns = (size // side for size in frames.shape[2:4])
    cut = frames[:, :, : rows * side, : columns * side]
    squares = cut.reshape(*frames.shape[:2], rows, side, columns, side, 3)
    return np.rint(255 * squares.mean((3, 5))).astype(np.uint8)
