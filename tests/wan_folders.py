"""Folders of tiny Wan models: the fixtures, and one that starts from an image."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import safetensors
from flax import nnx

from models.checkpoints.safetensors_io import save_safetensors
from models.wan.config import WanConfig
from models.wan.convert import load_wan_transformer, save_wan_transformer
from models.wan.transformer import WanTransformer
from models.wan.vae.convert import export_wan_vae
from tests import tiny_wan2_2

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


def save_text_or_image_to_video(folder: Path) -> Path:
    """Writes a model that holds its first frame, with seeded weights, for diffusers.

    Text encoder, tokenizer and scheduler are those of the fixtures.
    """
    shutil.copytree(TEXT_TO_VIDEO, folder)
    for part in ("transformer", "vae"):
        shutil.rmtree(folder / part)
    text = json.loads((folder / "text_encoder" / "config.json").read_text())
    config = dataclasses.replace(
        tiny_wan2_2.make_config("ti2v"), text_dim=text["d_model"], text_length=512
    )
    weights = tiny_wan2_2.make_weights(config, "ti2v")
    save_safetensors(weights, folder / "transformer", stem="model")
    _write_json(folder / "transformer" / "config.json", config.to_dict())
    codec = tiny_wan2_2.make_codec(averages=True)
    save_safetensors(export_wan_vae(codec.model), folder / "vae", stem="model")
    vae = codec.model.config
    _write_json(
        folder / "vae" / "config.json",
        {
            "base_dim": vae.base_dim,
            "decoder_base_dim": vae.decoder_base_dim,
            "z_dim": vae.latent_channels,
            "dim_mult": vae.dim_mult,
            "num_res_blocks": vae.num_res_blocks,
            "temperal_downsample": vae.temporal_downsample,
            "latents_mean": vae.latents_mean,
            "latents_std": vae.latents_std,
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
        },
    )
    index = json.loads((folder / "model_index.json").read_text())
    changes = {"expand_timesteps": True, "boundary_ratio": None}
    changes["transformer_2"] = [None, None]
    _write_json(folder / "model_index.json", index | changes)
    return folder


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content))


def save_pair(folder: Path, layout: str, *, from_image: bool = False) -> Path:
    """Writes two transformers with seeded weights, one for high noise and one for low.

    The other parts are those of the fixtures; the original's have placeholders' sizes.
    """
    shutil.copytree(FIXTURES / "wan_folders" / layout, folder)
    places = {"high": "transformer", "low": "transformer_2"}
    if layout == "original":
        tokenizer = folder / "google" / "umt5-xxl"
        shutil.copytree(TEXT_TO_VIDEO / "tokenizer", tokenizer)
        (folder / "diffusion_pytorch_model.safetensors").unlink()
        published = json.loads((folder / "config.json").read_text())
        (folder / "config.json").unlink()
        places = {side: f"{side}_noise_model" for side in places}
    else:
        published = json.loads((folder / "transformer" / "config.json").read_text())
        shutil.rmtree(folder / "transformer")
        index = json.loads((folder / "model_index.json").read_text())
        index["transformer_2"] = index["transformer"]
        index["boundary_ratio"] = 0.875
        _write_json(folder / "model_index.json", index)
    if from_image:
        changes = {"in_dim": 36, "model_type": "i2v"}
        published |= changes if layout == "original" else {"in_channels": 36}
    config = WanConfig.from_dict(published, image_dim=None, dtype="float32")
    for side, place in places.items():
        weights = tiny_wan2_2.make_weights(config, side)
        model = load_wan_transformer(weights, config)
        save_wan_transformer(
            model,
            folder / place,
            stem="diffusion_pytorch_model",
            layout=layout,
            dtype=None,
        )
        _write_json(folder / place / "config.json", published)
    return folder
