"""The loop around the transformer: one compiled step, run once per noise level."""

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from draft_jax.attention import initial_mask
from draft_jax.block_mask import BlockMask
from draft_jax.config import DraftConfig
from draft_jax.schedule import DraftPlan, DraftStep, SparsitySchedule
from models.schedulers import FlowEuler, euler_step
from models.wan.transformer import WanTransformer

LatentShape = tuple[int, int, int, int]  # frames, rows, columns, channels


class SamplerState(NamedTuple):
    """What one step hands to the next."""

    latents: Float[Array, "B F H W C"]  # float32
    masks: BlockMask | None  # leaves [layers, ...]; None with dense attention


class StepInputs(NamedTuple):
    """What is the same for every step. With guidance, prompts come first and their
    negative prompts after them, so 2 B rows; without it, B rows."""

    context: Float[Array, "rows L text_dim"]
    context_lengths: Int[Array, " rows"]
    guidance: Float[Array, ""]


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
      solver: Noise levels.
      latent_shape: Of one item.
      plan: What each step does; None with dense attention.
    """

    model: WanTransformer
    solver: FlowEuler
    latent_shape: LatentShape
    plan: DraftPlan | None

    @classmethod
    def create(
        cls,
        model: WanTransformer,
        *,
        latent_shape: LatentShape,
        solver: FlowEuler,
        draft: DraftConfig | None,
        schedule: SparsitySchedule | None,
    ) -> "Sampler":
        """Sets the model's attention and works the schedule out.

        Args:
          model: Transformer with any attention.
          latent_shape: Of one item.
          solver: Noise levels.
          draft: Options of draft attention; None is dense attention.
          schedule: The paper's by default. Not read if `draft` is None.

        Raises:
          ValueError: The schedule or the latent's shape does not fit the model.
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
        return cls(model=model, solver=solver, latent_shape=latent_shape, plan=plan)

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
        masks = None
        if self.plan is not None:
            config = self.model.config
            mask = initial_mask(
                self.model.grid(self.latent_shape),
                config.draft,
                batch=batch * (2 if guided else 1),
                num_heads=config.num_heads,
            )
            masks = jax.tree.map(
                lambda leaf: jnp.tile(leaf, (config.num_layers, 1, 1, 1)), mask
            )
        return SamplerState(jnp.stack(noise), masks)

    def compile(self, state: SamplerState, inputs: StepInputs) -> Callable:
        """Compiles the step for arrays shaped as these."""
        structure, _ = nnx.split(self.model)

        def step_fn(parameters, state, inputs, timestep, step_size, step):
            model = nnx.merge(structure, parameters)
            return _denoise(model, state, inputs, timestep, step_size, step)

        return (
            jax.jit(step_fn, donate_argnums=1)
            .lower(*self._arguments(state, inputs, 0))
            .compile()
        )

    def run_step(
        self, step_fn: Callable, state: SamplerState, inputs: StepInputs, index: int
    ) -> tuple[SamplerState, StepReport]:
        """Runs a step and waits for its result.

        Args:
          step_fn: What `compile` returned.
          state: From `initial_state` or the step before; its buffers are reused.
          inputs: As given to `compile`.
          index: Which step.

        Raises:
          FloatingPointError: The result is not finite.
        """
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
        step_size = jnp.float32(self.solver.step_sizes[index])
        step = self.step_plan(index)
        return nnx.state(self.model), state, inputs, timestep, step_size, step


def model_inputs(
    latents: Float[Array, "B F H W C"],
    timestep: Float[Array, ""] | float,
    inputs: StepInputs,
) -> tuple[Float[Array, "rows F H W C"], Float[Array, " rows"]]:
    """Latents and timesteps for each row of the context."""
    rows = inputs.context.shape[0]
    repeats = rows // latents.shape[0]
    return jnp.concatenate([latents] * repeats), jnp.full(rows, timestep, jnp.float32)


def _denoise(
    model: WanTransformer,
    state: SamplerState,
    inputs: StepInputs,
    timestep: Float[Array, ""],
    step_size: Float[Array, ""],
    step: DraftStep | None,
) -> tuple[SamplerState, Float[Array, " layers"], Bool[Array, ""]]:
    """One Euler step, the density of each layer, and whether all is finite."""
    velocity, masks = model(
        *model_inputs(state.latents, timestep, inputs),
        inputs.context,
        context_lengths=inputs.context_lengths,
        step=step,
        masks=state.masks,
    )
    batch = state.latents.shape[0]
    if velocity.shape[0] > batch:
        positive, negative = velocity[:batch], velocity[batch:]
        velocity = negative + inputs.guidance * (positive - negative)
    latents = euler_step(state.latents, velocity, step_size)
    kept_density = jnp.ones(model.config.num_layers)
    if step is not None and masks is not None:
        per_layer = jax.vmap(lambda mask: mask.density.mean())(masks)
        kept_density = jnp.where(step.dense, 1.0, per_layer)
    return SamplerState(latents, masks), kept_density, jnp.isfinite(latents).all()
