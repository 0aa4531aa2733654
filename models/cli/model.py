"""The model that a command runs and its inputs: checked first, loaded then."""

import argparse
import dataclasses
import warnings
from typing import Any

import jax
import numpy as np

from models.checkpoints.hub import commit_of
from models.cli import options
from models.cli.adapters import suggest_few_steps
from models.cli.report import run_details
from models.diffusion.contexts import as_prompts
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.sampling import Sampling
from models.loading import WAN, arguments_for_wan, find_family, load_pipeline
from models.media.image import read_image
from models.wan.image import kept_part
from models.wan.loading import WanInfo, describe_wan
from models.wan.part_files import PartFiles
from models.wan.sizes import size_like_image
from models.wan.text import TextOptions


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """The options' request, checked as far as it can be without weights.

    Attributes:
      arguments: The parsed command line.
      sampling: Settings, the model's own if the options are silent.
      image: The first frame in [-1, 1], as the file has it; None without.
      kept: Rows and columns of the image that the video shows.
      wan: The settings of a Wan model, and where its files lie; None for a small one.
    """

    arguments: argparse.Namespace
    sampling: Sampling
    image: np.ndarray | None = None
    kept: tuple[slice, slice] | None = None
    wan: WanInfo | None = None

    def load(self) -> VideoPipeline:
        """Loads the pipeline; Wan encodes prompts before its transformer is loaded."""
        arguments, sampling = self.arguments, self.sampling
        if self.wan is None:
            return load_pipeline(arguments.checkpoint)
        negative = (sampling.negative_prompt,) if sampling.guided else ()
        # Of the path and the files that were looked at: a name on the hub may stand
        # for others by now.
        pipeline = load_pipeline(
            self.wan.path,
            loras=arguments.lora,
            lora_strict=arguments.lora_strict == "yes",
            text=dataclasses.replace(
                _text_options(arguments), prompts=(arguments.prompt, *negative)
            ),
            files=self.wan.files,
        )
        if arguments.vae_tile is None:
            return pipeline
        codec = pipeline.codec.tiled(arguments.vae_tile)
        return dataclasses.replace(pipeline, codec=codec)

    def for_each_seed(self) -> list["Request"]:
        """Returns a request for each seed that was asked for."""
        seeds = getattr(self.arguments, "seeds", (self.sampling.seed,))
        return [
            dataclasses.replace(
                self, sampling=dataclasses.replace(self.sampling, seed=seed)
            )
            for seed in seeds
        ]

    def details(self) -> dict[str, Any]:
        """Returns what a reader of a report needs to repeat the run."""
        wan = self.wan
        return run_details(self.arguments, self.sampling) | {
            "image": self._image_details(),
            "model": None if wan is None else wan.model,
            "commit": None if wan is None else commit_of(wan.path),
        }

    def describe(self) -> list[str]:
        """Returns lines on what was told by the shapes of a file, or fitted."""
        lines = []
        if self.wan is not None and self.wan.model is not None:
            lines.append(f"model: {self.wan.model}, by the shapes in {self.wan.path}")
        if self.image is not None:
            lines.append(self._describe_image())
        return lines

    def _describe_image(self) -> str:
        details = self._image_details()
        assert details is not None  # there is an image
        (rows, columns), kept = details["size"], details["kept"]
        whole = kept == [[0, rows], [0, columns]]
        part = f"rows {kept[0][0]}-{kept[0][1]} and columns {kept[1][0]}-{kept[1][1]}"
        return (
            f"image: {'all' if whole else part} of {columns}x{rows}, resized to "
            f"{self.sampling.width}x{self.sampling.height}"
        )

    def _image_details(self) -> dict[str, Any] | None:
        if self.image is None or self.kept is None:
            return None
        return {
            "file": str(self.arguments.image),
            "size": list(self.image.shape[:2]),
            "kept": [[part.start, part.stop] for part in self.kept],
        }


def read_request(arguments: argparse.Namespace) -> Request:
    """Checks the options against each other, the image, and the model's settings.

    A model on the hub is fetched; no weights are read.

    Raises:
      CheckpointError: The model or stored embeddings are missing or damaged.
      OSError: The image does not exist.
      ValueError: An option, the image or the size does not suit the model.
    """
    as_prompts(arguments.prompt)
    if arguments.vae_tile is not None:
        _check_tile(arguments.vae_tile)
    options.sampling_from(arguments)  # what is wrong with any model
    image = None if arguments.image is None else read_image(arguments.image)
    path = arguments.checkpoint
    if find_family(path) is not WAN:
        _check_fits_small_model(arguments)
        sampling = options.sampling_from(arguments, Sampling())
        if path is None:
            _note_large_size(sampling)
        return Request(arguments=arguments, sampling=sampling)
    info = describe_wan(
        path,
        text=_text_options(arguments),
        files=_part_files(arguments),
        revision=arguments.revision,
    )
    info.conditioning.check_image(given=image is not None)
    sampling = _wan_sampling(arguments, info)
    info.conditioning.check_guidance(sampling)
    suggest_few_steps([file for file, _ in arguments.lora], sampling)
    if image is None:
        info.conditioning.latent_shape(sampling, info.vae)
        return Request(arguments=arguments, sampling=sampling, wan=info)
    multiples = info.conditioning.side_multiples(info.vae)
    if arguments.image_fit == "aspect":
        height, width = size_like_image(
            image.shape[:2],
            area=sampling.height * sampling.width,
            multiples=multiples,
        )
        sampling = dataclasses.replace(sampling, height=height, width=width)
    info.conditioning.latent_shape(sampling, info.vae)
    size = sampling.height, sampling.width
    return Request(
        arguments=arguments,
        sampling=sampling,
        image=image,
        kept=kept_part(image.shape[:2], size, multiples),
        wan=info,
    )


def _check_fits_small_model(arguments: argparse.Namespace) -> None:
    """Raises ValueError if options are given that a small model has no use for."""
    image = arguments.image
    if image is not None:
        raise ValueError(f"--image {image} is given, but this is a text-to-video model")
    for_wan = arguments_for_wan(
        arguments.lora,
        _text_options(arguments),
        _part_files(arguments),
        arguments.revision,
    )
    given = [f"--lora {file}" for file in for_wan.pop("loras", ())]
    given += [
        f"{flag} {getattr(arguments, name)}"
        for field, flag, name in (
            ("text.embeddings", "--embeddings", "embeddings"),
            ("text.device", "--text-device", "text_device"),
            ("files.vae", "--vae", "vae"),
            ("files.text_encoder", "--text-encoder", "text_encoder"),
            ("files.tokenizer", "--tokenizer", "tokenizer"),
            ("files.image_encoder", "--image-encoder", "image_encoder"),
            ("revision", "--revision", "revision"),
        )
        if field in for_wan
    ]
    if arguments.vae_tile is not None:
        given.append(f"--vae-tile {arguments.vae_tile}")
    if given:
        verb = "fits" if len(given) == 1 else "fit"
        raise ValueError(
            f"{' and '.join(given)} {verb} Wan models only: name one with --checkpoint"
        )


def _note_large_size(sampling: Sampling) -> None:
    """Warns of a size that the model that ships cannot fill: perhaps Wan was meant."""
    width, height, trained = sampling.width, sampling.height, Sampling()
    if width * height > trained.width * trained.height:
        warnings.warn(
            f"--size {width}x{height} is larger than {trained.width}x{trained.height}, "
            "the only size that the model that ships was trained on, and may take very "
            "long; for a Wan model, name it with --checkpoint",
            stacklevel=1,
        )


def _wan_sampling(arguments: argparse.Namespace, info: WanInfo) -> Sampling:
    width, height = getattr(
        arguments, "size", (info.sampling.width, info.sampling.height)
    )
    return options.sampling_from(arguments, info.sampling_at(height, width))


def _check_tile(pixels: int) -> None:
    if pixels < 32 or pixels % 32:
        raise ValueError(f"--vae-tile {pixels} must be a positive multiple of 32")


def _part_files(arguments: argparse.Namespace) -> PartFiles:
    return PartFiles(
        vae=arguments.vae,
        text_encoder=arguments.text_encoder,
        tokenizer=arguments.tokenizer,
        image_encoder=arguments.image_encoder,
    )


def _text_options(arguments: argparse.Namespace) -> TextOptions:
    on_cpu = arguments.text_device == "cpu"
    return TextOptions(
        embeddings=arguments.embeddings,
        device=jax.devices("cpu")[0] if on_cpu else None,
    )
