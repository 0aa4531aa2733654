"""Models by name: which family a checkpoint is of, and the pipeline it makes.

A family is an entry of `FAMILIES`; nothing else knows them all.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from models.checkpoints.hub import is_repository_name, why_not_found
from models.checkpoints.memory_map import CheckpointError
from models.diffusion.pipeline import VideoPipeline
from models.mini.checkpoint import SMALL_MODEL, is_small_model
from models.mini.pipeline import load_mini
from models.wan.layouts import (
    ALL_PARTS,
    Part,
    describe_layouts,
    describe_neighbour,
    find_layout,
)
from models.wan.loading import load_wan
from models.wan.part_files import PartFiles
from models.wan.text import TextOptions
from models.wan.transformer_file import is_transformer_file

Loras = Iterable[tuple[Path | str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Models of one architecture, and the folders they are stored in.

    Attributes:
      name: Name for people.
      owns: Tells whether a path holds a model of the family, by what lies in it.
      load: Makes a pipeline; takes the arguments of `load_pipeline`.
      expected: Contents of the family's folders, in words.
      describe_neighbour: Says what to give in place of a folder that lies in, or
        around, that of a model; None if there is no such model.
    """

    name: str
    owns: Callable[[Path], bool]
    load: Callable[..., VideoPipeline]
    expected: str
    describe_neighbour: Callable[[Path], str | None] = lambda path: None


def _load_mini(
    path: Path | str | None,
    *,
    parts: Collection[Part],
    loras: Loras,
    lora_strict: bool,
    text: TextOptions | None,
    files: PartFiles | None,
    revision: str | None,
) -> VideoPipeline:
    """Loads a small model, for which `parts` and `lora_strict` have no meaning."""
    del parts, lora_strict
    if given := arguments_for_wan(loras, text, files, revision):
        named = " and ".join(f"{name}={value!s}" for name, value in given.items())
        raise ValueError(f"{named}: arguments that fit Wan models only")
    return load_mini(path)


WAN = Family(
    name="Wan",
    owns=lambda path: find_layout(path) is not None or is_transformer_file(path),
    load=load_wan,
    expected=f"a Wan model in {describe_layouts()}, or one .safetensors file of its "
    "transformer",
    describe_neighbour=describe_neighbour,
)
MINI = Family(name="small", owns=is_small_model, load=_load_mini, expected=SMALL_MODEL)
FAMILIES = (WAN, MINI)


def load_pipeline(
    path: Path | str | None = None,
    *,
    parts: Collection[Part] = ALL_PARTS,
    loras: Loras = (),
    lora_strict: bool = True,
    text: TextOptions | None = None,
    files: PartFiles | None = None,
    revision: str | None = None,
) -> VideoPipeline:
    """Loads a checkpoint of any family, by default the model that ships.

    Computes in float32 on CPU and in bfloat16 elsewhere, Wan's codec in float32.

    Args:
      path: A folder in the format of `models/mini/weights`, or a published Wan
        model: its folder, its repository on the hub, or the `.safetensors` file of
        its transformer, whose shapes tell which model it is.
      parts: Parts of a Wan model to load; see `open_wan_parts`.
      loras: Adapters to merge into a Wan model, each with its strength. Steps and
        guidance that suit one made for few steps are told by
        `models.checkpoints.lora.find_few_steps`.
      lora_strict: Whether parts of adapters that mean nothing to the model are
        refused; else they are skipped with a warning.
      text: Where a Wan model's text encoder runs, whether it is freed before the
        transformer is loaded, and where embeddings are kept. By default it stays
        on the default device.
      files: Parts of a Wan model that are given by themselves. With the file of a
        transformer these are the autoencoder, the text encoder and its tokenizer.
      revision: Branch, tag or commit of a Wan model's repository on the hub. It is
        looked up once, so that all its files are of one commit.

    Returns:
      A pipeline with the weights in memory.

    Raises:
      CheckpointError: The model is missing, incomplete, or of another format.
      ConversionError: An adapter does not fit.
      ImportError: An optional package is needed and not installed.
      UnknownPromptError: `text` gives embeddings that lack one of its prompts.
      ValueError: `parts` lacks the VAE, or options for Wan models are given for
        another one.

    Example:
        ```py
        from models.loading import load_pipeline

        result = load_pipeline().generate("a red ball bounces over a blue sea")
        print(result.video.shape)  # one video, frames, height, width, colours
        ```
    """
    return find_family(path).load(
        path,
        parts=parts,
        loras=loras,
        lora_strict=lora_strict,
        text=text,
        files=files,
        revision=revision,
    )


def find_family(path: Path | str | None) -> Family:
    """Returns the family of a checkpoint, without reading weights or the network.

    Args:
      path: A folder, or else the name of a repository on the hub. None is the model
        that ships.

    Raises:
      CheckpointError: It is a path that does not exist, or holds no model.
    """
    if path is None:
        return MINI
    folder = Path(path).expanduser()
    if not folder.exists():
        if is_repository_name(path):
            return WAN  # the only family whose models are published
        raise CheckpointError(why_not_found(path))
    for family in FAMILIES:
        if family.owns(folder):
            return family
    hints = filter(None, (family.describe_neighbour(folder) for family in FAMILIES))
    expected = ", or ".join(family.expected for family in FAMILIES)
    raise CheckpointError(
        f"{path} holds no model; {next(hints, f'expected {expected}')}"
    )


def arguments_for_wan(
    loras: Loras,
    text: TextOptions | None = None,
    files: PartFiles | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """Returns the arguments given that only Wan models have a use for, by name."""
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
