"""The layouts of published HunyuanVideo folders.

The original's is tencent/HunyuanVideo, beside whose weights the text encoders are put
after its guide; that of diffusers is hunyuanvideo-community/HunyuanVideo.
"""

import os
from collections.abc import Mapping
from typing import Any

from models.diffusion.folders.layouts import FolderLayouts, Part
from models.hunyuan.convert import open_transformer_weights
from models.hunyuan.vae.convert import open_vae_weights

TEXT_PARTS: tuple[Part, ...] = (
    "text_encoder",
    "tokenizer",
    "text_encoder_2",
    "tokenizer_2",
)
_ORIGINAL = "hunyuan-video-t2v-720p"
_ENCODERS: dict[Part, tuple[str, ...]] = {
    "text_encoder": ("text_encoder/config.json", "text_encoder/*.safetensors"),
    "text_encoder_2": ("text_encoder_2/config.json", "text_encoder_2/*.safetensors"),
}


def _open_vae(path: str | os.PathLike, *, stem: str | None) -> Mapping[str, Any]:
    del stem  # no folder has other weights beside these
    return open_vae_weights(path)


LAYOUTS = FolderLayouts(
    family="HunyuanVideo",
    files={
        "original": {
            "transformer": (f"{_ORIGINAL}/transformers/mp_rank_00_model_states.pt",),
            "vae": (
                f"{_ORIGINAL}/vae/config.json",
                f"{_ORIGINAL}/vae/pytorch_model.pt",
            ),
            **_ENCODERS,
            "tokenizer": ("text_encoder/tokenizer*.json",),
            "tokenizer_2": ("text_encoder_2/*.json", "text_encoder_2/merges.txt"),
        },
        "diffusers": {
            "transformer": ("transformer/config.json", "transformer/*.safetensors"),
            "vae": ("vae/config.json", "vae/*.safetensors"),
            **_ENCODERS,
            "tokenizer": ("tokenizer/tokenizer*.json",),
            "tokenizer_2": ("tokenizer_2/*.json", "tokenizer_2/merges.txt"),
            "scheduler": ("scheduler/scheduler_config.json",),
        },
    },
    signs={
        "diffusers": ("model_index.json", "transformer/config.json"),
        "original": (f"{_ORIGINAL}/*",),
    },
    classes=frozenset(["HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel"]),
    needs_class=True,
    how={
        "vae": "the autoencoder (--vae, such as the pytorch_model.pt of tencent/"
        "HunyuanVideo)",
        "text_encoder": "the folder of the language model (--text-encoder)",
        "text_encoder_2": "the folder of CLIP-L (--text-encoder-2)",
    },
    open_part={"transformer": open_transformer_weights, "vae": _open_vae},
)
