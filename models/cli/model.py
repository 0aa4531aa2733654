"""The model that a command runs and its inputs: checked first, loaded then."""

import argparse
import dataclasses
import warnings
from typing import Any

import jax
import numpy as np

from draft_jax import DraftConfig, SparsitySchedule
from models.checkpoints.hub import commit_of
from models.cli import options
from models.cli.adapters import suggest_few_steps
from models.cli.caching import cache_from, describe_cache
from models.cli.mesh import check_devices, mesh_from
from models.cli.pair_options import check_one_transformer
from models.cli.report import run_details
from models.cli.speed import describe_speed, speed_details
from models.cli.tiles import check_tile, with_tiles
from models.diffusion.caches import StepCache
from models.diffusion.contexts import as_prompts
from models.diffusion.dtypes import check_linears
from models.diffusion.family import Family, ModelInfo
from models.diffusion.folders.part_files import PartFiles
from models.diffusion.images import kept_part
from models.diffusion.mesh import DeviceMesh
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.sampling import Sampling
from models.diffusion.sizes import size_like_image
from models.diffusion.text_options import TextOptions
from models.loading import (
    change_codec,
    find_family,
    given_arguments,
    load_pipeline,
    name_families,
)
from models.media.image import read_image


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """The options' request, checked as far as it can be without weights.

    Attributes:
      arguments: The parsed command line.
      family: Family of the model.
      sampling: Settings, the model's own if the options are silent.
      image: The first frame in [-1, 1], as the file has it; None without.
      kept: Rows and columns of the image that the video shows.
      info: The model's settings, and where its files lie.
    """

    arguments: argparse.Namespace
    family: Family
    sampling: Sampling
    info: ModelInfo
    image: np.ndarray | None = None
    kept: tuple[slice, slice] | None = None

    @property
    def draft(self) -> tuple[DraftConfig, SparsitySchedule]:
        """The draft's settings and schedule, the model's own if that is asked for."""
        return options.draft_from(self.arguments, self.info.published)

    @property
    def cache(self) -> StepCache | None:
        """Rule of the step cache that is asked for; None to compute every step."""
        return cache_from(self.arguments, self.info, self.sampling)

    @property
    def mesh(self) -> DeviceMesh | None:
        """Devices that share the work; None for one."""
        return mesh_from(self.arguments)

    def load(self, *, any_prompt: bool = False) -> VideoPipeline:
        """Loads the pipeline.

        Args:
          any_prompt: Whether it is to serve other prompts, too, for which text
            encoders stay in memory. Else they run before the transformer is loaded.
        """
        arguments, sampling = self.arguments, self.sampling
        if "text.prompts" not in self.family.takes:
            return load_pipeline(
                arguments.checkpoint, linears=arguments.linears, mesh=self.mesh
            )
        negative = (sampling.negative_prompt,) if sampling.guided else ()
        prompts = None if any_prompt else (arguments.prompt, *negative)
        # Of the path and the files that were looked at: a name on the hub may stand
        # for others by now.
        pipeline = load_pipeline(
            self.info.path,
            loras=arguments.lora,
            lora_strict=arguments.lora_strict == "yes",
            text=dataclasses.replace(_text_options(arguments), prompts=prompts),
            files=self.info.files,
            linears=arguments.linears,
            mesh=self.mesh,
        )
        codec = change_codec(pipeline.codec, dtype=arguments.vae_dtype)
        codec = with_tiles(codec, arguments)
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
        return run_details(self.arguments, self.sampling, *self.draft) | {
            "family": self.family.name,
            "speed": speed_details(self.arguments),
            "cache": None if self.cache is None else self.cache.describe(),
            "mesh": None if self.mesh is None else dataclasses.asdict(self.mesh),
            "image": self._image_details(),
            "model": self.info.model,
            "commit": commit_of(self.info.path),
        }

    def describe(self) -> list[str]:
        """Returns lines on what was chosen, told by the shapes of a file, or fitted."""
        lines = describe_speed(self.arguments)
        info = self.info
        if info.model is not None:
            lines.append(f"model: {info.model}, by the shapes in {info.path}")
        if self.image is not None:
            lines.append(self._describe_image())
        return lines + describe_cache(self.arguments, self.cache, self.sampling)

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
    options.sampling_from(arguments)  # what is wrong with any model
    image = None if arguments.image is None else read_image(arguments.image)
    request = read_model(arguments)
    info, sampling = request.info, request.sampling
    info.conditioning.check_image(given=image is not None)
    info.conditioning.check_guidance(sampling)
    options.check_preset(arguments, info.published)
    if arguments.checkpoint is None:
        _note_large_size(sampling)
    suggest_few_steps([file for file, _ in arguments.lora], sampling)
    if image is None:
        _check_mesh(request)
        return request
    multiples = info.conditioning.side_multiples(info.codec)
    if arguments.image_fit == "aspect":
        height, width = size_like_image(
            image.shape[:2],
            area=sampling.height * sampling.width,
            multiples=multiples,
        )
        sampling = dataclasses.replace(sampling, height=height, width=width)
    size = sampling.height, sampling.width
    request = dataclasses.replace(
        request,
        sampling=sampling,
        image=image,
        kept=kept_part(image.shape[:2], size, multiples),
    )
    _check_mesh(request)
    return request


def _check_mesh(request: Request) -> None:
    """Checks the size of the video, and the mesh that is to share the work."""
    conditioning, sampling = request.info.conditioning, request.sampling
    latent_shape = conditioning.latent_shape(sampling, request.info.codec)
    mesh = request.mesh
    if mesh is None:
        return
    two_calls = request.arguments.guidance_batching == "two_calls"
    mesh.check_rows(2 if sampling.guided and not two_calls else 1)
    conditioning.check_mesh(mesh, latent_shape)
    check_devices(mesh)


def read_model(arguments: argparse.Namespace) -> Request:
    """Returns a request of which the model is checked, but neither image nor size.

    A model on the hub is fetched; no weights are read.

    Raises:
      CheckpointError: The model or stored embeddings are missing or damaged.
      ValueError: An option does not suit the model.
    """
    if arguments.vae_tile is not None:
        check_tile(arguments.vae_tile)
    family, commit = find_family(arguments.checkpoint, revision=arguments.revision)
    _check_fits(arguments, family)
    check_linears(arguments.linears, apart=family.text_beside_jax)
    info = family.describe(
        arguments.checkpoint,
        text=_text_options(arguments),
        files=_part_files(arguments),
        revision=commit,
    )
    if info.sampling.boundary is None:
        check_one_transformer(arguments)
    sampling = _sampling(arguments, info)
    return Request(arguments=arguments, family=family, sampling=sampling, info=info)


# Flags of arguments that not every family takes.
_FLAGS = {
    "text.embeddings": ("--embeddings", "embeddings"),
    "text.device": ("--text-device", "text_device"),
    "files.vae": ("--vae", "vae"),
    "files.text_encoder": ("--text-encoder", "text_encoder"),
    "files.tokenizer": ("--tokenizer", "tokenizer"),
    "files.text_encoder_2": ("--text-encoder-2", "text_encoder_2"),
    "files.tokenizer_2": ("--tokenizer-2", "tokenizer_2"),
    "files.image_encoder": ("--image-encoder", "image_encoder"),
    "revision": ("--revision", "revision"),
    "tiles": ("--vae-tile", "vae_tile"),
    "codec_dtype": ("--vae-dtype", "vae_dtype"),
}


def _check_fits(arguments: argparse.Namespace, family: Family) -> None:
    """Raises ValueError if options are given that the family has no use for."""
    image = arguments.image
    if image is not None and "image" not in family.takes:
        raise ValueError(f"--image {image} is given, but this is a text-to-video model")
    given = given_arguments(
        arguments.lora,
        _text_options(arguments),
        _part_files(arguments),
        arguments.revision,
    )
    for name in ("tiles", "codec_dtype"):
        value = getattr(arguments, _FLAGS[name][1])
        if value is not None:
            given[name] = value
    wrong = {name: value for name, value in given.items() if name not in family.takes}
    if not wrong:
        return
    named = [f"--lora {file}" for file in wrong.get("loras", ())]
    named += [
        f"{flag} {getattr(arguments, option)}"
        for name, (flag, option) in _FLAGS.items()
        if name in wrong
    ]
    verb = "fits" if len(named) == 1 else "fit"
    raise ValueError(
        f"{' and '.join(named)} {verb} {name_families(wrong)} models only: name one "
        "with --checkpoint"
    )


def _note_large_size(sampling: Sampling) -> None:
    """Warns of a size that the model that ships cannot fill: perhaps Wan was meant."""
    width, height, trained = sampling.width, sampling.height, Sampling()
    if width * height > trained.width * trained.height:
        warnings.warn(
            f"--size {width}x{height} is larger than {trained.width}x{trained.height}, "
            "the only size that the model that ships was trained on, and may take very "
            "long; for a larger model, name it with --checkpoint",
            stacklevel=1,
        )


def _sampling(arguments: argparse.Namespace, info: ModelInfo) -> Sampling:
    width, height = getattr(
        arguments, "size", (info.sampling.width, info.sampling.height)
    )
    return options.sampling_from(arguments, info.sampling_at(height, width))


def _part_files(arguments: argparse.Namespace) -> PartFiles:
    return PartFiles(
        vae=arguments.vae,
        text_encoder=arguments.text_encoder,
        tokenizer=arguments.tokenizer,
        text_encoder_2=arguments.text_encoder_2,
        tokenizer_2=arguments.tokenizer_2,
        image_encoder=arguments.image_encoder,
    )


def _text_options(arguments: argparse.Namespace) -> TextOptions:
    on_cpu = arguments.text_device == "cpu"
    return TextOptions(
        embeddings=arguments.embeddings,
        device=jax.devices("cpu")[0] if on_cpu else None,
    )
