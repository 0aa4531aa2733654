"""Models by name: which family a checkpoint is of, and the pipeline it makes.

A family is an entry of `FAMILIES`; nothing else knows them all.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from models.checkpoints.files import find_visible
from models.checkpoints.hub import (
    commit_of,
    find_checkpoint,
    is_repository_name,
    why_not_found,
)
from models.checkpoints.memory_map import CheckpointError
from models.diffusion.dtypes import Linears, check_linears
from models.diffusion.family import Family
from models.diffusion.folders.layouts import ALL_PARTS, Part, class_in
from models.diffusion.folders.part_files import PartFiles
from models.diffusion.interfaces import Codec
from models.diffusion.mesh import DeviceMesh
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.text_options import TextOptions
from models.diffusion.video_autoencoder.codec import VideoCodec
from models.hunyuan.family import HUNYUAN
from models.mini.family import MINI
from models.wan.family import WAN

Loras = Iterable[tuple[Path | str, float]]

FAMILIES: tuple[Family, ...] = (HUNYUAN, WAN, MINI)


def load_pipeline(
    path: Path | str | None = None,
    *,
    parts: Collection[Part] = ALL_PARTS,
    loras: Loras = (),
    lora_strict: bool = True,
    text: TextOptions | None = None,
    files: PartFiles | None = None,
    revision: str | None = None,
    linears: Linears = "bfloat16",
    mesh: DeviceMesh | None = None,
) -> VideoPipeline:
    """Loads a checkpoint of any family, by default the model that ships.

    Computes in float32 on CPU and in bfloat16 elsewhere, Wan's codec in float32.

    Args:
      path: A folder in the format of `models/mini/weights`, or a published model: its
        folder, its repository on the hub, or the `.safetensors` file of its
        transformer, whose shapes tell which model it is.
      parts: Parts of a published model to load; see `open_wan_parts`.
      loras: Adapters to merge into a published model, each with its strength. Steps
        and guidance that suit one made for few steps are told by
        `models.checkpoints.lora.find_few_steps`.
      lora_strict: Whether parts of adapters that mean nothing to the model are
        refused; else they are skipped with a warning.
      text: Where a published model's text encoder runs, whether it is freed before
        the transformer is loaded, and where embeddings are kept. By default it stays
        on the default device.
      files: Parts of a published model that are given by themselves. With the file of
        a transformer these are the autoencoder, text encoders and tokenizers.
      revision: Branch, tag or commit of a repository on the hub. It is looked up
        once, so that all its files are of one commit.
      linears: Precision of the transformer's linear layers: "float8" halves their
        memory and is faster on GPUs that have it (Hopper, Ada), "auto" takes it there
        alone. Embeddings, modulation, text projections and the first and last layers
        stay as they are. Adapters are merged before weights are rounded.
      mesh: Devices that share the transformer's work, such as
        `DeviceMesh(sequence=2)`. Its weights are read to where the mesh wants them.

    Returns:
      A pipeline with the weights in memory.

    Raises:
      CheckpointError: The model is missing, incomplete, or of another format.
      ConversionError: An adapter does not fit.
      ImportError: An optional package is needed and not installed.
      UnknownPromptError: `text` gives embeddings that lack one of its prompts.
      ValueError: `parts` lacks the VAE, there are options that mean nothing to the
        model's family, the device has no FP8, or
        the mesh does not fit the devices or the model's heads.

    Example:
        ```py
        from models.loading import load_pipeline

        result = load_pipeline().generate("a red ball bounces over a blue sea")
        print(result.video.shape)  # one video, frames, height, width, colours
        ```
    """
    loras = list(loras)
    family, commit = find_family(path, revision=revision)
    check_takes(family, given_arguments(loras, text, files, revision))
    check_linears(linears, apart=family.text_beside_jax)
    return family.load(
        path,
        parts=parts,
        loras=loras,
        lora_strict=lora_strict,
        text=text,
        files=files,
        revision=commit,
        linears=linears,
        mesh=mesh,
    )


def load_codec(
    path: Path | str | None = None,
    *,
    files: PartFiles | None = None,
    revision: str | None = None,
    tile: int | None = None,
    dtype: str | None = None,
) -> Codec:
    """Loads the codec of a checkpoint alone, such as to decode latents that were kept.

    Args:
      path: As of `load_pipeline`.
      files: Parts that are given by themselves, of which the autoencoder is read.
      revision: Branch, tag or commit of a repository on the hub.
      tile: Rows and columns of pixels of the tiles that it is to run on; see
        `Codec.tiled`.
      dtype: What it is to compute in, "float32" or "bfloat16"; see `change_codec`.

    Raises:
      CheckpointError: The model is missing, incomplete, or of another format.
      ValueError: The family has no use for a part, a revision, tiles or a dtype that
        are given, or there are no tiles of that size.
    """
    family, commit = find_family(path, revision=revision)
    given = given_arguments(files=files, revision=revision)
    changes = {"tiles": tile, "codec_dtype": dtype}
    given |= {name: value for name, value in changes.items() if value is not None}
    check_takes(family, given)
    codec = family.load_codec(path, files=files, revision=commit)
    return change_codec(codec, tile=tile, dtype=dtype)


def change_codec(
    codec: Codec, *, tile: int | None = None, dtype: str | None = None
) -> Codec:
    """Returns a codec that runs on tiles, or in another dtype; None changes nothing.

    Args:
      codec: Of a family that has them.
      tile: Rows and columns of pixels of the tiles; see `Codec.tiled`. 0 is for whole
        frames.
      dtype: "float32" or "bfloat16"; see `VideoCodec.in_dtype`.

    Raises:
      ValueError: There are no tiles of that size, or no such dtype.
    """
    if tile:
        codec = codec.tiled(tile)
    elif tile is not None:
        codec = dataclasses.replace(codec, tiling=None)  # type: ignore[type-var]
    if dtype is None:
        return codec
    if not isinstance(codec, VideoCodec):
        raise ValueError(f"{dtype=} is given, but {type(codec).__name__} has one only")
    return codec.in_dtype(dtype)


def find_family(
    path: Path | str | None, *, revision: str | None = None
) -> tuple[Family, str | None]:
    """Returns the family of a checkpoint, without reading weights.

    Args:
      path: A path, or else the name of a repository on the hub, of which small files
        are fetched that tell the family. None is the model that ships.
      revision: Branch, tag or commit of a repository.

    Returns:
      The family; and the commit that the repository is at, from which the rest is to
      be fetched: a branch may move. For a path, `revision` as it is.

    Raises:
      CheckpointError: It is a path that does not exist, or holds no model that can
        be loaded.
    """
    if path is None:
        return MINI, revision
    folder = Path(path).expanduser()
    if folder.exists():
        return _family_of(folder, str(path)), revision
    if not is_repository_name(path):
        raise CheckpointError(why_not_found(path))
    signs = {sign: None for family in FAMILIES for sign in family.hub_signs}
    fetched = find_checkpoint(
        path, patterns=["model_index.json", *signs], revision=revision
    )
    return _family_of(fetched, str(path)), commit_of(fetched) or revision


def _family_of(folder: Path, name: str) -> Family:
    """Returns the family that a path is of; messages call it `name`."""
    named = class_in(folder)
    for family in FAMILIES:
        for sign, reason in family.refused.items():
            if named == sign or ("*" in sign and find_visible(folder, sign)):
                raise CheckpointError(f"{name}: {reason}")
    for family in FAMILIES:
        if family.owns(folder):
            return family
    hints = filter(None, (family.describe_neighbour(folder) for family in FAMILIES))
    expected = ", or ".join(family.expected for family in FAMILIES)
    kind = "" if named is None else f" that is known: it names the class {named}"
    raise CheckpointError(
        f"{name} holds no model{kind}; {next(hints, f'expected {expected}')}"
    )


def given_arguments(
    loras: Loras = (),
    text: TextOptions | None = None,
    files: PartFiles | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """Returns the given arguments that not every family takes, by name."""
    adapters = [str(file) for file, _ in loras]
    given: dict[str, Any] = {"loras": adapters} if adapters else {}
    text = text or TextOptions()
    given |= {
        f"text.{field.name}": value
        for field in dataclasses.fields(text)
        if (value := getattr(text, field.name)) != field.default
    }
    parts = (files or PartFiles()).given()
    given |= {f"files.{part}": str(file) for part, file in parts.items()}
    return given | ({} if revision is None else {"revision": revision})


def check_takes(family: Family, given: Mapping[str, Any]) -> None:
    """Checks that a family has a use for arguments; see `given_arguments`.

    Raises:
      ValueError: It has none; names the families that have.
    """
    if wrong := [name for name in given if name not in family.takes]:
        named = " and ".join(f"{name}={given[name]!s}" for name in wrong)
        others = name_families(wrong)
        raise ValueError(f"{named}: arguments that fit {others} models only")


def name_families(arguments: Iterable[str]) -> str:
    """Returns the names of the families that take all of these arguments."""
    arguments = set(arguments)
    names = [family.name for family in FAMILIES if arguments <= family.takes]
    return " and ".join(names) or "other"
