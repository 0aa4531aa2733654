"""Trains the model that ships with the project.

    python -m models.mini.train --sources sources.npz --minutes 15 --output run

`models.mini.sources` makes sources.npz. The output folder gets `weights`, which
`MiniCheckpoint.load` and `draft-video --checkpoint` read. It gets `log.json` and
contact sheets of samples, too. From `state.npz`, `--resume run` goes on where a stopped
run was. docs/mini_model.md says how the shipped weights were made.
"""

# Worker processes import this file: what needs JAX is imported inside functions.
import argparse
import collections
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.mini.captions import SAMPLE_PROMPTS

if TYPE_CHECKING:
    from models.mini.training import Trainer, TrainState

LOG_EVERY = 50  # steps
STEPS_IN_FLIGHT = 4
SHEET_PROMPTS = SAMPLE_PROMPTS[:12]  # shown on a contact sheet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the training with videos of one length.

    Attributes:
      frames: Frames of each video.
      batch: Videos in a step.
      share: Share of the training.
    """

    frames: int
    batch: int
    share: float

    @classmethod
    def parse(cls, text: str) -> "Stage":
        """Reads "FRAMES,BATCH,SHARE"."""
        try:
            frames, batch, share = text.split(",")
            stage = cls(frames=int(frames), batch=int(batch), share=float(share))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} must be FRAMES,BATCH,SHARE, for example 24,64,0.5"
            ) from None
        if stage.frames < 2 or stage.frames % 2 or stage.batch < 3 or stage.share <= 0:
            raise argparse.ArgumentTypeError(
                f"{text!r}: frames must be even, batch at least 3, share positive"
            )
        return stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Length:
    """The length of a training: in steps, or in seconds of stepping.

    Attributes:
      steps: None if the time counts.
      seconds: None if the steps count.
    """

    steps: int | None = None
    seconds: float | None = None

    def share(self, steps: int, seconds: float) -> float:
        """Returns the share that is over after so many steps, or seconds of them."""
        if self.steps is not None:
            return steps / self.steps
        assert self.seconds is not None, "one of the two is given"
        return seconds / self.seconds


def stage_at(stages: tuple[Stage, ...], share: float) -> Stage:
    """Returns the stage that runs when this share of the training is over."""
    total, reached = sum(stage.share for stage in stages), 0.0
    for stage in stages:
        reached += stage.share / total
        if share < reached:
            return stage
    return stages[-1]


@dataclasses.dataclass
class Progress:
    """The record of a run, apart from the parameters.

    Attributes:
      seconds: Time spent stepping, without compilation and samples.
      videos: Videos seen.
      skipped: Steps that changed nothing, because their gradient was not finite.
      losses: One entry per `LOG_EVERY` steps: step, seconds, frames, mean loss.
    """

    seconds: float = 0.0
    videos: int = 0
    skipped: int = 0
    losses: list[dict[str, float]] = dataclasses.field(default_factory=list)


class Run:
    """The loop around the compiled steps, and what it writes.

    Args:
      trainer: Model and data.
      stages: Parts of the training, in order.
      length: Length of the whole training, all resumed runs together.
      output: Folder for everything that is written.
      workers: Processes that draw scenes.
    """

    def __init__(
        self,
        trainer: "Trainer",
        stages: tuple[Stage, ...],
        length: Length,
        output: Path,
        *,
        workers: int,
    ) -> None:
        self.trainer, self.stages, self.length = trainer, stages, length
        self.output, self.workers = output, workers
        self.progress = Progress()
        self._compiled: dict[Stage, Any] = {}
        self._losses: list[float] = []

    def train(
        self,
        state: "TrainState",
        *,
        deadline: float = float("inf"),
        save_every: float = float("inf"),
    ) -> "TrainState":
        """Trains until the length is reached or a moment of `time.monotonic`.

        Args:
          state: State to start from.
          deadline: Stop by then, so that a later run can resume.
          save_every: Seconds between checkpoints with samples.

        Returns:
          The state after the last step.
        """
        from models.mini.feed import Feed

        step, last_save = int(state.step), time.monotonic()
        pending: collections.deque = collections.deque()
        with Feed(self.trainer.config.seed, workers=self.workers) as feed:
            mark = None  # when the time of the next step starts to count
            while time.monotonic() < deadline:
                share = self.length.share(step, self.progress.seconds)
                if share >= 1.0:
                    break
                stage = stage_at(self.stages, share)
                draw = feed.get(step, batch=stage.batch, frames=stage.frames)
                batch = self.trainer.batch(draw)
                if stage not in self._compiled:
                    self._collect(pending, 0)
                    self._compile(stage, state, batch)
                    mark = None
                mark = time.monotonic() if mark is None else mark
                state, loss = self._compiled[stage](
                    state, batch, self._rate(step, share)
                )
                pending.append((step, stage, loss))
                self._collect(pending, STEPS_IN_FLIGHT)
                now = time.monotonic()
                self.progress.seconds += now - mark
                mark, step = now, step + 1
                if now - last_save > save_every:
                    self._collect(pending, 0)
                    self.save(state)
                    mark, last_save = None, time.monotonic()
            self._collect(pending, 0)
        return state

    def save(self, state: "TrainState") -> None:
        """Writes weights, log, and a contact sheet of samples, named by the step."""
        from models.mini.samples import contact_sheet

        step = int(state.step)
        checkpoint = self.trainer.checkpoint(state.ema)
        checkpoint.save(self.output / "weights")
        (self.output / "log.json").write_text(json.dumps(self.log(step)) + "\n")
        config = self.trainer.config
        contact_sheet(
            checkpoint,
            SHEET_PROMPTS,
            self.output / f"samples_{step:06}.png",
            frames=self.stages[-1].frames,
            height=config.height,
            width=config.width,
        )
        print(f"saved after step {step}", flush=True)

    def log(self, step: int) -> dict[str, Any]:
        """Returns everything worth knowing about the run, ready for JSON."""
        import flax
        import jax
        import optax

        return {
            "device": jax.devices()[0].device_kind,
            "versions": {
                "jax": jax.__version__,
                "flax": flax.__version__,
                "optax": optax.__version__,
            },
            "config": dataclasses.asdict(self.trainer.config),
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
            "steps": step,
            **dataclasses.asdict(self.progress),
        }

    def _rate(self, step: int, share: float) -> float:
        from models.mini.training import learning_rate_at

        return learning_rate_at(self.trainer.config, step, share)

    def _compile(self, stage: Stage, state: "TrainState", batch: Any) -> None:
        start = time.monotonic()
        self._compiled[stage] = self.trainer.compile_step(state, batch)
        seconds = time.monotonic() - start
        print(f"compiled {stage} in {seconds:.0f} s", flush=True)

    def _collect(self, pending: collections.deque, most: int) -> None:
        """Waits until at most so many steps are under way; logs the finished ones."""
        while len(pending) > most:
            step, stage, loss = pending.popleft()
            self._note(step, float(loss))
            self.progress.videos += stage.batch
            if (step + 1) % LOG_EVERY == 0 and self._losses:
                entry = {
                    "step": step + 1,
                    "seconds": round(self.progress.seconds, 2),
                    "frames": stage.frames,
                    "loss": sum(self._losses) / len(self._losses),
                }
                self.progress.losses.append(entry)
                self._losses = []
                if (step + 1) % (4 * LOG_EVERY) == 0:
                    print(json.dumps(entry), flush=True)

    def _note(self, step: int, loss: float) -> None:
        if math.isfinite(loss):
            self._losses.append(loss)
            return
        self.progress.skipped += 1
        if self.progress.skipped > 10 + step // 100:
            raise FloatingPointError(
                f"{self.progress.skipped} of {step + 1} steps had a loss that is not "
                "finite: the parameters or the videos are broken"
            )


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Trains the small video model.")
    add = parser.add_argument
    add("--sources", type=Path, required=True, help="what models.mini.sources wrote")
    add("--output", type=Path, required=True, help="folder for weights and log")
    add("--resume", type=Path, help="output folder of a stopped run to go on from")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="length, as time of stepping")
    length.add_argument("--steps", type=int, help="length, as a number of steps")
    add("--stage", type=Stage.parse, action="append", metavar="FRAMES,BATCH,SHARE")
    add("--stop-after", type=float, default=float("inf"), metavar="SECONDS")
    add("--save-every", type=float, default=float("inf"), metavar="SECONDS")
    add("--learning-rate", type=float, default=1e-3)
    add("--whitening", type=float, default=0.5)
    add("--seed", type=int, default=0)
    add("--remat", action="store_true", help="less memory; see TrainConfig")
    add("--workers", type=int, default=8)
    return parser.parse_args(arguments)


DEFAULT_STAGES = (
    Stage(frames=8, batch=96, share=0.4),
    Stage(frames=24, batch=32, share=0.6),
)


def main(arguments: list[str] | None = None) -> None:
    """Trains as the command line asks."""
    started = time.monotonic()
    options = parse_options(arguments)
    from models.mini.codec import LinearCodec
    from models.mini.renderer import device_sources
    from models.mini.scenes import all_captions
    from models.mini.sources import Sources
    from models.mini.text import Vocabulary
    from models.mini.training import (
        TrainConfig,
        Trainer,
        fit_codec,
        load_state,
        save_state,
    )

    config = TrainConfig(
        learning_rate=options.learning_rate,
        whitening=options.whitening,
        seed=options.seed,
        remat=options.remat,
    )
    sources = device_sources(Sources.load(options.sources))
    if options.resume is None:
        codec = fit_codec(config, sources)
    else:
        codec = LinearCodec.load(options.resume / "weights" / "codec.safetensors")
    vocabulary = Vocabulary.from_captions(
        all_captions(), max_length=config.model.text_length
    )
    trainer = Trainer(config, vocabulary, codec, sources)
    seconds = None if options.minutes is None else 60.0 * options.minutes
    run = Run(
        trainer,
        tuple(options.stage or DEFAULT_STAGES),
        Length(steps=options.steps, seconds=seconds),
        options.output,
        workers=options.workers,
    )
    state = trainer.initial_state()
    if options.resume is not None:
        state, stored = load_state(options.resume, state)
        run.progress = Progress(**stored)
    options.output.mkdir(parents=True, exist_ok=True)
    state = run.train(
        state, deadline=started + options.stop_after, save_every=options.save_every
    )
    save_state(options.output, state, dataclasses.asdict(run.progress))
    run.save(state)
    print(f"{int(state.step)} steps, {run.progress.seconds:.0f} s of stepping")


if __name__ == "__main__":
    main()
