"""The rule of a step cache as the sampler knows it, and its state between steps."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from draft_jax import AttentionPlan
from draft_jax.pytree import register_dataclass
from models.diffusion.interfaces import KeepsResidual, VideoModel
from models.diffusion.schedulers import Solver

Residual = Float[Array, "rows T E"]
Latents = Float[Array, "B F H W C"]
Velocity = Float[Array, "rows F H W C"]  # prompts, then negative prompts


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CacheState:
    """State that a step hands to the next.

    Attributes:
      kept: Arrays of the last computed step, which skipped steps read. Those of
        prompts and of negative prompts are rows of their own.
      score: Numbers that are new after each step, for the decision about the next.
      owes_masks: Whether a skipped step was to make new masks. The sampler sets it;
        it is False wherever a program takes or returns the state.
    """

    kept: Any
    score: Float[Array, "..."]
    owes_masks: bool = dataclasses.field(default=False, metadata={"static": True})


@runtime_checkable
class StepCache(Protocol):
    """A rule for which steps are skipped, and what stands in for the model there.

    It is hashable. Methods that programs call depend on their arguments and the rule's
    class alone, so that a compiled step serves every rule of the class. Where a model
    switches to another expert, a run starts from `initial_state` again.
    """

    @property
    def keeps_residual(self) -> bool:
        """Whether the model's residual is kept; else its velocity alone is read."""

    def why_unsupported(self, model: VideoModel) -> str | None:
        """Returns why a model cannot have the cache, and what to do; None if it can."""

    def skippable(
        self, num_steps: int, expert_starts: Sequence[int] = (0,)
    ) -> Bool[np.ndarray, " steps"]:
        """Returns which steps may be skipped; those of `is_known` rules are.

        Args:
          num_steps: Steps of the run.
          expert_starts: First step of each expert, rising from 0. It is computed.
        """

    @property
    def is_known(self) -> bool:
        """Whether `skippable` steps are skipped for certain: scores are not read."""

    def allows(self, score: Float[np.ndarray, "..."]) -> bool:
        """Tells on the host whether the next step may be skipped, by the last score."""

    def notes(self, solver: Solver, attention: AttentionPlan) -> list[str]:
        """Returns sentences on where the rule's constants do not belong to a run."""

    def describe(self) -> dict[str, Any]:
        """Returns name and constants, ready for strict JSON."""

    def initial_state(
        self, latents: Latents, rows: int, residual: jax.ShapeDtypeStruct | None
    ) -> CacheState:
        """Returns a state of new arrays from which nothing may be skipped.

        Args:
          latents: The first step's.
          rows: Rows of the model's batch, with those of negative prompts.
          residual: Shape and dtype of one row's residual; None of a model without.
        """

    def after_computing(
        self,
        state: CacheState,
        latents: Latents,
        velocity: Velocity,
        residual: Residual | None,
    ) -> CacheState:
        """Returns the state after the model's call on some latents."""

    def reuse(
        self, kept: Any, latents: Latents, finish: Callable[[Residual], Velocity]
    ) -> Velocity:
        """Returns the velocity of a skipped step.

        Args:
          kept: Of the state.
          latents: The step's.
          finish: The rest of the model for a residual: embedding and head.
        """

    def after_moving(
        self, state: CacheState, before: Latents, after: Latents
    ) -> Float[Array, "..."]:
        """Returns the score once a step has moved the latents."""


def check_threshold(threshold: float) -> None:
    """Raises ValueError unless a threshold is a positive, finite number."""
    if not 0.0 < threshold < math.inf:
        raise ValueError(f"{threshold=!r} must be a positive number")


def check_count(name: str, value: object, *, least: int = 1) -> None:
    """Raises ValueError unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer >= {least}")


def empty_residual(rows: int, residual: jax.ShapeDtypeStruct | None) -> Residual:
    """Returns zeros to keep until a step is computed, one residual for each row."""
    assert residual is not None  # the sampler has seen to it
    return jnp.zeros((rows, *residual.shape), residual.dtype)


def why_no_residual(model: VideoModel) -> str | None:
    """Returns why a model has no residual to keep; None if it has."""
    if isinstance(model, KeepsResidual):
        return None
    return (
        f"{type(model).__name__} gives no residual: write the methods of "
        "KeepsResidual, or take EasyCache"
    )
