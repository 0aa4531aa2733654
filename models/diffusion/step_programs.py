"""The programs of a run: a step of each kind, and one that a cache skips.

They take the state of the step before and give up its memory. What stays as it is does
not pass through a program: a skipped step neither takes nor returns masks.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from draft_jax import AttentionPlan, BlockMask, DraftStep, StepKind
from draft_jax.pytree import register_named_tuple
from models.diffusion.caches import CacheState, StepCache
from models.diffusion.interfaces import ImageCondition, TextContext, VideoModel
from models.diffusion.schedulers import MAX_TIMESTEP, Solver
from models.diffusion.transformer.float8 import weight_only
from models.diffusion.transformer.sharded import ShardedTransformer

SKIPPED: Literal["skipped"] = "skipped"


@dataclasses.dataclass(frozen=True)
class WeightOnly:
    """The program of steps of a kind in which linear layers round no inputs to FP8."""

    kind: StepKind | None


# Which program a step needs: that of a kind, of dense attention, or of skipped steps.
Program = StepKind | WeightOnly | Literal["skipped"] | None


@register_named_tuple
class SamplerState(NamedTuple):
    """State that one step hands to the next."""

    latents: Float[Array, "B F H W C"]  # float32
    # Leaves [layers, rows, ...], or [2, layers, B, ...] with guidance in two calls;
    # None with dense attention.
    masks: BlockMask | None
    history: Any  # the solver's
    cache: CacheState | None = None  # of a step cache, if there is one


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
class StepNumbers(NamedTuple):
    """Numbers of one step, the same shapes each step."""

    timestep: Float[Array, ""]
    coefficients: Any  # the solver's
    budget: Any  # the schedule's; None with dense attention


@register_named_tuple
class StepArrays(NamedTuple):
    """Arrays of a step's report."""

    kept_density: Float[Array, " layers"]
    is_finite: Bool[Array, ""]
    estimate: Float[Array, "B F H W C"]  # of the clean latents


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ProgramParts:
    """Parts that programs are made of.

    Attributes:
      model: The transformer; its parameters are an argument.
      solver: The step between noise levels.
      attention: Dense or draft attention.
      two_calls: Whether prompts and negative prompts are calls of their own.
      cache: Rule of a step cache; None to compute every step.
    """

    model: VideoModel
    solver: Solver
    attention: AttentionPlan
    two_calls: bool
    cache: StepCache | None

    def lower(
        self, program: Program, state: SamplerState, inputs: StepInputs, numbers: Any
    ) -> Any:
        """Lowers a program for arrays shaped as these; `run` calls it compiled."""
        arguments = nnx.state(self.model), state, inputs, numbers
        if program == SKIPPED:
            arguments = _arguments_of_skipped(*arguments)
            jitted = jax.jit(
                self._skipped_step(),
                donate_argnums=1,
                out_shardings=_out_shardings(arguments[1]),
            )
            return jitted.lower(*arguments)
        # Memory of a cache's arrays that the step does not read is given up, too.
        jitted = jax.jit(
            self._computed_step(program),
            donate_argnums=1,
            keep_unused=self.cache is not None,
            out_shardings=_out_shardings(state),
        )
        return jitted.lower(*arguments)

    def _computed_step(self, program: StepKind | WeightOnly | None) -> Callable:
        whole: Any = self.model
        if isinstance(program, WeightOnly):
            whole, program = weight_only(whole), program.kind
        kind, structure = program, nnx.graphdef(whole)

        def step_fn(parameters, state, inputs, numbers):
            model: Any = nnx.merge(structure, parameters)
            step = None if kind is None else kind.step(numbers.budget)
            keeps_residual = self.cache is not None and self.cache.keeps_residual
            run_model = model.call_with_residual if keeps_residual else model

            def call(context, masks):
                rows = _model_inputs(model, state.latents, context, inputs, numbers)
                velocity, masks, *residual = run_model(
                    rows, attention=self.attention, step=step, masks=masks
                )
                return (velocity, *residual), masks

            by_row, masks = self._in_calls(call, inputs.context, state.masks)
            velocity, residual = by_row if keeps_residual else (*by_row, None)
            cache = state.cache
            if self.cache is not None:
                cache = self.cache.after_computing(
                    cache, state.latents, velocity, residual
                )
            density = _density_of_layers(masks, step, model.num_layers)
            moved, report = self._move(state, velocity, inputs, numbers, density, cache)
            return moved._replace(masks=masks), report

        return step_fn

    def _skipped_step(self) -> Callable:
        structure, _ = nnx.split(self.model)
        rule = self.cache
        assert rule is not None  # only a cache skips

        def step_fn(parameters, state, kept, inputs, numbers) -> Any:
            model: Any = nnx.merge(structure, parameters)

            def finish(residual):
                def call(rows, _):
                    context, residual = rows
                    rows = _model_inputs(model, state.latents, context, inputs, numbers)
                    return model.reuse_residual(rows, residual), None

                return self._in_calls(call, (inputs.context, residual), None)[0]

            velocity = rule.reuse(kept, state.latents, finish)
            cache = dataclasses.replace(state.cache, kept=kept)
            density = jnp.zeros(model.num_layers)
            moved, report = self._move(state, velocity, inputs, numbers, density, cache)
            assert moved.cache is not None
            cache = dataclasses.replace(moved.cache, kept=None)
            return moved._replace(cache=cache), report

        return step_fn

    def _move(
        self,
        state: SamplerState,
        velocity: Float[Array, "rows F H W C"],
        inputs: StepInputs,
        numbers: StepNumbers,
        density: Float[Array, " layers"],
        cache: CacheState | None,
    ) -> tuple[SamplerState, StepArrays]:
        """Guides, and moves the latents to the next noise level."""
        velocity = _guide(velocity, inputs, len(state.latents))
        latents, history = self.solver.update(
            state.latents, velocity, state.history, numbers.coefficients
        )
        hold = self.model.conditioning.hold_frames
        latents = hold(latents, inputs.image)
        if self.cache is not None and cache is not None:
            score = self.cache.after_moving(cache, state.latents, latents)
            cache = dataclasses.replace(cache, score=score)
        report = StepArrays(
            kept_density=density,
            is_finite=jnp.isfinite(latents).all(),
            estimate=hold(
                state.latents - numbers.timestep / MAX_TIMESTEP * velocity, inputs.image
            ),
        )
        return SamplerState(latents, None, history, cache), report

    def _in_calls(self, call: Callable, rows: Any, by_call: Any) -> tuple[Any, Any]:
        """Runs `call(rows, by_call)` once, or on prompts and then negative prompts.

        A loop, for XLA may run what is unrolled side by side.

        Args:
          call: Returns arrays with as many rows, and others.
          rows: Arrays of rows of prompts and then of negative prompts.
          by_call: With two calls, arrays with a leading axis for them.
        """
        if not self.two_calls:
            return call(rows, by_call)
        halves = jax.tree.map(
            lambda array: rearrange(array, "(halves B) ... -> halves B ...", halves=2),
            rows,
        )
        found, others = jax.lax.map(lambda half: call(*half), (halves, by_call))
        joined = jax.tree.map(
            lambda array: rearrange(array, "halves B ... -> (halves B) ..."), found
        )
        return joined, others


def place_state(
    model: ShardedTransformer, state: SamplerState, rule: StepCache | None
) -> SamplerState:
    """Puts the state that a run starts from on the devices of a mesh."""
    masks, cache = model.put_masks(state.masks), state.cache
    if cache is not None:
        cache = place_cache(model, cache, rule)
    rest = model.put_everywhere(state._replace(masks=None, cache=None))
    return rest._replace(masks=masks, cache=cache)


def place_cache(
    model: ShardedTransformer, cache: CacheState, rule: StepCache | None
) -> CacheState:
    """Puts a cache's state on the devices of a mesh."""
    assert rule is not None  # it has made the state
    put = model.put_residual if rule.keeps_residual else model.put_everywhere
    return dataclasses.replace(
        cache, kept=put(cache.kept), score=model.put_everywhere(cache.score)
    )


def run_program(
    compiled: Callable, program: Program, parameters: Any, *arguments: Any
) -> tuple[SamplerState, StepArrays]:
    """Starts a compiled program and returns its results, before they are there.

    Args:
      compiled: The program.
      program: Which one it is.
      parameters: The model's.
      *arguments: State, inputs and numbers. The state's buffers are given up, but for
        those that a skipped step leaves as they are.
    """
    if program != SKIPPED:
        return compiled(parameters, *arguments)
    before: SamplerState = arguments[0]
    state, report = compiled(*_arguments_of_skipped(parameters, *arguments))
    assert before.cache is not None  # only a cache skips
    assert state.cache is not None
    cache = dataclasses.replace(state.cache, kept=before.cache.kept)
    return state._replace(masks=before.masks, cache=cache), report


def _arguments_of_skipped(
    parameters: Any, state: SamplerState, inputs: StepInputs, numbers: StepNumbers
) -> tuple:
    """Returns arguments without masks, and what the cache keeps by itself."""
    assert state.cache is not None
    cache = dataclasses.replace(state.cache, kept=None)
    given_up = state._replace(masks=None, cache=cache)
    numbers = numbers._replace(budget=None)
    return parameters, given_up, state.cache.kept, inputs, numbers


def _out_shardings(state: SamplerState) -> Any:
    """Returns where a step leaves its results: the state where it has found it.

    Reports are on all devices. Of one device nothing is said.
    """
    if len(state.latents.sharding.device_set) == 1:
        return None
    return jax.tree.map(lambda x: x.sharding, state), state.latents.sharding


def _model_inputs(
    model: VideoModel,
    latents: Float[Array, "B F H W C"],
    context: TextContext,
    inputs: StepInputs,
    numbers: StepNumbers,
) -> Any:
    """Returns the model's own inputs for the rows of a context."""
    return model.step_inputs(
        latents, numbers.timestep, context, inputs.image, inputs.embedded_guidance
    )


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
    by_head = jax.lax.map(
        lambda mask: mask.density,
        jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(calls) + 1 :]), masks),
    )
    # Rows and heads may be on several devices: their sums are added up once, not in
    # each layer.
    by_head = by_head.reshape(-1, num_layers, *by_head.shape[1:])
    return jnp.where(step.dense, 1.0, by_head.mean((0, 2, 3)))
