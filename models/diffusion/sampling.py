"""Settings of a run: size, length, steps, guidance and seed of a video."""

import dataclasses

import numpy as np

from models.diffusion.prompt_text import check_text
from models.diffusion.schedulers import Solver, SolverName, make_solver
from pallas_kernels.common import make_plain, register_configuration


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of a run. Changing a field changes the video.

    Args:
      frames: Frames of the video.
      height: Rows of pixels.
      width: Columns of pixels.
      num_steps: Steps of the sampler; each is one model call.
      guidance: Classifier-free guidance: the prediction is
        `negative + guidance * (prompt - negative)`. 1.0 turns it off, which halves
        the work.
      low_guidance: Guidance of the steps of a second transformer for low noise, where a
        model has two; None for the same.
      boundary: Timestep, 0 to 1000, from which on a model's transformer for high noise
        runs, where it has two; None for that of the model.
      embedded_guidance: Strength of the guidance that a distilled model is told of,
        instead of running a negative prompt; None for models that are told nothing.
      shift: Of the noise levels; see `FlowEuler`.
      solver: "euler" or "unipc" with its default grid, or an object with as many
        steps as `num_steps`, which has its own shift.
      grid: Whose noise levels a solver given by name takes, see `make_solver`; the
        solver's default if None.
      seed: Of the initial noise; `VideoPipeline.generate` takes one for each item, too.
      negative_prompt: What guidance leads away from.

    Raises:
      ValueError: A size is not a positive integer, the seed is not an integer in
        [0, 2**32), a number is not finite and in range, there is no such solver, or
        the negative prompt cannot be written as UTF-8.
    """

    frames: int = 25
    height: int = 96
    width: int = 128
    num_steps: int = 16
    guidance: float = 4.0
    low_guidance: float | None = None
    boundary: float | None = None
    embedded_guidance: float | None = None
    shift: float = 3.0
    solver: SolverName | Solver = "euler"
    grid: str | None = None
    seed: int = 0
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("frames", "height", "width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        check_seed("seed", self.seed)
        check_text("negative_prompt", self.negative_prompt)
        if not 0.0 <= self.guidance < float("inf"):
            raise ValueError(
                f"guidance={self.guidance!r} must be a finite number >= 0; 1 is off"
            )
        low = self.low_guidance
        if low is not None and not 0.0 <= low < float("inf"):
            raise ValueError(
                f"low_guidance={low!r} must be a finite number >= 0, or None"
            )
        if self.boundary is not None and not 0.0 < self.boundary < 1000.0:
            raise ValueError(
                f"boundary={self.boundary!r} must be a timestep between 0 and 1000, or "
                "None"
            )
        embedded = self.embedded_guidance
        if embedded is not None and not 0.0 <= embedded < float("inf"):
            raise ValueError(
                f"embedded_guidance={embedded!r} must be a finite number >= 0, or None "
                "for models that take none"
            )
        solver = self.make_solver()
        if solver.num_steps != self.num_steps:
            raise ValueError(
                f"num_steps={self.num_steps!r} must equal {solver.num_steps=}"
            )

    @property
    def guided(self) -> bool:
        """Whether steps run a negative prompt too."""
        return self.guidance != 1.0 or self.low_guidance not in (None, 1.0)

    def make_solver(self) -> Solver:
        """Returns the solver that `solver`, `num_steps` and `shift` describe."""
        if isinstance(self.solver, Solver):
            return self.solver
        return make_solver(
            self.solver, num_steps=self.num_steps, shift=self.shift, grid=self.grid
        )


def check_seed(name: str, seed: object) -> None:
    """Raises ValueError unless a seed is an integer in [0, 2**32)."""
    if not isinstance(seed, int | np.integer) or not 0 <= int(seed) < 2**32:
        raise ValueError(f"{name}={seed!r} must be an integer in [0, 2**32)")
