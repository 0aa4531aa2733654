"""A run that measures the ratios of a model for `MagCache`."""

from collections.abc import Callable, Sequence

import numpy as np

from draft_jax import AttentionPlan
from models.diffusion.caches.calibration import MagCalibration
from models.diffusion.caches.mag import describe_attention
from models.diffusion.caches.ratios import MagRatios
from models.diffusion.interfaces import ImageCondition, Images, TextContext
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.results import StepReport, StopGeneration
from models.diffusion.sampler import GuidanceBatching, Sampler
from models.diffusion.sampling import Sampling
from models.diffusion.step_programs import SamplerState, StepInputs

_DIGITS = 5  # as the published lists have them


class _Scores:
    """A `StepRecorder` of the ratios that the step before has left."""

    def __init__(self) -> None:
        self.values: list[np.ndarray] = []

    def before_step(
        self, sampler: Sampler, state: SamplerState, inputs: StepInputs, index: int
    ) -> None:
        """Reads the last step's ratios."""
        if index:
            self.read(state)

    def read(self, state: SamplerState) -> None:
        """Reads the ratios of the step that has ended in a state."""
        assert state.cache is not None  # calibration is a cache
        self.values.append(np.asarray(state.cache.score, np.float64))


def measure_ratios(
    pipeline: VideoPipeline,
    prompts: str | Sequence[str] | TextContext,
    sampling: Sampling | None = None,
    *,
    model: str,
    image: Images | ImageCondition | None = None,
    attention: AttentionPlan,
    guidance_batching: GuidanceBatching = "one_call",
    callback: Callable[[StepReport], None] | None = None,
) -> MagRatios:
    """Runs the steps of a video, all of them computed, and measures their residuals.

    The lists that the authors of MagCache published are of one prompt. Ratios of the
    run's own number of steps, shift and attention suit it best.

    Args:
      pipeline: The model; its codec is not used but for an image.
      prompts: As `VideoPipeline.generate` takes them; of several, ratios are means.
      sampling: Settings of the run; the pipeline's by default.
      model: Name of the model, for people.
      image: As in `VideoPipeline.generate`.
      attention: Attention of the run that the ratios are for.
      guidance_batching: As in `VideoPipeline.generate`.
      callback: Called after each step.

    Returns:
      The ratios, of prompts and with guidance of negative prompts, to five digits.

    Raises:
      ValueError: As `VideoPipeline.generate`, or the model gives no residual.
      FloatingPointError: What a step makes is not finite.
      StopGeneration: The callback raised it.
    """
    sampling = pipeline.sampling if sampling is None else sampling
    sampler, state, inputs = pipeline.start(
        prompts,
        sampling,
        image=image,
        attention=attention,
        guidance_batching=guidance_batching,
        cache=MagCalibration(),
    )
    programs, _ = pipeline.compile(sampler, state, inputs)
    scores = _Scores()
    state, reports = sampler.run_steps(
        programs, state, inputs, sampling.num_steps, callback, scores
    )
    if len(reports) < sampling.num_steps:
        raise StopGeneration
    scores.read(state)
    values = np.round(np.stack(scores.values, axis=1), _DIGITS)
    return MagRatios(
        values=tuple(map(tuple, values.tolist())),
        model=model,
        source="draft-video calibrate",
        attention=describe_attention(attention),
        shift=getattr(sampler.solver, "shift", None),
        num_layers=sampler.model.num_layers,
    )
