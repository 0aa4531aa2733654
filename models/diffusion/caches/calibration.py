"""Measures the ratios that MagCache goes by: a run that computes every step."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from draft_jax import AttentionPlan
from models.diffusion.caches.interfaces import (
    CacheState,
    Latents,
    Residual,
    Velocity,
    empty_residual,
    why_no_residual,
)
from models.diffusion.interfaces import VideoModel
from models.diffusion.schedulers import Solver
from pallas_kernels.common import register_configuration


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class MagCalibration:
    """Skips nothing; its score is the ratio of each branch to the step before.

    A `StepCache`. The ratio is the mean over tokens and items of the ratio of lengths
    over channels, in float32; 1 on the first step, and for tokens that had none.

    Source: MagCache's `magcache_calibration`.
    """

    @property
    def keeps_residual(self) -> bool:
        """Whether the model's residual is kept: it is."""
        return True

    def why_unsupported(self, model: VideoModel) -> str | None:
        """Returns why a model cannot be measured; None if it can."""
        return why_no_residual(model)

    @property
    def is_known(self) -> bool:
        """Whether the skipped steps are known beforehand: there are none."""
        return True

    def skippable(
        self, num_steps: int, expert_starts: Sequence[int] = (0,)
    ) -> Bool[np.ndarray, " steps"]:
        """Returns that no step is skipped."""
        return np.zeros(num_steps, np.bool_)

    def allows(self, score: Float[np.ndarray, "..."]) -> bool:
        """Tells whether the next step may be skipped: no."""
        return False

    def notes(self, solver: Solver, attention: AttentionPlan) -> list[str]:
        """Returns nothing: it suits every run."""
        return []

    def describe(self) -> dict[str, Any]:
        """Returns the name, ready for strict JSON."""
        return {"rule": "calibration"}

    def initial_state(
        self, latents: Latents, rows: int, residual: jax.ShapeDtypeStruct | None
    ) -> CacheState:
        """Returns a residual of zeros, and a ratio for each branch."""
        return CacheState(
            kept=empty_residual(rows, residual),
            score=jnp.ones(rows // len(latents)),
        )

    def after_computing(
        self,
        state: CacheState,
        latents: Latents,
        velocity: Velocity,
        residual: Residual | None,
    ) -> CacheState:
        """Returns a state with the residual, and its ratios to the one before."""
        assert residual is not None  # it keeps residuals
        before, after = (
            jnp.linalg.norm(kept.astype(jnp.float32), axis=-1)
            for kept in (state.kept, residual)
        )
        ratio = jnp.where(before > 0, after / jnp.where(before > 0, before, 1.0), 1.0)
        branches = len(state.score)
        score = ratio.reshape(branches, -1).mean(1)
        return dataclasses.replace(state, kept=residual, score=score)

    def reuse(
        self, kept: Residual, latents: Latents, finish: Callable[[Residual], Velocity]
    ) -> Velocity:
        """Is not called, for no step is skipped."""
        raise NotImplementedError("a calibration computes every step")

    def after_moving(
        self, state: CacheState, before: Latents, after: Latents
    ) -> Float[Array, " branches"]:
        """Returns the ratios as they are."""
        return state.score
