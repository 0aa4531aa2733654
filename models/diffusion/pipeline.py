"""A pipeline from text, or an image and text, to video.

Encoders, the sampler around the transformer, and the codec; the model's family is
known by `interfaces` alone.
"""

import dataclasses
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from draft_jax import AttentionPlan, extra_work
from models.diffusion.caches import StepCache
from models.diffusion.caches.interfaces import check_count
from models.diffusion.contexts import as_prompts, join_contexts
from models.diffusion.decoding import check_codec_output, decode_video
from models.diffusion.experts import Experts
from models.diffusion.interfaces import (
    ClosedVocabulary,
    Codec,
    ImageCondition,
    ImageEncoder,
    Images,
    LatentShape,
    TextContext,
    TextEncoder,
    VideoModel,
)
from models.diffusion.mesh import DeviceMesh, on_one_device
from models.diffusion.results import DecodingError, GenerationResult, StepReport
from models.diffusion.sampler import (
    GuidanceBatching,
    Sampler,
    SamplerState,
    StepInputs,
    StepRecorder,
)
from models.diffusion.sampling import Sampling
from models.diffusion.seeds import items_of_seeds, join_results
from models.diffusion.sizes import shrink_latents
from models.diffusion.step_programs import Program
from models.diffusion.transformer.sharded import ShardedTransformer

_LOG = logging.getLogger(__name__)

DENSE = AttentionPlan.dense()
PREVIEW_POSITIONS = 60 * 104  # most of a preview: the latent frame of 832 x 480 pixels


class UnknownWordWarning(UserWarning):
    """A prompt has words that the text encoder was not trained on."""


class EmptyPromptWarning(UserWarning):
    """A prompt has no text."""


class CacheWarning(UserWarning):
    """Constants of a step cache belong to another run, or it skips nothing."""


@dataclasses.dataclass(frozen=True)
class VideoPipeline:
    """A transformer with its encoders and codec.

    Args:
      model: The transformer; `models.loading.load_pipeline` reads one.
      text_encoder: Makes the context of the prompts. None if `generate` is always
        given the context itself, so that a large encoder can be freed first.
      codec: Decodes latents, and says their shape.
      image_encoder: Makes the image tokens of an image-to-video model. None if there
        are none, or `generate` is always given the condition itself.
      sampling: Settings if `generate` is not told: those of the checkpoint.
      fps: Frames per second of the videos that the model was trained on.
      experts: Two transformers that take turns by the noise level; `model` is theirs.
      mesh: Devices that share the work of the transformer; None for one. `model` is a
        `ShardedTransformer` then. Encoders and codec run on one device.
      weight_only_steps: Last computed steps of a run in which linear layers in FP8
        round no inputs; see `Sampler`.

    Raises:
      ValueError: The mesh does not fit the devices or the model's heads, there are two
        transformers of which one waits in the host's memory, or weight_only_steps is
        not an integer >= 0.
    """

    model: VideoModel
    text_encoder: TextEncoder | None
    codec: Codec
    image_encoder: ImageEncoder | None = None
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    fps: float = 12.0
    experts: Experts | None = None
    mesh: DeviceMesh | None = None
    weight_only_steps: int = 1
    _compiled: dict = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_count("weight_only_steps", self.weight_only_steps, least=0)
        mesh = self.mesh
        if mesh is None:
            return

        def share(model: Any) -> VideoModel:
            if isinstance(model, ShardedTransformer):
                return model
            return ShardedTransformer(model, mesh)

        if self.experts is None:
            object.__setattr__(self, "model", share(self.model))
            return
        experts = self.experts.on_devices(share)
        object.__setattr__(self, "experts", experts)
        object.__setattr__(self, "model", experts.model)

    def latent_shape(self, sampling: Sampling) -> LatentShape:
        """Returns frames, rows, columns and channels of the latent of a video.

        Raises:
          ValueError: A side of the video does not suit the codec or the
            transformer's patches, or codec and transformer differ in channels.
        """
        return self.model.conditioning.latent_shape(sampling, self.codec)

    def encode(self, prompts: str | Sequence[str]) -> TextContext:
        """Returns the context of prompts, which `generate` takes in their place.

        Raises:
          ValueError: There is no text encoder, or no prompt.
        """
        prompts = as_prompts(prompts)
        if not all(prompt.strip() for prompt in prompts):
            warnings.warn(
                "a prompt is empty: the video is what the model makes without text",
                EmptyPromptWarning,
                skip_file_prefixes=(__file__,),  # the caller's line
            )
        self._warn_of_unknown_words(prompts)
        return self._encode(prompts)

    def encode_images(self, images: Images, sampling: Sampling) -> ImageCondition:
        """Returns the condition of first frames, which `generate` takes in their place.

        The model's family says how an image of another size is fitted; see the
        `image_condition` of its conditioning.

        Args:
          images: First frames in [-1, 1], of any size.
          sampling: Says the size and the number of frames.

        Raises:
          FloatingPointError: The codec's latents are not finite.
          ValueError: The images are not such, or there is no encoder for the tokens
            that the model takes.
        """
        _LOG.info("encoding the image")
        condition = self.model.conditioning.image_condition(
            images, sampling, codec=self.codec, image_encoder=self.image_encoder
        )
        check_codec_output("latent that the codec made of the image", condition.latents)
        return condition

    def generate(
        self,
        prompts: str | Sequence[str] | TextContext,
        sampling: Sampling | None = None,
        *,
        image: Images | ImageCondition | None = None,
        negative_context: TextContext | None = None,
        seeds: Sequence[int] | None = None,
        noise: Float[Array | np.ndarray, "B F H W C"] | None = None,
        attention: AttentionPlan = DENSE,
        guidance_batching: GuidanceBatching = "one_call",
        cache: StepCache | None = None,
        callback: Callable[[StepReport], None] | None = None,
        recorder: StepRecorder | None = None,
    ) -> GenerationResult:
        """Generates one video for each prompt.

        Every step waits for its result, so the times are those of the device. Steps
        of a kind share a program (`StepKind`: a usual schedule has two, dense steps
        and sparse ones), which later videos of the same size use again.

        Args:
          prompts: One or more prompts, or their context, sampled as one batch. The
            noise of an item depends on the seed and its position only.
          sampling: Settings of the run; `self.sampling` by default.
          image: First frame in [-1, 1] of any size (`encode_images` says how it is
            fitted), one or one for each prompt, or its condition; for an
            image-to-video model and only there.
          negative_context: Stands for `sampling.negative_prompt`: one item, or one
            for each prompt. Not read if the guidance is 1.
          seeds: A seed for each item, in place of `sampling.seed`; one prompt serves
            all. Items are then sampled one after another: each is, bit for bit, the
            video that its prompt and seed make alone, which a batch's is not.
          noise: Stands for the initial latents that `sampling.seed` draws.
          attention: Dense attention, or draft attention with its schedule.
          guidance_batching: Whether a guided step runs prompts and negative prompts
            in "one_call" or "two_calls"; two need less memory.
          cache: Rule by which steps are skipped, such as `EasyCache()`; None to
            compute every step. Of several seeds each skips its own steps.
          callback: Called after each step. Raising `StopGeneration` ends the run
            there: what was computed is decoded and returned. Of several seeds, the
            videos that are finished are returned, or else the first as far as it is.
          recorder: Called before each step, such as `AttentionRecorder`.

        Returns:
          The videos and their statistics.

        Raises:
          ValueError: There is no prompt or nothing to encode it with, or a context,
            an image, noise or a size does not suit the model, or seeds are not as
            many as what they are for.
          FloatingPointError: What a step or an encoder makes is not finite.
          DecodingError: The codec failed, for lack of memory say. The error has the
            latents, which `decode` takes later.
        """
        sampling = self.sampling if sampling is None else sampling
        if seeds is not None:
            if noise is not None:
                raise ValueError(f"{seeds=} and noise are both given; expected one")
            items = items_of_seeds(
                seeds, prompts, sampling, image=image, negative_context=negative_context
            )
            results: list[GenerationResult] = []
            for item in items:
                try:
                    result = self.generate(
                        **vars(item),
                        attention=attention,
                        guidance_batching=guidance_batching,
                        cache=cache,
                        callback=callback,
                        recorder=recorder,
                    )
                except DecodingError as error:
                    error.finished = join_results(results) if results else None
                    raise
                results.append(result)
                if result.stopped:
                    break
            return join_results(results)
        sampler, state, inputs = self.start(
            prompts,
            sampling,
            image=image,
            negative_context=negative_context,
            noise=noise,
            attention=attention,
            guidance_batching=guidance_batching,
            cache=cache,
        )
        programs, compile_ms = self.compile(sampler, state, inputs)
        state, reports = sampler.run_steps(
            programs, state, inputs, sampling.num_steps, callback, recorder
        )
        num_steps = len(reports)
        stopped = num_steps < sampling.num_steps
        latents = reports[-1].estimate if stopped else on_one_device(state.latents)
        assert latents is not None  # the last report has it
        del state, inputs  # masks can be large, and so is what decoding needs
        skipped = np.array([report.work == "skipped" for report in reports])
        result = GenerationResult(
            video=np.zeros((len(latents), 0, sampling.height, sampling.width, 3)),
            latents=np.asarray(latents),
            time_ms=np.array([report.time_ms for report in reports]),
            compile_ms=compile_ms,
            decode_ms=0.0,
            kept_density=np.stack([report.kept_density for report in reports]),
            dense=sampler.dense[:num_steps] & ~skipped[:, None],
            timesteps=sampler.solver.timesteps[:num_steps],
            stopped=stopped,
            extra_work=_extra_work(sampler),
            weight_only_steps=tuple(r.index for r in reports if r.weight_only),
        )
        start = time.perf_counter()
        try:
            video = self.decode(latents)
        except Exception as error:  # whatever it is: the steps took far longer
            raise DecodingError(result, error) from error
        decode_ms = 1e3 * (time.perf_counter() - start)
        return dataclasses.replace(result, video=video, decode_ms=decode_ms)

    def decode(
        self, latents: Float[Array | np.ndarray, "B F H W C"]
    ) -> Float[np.ndarray, "B frames height width 3"]:
        """Returns the video of latents, such as those of a `DecodingError`.

        Returns:
          Values in [0, 1].

        Raises:
          FloatingPointError: What the codec makes is not finite.
        """
        _LOG.info("decoding the video")
        return decode_video(self.codec, latents)

    def preview(
        self, estimate: Float[Array, "B F H W C"]
    ) -> Float[np.ndarray, "B height width 3"]:
        """Returns a picture of unfinished latents, such as `StepReport.estimate`.

        One latent frame is decoded, the middle one and by itself; of a large video
        the mean of neighbours. So it is cheap, and coarser than the video's frame.

        Returns:
          The first frame that it is decoded to, in [0, 1].
        """
        middle = estimate.shape[1] // 2
        frame = shrink_latents(estimate[:, middle : middle + 1], PREVIEW_POSITIONS)
        video = np.asarray(self.codec.decode(frame)[:, 0], np.float32)
        return np.clip(0.5 * (video + 1.0), 0.0, 1.0)

    def preview_video(
        self, estimate: Float[Array | np.ndarray, "B F H W C"]
    ) -> Float[np.ndarray, "B frames height width 3"]:
        """Returns a small video of unfinished latents, all its frames.

        Of a large video it shows the mean of neighbours: sides are at most a few
        hundred pixels.
        """
        small = shrink_latents(jnp.asarray(estimate), PREVIEW_POSITIONS // 4)
        decode = getattr(self.codec, "decode_to_host", self.codec.decode)
        return np.clip(0.5 * (np.asarray(decode(small), np.float32) + 1.0), 0.0, 1.0)

    def start(
        self,
        prompts: str | Sequence[str] | TextContext,
        sampling: Sampling,
        *,
        image: Images | ImageCondition | None = None,
        negative_context: TextContext | None = None,
        noise: Float[Array | np.ndarray, "B F H W C"] | None = None,
        attention: AttentionPlan = DENSE,
        guidance_batching: GuidanceBatching = "one_call",
        cache: StepCache | None = None,
    ) -> tuple[Sampler, SamplerState, StepInputs]:
        """Prepares what `generate` runs its first step with, for loops of your own.

        Takes and raises what `generate` does.
        """
        conditioning = self.model.conditioning
        conditioning.check_image(given=image is not None)
        conditioning.check_guidance(sampling)
        for name in ("low_guidance", "boundary"):
            if (value := getattr(sampling, name)) is not None and self.experts is None:
                raise ValueError(
                    f"sampling.{name}={value} is given, but this model has one "
                    "transformer for all noise levels: set it to None"
                )
        shape, solver = self.latent_shape(sampling), sampling.make_solver()
        for note in [] if cache is None else cache.notes(solver, attention):
            warnings.warn(note, CacheWarning, skip_file_prefixes=(__file__,))
        context = self._context(prompts, sampling, negative_context)
        sampler = Sampler.create(
            self.model,
            latent_shape=shape,
            solver=solver,
            attention=attention,
            guidance_batching=guidance_batching,
            cache=cache,
            experts=self.experts,
            low_guidance=sampling.low_guidance,
            boundary=sampling.boundary,
            weight_only_steps=self.weight_only_steps,
        )
        batch = len(context.lengths) // (2 if sampling.guided else 1)
        inputs = StepInputs(
            context,
            guidance=jnp.float32(sampling.guidance),
            image=self._image(image, sampling, batch, shape),
            embedded_guidance=(
                None
                if sampling.embedded_guidance is None
                else jnp.float32(sampling.embedded_guidance)
            ),
        )
        state = sampler.initial_state(batch, seed=sampling.seed, guided=sampling.guided)
        latents = state.latents
        if noise is not None:
            if noise.shape != latents.shape:
                raise ValueError(
                    f"noise has shape {noise.shape}; expected {latents.shape}"
                )
            # A copy, for the first step reuses the memory.
            latents = jnp.array(noise, jnp.float32, copy=True)
        latents = conditioning.hold_frames(latents, inputs.image)
        if isinstance(self.model, ShardedTransformer):
            latents = self.model.put_everywhere(latents)
            inputs = self.model.put_everywhere(inputs)
        return sampler, state._replace(latents=latents), inputs

    def compile(
        self, sampler: Sampler, state: SamplerState, inputs: StepInputs
    ) -> tuple[dict[Program, Callable], float]:
        """Returns compiled steps and the milliseconds that took; 0 if known before."""
        arrays = nnx.state(sampler.model), state, inputs
        key = (
            sampler.model.config,
            sampler.latent_shape,
            type(sampler.solver),
            # Not the schedule: programs that two schedules share are looked up by
            # their kind below.
            sampler.attention.config,
            sampler.guidance_batching,
            type(sampler.cache),  # its constants are read on the host
            # Shardings tell the devices too; a program serves no others.
            tuple(
                (leaf.shape, leaf.dtype.name, leaf.sharding)
                for leaf in jax.tree.leaves(arrays)
            ),
        )
        known = self._compiled.setdefault(key, {})
        missing = [kind for kind in sampler.kinds if kind not in known]
        if not missing:
            return known, 0.0
        start = time.perf_counter()
        known |= sampler.compile(state, inputs, missing)
        return known, 1e3 * (time.perf_counter() - start)

    def _context(
        self,
        prompts: str | Sequence[str] | TextContext,
        sampling: Sampling,
        negative: TextContext | None,
    ) -> TextContext:
        """Returns rows of the prompts and, with guidance, those of negative prompts."""
        check_context = self.model.conditioning.check_context
        if isinstance(prompts, TextContext):
            check_context("prompts", prompts)
            positive = prompts
        else:
            positive = self.encode(prompts)
        if not sampling.guided:
            return positive
        if negative is None:
            negative = self._encode([sampling.negative_prompt])
        check_context("negative_context", negative)
        return join_contexts(positive, negative)

    def _image(
        self,
        image: Images | ImageCondition | None,
        sampling: Sampling,
        batch: int,
        shape: LatentShape,
    ) -> ImageCondition | None:
        """Returns the condition of every item of the batch."""
        if image is None:
            return None
        if not isinstance(image, ImageCondition):
            image = self.encode_images(image, sampling)
        return self.model.conditioning.repeat_condition(image, batch, shape)

    def _encode(self, prompts: list[str]) -> TextContext:
        if self.text_encoder is None:
            raise ValueError(
                f"this pipeline has no text encoder for {prompts=}: pass a "
                "TextContext, and with guidance a negative_context too"
            )
        return self.text_encoder.encode(prompts)

    def _warn_of_unknown_words(self, prompts: list[str]) -> None:
        encoder = self.text_encoder
        if not isinstance(encoder, ClosedVocabulary):
            return
        unknown = dict.fromkeys(
            word for prompt in prompts for word in encoder.unknown_words(prompt)
        )
        if unknown:
            warnings.warn(
                f"the model was not trained on {', '.join(map(repr, unknown))}; "
                f"{encoder.describe_vocabulary()}",
                UnknownWordWarning,
                skip_file_prefixes=(__file__,),  # the caller's line
            )


def _extra_work(sampler: Sampler) -> float:
    """Returns `extra_work` of a sparse layer; 0 with dense attention."""
    config = sampler.attention.config
    if config is None:
        return 0.0
    return extra_work(sampler.model.grid(sampler.latent_shape), config)
