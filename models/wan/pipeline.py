"""Text to video: prompts, a sampler around the transformer, and the codec."""

import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from draft_jax.config import DraftConfig
from draft_jax.schedule import SparsitySchedule
from models.mini.checkpoint import MiniCheckpoint, MiniTextEncoder
from models.schedulers import Solver, SolverName, make_solver
from models.wan.sampler import (
    GuidanceBatching,
    LatentShape,
    Sampler,
    SamplerState,
    StepInputs,
    StepReport,
)
from models.wan.transformer import WanTransformer


class UnknownWordWarning(UserWarning):
    """A prompt has words that the text encoder was not trained on."""


@runtime_checkable
class TextEncoder(Protocol):
    """Turns prompts into the context of cross-attention."""

    def encode(
        self, prompts: Sequence[str]
    ) -> tuple[Float[Array, "B L text_dim"], Int[Array, " B"]]:
        """Context rows, padding included, and how many of them are real."""

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that training did not contain."""

    def describe_vocabulary(self) -> str:
        """What prompts can be made of, in a few words for a person."""


@runtime_checkable
class Codec(Protocol):
    """Turns latents into pixels."""

    def decode(
        self, latents: Float[Array, "B F H W C"]
    ) -> Float[Array, "B frames height width 3"]:
        """Pixels in [-1, 1]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """What is sampled. Changing a field changes the video.

    Args:
      frames: Frames of the video.
      height: Rows of pixels.
      width: Columns of pixels.
      num_steps: Steps of the sampler; each is one model call.
      guidance: Classifier-free guidance: the prediction is
        `negative + guidance * (prompt - negative)`. 1.0 turns it off, which halves
        the work.
      shift: Of the noise levels; see `FlowEuler`.
      solver: "euler" or "unipc" with its default grid, or an object with as many
        steps as `num_steps`, which has its own shift.
      seed: Of the initial noise.
      negative_prompt: What guidance leads away from.

    Raises:
      ValueError: A size is not a positive integer, the seed is not an integer in
        [0, 2**32), a number is not finite and in range, or there is no such solver.
    """

    frames: int = 24
    height: int = 96
    width: int = 128
    num_steps: int = 16
    guidance: float = 4.0
    shift: float = 3.0
    solver: SolverName | Solver = "euler"
    seed: int = 0
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed!r} must be an integer in [0, 2**32)")
        if not 0.0 <= self.guidance < float("inf"):
            raise ValueError(
                f"guidance={self.guidance!r} must be a finite number >= 0; 1 is off"
            )
        solver = self.make_solver()
        if solver.num_steps != self.num_steps:
            raise ValueError(
                f"num_steps={self.num_steps!r} must equal {solver.num_steps=}"
            )

    def make_solver(self) -> Solver:
        """The solver that `solver`, `num_steps` and `shift` describe."""
        if isinstance(self.solver, Solver):
            return self.solver
        return make_solver(self.solver, num_steps=self.num_steps, shift=self.shift)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """Videos and how they came about.

    Attributes:
      video: Values in [0, 1], one video per prompt.
      latents: What the codec decoded.
      time_ms: Duration of each step, without compilation.
      compile_ms: Time to trace and compile the step; 0 if it was compiled before.
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


@dataclasses.dataclass(frozen=True)
class VideoPipeline:
    """A transformer with its text encoder and codec.

    Args:
      model: The transformer. Its own choice of attention is not used; `generate`
        says which one runs.
      text_encoder: Makes the context of the prompts.
      codec: Decodes latents.
      codec_stride: Frames, rows and columns of pixels in one latent position.
    """

    model: WanTransformer
    text_encoder: TextEncoder
    codec: Codec
    codec_stride: tuple[int, int, int]
    _compiled: dict = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def from_checkpoint(cls, path: Path | str | None = None) -> "VideoPipeline":
        """Loads a checkpoint folder, by default the model that ships.

        Computes in float32 on CPU and in bfloat16 elsewhere.

        Args:
          path: A folder in the format of `models/mini/weights`.

        Returns:
          A pipeline with the weights in memory.

        Raises:
          CheckpointError: The folder is missing, incomplete, or of another format.
        """
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        checkpoint = MiniCheckpoint.load(path, dtype=dtype)
        return cls(
            model=checkpoint.transformer,
            text_encoder=MiniTextEncoder(
                checkpoint.vocabulary, checkpoint.text_embedding
            ),
            codec=checkpoint.codec,
            codec_stride=checkpoint.codec.stride,
        )

    def latent_shape(self, sampling: Sampling) -> LatentShape:
        """Frames, rows, columns and channels of the latent of a video.

        Raises:
          ValueError: A side of the video is not a multiple of what the codec and
            the transformer's patches need.
        """
        sides = []
        for name, stride, patch in zip(
            ("frames", "height", "width"),
            self.codec_stride,
            self.model.config.patch_size,
            strict=True,
        ):
            value = getattr(sampling, name)
            if value % (stride * patch):
                raise ValueError(
                    f"{name}={value} must be a multiple of {stride * patch} for this "
                    "model"
                )
            sides.append(value // stride)
        frames, rows, columns = sides
        return frames, rows, columns, self.model.config.in_channels

    def generate(
        self,
        prompts: str | Sequence[str],
        sampling: Sampling | None = None,
        *,
        draft: DraftConfig | None = None,
        schedule: SparsitySchedule | None = None,
        guidance_batching: GuidanceBatching = "one_call",
        callback: Callable[[StepReport], None] | None = None,
    ) -> GenerationResult:
        """Generates one video for each prompt.

        Every step waits for its result, so the times are those of the device, and
        one compilation serves dense and sparse steps alike.

        Args:
          prompts: One or more prompts, sampled as one batch. The noise of an item
            depends on the seed and its position only.
          sampling: What is sampled; `Sampling()` by default.
          draft: Draft attention by this configuration; None is dense attention.
          schedule: Which steps and layers stay dense all the same;
            `SparsitySchedule.paper()` by default. Not read if `draft` is None.
          guidance_batching: Whether a guided step runs prompts and negative prompts
            in "one_call" or "two_calls"; two need less memory.
          callback: Called after each step.

        Returns:
          The videos and their statistics.

        Raises:
          ValueError: There is no prompt, or a size does not suit the model.
          FloatingPointError: A step's result is not finite.
        """
        sampling = Sampling() if sampling is None else sampling
        sampler, state, inputs = self.start(
            prompts,
            sampling,
            draft=draft,
            schedule=schedule,
            guidance_batching=guidance_batching,
        )
        step_fn, compile_ms = self.compile(sampler, state, inputs)
        reports = []
        for index in range(sampling.num_steps):
            state, report = sampler.run_step(step_fn, state, inputs, index)
            reports.append(report)
            if callback is not None:
                callback(report)
        start = time.perf_counter()
        video = np.asarray(self.codec.decode(state.latents), np.float32)
        return GenerationResult(
            video=np.clip(0.5 * (video + 1.0), 0.0, 1.0),
            latents=np.asarray(state.latents),
            time_ms=np.array([report.time_ms for report in reports]),
            compile_ms=compile_ms,
            decode_ms=1e3 * (time.perf_counter() - start),
            kept_density=np.stack([report.kept_density for report in reports]),
            dense=sampler.dense,
            timesteps=sampler.solver.timesteps,
        )

    def start(
        self,
        prompts: str | Sequence[str],
        sampling: Sampling,
        *,
        draft: DraftConfig | None,
        schedule: SparsitySchedule | None,
        guidance_batching: GuidanceBatching = "one_call",
    ) -> tuple[Sampler, SamplerState, StepInputs]:
        """What `generate` runs its first step with, for loops of your own.

        Takes and raises what `generate` does.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self._check_prompts(prompts)
        sampler = Sampler.create(
            self.model,
            latent_shape=self.latent_shape(sampling),
            solver=sampling.make_solver(),
            draft=draft,
            schedule=schedule,
            guidance_batching=guidance_batching,
        )
        guided = sampling.guidance != 1.0
        negative = [sampling.negative_prompt] * len(prompts) if guided else []
        context, lengths = self.text_encoder.encode(prompts + negative)
        inputs = StepInputs(context, lengths, jnp.float32(sampling.guidance))
        state = sampler.initial_state(len(prompts), seed=sampling.seed, guided=guided)
        return sampler, state, inputs

    def compile(
        self, sampler: Sampler, state: SamplerState, inputs: StepInputs
    ) -> tuple[Callable, float]:
        """The compiled step and the milliseconds it took; 0 if known from before."""
        leaves = jax.tree.leaves((state, inputs))
        key = (
            sampler.model.config,
            sampler.latent_shape,
            type(sampler.solver),
            sampler.guidance_batching,
            tuple((leaf.shape, leaf.dtype.name) for leaf in leaves),
        )
        if key in self._compiled:
            return self._compiled[key], 0.0
        start = time.perf_counter()
        self._compiled[key] = sampler.compile(state, inputs)
        return self._compiled[key], 1e3 * (time.perf_counter() - start)

    def _check_prompts(self, prompts: list[str]) -> None:
        if not prompts or not all(prompt.strip() for prompt in prompts):
            raise ValueError(f"{prompts=} must be at least one prompt, none empty")
        unknown = dict.fromkeys(
            word
            for prompt in prompts
            for word in self.text_encoder.unknown_words(prompt)
        )
        if unknown:
            warnings.warn(
                f"the model was not trained on {', '.join(map(repr, unknown))}; "
                f"{self.text_encoder.describe_vocabulary()}",
                UnknownWordWarning,
                stacklevel=4,
            )
