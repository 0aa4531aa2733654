"""Keeps a GPU supplied with scene parameters, drawn ahead in worker processes.

Nothing here imports JAX, so that workers start fast and never touch the GPU.
"""

import collections
import concurrent.futures
import multiprocessing
from collections.abc import Callable

import numpy as np

from models.mini.scenes import Arrays, Mix, sample_batch
from models.mini.stages import VideoSize

Draw = tuple[list[str], Arrays, Arrays, Arrays]


def draw_parts(
    seed: tuple[int, int], parts: int, mix: Mix, frames: int, aspect: float
) -> Draw:
    """Draws a batch as equal parts, which lie one after another in each array.

    Args:
      seed: Of all batches, and the step.
      parts: Devices that share the batch.
      mix: Videos of each kind in a part.
      frames: Frames of each video.
      aspect: Width of the frames over their height.

    Returns:
      Like `sample_batch`; captions are those of the first part, of the second, and so
      on.
    """
    drawn = [sample_batch((*seed, part), mix, frames, aspect) for part in range(parts)]
    captions, *kinds = zip(*drawn, strict=True)
    procedural, pictures, clips = (
        {name: np.concatenate([part[name] for part in kind]) for name in kind[0]}
        for kind in kinds
    )
    return (
        [caption for part in captions for caption in part],
        procedural,
        pictures,
        clips,
    )


class Feed:
    """Batches by step; worker processes draw the next ones meanwhile.

    A batch depends on the seed, the step, its sizes, and the number of its parts only.
    So an interrupted training goes on with the very batches it would have had.

    Args:
      seed: Seed of all batches.
      parts: Devices that share a batch.
      workers: Processes; 0 draws in this process, which is easier to debug.
      ahead: Batches drawn in advance.
    """

    def __init__(
        self, seed: int, *, parts: int = 1, workers: int = 8, ahead: int = 32
    ) -> None:
        self._seed, self._parts = seed, parts
        self._ahead = ahead
        self._pool = None
        if workers:
            # A forked child of a process with JAX's threads can deadlock.
            self._pool = concurrent.futures.ProcessPoolExecutor(
                workers, mp_context=multiprocessing.get_context("spawn")
            )
        self._waiting: dict[tuple[int, VideoSize], concurrent.futures.Future] = (
            collections.OrderedDict()
        )

    def get(self, step: int, size_at: Callable[[int], VideoSize]) -> Draw:
        """Returns the captions and parameters of a step; see `draw_parts`.

        Args:
          step: The step.
          size_at: Sizes of this step and, as far as is known, of the next ones.
        """
        size = size_at(step)
        if self._pool is None:
            return self._draw(self._call, step, size)
        if (step, size) not in self._waiting:  # the first one, or the sizes changed
            self.drop()
        for future_step in range(step, step + self._ahead):
            key = (future_step, size_at(future_step))
            if key not in self._waiting:
                self._waiting[key] = self._draw(self._pool.submit, *key)
        return self._waiting.pop((step, size)).result()

    def _draw(self, call: Callable, step: int, size: VideoSize):
        mix = Mix.of(size.videos_of_each(self._parts))
        seed = (self._seed, step)
        return call(draw_parts, seed, self._parts, mix, size.frames, size.aspect)

    @staticmethod
    def _call(function: Callable, *arguments):
        return function(*arguments)

    def drop(self) -> None:
        """Forgets batches that nobody will ask for."""
        for future in self._waiting.values():
            future.cancel()
        self._waiting.clear()

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
