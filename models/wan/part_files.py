"""Parts of a model where they lie: in its folder, or given by themselves.

Other programs keep a transformer, an autoencoder and a text encoder as single files in
folders of their own. `PartFiles` names them.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from models.checkpoints.files import find_visible
from models.checkpoints.hub import find_checkpoint
from models.checkpoints.listing import list_names
from models.checkpoints.memory_map import CheckpointError
from models.checkpoints.weights import TORCH_SUFFIXES, open_weights
from models.umt5.convert import open_umt5_weights
from models.umt5.tokenizer import FILE as TOKENIZER_FILE
from models.umt5.tokenizer import search_tokenizer
from models.wan.convert import LayoutName, open_transformer_weights
from models.wan.layouts import LAYOUTS, Part, hub_patterns
from models.wan.vae.convert import open_vae_weights

_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
# How each part is given, for messages.
_HOW: dict[Part, str] = {
    "vae": "the autoencoder (--vae, such as Wan2.1_VAE.pth or wan_2.1_vae.safetensors)",
    "text_encoder": "the text encoder (--text-encoder, such as "
    "models_t5_umt5-xxl-enc-bf16.pth or umt5_xxl_fp8_e4m3fn_scaled.safetensors)",
    "tokenizer": f"the tokenizer ({TOKENIZER_FILE} beside the text encoder, or "
    "--tokenizer; --tokenizer google/umt5-xxl fetches it from the hub)",
    "image_encoder": "the image encoder (--image-encoder, such as "
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth or "
    "clip_vision_h.safetensors)",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartFiles:
    """Parts that are given by themselves; of None the model's own is taken.

    Each is a file, a folder of that part or of a whole model, or a repository on the
    hub. A file has the sizes of every Wan2.1 model.

    Attributes:
      vae: The video autoencoder.
      text_encoder: UMT5.
      tokenizer: The text encoder's `tokenizer.json`; it is also found beside a text
        encoder that is given.
      image_encoder: CLIP's image tower, for models that start from an image.
    """

    vae: Path | str | None = None
    text_encoder: Path | str | None = None
    tokenizer: Path | str | None = None
    image_encoder: Path | str | None = None

    def given(self) -> dict[Part, Path]:
        """Returns the paths that are not None."""
        named: dict[Part, Path | str | None] = {
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "tokenizer": self.tokenizer,
            "image_encoder": self.image_encoder,
        }
        return {part: Path(path) for part, path in named.items() if path is not None}

    def fetched(self, parts: Collection[Part]) -> "PartFiles":
        """Returns those of some parts as existing paths, fetched from the hub.

        Raises:
          CheckpointError: There is no such path or repository.
          ImportError: One is on the hub, and `huggingface_hub` is not installed.
        """
        found: dict[str, Path] = {}
        for part, name in self.given().items():
            if part in parts:
                patterns = hub_patterns([part])
                if part == "tokenizer":
                    patterns.append(TOKENIZER_FILE)
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
        every Wan2.1 model.
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


def source_in(folder: Path, layout: LayoutName, part: Part) -> PartSource:
    """Returns a part of a model's folder.

    Raises:
      CheckpointError: A file is missing or damaged, or the part has no weights.
    """
    if part not in LAYOUTS[layout] or part in ("tokenizer", "scheduler"):
        raise CheckpointError(f"{part=} has no weights in the {layout} layout")
    first, *_ = LAYOUTS[layout][part]
    path, stem = folder, None
    if layout == "diffusers":
        path /= part
    elif part == "transformer":
        stem = "diffusion_pytorch_model"
    else:
        path /= first
    return PartSource(
        weights=open_part_weights(part, path, stem=stem),
        files=tuple(files_in(folder, layout, part)),
        config_file=folder / first if first.endswith(".json") else None,
    )


def files_in(folder: Path, layout: LayoutName, part: Part) -> list[Path]:
    """Returns the files of a part's weights; none for a part that has none."""
    return sorted(
        file
        for pattern in LAYOUTS[layout].get(part, ())
        if not pattern.endswith(".json")
        for file in find_visible(folder, pattern)
    )


def find_part(part: Part, path: Path) -> PartSource:
    """Opens a part that is given by itself; see `PartFiles`.

    Raises:
      CheckpointError: The path holds no such part or several, or a file is damaged.
    """
    with naming(part, path):
        if path.is_file():
            return _open_file(part, path)
        for layout in LAYOUTS:
            if files_in(path, layout, part):
                return source_in(path, layout, part)
        found = [
            file for file in find_visible(path, "*") if file.suffix.lower() in _SUFFIXES
        ]
        if (path / "config.json").is_file() and found:
            return PartSource(
                weights=open_part_weights(part, path),
                files=tuple(found),
                config_file=path / "config.json",
            )
        if len(found) == 1:
            return _open_file(part, found[0])
        names = list_names(file.name for file in found)
        raise CheckpointError(
            f"{path} holds {f'the files {names}' if found else 'no weights'}; expected "
            f"one file ({', '.join(_SUFFIXES)}), or a folder of that part with its "
            "config.json, or of a whole model"
        )


def tokenizer_beside(source: PartSource) -> Path | None:
    """Returns the `tokenizer.json` beside a text encoder; None if there is none."""
    folder = source.files[0].parent
    return search_tokenizer([folder, folder.parent])


def check_complete(path: Path, missing_parts: Collection[Part]) -> None:
    """Raises if a lone transformer lacks parts that a pipeline needs beside it.

    Raises:
      CheckpointError: Names them, and how to give them.
    """
    if missing := [how for part, how in _HOW.items() if part in missing_parts]:
        raise CheckpointError(
            f"{path} is a transformer alone; give also "
            + ", and ".join(missing)
            + "; in Python, as PartFiles(vae=...)"
        )


def open_part_weights(
    part: Part, path: str | os.PathLike, *, stem: str | None = None
) -> Mapping[str, Any]:
    """Opens the weights of a part, as other programs store them, too.

    Args:
      part: A part that has weights.
      path: A file, or a folder with one checkpoint.
      stem: Start of the file names of a transformer in a folder with others.

    Raises:
      CheckpointError: A file is missing or damaged, or its FP8 weights and their
        scales do not fit.
    """
    match part:
        case "transformer":
            return open_transformer_weights(path, stem=stem)
        case "text_encoder":
            return open_umt5_weights(path)
        case "vae":
            return open_vae_weights(path)
    return open_weights(path)


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


def _open_file(part: Part, path: Path) -> PartSource:
    if path.suffix.lower() not in _SUFFIXES:
        raise CheckpointError(f"{path} must end with one of {', '.join(_SUFFIXES)}")
    return PartSource(weights=open_part_weights(part, path), files=(path,))


@contextlib.contextmanager
def naming(part: Part, name: Path) -> Iterator[None]:
    """Says which argument a wrong path was given by."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{part} {name}: {error}") from error
