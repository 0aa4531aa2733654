"""Which steps and layers stay dense, how sparse the others are, and mask reuse."""

import dataclasses
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Real

from draft_jax.config import (
    DraftConfig,
    check_sparsity,
    is_real,
    static_budget,
    warn_of_few_blocks,
)
from draft_jax.grid import VideoGrid
from draft_jax.pytree import register_dataclass
from pallas_kernels.common import make_plain, register_configuration


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DraftStep:
    """One denoising step of a plan, as a pytree of arrays.

    Plans hold NumPy's, so that values are known wherever no jit traces them. As an
    argument of a jitted function no value of a step recompiles it. But `dense` and
    `refresh` then become conditionals, which wait for the host; see `StepKind`.

    Attributes:
      dense: Whether each layer runs dense on this step, [L]; a scalar for one layer
        (`for_layer`, `with_dense`).
      budget: Pairs to keep; see `select_blocks`.
      refresh: Whether sparse layers recompute their mask or reuse the one they have.
    """

    dense: Bool[Array | np.ndarray, "*steps_and_layers"]
    budget: Int[Array | np.ndarray, "*steps"]
    refresh: Bool[Array | np.ndarray, "*steps"]

    def for_layer(
        self, index: int | Integer[Array | np.ndarray | np.integer, ""]
    ) -> "DraftStep":
        """Returns this step for one layer.

        Args:
          index: The layer, counted from 0. It may be traced, such as the counter of a
            scan over layers; whether the layer is dense is then decided at run time.
            A traced index is not checked against the number of layers.

        Returns:
          A step with a scalar `dense`.

        Raises:
          ValueError: The step has no layer of this index, is that of one layer
            already, or index is not a scalar.
          TypeError: index is not an integer; `with_dense` takes a flag.
        """
        index = _scalar(
            "index", index, jnp.integer, "an integer; a flag goes to with_dense(flag)"
        )
        is_traced = isinstance(index, jax.core.Tracer)
        if self.dense.ndim != 1 or not (is_traced or 0 <= index < len(self.dense)):
            raise ValueError(
                f"layer {index} is not one of this step's; its dense has shape "
                f"{self.dense.shape}"
            )
        dense = jnp.asarray(self.dense) if is_traced else _known(self.dense)
        return self.with_dense(dense[index])

    def with_dense(
        self, flag: bool | Bool[Array | np.ndarray | np.bool, ""]
    ) -> "DraftStep":
        """Returns this step for one layer that runs dense or does not.

        Args:
          flag: Whether the layer runs dense; it may be traced. A scan over layers hands
            the entries of `dense` to its body.

        Returns:
          A step with a scalar `dense`.

        Raises:
          ValueError: flag is not a scalar.
          TypeError: flag is not boolean; `for_layer` takes an index.
        """
        dense = _scalar(
            "flag", flag, jnp.bool_, "a boolean; an index goes to for_layer(index)"
        )
        return dataclasses.replace(self, dense=dense)


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepKind:
    """A step without its budget: jit takes it as any argument, static.

    It is hashable, and a pytree without leaves. There is a program for each kind of
    step, two or three in a usual schedule, and none has a conditional.

    Example:
        ```python
        import jax
        import numpy as np
        from draft_jax import (
            DraftConfig, SparsitySchedule, VideoGrid, initial_mask, scheduled_attention
        )

        grid = VideoGrid(frames=4, height=16, width=32)
        config = DraftConfig(sparsity=0.9)
        plan = SparsitySchedule(dense_fraction=0.25, mask_refresh=2).plan(
            np.array([1000, 900, 700, 400]), num_layers=1, grid=grid, config=config
        )

        @jax.jit
        def attend(q, k, v, mask, budget, kind):
            step = kind.step(budget).for_layer(0)
            return scheduled_attention(
                q, k, v, grid=grid, config=config, step=step, mask=mask
            )

        q, k, v = jax.random.normal(jax.random.key(0), (3, 1, grid.num_tokens, 2, 64))
        mask = initial_mask(grid, config, batch=1, num_heads=2)
        for index in range(len(plan)):
            kind, budget = plan.kind(index), plan.budget[index]
            out, mask = attend(q, k, v, mask, budget, kind)
        ```

    Attributes:
      dense: Whether each layer runs dense.
      refresh: Whether sparse layers recompute their mask.
    """

    dense: tuple[bool, ...]
    refresh: bool

    def __post_init__(self) -> None:
        make_plain(self)

    def step(self, budget: Int[Array | np.ndarray | np.integer, ""]) -> DraftStep:
        """Returns the step with this budget, which may be traced; the rest is known."""
        return DraftStep(
            dense=np.asarray(self.dense),
            budget=_known(budget),
            refresh=np.asarray(self.refresh),
        )


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StepPlan:
    """A schedule worked out for given timesteps, layers, grid and config.

    A pytree of its arrays. Under jit, as an argument, it gives steps of traced values
    and an index may be traced; `kind` needs known values.

    Attributes:
      dense: bool [steps, L].
      sparsity: float64 [steps], share of visual pairs skipped by the sparse layers.
      budget: int32 [steps], pairs to keep; see `select_blocks`.
      refresh: bool [steps], whether masks are recomputed.
    """

    dense: Bool[Array | np.ndarray, "steps L"]
    sparsity: Float[Array | np.ndarray, " steps"]
    budget: Int[Array | np.ndarray, " steps"]
    refresh: Bool[Array | np.ndarray, " steps"]

    def __len__(self) -> int:
        return len(self.dense)

    def __getitem__(
        self, index: int | Integer[Array | np.ndarray | np.integer, ""]
    ) -> DraftStep:
        return self.step(index)

    def step(
        self, index: int | Integer[Array | np.ndarray | np.integer, ""]
    ) -> DraftStep:
        """Returns the step at `index`, which may be traced.

        Raises:
          IndexError: There is no such step; a traced index is not checked.
        """
        is_traced = isinstance(index, jax.core.Tracer)
        if not is_traced and not -len(self) <= index < len(self):
            raise IndexError(f"step {index} is not one of the plan's {len(self)}")

        def take(values: Any) -> Any:
            return _known((jnp.asarray(values) if is_traced else values)[index])

        return DraftStep(
            dense=take(self.dense),
            budget=take(self.budget),
            refresh=take(self.refresh),
        )

    def kind(self, index: int) -> StepKind:
        """Returns the kind of the step at `index`: all of it but the budget."""
        dense = tuple(map(bool, self.dense[index]))
        # Without a sparse layer there is nothing to refresh: one kind, not two.
        refresh = bool(self.refresh[index]) and not all(dense)
        return StepKind(dense=dense, refresh=refresh)

    def stacked(self) -> DraftStep:
        """Returns all steps with a leading axis, to scan over."""
        return DraftStep(dense=self.dense, budget=self.budget, refresh=self.refresh)


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsitySchedule:
    """Rules for when attention is dense, and how sparse it is otherwise.

    A layer runs dense on a step if any of the three rules says so. Hashable, and a
    pytree without leaves. NumPy's numbers become Python's, lists tuples.

    Args:
      dense_fraction: The first share of the steps is dense: step i of n where
        i < dense_fraction * n. None for no such rule.
      dense_above_timestep: Steps whose timestep (0 to 1000) is above it are dense.
        None for no such rule.
      dense_layers: Layers that are always dense, counted from 0. Best side by side:
        models compile each run of layers that do the same by itself.
      sparsity: Share of visual pairs skipped by sparse layers, for all steps or for
        each step. None takes the config's. No value may be below the config's,
        because that one sets the static capacity of the masks.
      mask_refresh: Masks are recomputed on every mask_refresh-th sparse step, from
        the first, and reused in between. A reused mask keeps the sparsity of the
        step that made it.
      low_noise: Rules of a second transformer for low noise, where a model has two; its
        steps and masks are counted by themselves. None for the rules above, which
        count the steps of the whole run either way.

    Raises:
      TypeError: `low_noise` is of another class.
      ValueError: A field is outside the values above, or `low_noise` has one, too.

    Source: DraftAttention (arXiv 2505.14708), which keeps the first 25 % of the
    steps dense; see the presets for the rules of its published code.
    """

    dense_fraction: float | None = None
    dense_above_timestep: float | None = None
    dense_layers: tuple[int, ...] = ()
    sparsity: float | tuple[float, ...] | None = None
    mask_refresh: int = 1
    low_noise: "SparsitySchedule | None" = None

    def __post_init__(self) -> None:
        make_plain(self)
        self._check_low_noise()
        fraction = self.dense_fraction
        if fraction is not None and not (is_real(fraction) and 0.0 <= fraction <= 1.0):
            raise ValueError(f"dense_fraction={fraction!r} must be None or in [0, 1]")
        threshold = self.dense_above_timestep
        if threshold is not None and not (
            is_real(threshold) and 0.0 <= threshold <= 1000.0
        ):
            raise ValueError(
                f"dense_above_timestep={threshold!r} must be None or in [0, 1000]"
            )
        if not isinstance(self.dense_layers, tuple) or not all(
            _is_int(layer) and layer >= 0 for layer in self.dense_layers
        ):
            raise ValueError(
                f"dense_layers={self.dense_layers!r} must be a tuple of integers >= 0"
            )
        if isinstance(self.sparsity, tuple):
            for index, value in enumerate(self.sparsity):
                check_sparsity(f"sparsity[{index}]", value)
        elif self.sparsity is not None:
            check_sparsity("sparsity", self.sparsity)
        if not _is_int(self.mask_refresh) or self.mask_refresh < 1:
            raise ValueError(
                f"mask_refresh={self.mask_refresh!r} must be an integer >= 1"
            )

    def _check_low_noise(self) -> None:
        low = self.low_noise
        if low is not None and not isinstance(low, SparsitySchedule):
            raise TypeError(
                f"low_noise is {type(low).__name__}; expected a SparsitySchedule"
            )
        if low is not None and low.low_noise is not None:
            raise ValueError(
                f"low_noise={low} has one, too; a model has at most two transformers"
            )

    @classmethod
    def paper(cls) -> "SparsitySchedule":
        """Returns the paper's rule: the first 25 % of the steps are dense."""
        return cls(dense_fraction=0.25)

    @classmethod
    def wan_published(cls) -> "SparsitySchedule":
        """Returns the rule of the published code for Wan2.1; sparsity 0.75.

        Dense where t > 925 or in block 0.
        """
        return cls(dense_above_timestep=925.0, dense_layers=(0,), sparsity=0.75)

    @classmethod
    def wan_pair_published(cls) -> "SparsitySchedule":
        """Returns the rule for Wan2.1 for each of Wan2.2's two transformers.

        That for high noise is dense where t > 925 or in block 0, that for low noise,
        whose steps are all below, in block 0.
        """
        low = cls(dense_layers=(0,), sparsity=0.75)
        return dataclasses.replace(cls.wan_published(), low_noise=low)

    @classmethod
    def hunyuan_published(cls) -> "SparsitySchedule":
        """Returns the rule of the published code for HunyuanVideo; sparsity 0.9.

        Dense where t > 945 or in the double blocks 0 and 1. Layers are counted with
        the double blocks first.
        """
        return cls(dense_above_timestep=945.0, dense_layers=(0, 1), sparsity=0.9)

    @classmethod
    def hunyuan_custom_published(cls) -> "SparsitySchedule":
        """Returns the rule of the published code for HunyuanCustom; sparsity 0.9.

        Dense where t > 975 or in the double blocks 0 and 1. Layers are counted with
        the double blocks first.
        """
        return cls(dense_above_timestep=975.0, dense_layers=(0, 1), sparsity=0.9)

    def plan(
        self,
        timesteps: Real[np.ndarray, " steps"],
        *,
        num_layers: int,
        grid: VideoGrid,
        config: DraftConfig,
        low_noise_from: int | None = None,
    ) -> StepPlan:
        """Works the schedule out for a run.

        Args:
          timesteps: Timestep of each step in the order they run, 0 to 1000.
          num_layers: Attention layers of the model, L.
          grid: Geometry of the sequence.
          config: What the sparse layers compute.
          low_noise_from: First step of a second transformer for low noise, or the
            number of steps if it has none; None where a model has one transformer.

        Returns:
          One `DraftStep` per timestep.

        Raises:
          ValueError: timesteps is empty, not one-dimensional or outside 0 to 1000, a
            dense layer does not exist, sparsity does not fit the steps or config, or
            there are rules for low noise and the model has one transformer.
        """
        if self.low_noise is not None:
            return self._plan_of_two(
                timesteps,
                low_noise_from,
                num_layers=num_layers,
                grid=grid,
                config=config,
            )
        timesteps = np.asarray(timesteps, np.float64)
        if timesteps.ndim != 1 or not timesteps.size:
            raise ValueError(
                f"timesteps has shape {timesteps.shape}; expected [steps], at least one"
            )
        if not ((timesteps >= 0.0) & (timesteps <= 1000.0)).all():
            raise ValueError(f"timesteps={timesteps.tolist()} must lie in 0 to 1000")
        if not _is_int(num_layers) or num_layers < 1:
            raise ValueError(f"{num_layers=} must be a positive integer")
        if missing := [n for n in self.dense_layers if n >= num_layers]:
            raise ValueError(
                f"dense_layers={self.dense_layers} names layers {missing}; the model "
                f"has {num_layers=}"
            )
        dense_steps = self._dense_steps(timesteps)
        dense_layers = np.isin(np.arange(num_layers), self.dense_layers)
        sparsity = self._sparsity_per_step(len(timesteps), config)
        warn_of_few_blocks(max(sparsity), grid)
        sparse_steps_before = np.cumsum(~dense_steps) - ~dense_steps
        return StepPlan(
            dense=dense_steps[:, None] | dense_layers,
            sparsity=np.asarray(sparsity, np.float64),
            budget=np.asarray(
                [static_budget(value, grid, config) for value in sparsity], np.int32
            ),
            refresh=~dense_steps & (sparse_steps_before % self.mask_refresh == 0),
        )

    def _plan_of_two(
        self,
        timesteps: Real[np.ndarray, " steps"],
        start: int | None,
        *,
        num_layers: int,
        grid: VideoGrid,
        config: DraftConfig,
    ) -> StepPlan:
        """Joins the plans of two transformers; the second begins at step `start`."""
        assert self.low_noise is not None  # there are two
        if start is None or not 0 <= start <= len(timesteps):
            raise ValueError(
                f"low_noise={self.low_noise} needs low_noise_from={start} to be the "
                f"first step of the second, 0 to {len(timesteps)}; with one "
                "transformer leave low_noise out"
            )
        sizes: Any = {"num_layers": num_layers, "grid": grid, "config": config}
        whole = dataclasses.replace(self, low_noise=None).plan(timesteps, **sizes)
        if start == len(timesteps):
            return whole
        low = self.low_noise.plan(timesteps[start:], **sizes)
        names = [field.name for field in dataclasses.fields(StepPlan)]
        pairs = ((getattr(whole, name)[:start], getattr(low, name)) for name in names)
        return StepPlan(**dict(zip(names, map(np.concatenate, pairs), strict=True)))

    def _dense_steps(
        self, timesteps: Float[np.ndarray, " steps"]
    ) -> Bool[np.ndarray, " steps"]:
        dense = np.zeros(len(timesteps), np.bool_)
        if self.dense_fraction is not None:
            # The decimal value counts: 0.7 of 10 steps is 7, not 7.000000000000001.
            share = Fraction(str(self.dense_fraction))
            dense[: math.ceil(share * len(timesteps))] = True
        if self.dense_above_timestep is not None:
            dense |= timesteps > self.dense_above_timestep
        return dense

    def _sparsity_per_step(
        self, num_steps: int, config: DraftConfig
    ) -> tuple[float, ...]:
        sparsity = config.sparsity if self.sparsity is None else self.sparsity
        if not isinstance(sparsity, tuple):
            sparsity = (sparsity,) * num_steps
        if len(sparsity) != num_steps:
            raise ValueError(
                f"sparsity has {len(sparsity)} values; there are {num_steps} timesteps"
            )
        if min(sparsity) < config.sparsity:
            raise ValueError(
                f"sparsity={min(sparsity)} of the schedule must be at least "
                f"config.sparsity={config.sparsity}, which sets the masks' capacity"
            )
        return sparsity


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _known(values: Any) -> Any:
    """Returns NumPy's array, unless jit traces the values.

    jax.numpy would trace known ones too.
    """
    return values if isinstance(values, jax.core.Tracer) else np.asarray(values)


def _scalar(name: str, value: Any, kind: Any, expected: str) -> Any:
    """Returns `value` as a scalar array, NumPy's where it is known."""
    value = _known(value)
    if not jnp.issubdtype(value.dtype, kind):
        raise TypeError(f"{name} has dtype {value.dtype}; expected {expected}")
    if value.shape:
        raise ValueError(f"{name} has shape {value.shape}; expected a scalar")
    return value


def constant_step(
    grid: VideoGrid, config: DraftConfig, *, dense: bool = False
) -> DraftStep:
    """Makes a step for one layer without a schedule.

    It has the sparsity of the config and makes a new mask.

    Args:
      grid: Geometry of the sequence.
      config: What a sparse layer computes.
      dense: Whether the layer runs dense.

    Returns:
      A step with a scalar `dense`.
    """
    budget = static_budget(config.sparsity, grid, config)
    return DraftStep(
        dense=np.asarray(dense),
        budget=np.asarray(budget, np.int32),
        refresh=np.asarray(True),
    )
