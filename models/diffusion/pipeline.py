"""Text, or an image and text, to video: encoders, the sampler around the transformer,
and the codec."""

import dataclasses
import logging
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from draft_jax.config import DraftConfig
from draft_jax.schedule import SparsitySchedule, StepKind
from models.diffusion.interfaces import (
    ClosedVocabulary,
    Codec,
    ImageCondition,
    ImageEncoder,
    LatentShape,
    TextContext,
    TextEncoder,
)
from models.diffusion.sampler import (
    GuidanceBatching,
    Sampler,
    SamplerState,
    StepInputs,
    StepReport,
)
from models.diffusion.sampling import Sampling
from models.mini.checkpoint import MiniCheckpoint, MiniTextEncoder
from models.umt5.text_encoder import default_dtype
from models.wan.conditions import (
    as_prompts,
    check_context,
    check_image_is_wanted,
    join_contexts,
    repeat_condition,
)
from models.wan.image import as_images, condition_latents, fit_images
from models.wan.layouts import ALL_PARTS, Part
from models.wan.loading import is_wan, load_wan
from models.wan.sizes import latent_shape, side_multiples
from models.wan.text import TextOptions
from models.wan.transformer import WanTransformer

_LOG = logging.getLogger(__name__)

# One image, or one for each prompt.
Images = (
    Float[Array | np.ndarray, "height width 3"]
    | Float[Array | np.ndarray, "B height width 3"]
)


class UnknownWordWarning(UserWarning):
    """A prompt has words that the text encoder was not trained on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """Videos and how they came about.

    Attributes:
      video: Values in [0, 1], one video per prompt.
      latents: What the codec decoded.
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


@dataclasses.dataclass(frozen=True)
class VideoPipeline:
    """A transformer with its encoders and codec.

    Args:
      model: The transformer. Its own choice of attention is not used; `generate`
        says which one runs.
      text_encoder: Makes the context of the prompts. None if `generate` is always
        given the context itself, so that a large encoder can be freed first.
      codec: Decodes latents, and says their shape.
      image_encoder: Makes the image tokens of an image-to-video model. None if there
        are none, or `generate` is always given the condition itself.
      sampling: What is sampled if `generate` is not told: the checkpoint's settings.
      fps: Frames per second of the videos that the model was trained on.
    """

    model: WanTransformer
    text_encoder: TextEncoder | None
    codec: Codec
    image_encoder: ImageEncoder | None = None
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    fps: float = 12.0
    _compiled: dict = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def from_checkpoint(
        cls,
        path: Path | str | None = None,
        *,
        parts: Collection[Part] = ALL_PARTS,
        loras: Iterable[tuple[Path | str, float]] = (),
        text: TextOptions | None = None,
    ) -> "VideoPipeline":
        """Loads a checkpoint, by default the model that ships.

        Computes in float32 on CPU and in bfloat16 elsewhere, Wan's codec in float32.

        Args:
          path: A folder in the format of `models/mini/weights`, or a published Wan
            model: its folder, or its repository on the hub.
          parts: What to load of a Wan model; see `open_wan_parts`.
          loras: Adapters to merge into a Wan model, each with its strength.
          text: Where a Wan model's text encoder runs, whether it is freed before the
            transformer is loaded, and where embeddings are kept. By default it stays
            on the default device.

        Returns:
          A pipeline with the weights in memory.

        Raises:
          CheckpointError: The folder is missing, incomplete, or of another format.
          ConversionError: An adapter does not fit.
          ImportError: An optional package is needed and not installed.
          UnknownPromptError: `text` gives embeddings that lack one of its prompts.
          ValueError: `parts` lacks the VAE, or options for Wan models are given for
            another one.
        """
        if path is not None and is_wan(path):
            return cls(**vars(load_wan(path, parts=parts, loras=loras, text=text)))
        _check_nothing_is_for_wan(loras, text or TextOptions())
        checkpoint = MiniCheckpoint.load(path, dtype=default_dtype())
        return cls(
            model=checkpoint.transformer,
            text_encoder=MiniTextEncoder(
                checkpoint.vocabulary, checkpoint.text_embedding
            ),
            codec=checkpoint.codec,
        )

    def latent_shape(self, sampling: Sampling) -> LatentShape:
        """Frames, rows, columns and channels of the latent of a video.

        Raises:
          ValueError: A side of the video does not suit the codec or the
            transformer's patches, or codec and transformer differ in channels.
        """
        return latent_shape(sampling, self.model.config, self.codec)

    def encode(self, prompts: str | Sequence[str]) -> TextContext:
        """The context of prompts, which `generate` takes in their place.

        Raises:
          ValueError: There is no text encoder, no prompt, or an empty one.
        """
        prompts = as_prompts(prompts)
        self._warn_of_unknown_words(prompts)
        return self._encode(prompts)

    def encode_images(self, images: Images, sampling: Sampling) -> ImageCondition:
        """The condition of first frames, which `generate` takes in their place.

        Images of another size than the video are resized as Wan2.1 does it, after the
        middle was cut out of those of clearly another aspect ratio: see `fit_images`
        and `kept_part` in `models.wan.image`. The image encoder sees what is kept in
        the image's own pixels.

        Args:
          images: First frames in [-1, 1], of any size.
          sampling: Says the size and the number of frames.

        Raises:
          FloatingPointError: The codec's latents are not finite.
          ValueError: The images are not such, or there is no encoder for the tokens
            that the model takes.
        """
        config = self.model.config
        kept, images = fit_images(
            as_images(images),
            (sampling.height, sampling.width),
            side_multiples(config, self.codec),
        )
        _LOG.info("encoding the image")
        tokens = None
        if config.image_dim is not None:
            if self.image_encoder is None:
                raise ValueError(
                    "this pipeline has no image encoder: pass an ImageCondition"
                )
            tokens = self.image_encoder.encode(kept)
        latents = condition_latents(self.codec, images, frames=sampling.frames)
        _check_codec_output("latent that the codec made of the image", latents)
        return ImageCondition(latents, tokens)

    def generate(
        self,
        prompts: str | Sequence[str] | TextContext,
        sampling: Sampling | None = None,
        *,
        image: Images | ImageCondition | None = None,
        negative_context: TextContext | None = None,
        noise: Float[Array | np.ndarray, "B F H W C"] | None = None,
        draft: DraftConfig | None = None,
        schedule: SparsitySchedule | None = None,
        guidance_batching: GuidanceBatching = "one_call",
        callback: Callable[[StepReport], None] | None = None,
    ) -> GenerationResult:
        """Generates one video for each prompt.

        Every step waits for its result, so the times are those of the device. Steps
        of a kind share a program (`StepKind`: a usual schedule has two, dense steps
        and sparse ones), which later videos of the same size use again.

        Args:
          prompts: One or more prompts, or their context, sampled as one batch. The
            noise of an item depends on the seed and its position only.
          sampling: What is sampled; `self.sampling` by default.
          image: First frame in [-1, 1] of any size (`encode_images` says how it is
            fitted), one or one for each prompt, or its condition; for an
            image-to-video model and only there.
          negative_context: Stands for `sampling.negative_prompt`: one item, or one
            for each prompt. Not read if the guidance is 1.
          noise: Stands for the initial latents that `sampling.seed` draws.
          draft: Draft attention by this configuration; None is dense attention.
          schedule: Which steps and layers stay dense all the same;
            `SparsitySchedule.paper()` by default. Not read if `draft` is None.
          guidance_batching: Whether a guided step runs prompts and negative prompts
            in "one_call" or "two_calls"; two need less memory.
          callback: Called after each step.

        Returns:
          The videos and their statistics.

        Raises:
          ValueError: There is no prompt or nothing to encode it with, or a context,
            an image, noise or a size does not suit the model.
          FloatingPointError: What a step, the codec or an encoder makes is not finite.
        """
        sampling = self.sampling if sampling is None else sampling
        sampler, state, inputs = self.start(
            prompts,
            sampling,
            image=image,
            negative_context=negative_context,
            noise=noise,
            draft=draft,
            schedule=schedule,
            guidance_batching=guidance_batching,
        )
        programs, compile_ms = self.compile(sampler, state, inputs)
        reports = []
        for index in range(sampling.num_steps):
            state, report = sampler.run_step(programs, state, inputs, index)
            reports.append(report)
            if callback is not None:
                callback(report)
        latents = state.latents
        del state, inputs  # masks can be large, and so is what decoding needs
        _LOG.info("decoding the video")
        start = time.perf_counter()
        # A whole video at 720p takes a gigabyte: chunks leave the device one by one.
        decode = getattr(self.codec, "decode_to_host", self.codec.decode)
        video = np.asarray(decode(latents), np.float32)
        _check_codec_output("video that the codec decoded", video)
        return GenerationResult(
            video=np.clip(0.5 * (video + 1.0), 0.0, 1.0),
            latents=np.asarray(latents),
            time_ms=np.array([report.time_ms for report in reports]),
            compile_ms=compile_ms,
            decode_ms=1e3 * (time.perf_counter() - start),
            kept_density=np.stack([report.kept_density for report in reports]),
            dense=sampler.dense,
            timesteps=sampler.solver.timesteps,
        )

    def start(
        self,
        prompts: str | Sequence[str] | TextContext,
        sampling: Sampling,
        *,
        image: Images | ImageCondition | None = None,
        negative_context: TextContext | None = None,
        noise: Float[Array | np.ndarray, "B F H W C"] | None = None,
        draft: DraftConfig | None,
        schedule: SparsitySchedule | None,
        guidance_batching: GuidanceBatching = "one_call",
    ) -> tuple[Sampler, SamplerState, StepInputs]:
        """What `generate` runs its first step with, for loops of your own.

        Takes and raises what `generate` does.
        """
        check_image_is_wanted(self.model.config, given=image is not None)
        shape = self.latent_shape(sampling)
        context = self._context(prompts, sampling, negative_context)
        sampler = Sampler.create(
            self.model,
            latent_shape=shape,
            solver=sampling.make_solver(),
            draft=draft,
            schedule=schedule,
            guidance_batching=guidance_batching,
        )
        batch = len(context.lengths) // (2 if sampling.guided else 1)
        inputs = StepInputs(
            *context,
            guidance=jnp.float32(sampling.guidance),
            image=self._image(image, sampling, batch, shape),
        )
        state = sampler.initial_state(batch, seed=sampling.seed, guided=sampling.guided)
        if noise is None:
            return sampler, state, inputs
        if noise.shape != state.latents.shape:
            raise ValueError(
                f"noise has shape {noise.shape}; expected {state.latents.shape}"
            )
        # A copy, for the first step reuses the memory.
        latents = jnp.array(noise, jnp.float32, copy=True)
        return sampler, state._replace(latents=latents), inputs

    def compile(
        self, sampler: Sampler, state: SamplerState, inputs: StepInputs
    ) -> tuple[dict[StepKind | None, Callable], float]:
        """The compiled steps and the milliseconds that took; 0 if known from before."""
        leaves = jax.tree.leaves((state, inputs))
        key = (
            sampler.model.config,
            sampler.latent_shape,
            type(sampler.solver),
            sampler.guidance_batching,
            tuple((leaf.shape, leaf.dtype.name) for leaf in leaves),
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
        """Rows of the prompts and, with guidance, those of negative prompts."""
        config = self.model.config
        if isinstance(prompts, TextContext):
            check_context("prompts", prompts, config)
            positive = prompts
        else:
            positive = self.encode(prompts)
        if not sampling.guided:
            return positive
        if negative is None:
            negative = self._encode([sampling.negative_prompt])
        check_context("negative_context", negative, config)
        return join_contexts(positive, negative)

    def _image(
        self,
        image: Images | ImageCondition | None,
        sampling: Sampling,
        batch: int,
        shape: LatentShape,
    ) -> ImageCondition | None:
        """The condition of every item of the batch."""
        if image is None:
            return None
        if not isinstance(image, ImageCondition):
            image = self.encode_images(image, sampling)
        return repeat_condition(image, batch, shape, self.model.config)

    def _encode(self, prompts: list[str]) -> TextContext:
        if self.text_encoder is None:
            raise ValueError(
                f"this pipeline has no text encoder for {prompts=}: pass a "
                "TextContext, and with guidance a negative_context too"
            )
        return TextContext(*self.text_encoder.encode(prompts))

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


def _check_nothing_is_for_wan(
    loras: Iterable[tuple[Path | str, float]], text: TextOptions
) -> None:
    """Raises ValueError if arguments are given that a small model has no use for."""
    adapters = [str(file) for file, _ in loras]
    given = [f"loras={adapters}"] if adapters else []
    given += [
        f"text.{field.name}={value!s}"
        for field in dataclasses.fields(text)
        if (value := getattr(text, field.name)) != field.default
    ]
    if given:
        raise ValueError(f"{' and '.join(given)}: arguments that fit Wan models only")


def _check_codec_output(what: str, array: Float[Array | np.ndarray, "..."]) -> None:
    """Raises FloatingPointError if a result is not finite; its source was."""
    # NaN is both the least and the most, so no mask as large as a video is needed.
    if not np.isfinite([float(array.min()), float(array.max())]).all():
        raise FloatingPointError(
            f"the {what} is not finite: check the codec's weights (of a Wan model its "
            "VAE), which may be damaged"
        )
