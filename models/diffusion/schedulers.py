"""Noise levels of a flow-matching sampler and the step between them.

A sample at noise level sigma is `(1 - sigma) * clean + sigma * noise`. The model
predicts the velocity `noise - clean`, and its timestep input is `1000 * sigma`.

A solver works its coefficients out once, in float64 on the host. A step takes those
of its index as small arrays, so one compilation serves every step.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from draft_jax.pytree import register_named_tuple
from pallas_kernels.common import make_plain, register_configuration

MAX_TIMESTEP = 1000.0  # the timestep of pure noise, for every published model

SolverName = Literal["euler", "unipc"]
EulerGrid = Literal["linear", "diffusers"]
UniPCGrid = Literal["wan", "diffusers"]

# The published schedulers know 1000 noise levels, 0.001 apart, in float32.
_LEAST_SIGMA = 1.0 / MAX_TIMESTEP
_WAN_FIRST_SIGMA = float(np.float32(1.0 - _LEAST_SIGMA))


@runtime_checkable
class Solver(Protocol):
    """Noise levels, and how a sample moves from one to the next.

    `update` depends on its arguments and the solver's class alone, so that a
    compiled step serves every solver of the class.
    """

    @property
    def num_steps(self) -> int:
        """Model evaluations."""

    @property
    def timesteps(self) -> Float[np.ndarray, " steps"]:
        """The model's timestep at each step; falls from at most 1000."""

    def initial_history(self, latents: Float[Array, "*shape"]) -> Any:
        """Returns the history that a first step takes: a pytree of new arrays."""

    def coefficients(self, index: int) -> Any:
        """Returns a step's numbers: a pytree of arrays of the same shapes each step."""

    def update(
        self,
        latents: Float[Array, "*shape"],
        velocity: Float[Array, "*shape"],
        history: Any,
        coefficients: Any,
    ) -> tuple[Float[Array, "*shape"], Any]:
        """Returns the sample at the next noise level, and the next step's history."""


@register_configuration
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
      grid: "linear" as above. "diffusers" is what its FlowMatchEulerDiscrete
        scheduler does if it is given no sigmas: it shifts twice, once the range of
        levels and once the levels in it, and ends at lower noise before 0.

    Raises:
      ValueError: num_steps is not a positive integer, shift is not a positive,
        finite number, or there is no such grid.

    Source: MODELS facts of tencent-hunyuan/HunyuanVideo (50 steps, shift 7);
    Esser et al., arXiv 2403.03206, section 5.3.2, for the shift; diffusers 0.42.1
    `FlowMatchEulerDiscreteScheduler` for its grid.
    """

    num_steps: int
    shift: float = 1.0
    grid: EulerGrid = "linear"

    def __post_init__(self) -> None:
        make_plain(self)
        _check_grid(self.num_steps, self.shift, self.grid, get_args(EulerGrid))

    @functools.cached_property
    def sigmas(self) -> Float[np.ndarray, " levels"]:
        """Noise levels before each step, and 0 at the end. Falls from 1 to 0."""
        if self.grid == "linear":
            levels = np.linspace(1.0, 0.0, self.num_steps + 1)
        else:
            last = shift_sigmas(_LEAST_SIGMA, self.shift)
            levels = np.append(np.linspace(1.0, last, self.num_steps), 0.0)
        return _read_only(shift_sigmas(levels, self.shift))

    @functools.cached_property
    def timesteps(self) -> Float[np.ndarray, " steps"]:
        """The model's timestep at each step, 1000 * sigma."""
        return _read_only(MAX_TIMESTEP * self.sigmas[:-1])

    @functools.cached_property
    def step_sizes(self) -> Float[np.ndarray, " steps"]:
        """Change of sigma in each step; negative, and -1 in sum."""
        return _read_only(np.diff(self.sigmas))

    def initial_history(self, latents: Float[Array, "*shape"]) -> tuple[()]:
        """Returns nothing: a step needs none."""
        return ()

    def coefficients(self, index: int) -> Float[np.ndarray, ""]:
        """Returns the size of a step.

        Raises:
          ValueError: index is outside the grid.
        """
        _check_index(index, self.num_steps)
        return np.asarray(self.step_sizes[index])

    def update(
        self,
        latents: Float[Array, "*shape"],
        velocity: Float[Array, "*shape"],
        history: tuple[()],
        coefficients: Float[Array | np.ndarray, ""],
    ) -> tuple[Float[Array, "*shape"], tuple[()]]:
        """Returns the sample at the next noise level; see `Solver.update`."""
        return euler_step(latents, velocity, coefficients), history

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
        return euler_step(latents, velocity, float(self.coefficients(index)))


def euler_step(
    latents: Float[Array, "*shape"],
    velocity: Float[Array, "*shape"],
    step_size: float | Float[Array | np.ndarray, ""],
) -> Float[Array, "*shape"]:
    """Returns `latents + step_size * velocity`.

    The size may be traced, so one compilation serves every step.
    """
    return (latents + step_size * velocity).astype(latents.dtype)


@register_named_tuple
class UniPCHistory(NamedTuple):
    """Arrays that a UniPC step needs of those before it."""

    sample: Float[Array, "*shape"]  # the corrected sample of the last step
    clean: Float[Array, "*shape"]  # the clean sample predicted there
    earlier: Float[Array, "*shape"]  # and one step before that


@register_named_tuple
class UniPCCoefficients(NamedTuple):
    """Weights of one UniPC step, which is linear in what it combines."""

    sigma: Float[Array | np.ndarray, ""]
    # Of the sample, the history's sample, and the clean samples of this step, the
    # last one and the one before.
    corrector: Float[Array | np.ndarray, "5"]
    # Of the corrected sample and the clean samples of this step and the last one.
    predictor: Float[Array | np.ndarray, "3"]


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowUniPC:
    """Second-order UniPC, the solver of Wan's own sampler.

    Each step corrects the sample with the prediction made there, then predicts the
    next sample from the two latest clean samples: B(h) = expm1(h) ("bh2"), in terms
    of the clean sample ("predict x0"). The first step has no corrector; the first
    and the last have order 1, and the last one ends on the predicted clean sample.

    Args:
      num_steps: Model evaluations, at least 1. Wan uses 50, for images to video 40.
      shift: See `FlowEuler`. Wan uses 5.0, and 3.0 for images to video at 480p.
      grid: "wan" shifts `linspace(0.999, 0, num_steps + 1)`, as the original does.
        "diffusers" shifts `linspace(1, 0.001, num_steps + 1)`, as its
        UniPCMultistepScheduler does, so it ends at higher noise before 0. In both
        the sigmas are rounded to float32 and the timesteps to integers below.

    Raises:
      ValueError: num_steps is not a positive integer, shift is not a positive,
        finite number, there is no such grid, or two noise levels are equal in
        float32.

    Source: Zhao et al., "UniPC", arXiv 2302.04867; Wan2.1
    `FlowUniPCMultistepScheduler`; diffusers 0.42.1 `UniPCMultistepScheduler`.
    """

    num_steps: int
    shift: float = 5.0
    grid: UniPCGrid = "wan"

    def __post_init__(self) -> None:
        make_plain(self)
        _check_grid(self.num_steps, self.shift, self.grid, get_args(UniPCGrid))
        if not (self.sigmas[0] < 1.0 and (np.diff(self.sigmas) < 0.0).all()):
            raise ValueError(
                f"num_steps={self.num_steps!r} and shift={self.shift!r} give noise "
                "levels that float32 cannot tell from each other or from 1: lower "
                "the number of steps or bring the shift closer to 1"
            )

    @functools.cached_property
    def sigmas(self) -> Float[np.ndarray, " levels"]:
        """Noise levels before each step, and 0 at the end; all below 1."""
        # Near 1 the published rounding decides what `log(1 - sigma)` is.
        rounded = np.append(self._unrounded_sigmas, 0.0).astype(np.float32)
        return _read_only(rounded.astype(np.float64))

    @functools.cached_property
    def timesteps(self) -> Float[np.ndarray, " steps"]:
        """The model's timestep at each step: 1000 * sigma, rounded down."""
        return _read_only(np.floor(MAX_TIMESTEP * self._unrounded_sigmas))

    def initial_history(self, latents: Float[Array, "*shape"]) -> UniPCHistory:
        """Returns zeros, which the first steps give no weight."""
        return UniPCHistory(*(jnp.zeros_like(latents) for _ in range(3)))

    def coefficients(self, index: int) -> UniPCCoefficients:
        """Returns the weights of a step, float64.

        Raises:
          ValueError: index is outside the grid.
        """
        _check_index(index, self.num_steps)
        return UniPCCoefficients(
            *(np.asarray(table[index]) for table in self._coefficient_tables)
        )

    def update(
        self,
        latents: Float[Array, "*shape"],
        velocity: Float[Array, "*shape"],
        history: UniPCHistory,
        coefficients: UniPCCoefficients,
    ) -> tuple[Float[Array, "*shape"], UniPCHistory]:
        """Returns the sample at the next noise level; see `Solver.update`."""
        sigma, corrector, predictor = coefficients
        clean = latents - sigma * velocity
        parts = (latents, history.sample, clean, history.clean, history.earlier)
        corrected = _combine(corrector, parts).astype(latents.dtype)
        moved = _combine(predictor, (corrected, clean, history.clean))
        new_history = UniPCHistory(corrected, clean, history.clean)
        return moved.astype(latents.dtype), new_history

    @property
    def _unrounded_sigmas(self) -> Float[np.ndarray, " steps"]:
        """Noise levels before each step, in float64."""
        if self.grid == "wan":
            levels = np.linspace(_WAN_FIRST_SIGMA, 0.0, self.num_steps + 1)[:-1]
            return shift_sigmas(levels, self.shift)
        levels = np.linspace(1.0, _LEAST_SIGMA, self.num_steps + 1)[:-1]
        sigmas = shift_sigmas(levels, self.shift)
        sigmas[0] -= 1e-6  # diffusers' guard against log(0)
        return sigmas

    @functools.cached_property
    def _coefficient_tables(self) -> UniPCCoefficients:
        """The coefficients of all steps, stacked."""
        last = self.num_steps - 1
        orders = [1 if index in (0, last) else 2 for index in range(self.num_steps)]
        correctors = [np.array([1.0, 0.0, 0.0, 0.0, 0.0])]
        correctors += [
            _corrector_weights(self.sigmas, index + 1, order)
            for index, order in enumerate(orders[:-1])
        ]
        predictors = [
            _predictor_weights(self.sigmas, index, order)
            for index, order in enumerate(orders)
        ]
        return UniPCCoefficients(
            self.sigmas[:-1], np.stack(correctors), np.stack(predictors)
        )


def make_solver(
    name: SolverName, *, num_steps: int, shift: float, grid: str | None = None
) -> Solver:
    """Returns a solver by its name, as checkpoints and command lines give it.

    Args:
      name: "euler" is `FlowEuler`, "unipc" is `FlowUniPC`.
      num_steps: Model evaluations.
      shift: Of the noise levels.
      grid: Whose noise levels; the solver's default if None.

    Raises:
      ValueError: There is no such solver, or as the solver's class.
    """
    if name not in get_args(SolverName):
        raise ValueError(f"solver={name!r} must be one of {get_args(SolverName)}")
    solver = FlowEuler if name == "euler" else FlowUniPC
    options: dict[str, Any] = {} if grid is None else {"grid": grid}
    return solver(num_steps=num_steps, shift=shift, **options)


def shift_sigmas[T: (float, np.ndarray)](sigmas: T, shift: float) -> T:
    """Moves noise levels in [0, 1] towards 1, keeping 0 and 1 where they are."""
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)


def _predictor_weights(
    sigmas: Float[np.ndarray, " levels"], index: int, order: int
) -> Float[np.ndarray, "3"]:
    """Weights of the sample, and of the clean samples here and one step before.

    UniP-B(h) from level `index` to the next: an exact step if the clean sample were
    constant, and for order 2 half its slope over the last step on top.
    """
    log_snr = _half_log_snr(sigmas)
    h = log_snr[index + 1] - log_snr[index]
    gain = -(1.0 - sigmas[index + 1]) * np.expm1(-h)
    slope = 0.0
    if order == 2:
        slope = 0.5 * gain * h / (log_snr[index - 1] - log_snr[index])
    return np.array([sigmas[index + 1] / sigmas[index], gain - slope, slope])


def _corrector_weights(
    sigmas: Float[np.ndarray, " levels"], index: int, order: int
) -> Float[np.ndarray, "5"]:
    """Weights that correct the sample at level `index`; see `UniPCCoefficients`.

    UniC-B(h) takes the step from `index - 1` again, with the clean sample that was
    predicted at its end. Its weights solve `rho_past + rho_now = b_1` and
    `r * rho_past + rho_now = b_2`.
    """
    log_snr = _half_log_snr(sigmas)
    h = log_snr[index] - log_snr[index - 1]
    gain = -(1.0 - sigmas[index]) * np.expm1(-h)
    past, now = 0.0, 0.5 * gain
    if order == 2:
        r = (log_snr[index - 2] - log_snr[index - 1]) / h
        phi_1 = -np.expm1(-h) / h - 1.0
        phi_2 = -phi_1 / h - 0.5
        b_1, b_2 = phi_1 / np.expm1(-h), 2.0 * phi_2 / np.expm1(-h)
        rho_past = (b_1 - b_2) / (1.0 - r)
        past, now = gain * rho_past / r, gain * (b_1 - rho_past)
    ratio = sigmas[index] / sigmas[index - 1]
    return np.array([0.0, ratio, now, gain - past - now, past])


def _half_log_snr(sigmas: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Returns log((1 - sigma) / sigma); infinite at 0."""
    with np.errstate(divide="ignore"):
        return np.log1p(-sigmas) - np.log(sigmas)


def _combine(
    weights: Float[Array | np.ndarray, " n"], parts: tuple[Array, ...]
) -> Array:
    """Returns the weighted sum of arrays of one shape."""
    total = weights[0] * parts[0]
    for index in range(1, len(parts)):
        total += weights[index] * parts[index]
    return total


def _check_grid(
    num_steps: int, shift: float, grid: str, accepted: tuple[str, ...]
) -> None:
    if (
        isinstance(num_steps, bool)
        or not isinstance(num_steps, (int, np.integer))
        or num_steps < 1
    ):
        raise ValueError(f"num_steps={num_steps!r} must be a positive integer")
    if not 0.0 < shift < float("inf"):
        raise ValueError(f"shift={shift!r} must be a positive, finite number")
    if grid not in accepted:
        raise ValueError(f"grid={grid!r} must be one of {accepted}")


def _check_index(index: int, num_steps: int) -> None:
    if not 0 <= index < num_steps:
        raise ValueError(f"{index=} must be in 0 .. {num_steps - 1}")


def _read_only(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    values.flags.writeable = False
    return values
