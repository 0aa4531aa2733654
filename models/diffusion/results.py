"""Reports on steps and runs: times, kept shares, videos."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StepReport:
    """One finished step, as callbacks get it.

    Attributes:
      index: 0 to num_steps - 1.
      num_steps: Steps of the run.
      timestep: Timestep that the model was given, 0 to 1000.
      time_ms: Time until the result was there.
      kept_density: Share of token pairs each layer computed; 1.0 where dense.
    """

    index: int
    num_steps: int
    timestep: float
    time_ms: float
    kept_density: Float[np.ndarray, " layers"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GenerationResult:
    """Videos and how they came about.

    Attributes:
      video: Values in [0, 1], one video per prompt.
      latents: Latents that the codec decoded.
      time_ms: Duration of each step, without compilation.
      compile_ms: Time to trace and compile the steps; 0 if all were compiled before.
      decode_ms: Time of the codec, its compilation included.
      kept_density: Share of token pairs computed, mean over batch and heads; 1.0
        where a step and layer ran dense.
      dense: Which steps and layers ran dense.
      timesteps: Model timestep of each step.
    """

    video: Float[np.ndarray, "B frames height width 3"]
    latents: Float[np.ndarray, "B F H W C"]
    time_ms: Float[np.ndarray, " steps"]
    compile_ms: float
    decode_ms: float
    kept_density: Float[np.ndarray, "steps layers"]
    dense: Bool[np.ndarray, "steps layers"]
    timesteps: Float[np.ndarray, " steps"]
