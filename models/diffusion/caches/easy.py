"""EasyCache: skips steps while the velocity is expected to have changed little."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from draft_jax import AttentionPlan
from draft_jax.pytree import register_named_tuple
from models.diffusion.caches.interfaces import (
    CacheState,
    Latents,
    Residual,
    Velocity,
    check_count,
    check_threshold,
)
from models.diffusion.interfaces import VideoModel
from models.diffusion.schedulers import Solver
from pallas_kernels.common import make_plain, register_configuration

# Rates before the first step, and before the second. Finite, for whoever looks for NaN
# and infinity; no sum of changes stays below any threshold with the latter.
_NO_STEP = -1.0
_UNKNOWN = 1e30


@register_named_tuple
class Computed(NamedTuple):
    """The last computed step."""

    latents: Float[Array, "B F H W C"]
    velocity: Float[Array, "rows F H W C"]
    # Expected relative change of the velocity by one unit of change of the latents.
    rate: Float[Array, ""]


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class EasyCache:
    """Skips steps while the expected relative change of the velocity adds up to little.

    How much the velocity changes with the latents is taken from the last two computed
    steps, of the prompts' rows; negative prompts follow. A skipped step's velocity is
    its latents plus (velocity - latents) of the last computed step, for each row.
    Means are over the whole batch, which has one decision.

    Args:
      threshold: The sum of expected changes stays below it.
      first_steps: First steps that are computed. The last step is, too.

    Raises:
      ValueError: threshold is not a positive, finite number, or first_steps is below 1.

    Source: EasyCache, arXiv 2507.02860, and its `easycache_generate.py` for Wan2.1. For
    HunyuanVideo it takes a threshold of 0.025 and 5 first steps.
    """

    threshold: float = 0.05
    first_steps: int = 10

    def __post_init__(self) -> None:
        make_plain(self)
        check_threshold(self.threshold)
        check_count("first_steps", self.first_steps)

    @property
    def keeps_residual(self) -> bool:
        """Whether the model's residual is kept: its velocity is."""
        return False

    def why_unsupported(self, model: VideoModel) -> str | None:
        """Returns why a model cannot have the cache: any can."""
        return None

    @property
    def is_known(self) -> bool:
        """Whether the skipped steps are known beforehand: the latents decide."""
        return False

    def skippable(
        self, num_steps: int, expert_starts: Sequence[int] = (0,)
    ) -> Bool[np.ndarray, " steps"]:
        """Returns which steps may be skipped; see `StepCache.skippable`."""
        steps = np.arange(num_steps)
        may = (steps >= self.first_steps) & (steps < num_steps - 1)
        return may & ~np.isin(steps, expert_starts)

    def allows(self, score: Float[np.ndarray, "..."]) -> bool:
        """Tells whether the sum of expected changes is below the threshold."""
        return bool(score < np.float32(self.threshold))

    def notes(self, solver: Solver, attention: AttentionPlan) -> list[str]:
        """Returns a sentence if no step of a run can be skipped."""
        if self.skippable(solver.num_steps).any():
            return []
        return [
            f"EasyCache computes the first {self.first_steps} steps and the last, so "
            f"that none of {solver.num_steps} is skipped: lower its first steps"
        ]

    def describe(self) -> dict[str, Any]:
        """Returns name and constants, ready for strict JSON."""
        return {"rule": "easy"} | dataclasses.asdict(self)

    def initial_state(
        self, latents: Latents, rows: int, residual: jax.ShapeDtypeStruct | None
    ) -> CacheState:
        """Returns a state whose score is too large until two steps were computed."""
        velocity = jnp.zeros((rows, *latents.shape[1:]), jnp.float32)
        kept = Computed(jnp.zeros_like(latents), velocity, jnp.full((), _NO_STEP))
        return CacheState(kept=kept, score=jnp.full((), _UNKNOWN))

    def after_computing(
        self,
        state: CacheState,
        latents: Latents,
        velocity: Velocity,
        residual: Residual | None,
    ) -> CacheState:
        """Returns a state with the step's velocity, and a sum that starts from 0."""
        last, prompts = state.kept, slice(len(latents))
        change = _mean_size(velocity[prompts] - last.velocity[prompts])
        moved = _mean_size(latents - last.latents)
        rate = change / moved / _mean_size(velocity[prompts])
        rate = jnp.where(last.rate == _NO_STEP, _UNKNOWN, rate)
        return dataclasses.replace(
            state, kept=Computed(latents, velocity, rate), score=jnp.zeros(())
        )

    def reuse(
        self, kept: Computed, latents: Latents, finish: Callable[[Residual], Velocity]
    ) -> Velocity:
        """Returns latents + (velocity - latents of the last computed step)."""
        repeats = len(kept.velocity) // len(latents)
        moved = latents - kept.latents
        return kept.velocity + jnp.concatenate([moved] * repeats)

    def after_moving(
        self, state: CacheState, before: Latents, after: Latents
    ) -> Float[Array, ""]:
        """Returns the sum with the expected change of the step that has ended."""
        return state.score + state.kept.rate * _mean_size(after - before)


def _mean_size(array: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.abs(array).mean()
