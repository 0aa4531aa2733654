"""What is sampled: size, length, steps, guidance and seed of a video."""
# ruff: noqa: RUF001  Chinese has its own comma.

import dataclasses
from typing import Any, Literal, get_args

from models.diffusion.schedulers import Solver, SolverName, make_solver

WanSize = Literal["480p", "720p"]
WanTask = Literal["text", "image"]

# What Wan's own sampler leads away from if it is not told otherwise: garish colours,
# overexposure, stillness, subtitles, JPEG artefacts, malformed hands and faces.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，"
    "最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，"
    "画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
# From an image, away from a shaking camera too.
WAN_IMAGE_NEGATIVE_PROMPT = "镜头晃动，" + WAN_NEGATIVE_PROMPT

# Height and width by name.
WAN_PIXELS: dict[str, tuple[int, int]] = {"480p": (480, 832), "720p": (720, 1280)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """What is sampled. Changing a field changes the video.

    Args:
      frames: Frames of the video.
      height: Rows of pixels.
      width: Columns of pixels.
      num_steps: Steps of the sampler; each is one model call.
      guidance: Classifier-free guidance: the prediction is
        `negative + guidance * (prompt - negative)`. 1.0 turns it off, which halves
        the work.
      shift: Of the noise levels; see `FlowEuler`.
      solver: "euler" or "unipc" with its default grid, or an object with as many
        steps as `num_steps`, which has its own shift.
      grid: Whose noise levels a solver given by name takes, see `make_solver`; the
        solver's default if None.
      seed: Of the initial noise.
      negative_prompt: What guidance leads away from.

    Raises:
      ValueError: A size is not a positive integer, the seed is not an integer in
        [0, 2**32), a number is not finite and in range, or there is no such solver.
    """

    frames: int = 24
    height: int = 96
    width: int = 128
    num_steps: int = 16
    guidance: float = 4.0
    shift: float = 3.0
    solver: SolverName | Solver = "euler"
    grid: str | None = None
    seed: int = 0
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed!r} must be an integer in [0, 2**32)")
        if not 0.0 <= self.guidance < float("inf"):
            raise ValueError(
                f"guidance={self.guidance!r} must be a finite number >= 0; 1 is off"
            )
        solver = self.make_solver()
        if solver.num_steps != self.num_steps:
            raise ValueError(
                f"num_steps={self.num_steps!r} must equal {solver.num_steps=}"
            )

    @classmethod
    def wan(
        cls, size: WanSize = "720p", *, task: WanTask = "text", **changes: Any
    ) -> "Sampling":
        """The settings of Wan2.1's own `generate.py`: 81 frames, UniPC, guidance 5.

        For the 1.3B model its README advises `guidance=6.0` and a shift of 8 to 12.

        Args:
          size: "480p" is 480 x 832 pixels, "720p" is 720 x 1280.
          task: What the video is made from. From text in 50 steps with shift 5; from
            an image in 40, with shift 3 at 480p.
          **changes: Fields to set instead.

        Raises:
          ValueError: There is no such size or task, or a change is out of range.

        Source: Wan-Video/Wan2.1 `generate.py`, `wan/configs`, README.
        """
        if size not in get_args(WanSize):
            raise ValueError(f"{size=} must be one of {get_args(WanSize)}")
        if task not in get_args(WanTask):
            raise ValueError(f"{task=} must be one of {get_args(WanTask)}")
        height, width = WAN_PIXELS[size]
        from_text = task == "text"
        settings: dict[str, Any] = {
            "frames": 81,
            "height": height,
            "width": width,
            "num_steps": 50 if from_text else 40,
            "guidance": 5.0,
            "shift": wan_shift(task, height, width),
            "solver": "unipc",
            "negative_prompt": (
                WAN_NEGATIVE_PROMPT if from_text else WAN_IMAGE_NEGATIVE_PROMPT
            ),
        }
        return cls(**(settings | changes))

    @property
    def guided(self) -> bool:
        """Whether steps run a negative prompt too."""
        return self.guidance != 1.0

    def make_solver(self) -> Solver:
        """The solver that `solver`, `num_steps` and `shift` describe."""
        if isinstance(self.solver, Solver):
            return self.solver
        return make_solver(
            self.solver, num_steps=self.num_steps, shift=self.shift, grid=self.grid
        )


def wan_shift(task: WanTask, height: int, width: int) -> float:
    """The shift of the noise levels in Wan2.1's `generate.py`: 5, or 3 for videos from
    an image at 480p, wide or tall."""
    is_480p = sorted((height, width)) == sorted(WAN_PIXELS["480p"])
    return 3.0 if task == "image" and is_480p else 5.0
