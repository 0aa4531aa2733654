"""The loop around the transformer: compiled steps, one run for each noise level."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from draft_jax.attention import initial_mask
from draft_jax.block_mask import BlockMask
from draft_jax.config import DraftConfig
from draft_jax.schedule import DraftStep, SparsitySchedule, StepKind, StepPlan
from models.diffusion.interfaces import ImageCondition, LatentShape
from models.diffusion.schedulers import Solver
from models.wan.transformer import WanTransformer

# How a guided step runs the model on prompts and negative prompts: as one batch, or
# one after the other, which needs less memory.
GuidanceBatching = Literal["one_call", "two_calls"]


class SamplerState(NamedTuple):
    """What one step hands to the next."""

    latents: Float[Array, "B F H W C"]  # float32
    # Leaves [layers, rows, ...], or [2, layers, B, ...] with guidance in two calls;
    # None with dense attention.
    masks: BlockMask | None
    history: Any  # the solver's


class StepInputs(NamedTuple):
    """What is the same for every step. With guidance, prompts come first and their
    negative prompts after them, so 2 B rows; without it, B rows."""

    context: Float[Array, "rows L text_dim"]
    context_lengths: Int[Array, " rows"]
    guidance: Float[Array, ""]
    image: ImageCondition | None = None  # B rows; for an image-to-video model


class ModelInputs(TypedDict):
    """What the transformer takes, by argument."""

    latents: Float[Array, "rows F H W C"]
    timesteps: Float[Array, " rows"]
    context: Float[Array, "rows L text_dim"]
    context_lengths: Int[Array, " rows"]
    image_tokens: Float[Array, "rows I image_dim"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """One finished step, as callbacks get it.

    Attributes:
      index: 0 to num_steps - 1.
      num_steps: Steps of the run.
      timestep: What the model was told, 0 to 1000.
      time_ms: Until the result was there.
      kept_density: Share of token pairs each layer computed; 1.0 where dense.
    """

    index: int
    num_steps: int
    timestep: float
    time_ms: float
    kept_density: Float[np.ndarray, " layers"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sampler:
    """A transformer with its attention, noise levels and schedule worked out.

    Attributes:
      model: With the attention that the run uses.
      solver: Noise levels, and the step between them.
      latent_shape: Of one item.
      plan: What each step does; None with dense attention.
      guidance_batching: How guided steps run the model.
    """

    model: WanTransformer
    solver: Solver
    latent_shape: LatentShape
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
        model: WanTransformer,
        *,
        latent_shape: LatentShape,
        solver: Solver,
        draft: DraftConfig | None,
        schedule: SparsitySchedule | None,
        guidance_batching: GuidanceBatching = "one_call",
    ) -> "Sampler":
        """Sets the model's attention and works the schedule out.

        Args:
          model: Transformer with any attention.
          latent_shape: Of one item.
          solver: Noise levels, and the step between them.
          draft: Options of draft attention; None is dense attention.
          schedule: The paper's by default. Not read if `draft` is None.
          guidance_batching: Whether a guided step runs prompts and negative prompts
            in "one_call" or "two_calls". Two need less memory; results agree up to
            rounding.

        Raises:
          ValueError: The schedule or the latent's shape does not fit the model, or
            there is no such batching.
        """
        plan = None
        if draft is None:
            model = model.with_attention("dense")
        else:
            model = model.with_attention("draft", draft)
            schedule = SparsitySchedule.paper() if schedule is None else schedule
            plan = schedule.plan(
                solver.timesteps,
                num_layers=model.config.num_layers,
                grid=model.grid(latent_shape),
                config=draft,
            )
        return cls(
            model=model,
            solver=solver,
            latent_shape=latent_shape,
            plan=plan,
            guidance_batching=guidance_batching,
        )

    @property
    def dense(self) -> Bool[np.ndarray, "steps layers"]:
        """Which steps and layers run dense."""
        if self.plan is not None:
            return self.plan.dense
        return np.ones((self.solver.num_steps, self.model.config.num_layers), np.bool_)

    def step_plan(self, index: int) -> DraftStep | None:
        """The schedule's entry of a step."""
        return None if self.plan is None else self.plan.step(index)

    def initial_state(self, batch: int, *, seed: int, guided: bool) -> SamplerState:
        """Pure noise and masks to start from.

        Item `i` gets noise from `fold_in(key(seed), i)`, so that it does not depend
        on how many items are sampled together.
        """
        keys = [jax.random.fold_in(jax.random.key(seed), item) for item in range(batch)]
        noise = [jax.random.normal(key, self.latent_shape) for key in keys]
        latents = jnp.stack(noise)
        masks = None if self.plan is None else self._initial_masks(batch, guided)
        return SamplerState(latents, masks, self.solver.initial_history(latents))

    def _initial_masks(self, batch: int, guided: bool) -> BlockMask:
        config = self.model.config
        two_calls = guided and self.guidance_batching == "two_calls"
        mask = initial_mask(
            self.model.grid(self.latent_shape),
            config.draft,
            batch=batch * (2 if guided and not two_calls else 1),
            num_heads=config.num_heads,
        )
        repeats = (*((2,) if two_calls else ()), config.num_layers, 1, 1, 1)
        return jax.tree.map(lambda leaf: jnp.tile(leaf, repeats), mask)

    def kind(self, index: int) -> StepKind | None:
        """Which program a step needs; None with dense attention."""
        return None if self.plan is None else self.plan.kind(index)

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
          inputs: What `run_step` is given.
          kinds: Which steps; all of `self.kinds` by default.
        """
        kinds = self.kinds if kinds is None else list(kinds)
        lowered = [self._lower(state, inputs, kind) for kind in kinds]
        with concurrent.futures.ThreadPoolExecutor(max(len(kinds), 1)) as pool:
            programs = pool.map(lambda step: step.compile(), lowered)
            return dict(zip(kinds, programs, strict=True))

    def _lower(self, state: SamplerState, inputs: StepInputs, kind: StepKind | None):
        structure, _ = nnx.split(self.model)
        update, predict = self.solver.update, _in_one_call
        if self.guidance_batching == "two_calls" and _is_guided(state, inputs):
            predict = _in_two_calls

        def step_fn(parameters, state, inputs, timestep, coefficients, budget):
            model = nnx.merge(structure, parameters)
            step = None if kind is None else kind.step(budget)
            velocity, masks = predict(model, state, inputs, timestep, step)
            latents, history = update(
                state.latents,
                _guide(velocity, inputs, len(state.latents)),
                state.history,
                coefficients,
            )
            kept_density = _density_of_layers(masks, step, model.config.num_layers)
            finite = jnp.isfinite(latents).all()
            return SamplerState(latents, masks, history), kept_density, finite

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
          programs: What `compile` returned.
          state: From `initial_state` or the step before; its buffers are reused.
          inputs: As given to `compile`.
          index: Which step.

        Raises:
          FloatingPointError: The result is not finite.
        """
        step_fn = programs[self.kind(index)]
        arguments = self._arguments(state, inputs, index)
        start = time.perf_counter()
        state, kept_density, finite = jax.block_until_ready(step_fn(*arguments))
        time_ms = 1e3 * (time.perf_counter() - start)
        num_steps, timestep = self.solver.num_steps, self.solver.timesteps[index]
        if not finite:
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
            kept_density=np.asarray(kept_density),
        )

    def _arguments(self, state: SamplerState, inputs: StepInputs, index: int) -> tuple:
        timestep = jnp.float32(self.solver.timesteps[index])
        coefficients = jax.tree.map(
            lambda value: jnp.asarray(value, jnp.float32),
            self.solver.coefficients(index),
        )
        budget = None if self.plan is None else jnp.asarray(self.plan.budget[index])
        return nnx.state(self.model), state, inputs, timestep, coefficients, budget


def model_inputs(
    latents: Float[Array, "B F H W C"],
    timestep: Float[Array, ""] | float,
    inputs: StepInputs,
) -> ModelInputs:
    """The model's arguments, one row for each of the context."""
    rows = inputs.context.shape[0]
    repeats = rows // latents.shape[0]
    tokens = None
    if inputs.image is not None:
        latents = jnp.concatenate([latents, inputs.image.latents], axis=-1)
        tokens = inputs.image.tokens
    return {
        "latents": jnp.concatenate([latents] * repeats),
        "timesteps": jnp.full(rows, timestep, jnp.float32),
        "context": inputs.context,
        "context_lengths": inputs.context_lengths,
        "image_tokens": None if tokens is None else jnp.concatenate([tokens] * repeats),
    }


def _is_guided(state: SamplerState, inputs: StepInputs) -> bool:
    return inputs.context.shape[0] > state.latents.shape[0]


def _in_one_call(
    model: WanTransformer,
    state: SamplerState,
    inputs: StepInputs,
    timestep: Float[Array, ""],
    step: DraftStep | None,
) -> tuple[Float[Array, "rows F H W C"], BlockMask | None]:
    """Velocities and masks of all rows as one batch."""
    rows = model_inputs(state.latents, timestep, inputs)
    return model(**rows, step=step, masks=state.masks)


def _in_two_calls(
    model: WanTransformer,
    state: SamplerState,
    inputs: StepInputs,
    timestep: Float[Array, ""],
    step: DraftStep | None,
) -> tuple[Float[Array, "rows F H W C"], BlockMask | None]:
    """Velocities and masks of the prompts' rows, then of the negative prompts'.

    A loop, for XLA may run what is unrolled side by side.
    """

    def call(half):
        (context, lengths), masks = half
        part = inputs._replace(context=context, context_lengths=lengths)
        return _in_one_call(model, state._replace(masks=masks), part, timestep, step)

    halves = jax.tree.map(
        lambda rows: rows.reshape(2, -1, *rows.shape[1:]),
        (inputs.context, inputs.context_lengths),
    )
    velocity, masks = jax.lax.map(call, (halves, state.masks))
    return velocity.reshape(-1, *velocity.shape[2:]), masks


def _guide(
    velocity: Float[Array, "rows F H W C"], inputs: StepInputs, batch: int
) -> Float[Array, "B F H W C"]:
    """Classifier-free guidance where there are rows of negative prompts."""
    if velocity.shape[0] == batch:
        return velocity
    positive, negative = velocity[:batch], velocity[batch:]
    return negative + inputs.guidance * (positive - negative)


def _density_of_layers(
    masks: BlockMask | None, step: DraftStep | None, num_layers: int
) -> Float[Array, " layers"]:
    """Share of token pairs each layer computed, the mean of rows and heads."""
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
