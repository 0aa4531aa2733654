"""Steps of several sizes, compiled in the background while others run."""

import concurrent.futures
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from models.mini.data_parallel import DataParallel
from models.mini.feed import Draw, Feed
from models.mini.stages import VideoSize

Programs = tuple[jax.stages.Lowered, jax.stages.Lowered]  # of the data, of the step
Compiled = tuple[jax.stages.Compiled, jax.stages.Compiled]


@runtime_checkable
class Task(Protocol):
    """A trainer: what a step is, and what is kept of a state."""

    @property
    def config(self) -> Any:
        """Settings, with the `seed` of the scenes."""

    @property
    def devices(self) -> DataParallel:
        """Devices that share the videos of a step."""

    def batch(self, draw: Draw) -> Any:
        """Returns what the host hands to a step."""

    def lower_step(self, state: Any, batch: Any, size: VideoSize) -> Programs:
        """Returns the programs of a step, which are to be compiled."""

    def rate(self, steps: int, share: float) -> float:
        """Returns the learning rate; see `learning_rate_at`."""

    def call(self, compiled: Compiled, state: Any, batch: Any, rate: float) -> Any:
        """Runs a compiled step; returns the new state and the loss before it."""

    def save(self, state: Any, folder: Path) -> None:
        """Writes what pipelines read."""


class Compiler:
    """Compiles the programs of steps, each size once, in threads.

    Args:
      task: Makes the programs.
      state: A state such as the steps will have; only its shapes are kept.
    """

    def __init__(self, task: Task, state: Any) -> None:
        self._task = task
        # Steps take the buffers of a state, so the arrays themselves do not last.
        self._state = jax.eval_shape(lambda state: state, state)
        self._tracing = threading.Lock()  # traces share one interpreter anyhow
        self._threads = concurrent.futures.ThreadPoolExecutor()
        self._running: dict[VideoSize, concurrent.futures.Future[Compiled]] = {}

    def start(self, sizes: Sequence[VideoSize]) -> None:
        """Starts to compile the sizes that were not started yet, in their order."""
        for size in sizes:
            if size not in self._running:
                self._running[size] = self._threads.submit(self._compile, size)

    def is_ready(self, size: VideoSize) -> bool:
        """Returns whether `get` would return at once."""
        return self._running[size].done()

    def get(self, size: VideoSize) -> Compiled:
        """Waits for the programs of a size that was started."""
        return self._running[size].result()

    def stop(self) -> None:
        """Starts nothing more; what is being compiled is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compile(self, size: VideoSize) -> Compiled:
        start = time.monotonic()
        seed, parts = self._task.config.seed, self._task.devices.count
        with Feed(seed, parts=parts, workers=0) as feed:
            batch = self._task.batch(feed.get(0, lambda _: size))
        with self._tracing:
            data, step = self._task.lower_step(self._state, batch, size)
        lowered = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(1) as other:
            first = other.submit(data.compile)
            programs = (step.compile(), first.result())
        memory = programs[0].memory_analysis()
        gigabytes = 0.0 if memory is None else memory.temp_size_in_bytes / 1e9
        print(
            f"{size}: {gigabytes:.1f} GB beside the state, traced in "
            f"{lowered - start:.0f} s, compiled in {time.monotonic() - lowered:.0f} s",
            flush=True,
        )
        return programs[1], programs[0]
