"""The attention of one run: dense, or draft attention with its schedule."""

import dataclasses

import numpy as np
from jaxtyping import Real

from draft_jax.config import DraftConfig
from draft_jax.grid import VideoGrid
from draft_jax.schedule import SparsitySchedule, StepPlan
from pallas_kernels.common import register_configuration


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """Attention of one run: a choice of run time, not of architecture.

    The same weights run under any plan. `dense()` and `draft()` build the two kinds.
    Hashable, and a pytree without leaves: jit takes it as any argument, static.

    Three things are called a plan, each made from the one before it:

    - An `AttentionPlan` says what to do at any size: a config and a schedule.
    - `AttentionPlan.steps` works it out for given timesteps, layers and grid: a
      `StepPlan`, arrays over the steps.
    - `StepPlan.step` takes one step out of it: a `DraftStep`, which the model is given.

    Attributes:
      config: What sparse layers compute; None is dense attention.
      schedule: Which steps and layers are dense; None with dense attention only.

    Raises:
      TypeError: A field is of another class.
      ValueError: One of the two fields is given without the other.

    Example:
        ```python
        from draft_jax import AttentionPlan, DraftConfig, SparsitySchedule

        plan = AttentionPlan.draft(
            DraftConfig(sparsity=0.9), SparsitySchedule(dense_fraction=0.25)
        )
        ```
    """

    config: DraftConfig | None
    schedule: SparsitySchedule | None

    def __post_init__(self) -> None:
        for name, expected in (("config", DraftConfig), ("schedule", SparsitySchedule)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, expected):
                raise TypeError(
                    f"{name} is {type(value).__name__}; expected a {expected.__name__} "
                    "or None: see AttentionPlan.dense() and AttentionPlan.draft(config)"
                )
        if (self.config is None) != (self.schedule is None):
            given = "schedule" if self.config is None else "config"
            missing = "config" if self.config is None else "schedule"
            raise ValueError(
                f"{given} is given, but {missing}=None: draft attention needs both and "
                "dense attention takes neither; use AttentionPlan.draft(config, "
                "schedule) or AttentionPlan.dense()"
            )

    @classmethod
    def dense(cls) -> "AttentionPlan":
        """Returns the plan of exact attention in every layer on every step."""
        return cls(config=None, schedule=None)

    @classmethod
    def draft(
        cls, config: DraftConfig, schedule: SparsitySchedule | None = None
    ) -> "AttentionPlan":
        """Returns a plan of draft attention.

        Args:
          config: What sparse layers compute.
          schedule: Which steps and layers are dense; `SparsitySchedule.paper()` by
            default.

        Raises:
          TypeError: An argument is of another class.
        """
        if not isinstance(config, DraftConfig):
            raise TypeError(
                f"config is {type(config).__name__}; expected a DraftConfig: "
                "exact attention is AttentionPlan.dense()"
            )
        schedule = SparsitySchedule.paper() if schedule is None else schedule
        return cls(config=config, schedule=schedule)

    @property
    def is_dense(self) -> bool:
        """Whether every layer runs exact attention on every step."""
        return self.config is None

    def steps(
        self,
        timesteps: Real[np.ndarray, " steps"],
        *,
        num_layers: int,
        grid: VideoGrid,
        low_noise_from: int | None = None,
    ) -> StepPlan | None:
        """Works the plan out for a run.

        Args:
          timesteps: Timestep of each step in the order they run, 0 to 1000.
          num_layers: Attention layers of the model, L.
          grid: Geometry of the sequence.
          low_noise_from: First step of a second transformer; see
            `SparsitySchedule.plan`.

        Returns:
          One step per timestep; None with dense attention, which needs no steps.

        Raises:
          ValueError: As `SparsitySchedule.plan`.
        """
        if self.config is None or self.schedule is None:
            return None
        return self.schedule.plan(
            timesteps,
            num_layers=num_layers,
            grid=grid,
            config=self.config,
            low_noise_from=low_noise_from,
        )
