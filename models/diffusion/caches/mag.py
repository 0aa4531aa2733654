"""MagCache: a fixed list of skipped steps, from measured ratios of magnitudes."""

import dataclasses
import itertools
import math
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
    check_count,
    check_threshold,
    empty_residual,
    why_no_residual,
)
from models.diffusion.caches.ratios import MagRatios
from models.diffusion.interfaces import VideoModel
from models.diffusion.schedulers import Solver
from pallas_kernels.common import make_plain, register_configuration


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class MagCache:
    """Skips a step where the last computed residual is still about as long as its own.

    A skipped step adds the kept residual to its own embedding, and runs the head. The
    product of the ratios since the last computed step says how far its length is off;
    the errors of steps that are skipped one after the other add up. The latents are not
    looked at, so the list is known before the run.

    Args:
      ratios: Measured on the model, best with the run's own steps and attention.
      threshold: The sum of errors stays below it.
      max_skips: Most steps skipped one after the other.
      retention: First share of the steps (of each expert) that is computed.

    Raises:
      ValueError: threshold is not a positive, finite number, max_skips is below 1, or
        retention is outside [0, 1].

    Source: MagCache, arXiv 2506.09045, and its `magcache_generate.py` for Wan2.1. Both
    branches of a guided step skip the same steps here: those that both would. Wan2.2's
    published code keeps its state across its two experts.
    """

    ratios: MagRatios
    threshold: float = 0.12
    max_skips: int = 2
    retention: float = 0.2

    def __post_init__(self) -> None:
        make_plain(self)
        check_threshold(self.threshold)
        check_count("max_skips", self.max_skips)
        if not 0.0 <= self.retention <= 1.0:
            raise ValueError(f"retention={self.retention!r} must be in [0, 1]")

    @property
    def keeps_residual(self) -> bool:
        """Whether the model's residual is kept: it is."""
        return True

    def why_unsupported(self, model: VideoModel) -> str | None:
        """Returns why a model cannot have the cache; None if it can."""
        layers = self.ratios.num_layers
        if layers not in (None, model.num_layers):
            return (
                f"the ratios are of {self.ratios.model}, which has {layers} layers; "
                f"this model has {model.num_layers}: `draft-video calibrate` measures "
                "its own"
            )
        return why_no_residual(model)

    @property
    def is_known(self) -> bool:
        """Whether the skipped steps are known beforehand: they are."""
        return True

    def skippable(
        self, num_steps: int, expert_starts: Sequence[int] = (0,)
    ) -> Bool[np.ndarray, " steps"]:
        """Returns which steps are skipped; see `StepCache.skippable`."""
        ratios = self.ratios.at(num_steps)
        branches = len(ratios)
        skipped = np.zeros(num_steps, np.bool_)
        for start, stop in itertools.pairwise([*expert_starts, num_steps]):
            # Published code counts calls; a start amid a step's calls is rounded up.
            calls = int((stop - start) * branches * self.retention)
            first = start + max(1, math.ceil(calls / branches))
            skipped[first:stop] = self._skips_of(ratios[:, first:stop])
        return skipped

    def _skips_of(
        self, ratios: Float[np.ndarray, "branches steps"]
    ) -> Bool[np.ndarray, " steps"]:
        """Returns which steps are skipped after a computed one."""
        skipped = np.zeros(ratios.shape[1], np.bool_)
        product, error, count = np.ones(len(ratios)), np.zeros(len(ratios)), 0
        for step, ratio in enumerate(ratios.T):
            product = product * ratio
            error = error + np.abs(1 - product)
            count += 1
            skipped[step] = count <= self.max_skips and (error < self.threshold).all()
            if not skipped[step]:
                product, error, count = np.ones_like(ratio), np.zeros_like(ratio), 0
        return skipped

    def allows(self, score: Float[np.ndarray, "..."]) -> bool:
        """Tells whether the next step may be skipped: all of the list are."""
        return True

    def notes(self, solver: Solver, attention: AttentionPlan) -> list[str]:
        """Returns sentences on where the ratios do not belong to a run."""
        ratios, notes = self.ratios, []
        if ratios.num_steps != solver.num_steps:
            notes.append(
                f"they are of {ratios.num_steps} steps, and the nearest ones are taken "
                f"for {solver.num_steps}"
            )
        shift = getattr(solver, "shift", None)
        if None not in (shift, ratios.shift) and shift != ratios.shift:
            notes.append(f"they are of shift {ratios.shift:g}, not {shift:g}")
        name = describe_attention(attention)
        if name != ratios.attention:
            notes.append(f"they belong to {ratios.attention} attention, not {name}")
        if not notes:
            return []
        return [
            f"MagCache's ratios of {ratios.model}: {'; '.join(notes)}. `draft-video "
            "calibrate` measures those of this run"
        ]

    def describe(self) -> dict[str, Any]:
        """Returns name and constants, ready for strict JSON."""
        return {
            "rule": "mag",
            "threshold": self.threshold,
            "max_skips": self.max_skips,
            "retention": self.retention,
            "ratios": {
                field.name: getattr(self.ratios, field.name)
                for field in dataclasses.fields(MagRatios)
                if field.name != "values"
            }
            | {"num_steps": self.ratios.num_steps},
        }

    def initial_state(
        self, latents: Latents, rows: int, residual: jax.ShapeDtypeStruct | None
    ) -> CacheState:
        """Returns a residual of zeros; no step reads it before one is computed."""
        return CacheState(kept=empty_residual(rows, residual), score=jnp.zeros(()))

    def after_computing(
        self,
        state: CacheState,
        latents: Latents,
        velocity: Velocity,
        residual: Residual | None,
    ) -> CacheState:
        """Returns a state with the residual."""
        return dataclasses.replace(state, kept=residual)

    def reuse(
        self, kept: Residual, latents: Latents, finish: Callable[[Residual], Velocity]
    ) -> Velocity:
        """Returns the velocity that follows from the kept residual."""
        return finish(kept)

    def after_moving(
        self, state: CacheState, before: Latents, after: Latents
    ) -> Float[Array, ""]:
        """Returns the score as it is: there is none."""
        return state.score


def describe_attention(attention: AttentionPlan) -> str:
    """Returns "dense", or the sparsity and the schedule that ratios belong to."""
    if attention.config is None:
        return "dense"
    selection = attention.config.selection
    return f"{selection} sparse ({100 * attention.config.sparsity:g} %)"
