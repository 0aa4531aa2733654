"""The loop around compiled training steps: time, losses, and what is written when."""

import collections
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import flax
import jax
import optax

from models.files import whole_file
from models.mini.compilation import Compiler, Task
from models.mini.feed import Feed
from models.mini.stages import Length, Stage, VideoSize, sizes_of, stage_index

LOG_EVERY = 50  # steps
STEPS_IN_FLIGHT = 4
LOG = "log.json"


@dataclasses.dataclass
class Progress:
    """The record of a training, apart from the parameters.

    Attributes:
      steps: Steps done.
      seconds: Time spent stepping, without compilation and samples.
      videos: Videos seen.
      skipped: Steps that changed nothing, because their gradient was not finite.
      starts: Steps at which the optimizer started afresh.
      losses: One entry per `LOG_EVERY` steps and size: step, seconds, size, mean loss.
    """

    steps: int = 0
    seconds: float = 0.0
    videos: int = 0
    skipped: int = 0
    starts: list[int] = dataclasses.field(default_factory=lambda: [0])
    losses: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> "Progress":
        """Reads the log of a stopped training."""
        log = json.loads((folder / LOG).read_text())
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: log[name] for name in names})


class Run:
    """The loop around the compiled steps, and what it writes.

    Args:
      task: Model and data.
      stages: Parts of the training, in order.
      length: Length of the whole training, all resumed runs together.
      output: Folder for everything that is written.
      workers: Processes that draw scenes.
      progress: Record of the training that this run continues.
      compiler: Of the same task, perhaps with programs of another run.

    Raises:
      ValueError: The devices cannot share the videos of some step equally.
    """

    def __init__(
        self,
        task: Task,
        stages: tuple[Stage, ...],
        length: Length,
        output: Path,
        *,
        workers: int,
        progress: Progress | None = None,
        compiler: Compiler | None = None,
    ) -> None:
        for size in sizes_of(stages):  # not hours later, when its stage begins
            size.videos_of_each(task.devices.count)
        self.task, self.stages, self.length = task, stages, length
        self.output, self.workers = output, workers
        self.progress = Progress() if progress is None else progress
        self._compiler = compiler
        self._losses: dict[VideoSize, list[float]] = {}

    def train(
        self,
        state: Any,
        *,
        deadline: float = float("inf"),
        save_every: float = float("inf"),
    ) -> Any:
        """Trains until the length is reached or a moment of `time.monotonic`.

        Args:
          state: State to start from.
          deadline: Stop by then, so that a later run can resume.
          save_every: Seconds between checkpoints.

        Returns:
          The state after the last step.
        """
        progress, last_save = self.progress, time.monotonic()
        pending: collections.deque = collections.deque()
        seed, parts = self.task.config.seed, self.task.devices.count
        with Feed(seed, parts=parts, workers=self.workers) as feed:
            compiler = self._compiler or Compiler(self.task, state)
            mark = time.monotonic()  # when the time of the next step starts to count
            while time.monotonic() < deadline:
                step = progress.steps
                share = self.length.share(step, progress.seconds)
                if share >= 1.0:
                    break
                index = stage_index(self.stages, share)
                # The sizes of the next stage compile while this one runs.
                compiler.start(sizes_of(self.stages[index : index + 2]))
                stage = self.stages[index]
                size = stage.size_at(step)
                batch = self.task.batch(feed.get(step, stage.size_at))
                rate = self.task.rate(step - progress.starts[-1], share)
                waits = not compiler.is_ready(size)
                compiled = compiler.get(size)
                if waits:
                    mark = time.monotonic()
                state, loss = self.task.call(compiled, state, batch, rate)
                pending.append((step, size, loss))
                self._collect(pending, STEPS_IN_FLIGHT)
                now = time.monotonic()
                progress.seconds += now - mark
                mark, progress.steps = now, step + 1
                if now - last_save > save_every:
                    self._collect(pending, 0)
                    self.save(state)
                    mark = last_save = time.monotonic()
            compiler.stop()
            self._collect(pending, 0)
        return state

    def save(self, state: Any) -> None:
        """Writes what pipelines read, and the log."""
        self.output.mkdir(parents=True, exist_ok=True)
        self.task.save(state, self.output)
        with whole_file(self.output / LOG) as temporary:
            temporary.write_text(json.dumps(self.log()) + "\n")
        print(f"saved after step {self.progress.steps}", flush=True)

    def log(self) -> dict[str, Any]:
        """Returns everything worth knowing about the run, ready for JSON."""
        return {
            "device": jax.devices()[0].device_kind,
            "devices": self.task.devices.count,
            "versions": {
                "jax": jax.__version__,
                "flax": flax.__version__,
                "optax": optax.__version__,
            },
            "config": dataclasses.asdict(self.task.config),
            "stages": [
                {
                    "share": stage.share,
                    "turns": [dataclasses.asdict(size) for size in stage.turns],
                }
                for stage in self.stages
            ],
            **dataclasses.asdict(self.progress),
        }

    def _collect(self, pending: collections.deque, most: int) -> None:
        """Waits until at most so many steps are under way; logs the finished ones."""
        while len(pending) > most:
            step, size, loss = pending.popleft()
            self._note(step, size, float(loss))
            self.progress.videos += size.batch
            if (step + 1) % LOG_EVERY:
                continue
            for each, losses in self._losses.items():
                entry = {
                    "step": step + 1,
                    "seconds": round(self.progress.seconds, 2),
                    "size": [each.frames, each.height, each.width],
                    "loss": sum(losses) / len(losses),
                }
                self.progress.losses.append(entry)
                if (step + 1) % (4 * LOG_EVERY) == 0:
                    print(json.dumps(entry), flush=True)
            self._losses = {}

    def _note(self, step: int, size: VideoSize, loss: float) -> None:
        if math.isfinite(loss):
            self._losses.setdefault(size, []).append(loss)
            return
        self.progress.skipped += 1
        if self.progress.skipped > 10 + step // 100:
            raise FloatingPointError(
                f"{self.progress.skipped} of {step + 1} steps had a loss that is not "
                "finite: the parameters or the videos are broken"
            )
