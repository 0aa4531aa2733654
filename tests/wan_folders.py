"""Folders of tiny Wan models: the fixtures, and one that starts from an image."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import safetensors
from flax import nnx

from models.checkpoints.safetensors_io import save_safetensors
from models.wan.config import WanConfig
from models.wan.convert import save_wan_transformer
from models.wan.transformer import WanTransformer

FIXTURES = Path(__file__).parent / "fixtures"
TEXT_TO_VIDEO = FIXTURES / "wan_folders" / "diffusers"
CLIP = FIXTURES / "clip_exact.safetensors"


def save_image_to_video(folder: Path) -> Path:
    """Writes an image-to-video model with random weights in diffusers' layout.

    Text encoder, tokenizer, autoencoder and scheduler are those of the fixtures, and
    so is the image tower.
    """
    shutil.copytree(TEXT_TO_VIDEO, folder)
    shutil.rmtree(folder / "transformer")
    with safetensors.safe_open(CLIP, "np") as stored:
        tower = json.loads(stored.metadata()["config"])
        prefix = "transformers_5/"
        weights = {
            key.removeprefix(prefix): stored.get_tensor(key)
            for key in stored.keys()  # noqa: SIM118
            if key.startswith(prefix)
        }
    save_safetensors(weights, folder / "image_encoder", stem="model")
    _write_json(folder / "image_encoder" / "config.json", tower)
    text = json.loads((folder / "text_encoder" / "config.json").read_text())
    config = WanConfig(
        dim=24,
        ffn_dim=32,
        num_heads=2,
        num_layers=2,
        in_channels=36,
        text_dim=text["d_model"],
        image_dim=tower["hidden_size"],
        freq_dim=16,
        dtype="float32",
    )
    shapes = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    structure, state = nnx.split(shapes)
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(leaf.dtype), state
    )
    transformer = folder / "transformer"
    model = nnx.merge(structure, state)
    save_wan_transformer(model, transformer, layout="diffusers", dtype=None)
    _write_json(transformer / "config.json", config.to_dict())
    return folder


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content))
