"""What a training sees when: sizes of videos, stages of sizes, and the whole length.

Nothing here imports JAX, so that worker processes start fast.
"""

import argparse
import dataclasses
import re

_SIZE = re.compile(r"(\d+)x(\d+)x(\d+)\*(\d+)(?:\*(\d+))?")
_EXAMPLE = "0.7=25x96x128*32*6+25x256x384*4"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoSize:
    """The videos of a step.

    Attributes:
      frames: Frames of each video.
      height: Rows of pixels.
      width: Columns of pixels.
      batch: Videos in a step.

    Raises:
      ValueError: A number is not positive.
    """

    frames: int
    height: int
    width: int
    batch: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"{field.name}={getattr(self, field.name)} must be > 0"
                )

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height

    def videos_of_each(self, devices: int) -> int:
        """Returns the videos of each device that shares a step.

        Raises:
          ValueError: They cannot be shared equally.
        """
        videos, rest = divmod(self.batch, devices)
        if rest:
            raise ValueError(
                f"batch={self.batch} of {self} must be a multiple of the {devices} "
                "devices that share it; change --stage or --devices"
            )
        return videos


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a training in which videos of some sizes take turns.

    Attributes:
      share: Share of the training; those of all stages need not add up to one.
      turns: Sizes in the order of their steps; the last is followed by the first.

    Raises:
      ValueError: The share is not positive, or there is no size.
    """

    share: float
    turns: tuple[VideoSize, ...]

    def __post_init__(self) -> None:
        if not self.share > 0.0 or not self.turns:
            raise ValueError(
                f"share={self.share} must be positive, with a size to train on at least"
            )

    @classmethod
    def parse(cls, text: str) -> "Stage":
        """Reads "SHARE=FRAMESxHEIGHTxWIDTH*BATCH[*STEPS]+...".

        Raises:
          ArgumentTypeError: It is of another form.
        """
        try:
            share, _, sizes = text.partition("=")
            turns: list[VideoSize] = []
            for part in sizes.split("+"):
                found = _SIZE.fullmatch(part)
                if found is None:
                    raise ValueError(part)
                *numbers, steps = (int(number or 1) for number in found.groups())
                names = ("frames", "height", "width", "batch")
                size = VideoSize(**dict(zip(names, numbers, strict=True)))
                turns += [size] * steps
            return cls(share=float(share), turns=tuple(turns))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} must be SHARE=FRAMESxHEIGHTxWIDTH*BATCH[*STEPS]+..., as "
                f"{_EXAMPLE}: six steps of 32 small videos, then one of 4 large ones"
            ) from None

    def size_at(self, step: int) -> VideoSize:
        """Returns the size of a step; a step always has the same within a stage."""
        return self.turns[step % len(self.turns)]


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


def stage_index(stages: tuple[Stage, ...], share: float) -> int:
    """Returns which stage runs when this share of the training is over."""
    total, reached = sum(stage.share for stage in stages), 0.0
    for index, stage in enumerate(stages):
        reached += stage.share / total
        if share < reached:
            return index
    return len(stages) - 1


def sizes_of(stages: tuple[Stage, ...]) -> tuple[VideoSize, ...]:
    """Returns every size of the stages once, in the order of their first steps."""
    return tuple(dict.fromkeys(size for stage in stages for size in stage.turns))
