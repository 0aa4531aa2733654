"""The layouts of published Wan2.1 folders, and how to tell folders apart.

Two layouts are published: the original's (Wan-AI/Wan2.1-T2V-1.3B, -14B, ...) and that
of diffusers (the same names with -Diffusers); `LAYOUTS` lists their files.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

from models.checkpoints.files import find_visible
from models.wan.convert import LayoutName

Part = Literal[
    "transformer", "text_encoder", "tokenizer", "vae", "image_encoder", "scheduler"
]
ALL_PARTS: tuple[Part, ...] = get_args(Part)

# Files of each part. Only models that start from an image have an image encoder.
LAYOUTS: dict[LayoutName, dict[Part, tuple[str, ...]]] = {
    "original": {
        "transformer": ("config.json", "diffusion_pytorch_model*.safetensors"),
        "text_encoder": ("models_t5_umt5-xxl-enc-bf16.pth",),
        "tokenizer": ("google/umt5-xxl/tokenizer.json",),
        "vae": ("Wan2.1_VAE.pth",),
        "image_encoder": ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",),
    },
    "diffusers": {
        "transformer": ("transformer/config.json", "transformer/*.safetensors"),
        "text_encoder": ("text_encoder/config.json", "text_encoder/*.safetensors"),
        "tokenizer": ("tokenizer/tokenizer.json",),
        "vae": ("vae/config.json", "vae/*.safetensors"),
        "image_encoder": ("image_encoder/config.json", "image_encoder/*.safetensors"),
        "scheduler": ("scheduler/scheduler_config.json",),
    },
}
# The parts that a folder in the diffusers layout has as folders.
_PART_FOLDERS = tuple(LAYOUTS["diffusers"])
# Any one of these shows a layout, even in a folder that is incomplete.
_SIGNS: dict[LayoutName, tuple[str, ...]] = {
    "diffusers": ("model_index.json", "transformer/config.json"),
    "original": ("diffusion_pytorch_model*", "*VAE.pth", "models_t5*.pth"),
}


def find_layout(path: str | os.PathLike) -> LayoutName | None:
    """Returns the layout of a Wan model's folder, complete or not; else None."""
    for layout, signs in _SIGNS.items():
        if any(find_visible(path, sign) for sign in signs):
            return layout
    return None


def hub_patterns(parts: Collection[Part] = ALL_PARTS) -> list[str]:
    """Returns the files to fetch for some parts, whichever the repository's layout."""
    wanted = [
        pattern
        for layout in LAYOUTS.values()
        for part, patterns in layout.items()
        for pattern in patterns
        if part in parts
    ]
    indices = [f"{name}.index.json" for name in wanted if name.endswith(".safetensors")]
    return ["model_index.json", *wanted, *indices]


def describe_layouts(
    layouts: Mapping[LayoutName, Mapping[Part, tuple[str, ...]]] = LAYOUTS,
) -> str:
    """Says in words what a model's folder holds, in any layout by default."""
    return " or ".join(
        f"the {name} layout ({_describe_files(parts)})"
        for name, parts in layouts.items()
    )


def describe_neighbour(path: str | os.PathLike) -> str | None:
    """Says which folder to give in place of one inside, or around, a model's.

    Args:
      path: A folder of one part in the diffusers layout, or the folder that the hub's
        cache keeps for a repository, whose files are in `snapshots`.

    Returns:
      A sentence; None if there is no such model.
    """
    folder = Path(path).resolve()
    parent = folder.parent
    if folder.name in _PART_FOLDERS and (parent / "model_index.json").is_file():
        return f"it is only the {folder.name} of a model: give the whole, {parent}"
    for snapshot in _snapshots(folder):
        if find_layout(snapshot) is not None:
            return f"the hub's cache keeps the files deeper down: give {snapshot}"
    return None


def _describe_files(parts: Mapping[Part, tuple[str, ...]]) -> str:
    """Lists the patterns, those of image-to-video models last."""
    common, image = (
        ", ".join(
            pattern
            for part, patterns in parts.items()
            for pattern in patterns
            if (part == "image_encoder") is of_image
        )
        for of_image in (False, True)
    )
    return f"{common}; for image-to-video also {image}" if image else common


def _snapshots(folder: Path) -> Iterator[Path]:
    """Yields a repository's revisions in the hub's cache, that of main first."""
    if folder.name == "snapshots":
        folder = folder.parent
    main = folder / "refs" / "main"
    if main.is_file():
        yield folder / "snapshots" / main.read_text().strip()
    yield from find_visible(folder / "snapshots", "*")
