"""Parts of a model where they lie: in its folder, or given by themselves.

Other programs keep a transformer, an autoencoder and a text encoder as single files in
folders of their own. `PartFiles` names them.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from models.checkpoints.conversion import ConversionError
from models.checkpoints.files import find_visible
from models.checkpoints.hub import find_checkpoint
from models.checkpoints.listing import list_names
from models.checkpoints.memory_map import CheckpointError
from models.checkpoints.weights import TORCH_SUFFIXES
from models.diffusion.folders.layouts import FolderLayouts, LayoutName, Part

_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartFiles:
    """Parts that are given by themselves; of None the model's own is taken.

    Each is a file, a folder of that part or of a whole model, or a repository on the
    hub. A file has the sizes that every model of its family has.

    Attributes:
      vae: The video autoencoder.
      text_encoder: UMT5 for Wan, the language model for HunyuanVideo.
      tokenizer: The text encoder's tokenizer; it is also found beside a text encoder
        that is given.
      text_encoder_2: CLIP's text tower, for HunyuanVideo.
      tokenizer_2: Its tokenizer, found as the first one's is.
      image_encoder: CLIP's image tower, for models that start from an image.
    """

    vae: Path | str | None = None
    text_encoder: Path | str | None = None
    tokenizer: Path | str | None = None
    text_encoder_2: Path | str | None = None
    tokenizer_2: Path | str | None = None
    image_encoder: Path | str | None = None

    def given(self) -> dict[Part, Path]:
        """Returns the paths that are not None."""
        named: dict[Part, Path | str | None] = {
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "tokenizer": self.tokenizer,
            "text_encoder_2": self.text_encoder_2,
            "tokenizer_2": self.tokenizer_2,
            "image_encoder": self.image_encoder,
        }
        return {part: Path(path) for part, path in named.items() if path is not None}

    def fetched(self, parts: Collection[Part], layouts: FolderLayouts) -> "PartFiles":
        """Returns those of some parts as existing paths, fetched from the hub.

        Raises:
          CheckpointError: There is no such path or repository.
          ImportError: One is on the hub, and `huggingface_hub` is not installed.
        """
        found: dict[str, Path] = {}
        for part, name in self.given().items():
            if part in parts:
                patterns = layouts.hub_patterns([part])
                if part == "tokenizer":
                    patterns.append(layouts.tokenizer_file)
                with naming(part, name):
                    found[part] = find_checkpoint(name, patterns=patterns)
        return PartFiles(**found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartSource:
    """One part of a model, opened but not read.

    Attributes:
      weights: Arrays by key, each read from disk when it is used.
      files: The files of the weights.
      config_file: The `config.json` that says its sizes; None if they are those of
        every model of the family.
    """

    weights: Mapping[str, Any]
    files: tuple[Path, ...]
    config_file: Path | None = None

    def read_config[Config](
        self,
        read: Callable[..., Config],
        default: Callable[..., Config],
        **changes: Any,
    ) -> Config:
        """Reads the part's sizes.

        Args:
          read: Makes them from `config.json`.
          default: Makes them without one.
          **changes: Arguments that both are given, such as `dtype`.

        Raises:
          CheckpointError: The file is missing or damaged, or of another model; it is
            named.
        """
        if self.config_file is None:
            return default(**changes)
        try:
            return read(read_json(self.config_file), **changes)
        except (ValueError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.config_file}: {error}") from error


def source_in(
    layouts: FolderLayouts, folder: Path, layout: LayoutName, part: Part
) -> PartSource:
    """Returns a part of a model's folder.

    Raises:
      CheckpointError: A file is missing or damaged, or the part has no weights.
    """
    patterns = layouts.files[layout].get(part, ())
    stored = [pattern for pattern in patterns if not pattern.endswith(".json")]
    if not stored:
        raise CheckpointError(f"{part=} has no weights in the {layout} layout")
    path, stem = folder / stored[0], None
    if "*" in path.name:  # shards, maybe beside other weights
        stem = path.name.partition("*")[0] or None
        path = path.parent
    return PartSource(
        weights=layouts.open_weights(part, path, stem=stem),
        files=tuple(files_in(layouts, folder, layout, part)),
        config_file=folder / patterns[0] if patterns[0].endswith(".json") else None,
    )


def files_in(
    layouts: FolderLayouts, folder: Path, layout: LayoutName, part: Part
) -> list[Path]:
    """Returns the files of a part's weights; none for a part that has none."""
    return sorted(
        file
        for pattern in layouts.files[layout].get(part, ())
        if not pattern.endswith(".json")
        for file in find_visible(folder, pattern)
    )


def find_part(layouts: FolderLayouts, part: Part, path: Path) -> PartSource:
    """Opens a part that is given by itself; see `PartFiles`.

    Raises:
      CheckpointError: The path holds no such part or several, or a file is damaged.
    """
    with naming(part, path):
        if path.is_file():
            return _open_file(layouts, part, path)
        for layout in layouts.files:
            if files_in(layouts, path, layout, part):
                return source_in(layouts, path, layout, part)
        found = [
            file for file in find_visible(path, "*") if file.suffix.lower() in _SUFFIXES
        ]
        if (path / "config.json").is_file() and found:
            return PartSource(
                weights=layouts.open_weights(part, path),
                files=tuple(found),
                config_file=path / "config.json",
            )
        if len(found) == 1:
            return _open_file(layouts, part, found[0])
        names = list_names(file.name for file in found)
        raise CheckpointError(
            f"{path} holds {f'the files {names}' if found else 'no weights'}; expected "
            f"one file ({', '.join(_SUFFIXES)}), or a folder of that part with its "
            "config.json, or of a whole model"
        )


def find_layout(layouts: FolderLayouts, path: Path) -> LayoutName:
    """Returns the layout of a model's folder, complete or not.

    Raises:
      CheckpointError: It is no folder of the family's models; says what is expected.
    """
    layout = layouts.find(path)
    if layout is None:
        raise CheckpointError(
            f"{path} is no folder of a {layouts.family} model; "
            + (layouts.describe_neighbour(path) or f"expected {layouts.describe()}")
        )
    return layout


def check_files(
    layouts: FolderLayouts,
    path: Path,
    layout: LayoutName,
    needed: Mapping[Part, tuple[str, ...]],
) -> None:
    """Raises if a model's folder lacks files.

    Args:
      layouts: The family's table.
      path: The folder.
      layout: Its layout.
      needed: Files that must be there, by part.

    Raises:
      CheckpointError: Names all that are missing, or the folder to give instead.
    """
    missing = [
        f"{pattern} ({part})"
        for part, patterns in needed.items()
        for pattern in patterns
        if not find_visible(path, pattern)
    ]
    if not missing:
        return
    if neighbour := layouts.describe_neighbour(path):
        raise CheckpointError(
            f"{path} is not a whole {layouts.family} model; {neighbour}"
        )
    raise CheckpointError(
        f"{path}, a {layouts.family} model in the {layout} layout, lacks "
        f"{', '.join(missing)}; expected {layouts.describe({layout: needed})}"
    )


def check_complete(
    layouts: FolderLayouts, path: Path, missing_parts: Collection[Part]
) -> None:
    """Raises if a lone transformer lacks parts that a pipeline needs beside it.

    Raises:
      CheckpointError: Names them, and how to give them.
    """
    if missing := [how for part, how in layouts.how.items() if part in missing_parts]:
        raise CheckpointError(
            f"{path} is a transformer alone; give also "
            + ", and ".join(missing)
            + "; in Python, as PartFiles(vae=...)"
        )


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      CheckpointError: The file is missing, or holds something else.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is missing or not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return content


def _open_file(layouts: FolderLayouts, part: Part, path: Path) -> PartSource:
    if path.suffix.lower() not in _SUFFIXES:
        raise CheckpointError(f"{path} must end with one of {', '.join(_SUFFIXES)}")
    return PartSource(weights=layouts.open_weights(part, path), files=(path,))


@contextlib.contextmanager
def fitting(part: Part, source: PartSource | None) -> Iterator[None]:
    """Says which part weights were of that do not fit; of none nothing is loaded.

    Raises:
      CheckpointError: Stands for a `ConversionError` of the block.
    """
    try:
        yield
    except ConversionError as error:
        files = () if source is None else source.files
        named = ", ".join(map(str, files))
        raise CheckpointError(f"the {part} in {named} does not fit: {error}") from error


@contextlib.contextmanager
def naming(part: Part, name: Path) -> Iterator[None]:
    """Says which argument a wrong path was given by."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{part} {name}: {error}") from error
