"""The loop around the transformer: compiled steps, one run for each noise level."""

import concurrent.futures
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from draft_jax import (
    AttentionPlan,
    BlockMask,
    DraftStep,
    StepKind,
    StepPlan,
    initial_mask,
)
from draft_jax.pytree import register_named_tuple
from models.diffusion.interfaces import (
    ImageCondition,
    LatentShape,
    TextContext,
    VideoModel,
)
from models.diffusion.results import StepReport, StepWork, StopGeneration
from models.diffusion.schedulers import MAX_TIMESTEP, Solver
from models.float8.product import compiler_options

# How a guided step runs the model on prompts and negative prompts: as one batch, or
# one after the other, which needs less memory.
GuidanceBatching = Literal["one_call", "two_calls"]


@register_named_tuple
class SamplerState(NamedTuple):
    """State that one step hands to the next."""

    latents: Float[Array, "B F H W C"]  # float32
    # Leaves [layers, rows, ...], or [2, layers, B, ...] with guidance in two calls;
    # None with dense attention.
    masks: BlockMask | None
    history: Any  # the solver's


@register_named_tuple
class StepInputs(NamedTuple):
    """Inputs that are the same for every step.

    With guidance, prompts come first and their negative prompts after them, so 2 B
    rows; without it, B rows.
    """

    context: TextContext
    guidance: Float[Array, ""]
    image: ImageCondition | None = None  # B rows; for an image-to-video model
    embedded_guidance: Float[Array, ""] | None = None  # see `Sampling`


@register_named_tuple
class _StepArrays(NamedTuple):
    """Arrays of a step's report."""

    kept_density: Float[Array, " layers"]
    is_finite: Bool[Array, ""]
    estimate: Float[Array, "B F H W C"]  # of the clean latents


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sampler:
    """A transformer with its attention, noise levels and schedule worked out.

    Attributes:
      model: The transformer.
      solver: Noise levels, and the step between them.
      latent_shape: Shape of one item's latent.
      attention: Dense or draft attention.
      plan: The schedule's entry for each step; None with dense attention.
      guidance_batching: How guided steps run the model.
    """

    model: VideoModel
    solver: Solver
    latent_shape: LatentShape
    attention: AttentionPlan
    plan: StepPlan | None
    guidance_batching: GuidanceBatching = "one_call"

    def __post_init__(self) -> None:
        if self.guidance_batching not in get_args(GuidanceBatching):
            raise ValueError(
                f"guidance_batching={self.guidance_batching!r} must be one of "
                f"{get_args(GuidanceBatching)}"
            )

    @classmethod
    def create(
        cls,
        model: VideoModel,
        *,
        latent_shape: LatentShape,
        solver: Solver,
        attention: AttentionPlan,
        guidance_batching: GuidanceBatching = "one_call",
    ) -> "Sampler":
        """Works the schedule out for a model and a size.

        Args:
          model: The transformer.
          latent_shape: Shape of one item's latent.
          solver: Noise levels, and the step between them.
          attention: Dense attention, or draft attention with its schedule.
          guidance_batching: Whether a guided step runs prompts and negative prompts
            in "one_call" or "two_calls". Two need less memory; results agree up to
            rounding.

        Raises:
          ValueError: The schedule or the latent's shape does not fit the model, or
            there is no such batching.
        """
        plan = attention.steps(
            solver.timesteps,
            num_layers=model.num_layers,
            grid=model.grid(latent_shape),
        )
        return cls(
            model=model,
            solver=solver,
            latent_shape=latent_shape,
            attention=attention,
            plan=plan,
            guidance_batching=guidance_batching,
        )

    @property
    def dense(self) -> Bool[np.ndarray, "steps layers"]:
        """Which steps and layers run dense."""
        if self.plan is not None:
            return np.asarray(self.plan.dense)
        return np.ones((self.solver.num_steps, self.model.num_layers), np.bool_)

    def step_plan(self, index: int) -> DraftStep | None:
        """Returns the schedule's entry of a step; None with dense attention."""
        return None if self.plan is None else self.plan.step(index)

    def initial_state(self, batch: int, *, seed: int, guided: bool) -> SamplerState:
        """Returns pure noise and masks to start from.

        Item `i` gets noise from `fold_in(key(seed), i)`, so that it does not depend
        on how many items are sampled together.
        """
        keys = [jax.random.fold_in(jax.random.key(seed), item) for item in range(batch)]
        noise = [jax.random.normal(key, self.latent_shape) for key in keys]
        latents = jnp.stack(noise)
        masks = self._initial_masks(batch, guided)
        return SamplerState(latents, masks, self.solver.initial_history(latents))

    def _initial_masks(self, batch: int, guided: bool) -> BlockMask | None:
        """Returns arrays of their own for each layer, for steps reuse the memory."""
        config = self.attention.config
        if config is None:
            return None
        two_calls = guided and self.guidance_batching == "two_calls"
        mask = initial_mask(
            self.model.grid(self.latent_shape),
            config,
            batch=batch * (2 if guided and not two_calls else 1),
            num_heads=self.model.num_heads,
        )
        repeats = (*((2,) if two_calls else ()), self.model.num_layers, 1, 1, 1)
        return jax.tree.map(lambda leaf: jnp.tile(leaf, repeats), mask)

    def kind(self, index: int) -> StepKind | None:
        """Returns which program a step needs; None with dense attention."""
        return None if self.plan is None else self.plan.kind(index)

    def work(self, index: int) -> StepWork:
        """Returns how a step is computed, as its report says it."""
        return "dense" if self.dense[index].all() else "sparse"

    @property
    def kinds(self) -> list[StepKind | None]:
        """The programs that the run needs, in the order of their first steps."""
        return list(dict.fromkeys(map(self.kind, range(self.solver.num_steps))))

    def compile(
        self,
        state: SamplerState,
        inputs: StepInputs,
        kinds: Iterable[StepKind | None] | None = None,
    ) -> dict[StepKind | None, Callable]:
        """Compiles steps for arrays shaped as these.

        Args:
          state: From `initial_state`.
          inputs: Inputs that `run_step` will be given.
          kinds: Kinds of steps; all of `self.kinds` by default.
        """
        kinds = self.kinds if kinds is None else list(kinds)
        lowered = [self._lower(state, inputs, kind) for kind in kinds]
        options = compiler_options(nnx.state(self.model))
        with concurrent.futures.ThreadPoolExecutor(max(len(kinds), 1)) as pool:
            programs = pool.map(
                lambda step: step.compile(compiler_options=options), lowered
            )
            return dict(zip(kinds, programs, strict=True))

    def _lower(self, state: SamplerState, inputs: StepInputs, kind: StepKind | None):
        structure, _ = nnx.split(self.model)
        attention, update = self.attention, self.solver.update
        two_calls = self.guidance_batching == "two_calls" and _is_guided(state, inputs)

        def step_fn(parameters, state, inputs, timestep, coefficients, budget):
            model = nnx.merge(structure, parameters)
            step = None if kind is None else kind.step(budget)

            def call(context, masks):
                rows = model.step_inputs(
                    state.latents,
                    timestep,
                    context,
                    inputs.image,
                    inputs.embedded_guidance,
                )
                return model(rows, attention=attention, step=step, masks=masks)

            predict = functools.partial(_in_two_calls, call) if two_calls else call
            velocity, masks = predict(inputs.context, state.masks)
            velocity = _guide(velocity, inputs, len(state.latents))
            latents, history = update(
                state.latents, velocity, state.history, coefficients
            )
            report = _StepArrays(
                kept_density=_density_of_layers(masks, step, model.num_layers),
                is_finite=jnp.isfinite(latents).all(),
                estimate=state.latents - timestep / MAX_TIMESTEP * velocity,
            )
            return SamplerState(latents, masks, history), report

        arguments = self._arguments(state, inputs, 0)
        return jax.jit(step_fn, donate_argnums=1).lower(*arguments)

    def run_step(
        self,
        programs: dict[StepKind | None, Callable],
        state: SamplerState,
        inputs: StepInputs,
        index: int,
    ) -> tuple[SamplerState, StepReport]:
        """Runs a step and waits for its result.

        Args:
          programs: Programs that `compile` returned.
          state: From `initial_state` or the step before; its buffers are reused.
          inputs: As given to `compile`.
          index: Number of the step, from 0.

        Raises:
          FloatingPointError: The result is not finite.
        """
        step_fn = programs[self.kind(index)]
        arguments = self._arguments(state, inputs, index)
        start = time.perf_counter()
        state, arrays = jax.block_until_ready(step_fn(*arguments))
        time_ms = 1e3 * (time.perf_counter() - start)
        num_steps, timestep = self.solver.num_steps, self.solver.timesteps[index]
        if not arrays.is_finite:
            raise FloatingPointError(
                f"the latent is not finite after step {index + 1} of {num_steps} "
                f"(timestep {timestep:.1f}): the weights may be damaged, or guidance="
                f"{float(inputs.guidance):g} too strong"
            )
        return state, StepReport(
            index=index,
            num_steps=num_steps,
            timestep=float(timestep),
            time_ms=time_ms,
            kept_density=np.asarray(arrays.kept_density),
            work=self.work(index),
            estimate=arrays.estimate,
        )

    def run_steps(
        self,
        programs: dict[StepKind | None, Callable],
        state: SamplerState,
        inputs: StepInputs,
        num_steps: int,
        callback: Callable[[StepReport], None] | None = None,
        recorder: "StepRecorder | None" = None,
    ) -> tuple[SamplerState, list[StepReport]]:
        """Runs the first steps, and calls back after each; see `run_step`.

        A recorder is called before each step, outside the time that is reported.

        Returns:
          The state after the last step, and a report of each, fewer than `num_steps`
          if the callback raised `StopGeneration`.
        """
        reports: list[StepReport] = []
        for index in range(num_steps):
            if reports:  # the next step needs the memory
                reports[-1] = dataclasses.replace(reports[-1], estimate=None)
            if recorder is not None:
                recorder.before_step(self, state, inputs, index)
            state, report = self.run_step(programs, state, inputs, index)
            left = self._time_left_ms([*reports, report], num_steps)
            reports.append(dataclasses.replace(report, time_left_ms=left))
            try:
                if callback is not None:
                    callback(reports[-1])
            except StopGeneration:
                break
        return state, reports

    def _time_left_ms(self, reports: list[StepReport], num_steps: int) -> float:
        """Returns how long the steps up to `num_steps` take, after some reports."""
        times: dict[StepKind | None, list[float]] = {}
        for report in reports:
            times.setdefault(self.kind(report.index), []).append(report.time_ms)
        mean = float(np.mean([report.time_ms for report in reports]))
        left = map(self.kind, range(len(reports), num_steps))
        return math.fsum(np.mean(times[k]) if k in times else mean for k in left)

    def _arguments(self, state: SamplerState, inputs: StepInputs, index: int) -> tuple:
        timestep = jnp.float32(self.solver.timesteps[index])
        coefficients = jax.tree.map(
            lambda value: jnp.asarray(value, jnp.float32),
            self.solver.coefficients(index),
        )
        budget = None if self.plan is None else jnp.asarray(self.plan.budget[index])
        return nnx.state(self.model), state, inputs, timestep, coefficients, budget


@runtime_checkable
class StepRecorder(Protocol):
    """Looks at what a step is about to start from, and changes nothing."""

    def before_step(
        self, sampler: Sampler, state: SamplerState, inputs: StepInputs, index: int
    ) -> None:
        """Is called before step `index`; the state's arrays are gone after it."""


def _is_guided(state: SamplerState, inputs: StepInputs) -> bool:
    """Tells whether there are rows of negative prompts."""
    return len(jax.tree.leaves(inputs.context)[0]) > len(state.latents)


def _in_two_calls(
    call: Callable, context: TextContext, masks: BlockMask | None
) -> tuple[Float[Array, "rows F H W C"], BlockMask | None]:
    """Runs `call` on the prompts' rows, then on those of the negative prompts.

    A loop, for XLA may run what is unrolled side by side.
    """
    halves = jax.tree.map(
        lambda rows: rearrange(rows, "(halves B) ... -> halves B ...", halves=2),
        context,
    )
    velocity, masks = jax.lax.map(lambda half: call(*half), (halves, masks))
    return rearrange(velocity, "halves B ... -> (halves B) ..."), masks


def _guide(
    velocity: Float[Array, "rows F H W C"], inputs: StepInputs, batch: int
) -> Float[Array, "B F H W C"]:
    """Applies classifier-free guidance where there are rows of negative prompts."""
    if velocity.shape[0] == batch:
        return velocity
    positive, negative = velocity[:batch], velocity[batch:]
    return negative + inputs.guidance * (positive - negative)


def _density_of_layers(
    masks: BlockMask | None, step: DraftStep | None, num_layers: int
) -> Float[Array, " layers"]:
    """Returns each layer's share of computed token pairs, mean of rows and heads."""
    if step is None or masks is None:
        return jnp.ones(num_layers)
    calls = masks.row_offsets.shape[:-4]  # (2,) with guidance in two calls
    # A layer at a time: the lists of all layers are large.
    per_layer = jax.lax.map(
        lambda mask: mask.density.mean(),
        jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(calls) + 1 :]), masks),
    )
    per_layer = per_layer.reshape(-1, num_layers).mean(0)
    return jnp.where(step.dense, 1.0, per_layer)
