"""Noise levels of a flow-matching sampler and the step between them.

A sample at noise level sigma is `(1 - sigma) * clean + sigma * noise`. The model
predicts the velocity `noise - clean`, and its timestep input is `1000 * sigma`.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Array, Float

MAX_TIMESTEP = 1000.0  # the timestep of pure noise, for every published model


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowEuler:
    """First-order (Euler) solver of the flow-matching equation.

    The grid is `linspace(1, 0, num_steps + 1)`, shifted towards high noise by
    `sigma -> shift * sigma / (1 + (shift - 1) * sigma)`. This is HunyuanVideo's
    sampler, and the grid (not the solver) of Wan up to its factor of 0.999.

    Args:
      num_steps: Model evaluations, at least 1.
      shift: 1.0 leaves the grid linear; larger values spend more steps at high
        noise. Larger videos want a larger shift.

    Raises:
      ValueError: num_steps is not a positive integer or shift is not a positive,
        finite number.

    Source: MODELS facts of tencent-hunyuan/HunyuanVideo (50 steps, shift 7);
    Esser et al., arXiv 2403.03206, section 5.3.2, for the shift.
    """

    num_steps: int
    shift: float = 1.0

    def __post_init__(self) -> None:
        if (
            isinstance(self.num_steps, bool)
            or not isinstance(self.num_steps, (int, np.integer))
            or self.num_steps < 1
        ):
            raise ValueError(f"num_steps={self.num_steps!r} must be a positive integer")
        if not 0.0 < self.shift < float("inf"):
            raise ValueError(f"shift={self.shift!r} must be a positive, finite number")

    @functools.cached_property
    def sigmas(self) -> Float[np.ndarray, " levels"]:
        """Noise levels before each step, and 0 at the end. Falls from 1 to 0."""
        linear = np.linspace(1.0, 0.0, self.num_steps + 1)
        shifted = self.shift * linear / (1.0 + (self.shift - 1.0) * linear)
        shifted.flags.writeable = False
        return shifted

    @functools.cached_property
    def timesteps(self) -> Float[np.ndarray, " steps"]:
        """What the model is told at each step, 1000 * sigma."""
        timesteps = MAX_TIMESTEP * self.sigmas[:-1]
        timesteps.flags.writeable = False
        return timesteps

    @functools.cached_property
    def step_sizes(self) -> Float[np.ndarray, " steps"]:
        """Change of sigma in each step; negative, and -1 in sum."""
        sizes = np.diff(self.sigmas)
        sizes.flags.writeable = False
        return sizes

    def step(
        self,
        latents: Float[Array, "*shape"],
        velocity: Float[Array, "*shape"],
        index: int,
    ) -> Float[Array, "*shape"]:
        """Moves the latents from noise level `index` to the next one.

        Args:
          latents: Sample at `sigmas[index]`.
          velocity: The model's prediction of `noise - clean` there.
          index: Which step, 0 to num_steps - 1.

        Returns:
          The sample at `sigmas[index + 1]`, in the dtype of `latents`.

        Raises:
          ValueError: index is outside the grid.
        """
        if not 0 <= index < self.num_steps:
            raise ValueError(f"{index=} must be in 0 .. {self.num_steps - 1}")
        return euler_step(latents, velocity, float(self.step_sizes[index]))


def euler_step(
    latents: Float[Array, "*shape"],
    velocity: Float[Array, "*shape"],
    step_size: float | Float[Array, ""],
) -> Float[Array, "*shape"]:
    """`latents + step_size * velocity`; the size may be traced, so one compilation
    serves every step."""
    return (latents + step_size * velocity).astype(latents.dtype)
