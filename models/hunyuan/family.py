"""HunyuanVideo as a family of models."""

from pathlib import Path

from models.diffusion.family import FOR_PUBLISHED, Family
from models.hunyuan.checkpoint import NO_I2V, is_hunyuan_file
from models.hunyuan.layouts import LAYOUTS
from models.hunyuan.loading import (
    describe_hunyuan,
    load_hunyuan,
    load_hunyuan_codec,
)


def _owns(path: Path) -> bool:
    return is_hunyuan_file(path) or LAYOUTS.find(path) is not None


_NEWER = "HunyuanVideo 1.5 is another architecture, which is not supported"
_CUSTOM = "HunyuanCustom has no pipeline here: see models.hunyuan for its transformer"

HUNYUAN = Family(
    name="HunyuanVideo",
    owns=_owns,
    describe=describe_hunyuan,
    load=load_hunyuan,
    load_codec=load_hunyuan_codec,
    expected=f"a HunyuanVideo model in {LAYOUTS.describe()}, or one file of its "
    "transformer",
    takes=FOR_PUBLISHED | {"files.text_encoder_2", "files.tokenizer_2"},
    hub_signs=("hunyuan-video-t2v-720p/vae/config.json", "transformer/config.json"),
    describe_neighbour=LAYOUTS.describe_neighbour,
    text_beside_jax=True,
    refused={
        "HunyuanVideoImageToVideoPipeline": NO_I2V,
        "HunyuanSkyreelsImageToVideoPipeline": NO_I2V,
        "HunyuanVideo15Pipeline": _NEWER,
        "HunyuanVideo15ImageToVideoPipeline": _NEWER,
        "HunyuanVideo15Transformer3DModel": _NEWER,
        "HunyuanVideoFramepackPipeline": "FramePack is not supported",
        "hunyuan-video-i2v-720p/*": NO_I2V,
        "hunyuancustom_*/*": _CUSTOM,
    },
)
