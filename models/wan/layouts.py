"""The layouts of published Wan folders.

Two layouts are published: the original's (Wan-AI/Wan2.1-T2V-1.3B, -14B, ...) and that
of diffusers (the same names with -Diffusers). Those of Wan2.2 have other files.
"""

import dataclasses
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from models.checkpoints.files import find_visible
from models.diffusion.folders.layouts import ALL_PARTS, FolderLayouts, Part
from models.diffusion.folders.part_files import read_json
from models.umt5.convert import open_umt5_weights
from models.umt5.tokenizer import FILE as TOKENIZER_FILE
from models.wan.convert import open_transformer_weights
from models.wan.vae.convert import open_vae_weights


def _open_text_encoder(
    path: str | os.PathLike, *, stem: str | None
) -> Mapping[str, Any]:
    del stem  # no folder has other weights beside these
    return open_umt5_weights(path)


def _open_vae(path: str | os.PathLike, *, stem: str | None) -> Mapping[str, Any]:
    del stem
    return open_vae_weights(path)


LAYOUTS = FolderLayouts(
    family="Wan",
    files={
        "original": {
            "transformer": ("config.json", "diffusion_pytorch_model*.safetensors"),
            "text_encoder": ("models_t5_umt5-xxl-enc-bf16.pth",),
            "tokenizer": ("google/umt5-xxl/tokenizer.json",),
            "vae": ("Wan2.1_VAE.pth",),
            "image_encoder": (
                "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
            ),
        },
        "diffusers": {
            "transformer": ("transformer/config.json", "transformer/*.safetensors"),
            "text_encoder": ("text_encoder/config.json", "text_encoder/*.safetensors"),
            "tokenizer": ("tokenizer/tokenizer.json",),
            "vae": ("vae/config.json", "vae/*.safetensors"),
            "image_encoder": (
                "image_encoder/config.json",
                "image_encoder/*.safetensors",
            ),
            "scheduler": ("scheduler/scheduler_config.json",),
        },
    },
    signs={
        "diffusers": ("model_index.json", "transformer/config.json"),
        "original": ("diffusion_pytorch_model*", "*VAE.pth", "models_t5*.pth"),
    },
    classes=frozenset(
        ["WanPipeline", "WanImageToVideoPipeline", "WanTransformer3DModel", "WanModel"]
    ),
    of_image=frozenset(["image_encoder"]),
    how={
        "vae": "the autoencoder (--vae, such as Wan2.1_VAE.pth or "
        "wan_2.1_vae.safetensors)",
        "text_encoder": "the text encoder (--text-encoder, such as "
        "models_t5_umt5-xxl-enc-bf16.pth or umt5_xxl_fp8_e4m3fn_scaled.safetensors)",
        "tokenizer": f"the tokenizer ({TOKENIZER_FILE} beside the text encoder, or "
        "--tokenizer; --tokenizer google/umt5-xxl fetches it from the hub)",
        "image_encoder": "the image encoder (--image-encoder, such as "
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth or "
        "clip_vision_h.safetensors)",
    },
    open_part={
        "transformer": open_transformer_weights,
        "text_encoder": _open_text_encoder,
        "vae": _open_vae,
    },
    tokenizer_file=TOKENIZER_FILE,
)


# Wan2.2's model from text or an image has an autoencoder of its own.
LAYOUTS_TI2V = dataclasses.replace(
    LAYOUTS,
    files={
        **LAYOUTS.files,
        "original": {**LAYOUTS.files["original"], "vae": ("Wan2.2_VAE.pth",)},
    },
)


# Wan2.2's pairs: the transformer for high noise, and a second one for low.
_PAIR = {"high": "high_noise_model", "low": "low_noise_model"}
_SECOND = "transformer_2"


def _files_in(folder: str) -> tuple[str, str]:
    return f"{folder}/config.json", f"{folder}/diffusion_pytorch_model*.safetensors"


LAYOUTS_PAIR = dataclasses.replace(
    LAYOUTS,
    files={
        "original": {
            **LAYOUTS.files["original"],
            "transformer": _files_in(_PAIR["high"]),
            "transformer_2": _files_in(_PAIR["low"]),
        },
        "diffusers": {
            **LAYOUTS.files["diffusers"],
            "transformer_2": (f"{_SECOND}/config.json", f"{_SECOND}/*.safetensors"),
        },
    },
    signs={**LAYOUTS.signs, "original": (*LAYOUTS.signs["original"], *_PAIR.values())},
)


def layouts_of(path: str | os.PathLike) -> FolderLayouts:
    """Returns the layouts of the model that lies in a folder, whole or not."""
    if any((Path(path) / name).is_dir() for name in (*_PAIR.values(), _SECOND)):
        return LAYOUTS_PAIR
    if any(read_index(path).get(_SECOND) or ()):
        return LAYOUTS_PAIR
    if find_visible(path, LAYOUTS_TI2V.files["original"]["vae"][0]):
        return LAYOUTS_TI2V
    return LAYOUTS


def read_index(path: str | os.PathLike) -> dict[str, Any]:
    """Reads what diffusers says of a pipeline; nothing in the original layout.

    Raises:
      CheckpointError: The file is damaged.
    """
    file = Path(path) / "model_index.json"
    return read_json(file) if file.is_file() else {}


def hub_patterns(parts: Collection[Part] = ALL_PARTS) -> list[str]:
    """Returns the files to fetch for parts, whichever model a repository holds."""
    tables = (LAYOUTS, LAYOUTS_TI2V, LAYOUTS_PAIR)
    patterns = [name for table in tables for name in table.hub_patterns(parts)]
    return list(dict.fromkeys(patterns))
