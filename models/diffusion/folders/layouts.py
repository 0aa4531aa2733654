"""Layouts of a family's published folders, and how to tell folders apart.

A family gives a table of files by layout and part; everything else is here.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from models.checkpoints.files import find_visible
from models.checkpoints.weights import open_weights

LayoutName = Literal["original", "diffusers"]
Part = Literal[
    "transformer",
    "transformer_2",
    "text_encoder",
    "tokenizer",
    "text_encoder_2",
    "tokenizer_2",
    "vae",
    "image_encoder",
    "scheduler",
]
ALL_PARTS: tuple[Part, ...] = get_args(Part)
# Where a class of the model is named, the first that exists.
CLASS_FILES = ("model_index.json", "transformer/config.json", "config.json")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FolderLayouts:
    """The layouts that a family's models are published in.

    Attributes:
      family: Name for people.
      files: Files of each part by layout, a `config.json` first where there is one.
      signs: Any one of these shows a layout, even in a folder that is incomplete.
      classes: Classes that the family's `model_index.json` or `config.json` names.
        A folder that names another is not the family's.
      needs_class: Whether a folder in the diffusers layout must name one: the signs
        of that layout are those of other families, too.
      of_image: Parts that only models which start from an image have.
      how: How each part is given beside a transformer alone, for messages.
      open_part: Opens the weights of parts that need more than `open_weights`, each
        given a path and the start of the files' names.
      tokenizer_file: Name of a tokenizer's file.
    """

    family: str
    files: Mapping[LayoutName, Mapping[Part, tuple[str, ...]]]
    signs: Mapping[LayoutName, tuple[str, ...]]
    classes: frozenset[str]
    needs_class: bool = False
    of_image: frozenset[Part] = frozenset()
    how: Mapping[Part, str] = dataclasses.field(default_factory=dict)
    open_part: Mapping[Part, Callable[..., Mapping[str, Any]]] = dataclasses.field(
        default_factory=dict
    )
    tokenizer_file: str = "tokenizer.json"

    def claims(self, path: str | os.PathLike) -> bool:
        """Returns whether a folder names a class of the family, or none at all."""
        named = class_in(path)
        return named is None or named in self.classes

    def find(self, path: str | os.PathLike) -> LayoutName | None:
        """Returns the layout of a model's folder, complete or not; else None."""
        if not self.claims(path):
            return None
        for layout, signs in self.signs.items():
            if layout == "diffusers" and self.needs_class and class_in(path) is None:
                continue
            if any(find_visible(path, sign) for sign in signs):
                return layout
        return None

    def hub_patterns(self, parts: Collection[Part] = ALL_PARTS) -> list[str]:
        """Returns the files to fetch for parts, whichever the repository's layout."""
        wanted = [
            pattern
            for layout in self.files.values()
            for part, patterns in layout.items()
            for pattern in patterns
            if part in parts
        ]
        indices = [
            f"{name}.index.json" for name in wanted if name.endswith(".safetensors")
        ]
        return ["model_index.json", *wanted, *indices]

    def describe(
        self,
        layouts: Mapping[LayoutName, Mapping[Part, tuple[str, ...]]] | None = None,
    ) -> str:
        """Says in words what a model's folder holds, in any layout by default."""
        return " or ".join(
            f"the {name} layout ({self._describe_files(parts)})"
            for name, parts in (layouts or self.files).items()
        )

    def describe_neighbour(self, path: str | os.PathLike) -> str | None:
        """Says which folder to give in place of one inside, or around, a model's.

        Args:
          path: A folder of one part in the diffusers layout, or the folder that the
            hub's cache keeps for a repository, whose files are in `snapshots`.

        Returns:
          A sentence; None if there is no such model.
        """
        folder = Path(path).resolve()
        parent = folder.parent
        in_model = (parent / "model_index.json").is_file()
        if folder.name in self.files["diffusers"] and in_model:
            return f"it is only the {folder.name} of a model: give the whole, {parent}"
        for snapshot in _snapshots(folder):
            if self.find(snapshot) is not None:
                return f"the hub's cache keeps the files deeper down: give {snapshot}"
        return None

    def open_weights(
        self, part: Part, path: str | os.PathLike, *, stem: str | None = None
    ) -> Mapping[str, Any]:
        """Opens the weights of a part, as other programs store them, too.

        Args:
          part: A part that has weights.
          path: A file, or a folder with one checkpoint.
          stem: Start of the file names of weights in a folder with others.

        Raises:
          CheckpointError: A file is missing or damaged, or its FP8 weights and their
            scales do not fit.
        """
        if part in self.open_part:
            return self.open_part[part](path, stem=stem)
        return open_weights(path, stem=stem)

    def _describe_files(self, parts: Mapping[Part, tuple[str, ...]]) -> str:
        """Lists the patterns, those of image-to-video models last."""
        common, image = (
            ", ".join(
                pattern
                for part, patterns in parts.items()
                for pattern in patterns
                if (part in self.of_image) is of_image
            )
            for of_image in (False, True)
        )
        return f"{common}; for image-to-video also {image}" if image else common


def class_in(path: str | os.PathLike) -> str | None:
    """Returns the class that a folder's files name; None if they name none."""
    for name in CLASS_FILES:
        file = Path(path) / name
        if not file.is_file():
            continue
        try:
            stored = json.loads(file.read_text())
        except (OSError, ValueError):
            return None  # whoever reads the file says what is wrong with it
        named = stored.get("_class_name") if isinstance(stored, dict) else None
        return named if isinstance(named, str) else None
    return None


def _snapshots(folder: Path) -> Iterator[Path]:
    """Yields a repository's revisions in the hub's cache, that of main first."""
    if folder.name == "snapshots":
        folder = folder.parent
    main = folder / "refs" / "main"
    if main.is_file():
        yield folder / "snapshots" / main.read_text().strip()
    yield from find_visible(folder / "snapshots", "*")
