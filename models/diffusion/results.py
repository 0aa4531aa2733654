"""Reports on steps and runs: times, kept shares, videos."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Array, Bool, Float

# How a step was computed: dense in every layer, sparse in some, or skipped by a cache.
StepWork = Literal["dense", "sparse", "skipped"]


class StopGeneration(Exception):  # noqa: N818 -- no error, as StopIteration is none
    """Raised by a callback to end a run after the step that it was called for."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StepReport:
    """One finished step, as callbacks get it.

    Attributes:
      index: 0 to num_steps - 1.
      num_steps: Steps of the run.
      timestep: Timestep that the model was given, 0 to 1000.
      time_ms: Time until the result was there.
      kept_density: Share of token pairs each layer computed: 1.0 where dense, and 0.0
        where a cache skipped the step.
      work: How the step was computed.
      weight_only: Whether linear layers in FP8 rounded no inputs; see `Sampler`.
      time_left_ms: Time that the steps left take, if each takes as long as those of
        its kind before; of a kind that was not run yet, as long as all before.
      estimate: The clean latents as the step predicts them, on the device, up to the
        rounding of the timestep. `VideoPipeline.preview` makes a picture of them.
        None in the reports of earlier steps, which would fill the memory.
    """

    index: int
    num_steps: int
    timestep: float
    time_ms: float
    kept_density: Float[np.ndarray, " layers"]
    work: StepWork = "dense"
    weight_only: bool = False
    time_left_ms: float = 0.0
    estimate: Float[Array, "B F H W C"] | None = None


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
        where a step and layer ran dense, 0.0 where a step was skipped.
      dense: Which steps and layers ran dense.
      timesteps: Model timestep of each step.
      stopped: Whether `StopGeneration` ended the run before its last step. There are
        as many steps as were run then, and the video is their estimate of the clean
        one.
      extra_work: Work of a sparse layer beyond its kept blocks, that of means and
        exact rows, as a share of dense attention's; see `draft_jax.extra_work`.
      weight_only_steps: Steps, from 0, in which linear layers in FP8 rounded no inputs.
    """

    video: Float[np.ndarray, "B frames height width 3"]
    latents: Float[np.ndarray, "B F H W C"]
    time_ms: Float[np.ndarray, " steps"]
    compile_ms: float
    decode_ms: float
    kept_density: Float[np.ndarray, "steps layers"]
    dense: Bool[np.ndarray, "steps layers"]
    timesteps: Float[np.ndarray, " steps"]
    stopped: bool = False
    extra_work: float = 0.0
    weight_only_steps: tuple[int, ...] = ()

    @property
    def skipped(self) -> Bool[np.ndarray, " steps"]:
        """Which steps a cache skipped; no other step computes nothing."""
        return (self.kept_density == 0.0).all(axis=1)

    @property
    def work(self) -> tuple[StepWork, ...]:
        """How each step was computed."""
        dense = self.dense.all(axis=1)
        return tuple(
            "skipped" if skip else "dense" if full else "sparse"
            for skip, full in zip(self.skipped, dense, strict=True)
        )

    @property
    def work_share(self) -> float:
        """Work of all steps and layers over that of dense attention.

        It is the mean of `kept_density` where sparse layers have no `extra_work`.
        """
        is_sparse = ~self.dense & ~self.skipped[:, None]
        extra = self.extra_work * float(is_sparse.mean())
        return float(self.kept_density.mean()) + extra


class DecodingError(RuntimeError):
    """The codec could not decode what the steps have made. Nothing of it is lost.

    Attributes:
      result: The run without its video, which has no frames. Its latents are what
        `VideoPipeline.decode` takes later, with more memory or on tiles
        (`Codec.tiled`).
      finished: The videos of earlier seeds, where there are several; None without.
    """

    def __init__(self, result: GenerationResult, reason: Exception):
        self.result = result
        self.finished: GenerationResult | None = None
        said = " ".join(str(reason).split()) or type(reason).__name__
        super().__init__(f"the video cannot be decoded: {said}")
