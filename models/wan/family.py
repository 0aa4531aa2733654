"""Wan2.1 and Wan2.2 as a family of models."""

from pathlib import Path

from models.diffusion.family import FOR_PUBLISHED, Family
from models.wan.checkpoint import names_wan
from models.wan.layouts import LAYOUTS, layouts_of
from models.wan.loading import describe_wan, load_wan, load_wan_codec
from models.wan.transformer_file import is_transformer_file


def _owns(path: Path) -> bool:
    if is_transformer_file(path):
        return True
    return layouts_of(path).find(path) is not None or names_wan(path)


WAN = Family(
    name="Wan",
    owns=_owns,
    describe=describe_wan,
    load=load_wan,
    load_codec=load_wan_codec,
    expected=f"a Wan model in {LAYOUTS.describe()}, or one .safetensors file of its "
    "transformer",
    takes=FOR_PUBLISHED | {"files.image_encoder", "image"},
    hub_signs=("config.json", "transformer/config.json"),
    describe_neighbour=LAYOUTS.describe_neighbour,
    refused={
        "WanVACEPipeline": "VACE, which edits videos, is not supported",
        "WanVACETransformer3DModel": "VACE, which edits videos, is not supported",
        "WanAnimatePipeline": "Wan-Animate is not supported",
    },
)
