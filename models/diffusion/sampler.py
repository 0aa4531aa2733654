"""The loop around the transformer: compiled steps, one run for each noise level."""

import concurrent.futures
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
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
from models.diffusion.caches import CacheState, StepCache
from models.diffusion.caches.interfaces import check_count
from models.diffusion.experts import ExpertName, Experts, expert_names, first_steps
from models.diffusion.interfaces import KeepsResidual, LatentShape, VideoModel
from models.diffusion.mesh import on_one_device
from models.diffusion.results import StepReport, StepWork, StopGeneration
from models.diffusion.schedulers import Solver
from models.diffusion.step_programs import (
    SKIPPED,
    Program,
    ProgramParts,
    SamplerState,
    StepInputs,
    StepNumbers,
    WeightOnly,
    place_cache,
    place_state,
    run_program,
)
from models.diffusion.transformer.float8 import has_float8_linears
from models.diffusion.transformer.sharded import ShardedTransformer
from models.float8.product import compiler_options

# How a guided step runs the model on prompts and negative prompts: as one batch, or
# one after the other, which needs less memory.
GuidanceBatching = Literal["one_call", "two_calls"]


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
      cache: Rule of a step cache; None to compute every step.
      experts: The transformers that take turns, of which `model` is one; None for one
        transformer.
      low_guidance: Guidance of the steps of the expert for low noise; None for that of
        the inputs.
      boundary: Least timestep of the expert for high noise; None for the experts' own.
      weight_only_steps: Last computed steps in which linear layers in FP8 round no
        inputs, so that their weights alone are in FP8. Such a step takes as long as in
        the model's dtype. Of all that rounding moves a video by, most is of the last
        step, whose errors no other step mends: one is enough.

    Raises:
      ValueError: There is no such batching, the model cannot have the cache, or
        weight_only_steps is not an integer >= 0.
    """

    model: VideoModel
    solver: Solver
    latent_shape: LatentShape
    attention: AttentionPlan
    plan: StepPlan | None
    guidance_batching: GuidanceBatching = "one_call"
    cache: StepCache | None = None
    experts: Experts | None = None
    low_guidance: float | None = None
    boundary: float | None = None
    weight_only_steps: int = 1

    def __post_init__(self) -> None:
        check_count("weight_only_steps", self.weight_only_steps, least=0)
        if self.guidance_batching not in get_args(GuidanceBatching):
            raise ValueError(
                f"guidance_batching={self.guidance_batching!r} must be one of "
                f"{get_args(GuidanceBatching)}"
            )
        why_not = self.cache and self.cache.why_unsupported(self.model)
        if why_not:
            raise ValueError(f"cache={self.cache!r} does not fit: {why_not}")

    @classmethod
    def create(
        cls,
        model: VideoModel,
        *,
        latent_shape: LatentShape,
        solver: Solver,
        attention: AttentionPlan,
        guidance_batching: GuidanceBatching = "one_call",
        cache: StepCache | None = None,
        experts: Experts | None = None,
        low_guidance: float | None = None,
        boundary: float | None = None,
        weight_only_steps: int = 1,
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
          cache: Rule of a step cache; None to compute every step.
          experts: The transformers that take turns, of which `model` is one.
          low_guidance: Guidance of the expert for low noise.
          boundary: Least timestep of the expert for high noise; None for the experts'
            own.
          weight_only_steps: Last computed steps in which linear layers in FP8 round no
            inputs.

        Raises:
          ValueError: The schedule or the latent's shape does not fit the model, or
            there is no such batching, or the model cannot have the cache.
        """
        low_noise_from = None
        if experts is not None:
            boundary = experts.boundary if boundary is None else boundary
            low_noise_from = expert_names(solver.timesteps, boundary).count("high")
        plan = attention.steps(
            solver.timesteps,
            num_layers=model.num_layers,
            grid=model.grid(latent_shape),
            low_noise_from=low_noise_from,
        )
        return cls(
            model=model,
            solver=solver,
            latent_shape=latent_shape,
            attention=attention,
            plan=plan,
            guidance_batching=guidance_batching,
            cache=cache,
            experts=experts,
            low_guidance=low_guidance,
            boundary=boundary,
            weight_only_steps=weight_only_steps,
        )

    @functools.cached_property
    def expert_names(self) -> list[ExpertName]:
        """The expert of each step; empty where a model has one transformer."""
        if self.experts is None:
            return []
        boundary = self.experts.boundary if self.boundary is None else self.boundary
        return expert_names(self.solver.timesteps, boundary)

    @functools.cached_property
    def expert_starts(self) -> tuple[int, ...]:
        """The first step of each transformer."""
        return first_steps(self.expert_names)

    def model_at(self, index: int) -> VideoModel:
        """Returns the transformer of a step, with its weights on the device."""
        if self.experts is None:
            return self.model
        return self.experts.take(self.expert_names[index])

    @property
    def dense(self) -> Bool[np.ndarray, "steps layers"]:
        """Which steps and layers run dense, if they are not skipped."""
        if self.plan is not None:
            return np.asarray(self.plan.dense)
        return np.ones((self.solver.num_steps, self.model.num_layers), np.bool_)

    def step_plan(self, index: int) -> DraftStep | None:
        """Returns the schedule's entry of a step; None with dense attention."""
        return None if self.plan is None else self.plan.step(index)

    def initial_state(self, batch: int, *, seed: int, guided: bool) -> SamplerState:
        """Returns pure noise, masks and a cache's state to start from.

        Item `i` gets noise from `fold_in(key(seed), i)`, so that it does not depend
        on how many items are sampled together.
        """
        keys = [jax.random.fold_in(jax.random.key(seed), item) for item in range(batch)]
        noise = [jax.random.normal(key, self.latent_shape) for key in keys]
        latents = jnp.stack(noise)
        masks = self._initial_masks(batch, guided)
        cache = self._initial_cache(latents, rows=batch * (2 if guided else 1))
        history = self.solver.initial_history(latents)
        state = SamplerState(latents, masks, history, cache)
        if isinstance(self.model, ShardedTransformer):
            return place_state(self.model, state, self.cache)
        return state

    def _initial_cache(
        self, latents: Float[Array, "B F H W C"], *, rows: int
    ) -> CacheState | None:
        """Returns a cache's state from which nothing is skipped; None without one."""
        if self.cache is None:
            return None
        residual = (
            self.model.residual_shape(self.latent_shape)
            if isinstance(self.model, KeepsResidual)
            else None
        )
        return self.cache.initial_state(latents, rows=rows, residual=residual)

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
        """Returns the kind of a step that is not skipped; None with dense attention."""
        return None if self.plan is None else self.plan.kind(index)

    @functools.cached_property
    def skippable(self) -> Bool[np.ndarray, " steps"]:
        """Which steps a cache may skip."""
        num_steps = self.solver.num_steps
        if self.cache is None:
            return np.zeros(num_steps, np.bool_)
        return self.cache.skippable(num_steps, self.expert_starts)

    @functools.cached_property
    def weight_only(self) -> Bool[np.ndarray, " steps"]:
        """Which steps run with weights alone in FP8: none of a model without FP8."""
        found = np.zeros(self.solver.num_steps, np.bool_)
        if self.weight_only_steps and has_float8_linears(self.model):
            found[np.flatnonzero(~self.skippable)[-self.weight_only_steps :]] = True
        return found

    def program(
        self, index: int, *, skip: bool, owes_masks: bool
    ) -> tuple[Program, bool]:
        """Returns which program a step needs.

        A skipped step keeps masks as they are. If it was to make new ones, the next
        sparse step that is computed does.

        Args:
          index: Number of the step, from 0.
          skip: Whether a cache skips it.
          owes_masks: Whether a skipped step before was to make masks.

        Returns:
          The program, and whether masks are owed after the step.
        """
        kind = self.kind(index)
        computed = WeightOnly if self.weight_only[index] else lambda kind: kind
        if kind is None:
            return (SKIPPED if skip else computed(None)), False
        # Masks of one transformer say nothing about another.
        owes_masks = owes_masks or kind.refresh or index in self.expert_starts[1:]
        if skip:
            return SKIPPED, owes_masks
        if all(kind.dense):
            return computed(kind), owes_masks
        return computed(dataclasses.replace(kind, refresh=owes_masks)), False

    @property
    def kinds(self) -> list[Program]:
        """The programs that the run may need, in the order of their first steps."""
        found: dict[Program, None] = {}
        debts = {False}
        for index in range(self.solver.num_steps):
            options = {bool(self.skippable[index])}
            if self.cache is not None and not self.cache.is_known:
                options.add(False)  # the latents may forbid it
            steps = [
                self.program(index, skip=skip, owes_masks=debt)
                for skip in sorted(options)
                for debt in sorted(debts)
            ]
            found |= dict.fromkeys(program for program, _ in steps)
            debts = {debt for _, debt in steps}
        return list(found)

    def compile(
        self,
        state: SamplerState,
        inputs: StepInputs,
        kinds: Iterable[Program] | None = None,
    ) -> dict[Program, Callable]:
        """Compiles steps for arrays shaped as these.

        Args:
          state: From `initial_state`.
          inputs: Inputs that `run_step` will be given.
          kinds: Programs; all of `self.kinds` by default.
        """
        lowered = self.lower(state, inputs, kinds)
        options = compiler_options(nnx.state(self.model))
        with concurrent.futures.ThreadPoolExecutor(max(len(lowered), 1)) as pool:
            programs = pool.map(
                lambda step: step.compile(compiler_options=options), lowered.values()
            )
            return dict(zip(lowered, programs, strict=True))

    def lower(
        self,
        state: SamplerState,
        inputs: StepInputs,
        kinds: Iterable[Program] | None = None,
    ) -> dict[Program, Any]:
        """Returns steps as they are before compilation; takes what `compile` takes."""
        parts = ProgramParts(
            model=self.model,
            solver=self.solver,
            attention=self.attention,
            two_calls=self.guidance_batching == "two_calls"
            and _is_guided(state, inputs),
            cache=self.cache,
        )
        numbers = self._numbers(0)
        return {
            kind: parts.lower(kind, state, inputs, numbers)
            for kind in (self.kinds if kinds is None else kinds)
        }

    def run_step(
        self,
        programs: dict[Program, Callable],
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
        start = time.perf_counter()
        state, inputs = self._for_expert(state, inputs, index)
        program, state, owes_masks = self._choose(state, index)
        arguments = nnx.state(self.model_at(index)), state, inputs, self._numbers(index)
        state, arrays = run_program(programs[program], program, *arguments)
        if self.experts is not None and index + 1 in self.expert_starts:
            self.experts.prepare("low")  # while the device works
        if state.cache is not None and self.cache and not self.cache.is_known:
            state.cache.score.copy_to_host_async()  # while the device works
        state, arrays = jax.block_until_ready((state, arrays))
        time_ms = 1e3 * (time.perf_counter() - start)
        num_steps, timestep = self.solver.num_steps, self.solver.timesteps[index]
        if not arrays.is_finite:
            raise FloatingPointError(
                f"the latent is not finite after step {index + 1} of {num_steps} "
                f"(timestep {timestep:.1f}): the weights may be damaged, or guidance="
                f"{float(inputs.guidance):g} too strong"
            )
        if state.cache is not None:
            cache = dataclasses.replace(state.cache, owes_masks=owes_masks)
            state = state._replace(cache=cache)
        return state, StepReport(
            index=index,
            num_steps=num_steps,
            timestep=float(timestep),
            time_ms=time_ms,
            kept_density=np.asarray(arrays.kept_density),
            work=_work(program),
            weight_only=isinstance(program, WeightOnly),
            estimate=on_one_device(arrays.estimate),
        )

    def _for_expert(
        self, state: SamplerState, inputs: StepInputs, index: int
    ) -> tuple[SamplerState, StepInputs]:
        """Returns a step's state and inputs as its transformer takes them."""
        if self.experts is None:
            return state, inputs
        if index in self.expert_starts[1:] and state.cache is not None:
            rows = len(jax.tree.leaves(inputs.context)[0])
            cache = self._initial_cache(state.latents, rows=rows)
            assert cache is not None  # there was a state
            if isinstance(self.model, ShardedTransformer):
                cache = place_cache(self.model, cache, self.cache)
            cache = dataclasses.replace(cache, owes_masks=state.cache.owes_masks)
            state = state._replace(cache=cache)
        if self.expert_names[index] == "low" and self.low_guidance is not None:
            inputs = inputs._replace(guidance=jnp.float32(self.low_guidance))
        return state, inputs

    def _choose(
        self, state: SamplerState, index: int
    ) -> tuple[Program, SamplerState, bool]:
        """Returns a step's program, the state for it, and if masks are owed then."""
        rule, cache = self.cache, state.cache
        if rule is None or cache is None:
            program, _ = self.program(index, skip=False, owes_masks=False)
            return program, state, False
        skip = bool(self.skippable[index])
        if skip and not rule.is_known:
            skip = rule.allows(np.asarray(cache.score))
        program, owes_masks = self.program(
            index, skip=skip, owes_masks=cache.owes_masks
        )
        cache = dataclasses.replace(cache, owes_masks=False)
        return program, state._replace(cache=cache), owes_masks

    def run_steps(
        self,
        programs: dict[Program, Callable],
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
        times: dict[Program, list[float]] = {}
        for report in reports:
            times.setdefault(self._time_group(report.index), []).append(report.time_ms)
        mean = float(np.mean([report.time_ms for report in reports]))
        left = map(self._time_group, range(len(reports), num_steps))
        return math.fsum(np.mean(times[k]) if k in times else mean for k in left)

    def _time_group(self, index: int) -> Program:
        """Returns the program that a step's time stands for.

        Steps that may be skipped are one group: it has as many skipped ones as before.
        """
        return SKIPPED if self.skippable[index] else self.kind(index)

    def _numbers(self, index: int) -> StepNumbers:
        return StepNumbers(
            timestep=jnp.float32(self.solver.timesteps[index]),
            coefficients=jax.tree.map(
                lambda value: jnp.asarray(value, jnp.float32),
                self.solver.coefficients(index),
            ),
            budget=(
                None if self.plan is None else jnp.asarray(self.plan.budget[index])
            ),
        )


def _work(program: Program) -> StepWork:
    """Returns how a step is computed, as its report says it."""
    if program == SKIPPED:
        return "skipped"
    kind = program.kind if isinstance(program, WeightOnly) else program
    dense = not isinstance(kind, StepKind) or all(kind.dense)
    return "dense" if dense else "sparse"


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
