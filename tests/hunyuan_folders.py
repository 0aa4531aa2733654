"""Folders of a tiny HunyuanVideo model with random weights, in both layouts."""

import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from models.checkpoints.safetensors_io import save_safetensors
from models.diffusion.embeddings import GivenTextEncoder, PromptEmbedding
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.convert import export_hunyuan_transformer, save_hunyuan_transformer
from models.hunyuan.transformer import HunyuanTransformer
from models.hunyuan.vae.autoencoder import HunyuanVAE
from models.hunyuan.vae.config import HunyuanVAEConfig
from models.hunyuan.vae.convert import export_hunyuan_vae
from tests.torch_files import write_torch

CONFIG = HunyuanConfig(
    dim=24,
    num_heads=2,
    num_double_blocks=2,
    num_single_blocks=2,
    in_channels=4,
    out_channels=4,
    text_dim=10,
    pooled_dim=6,
    rope_channels=(2, 4, 6),
    dtype="float32",
)
VAE = {
    "_class_name": "AutoencoderKLHunyuanVideo",
    "latent_channels": 4,
    "block_out_channels": [4, 8, 8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0}
ORIGINAL = "hunyuan-video-t2v-720p"


def use_tiny_sizes(monkeypatch) -> None:
    """Makes the known sizes tiny: the original has no configuration beside it."""

    def video_13b(**changes):
        return HunyuanConfig.from_dict(CONFIG.to_dict(), **changes)

    monkeypatch.setattr(HunyuanConfig, "video_13b", video_13b)


def fill(make):
    """A model with random weights."""
    structure, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: 0.1 * rng.normal(size=leaf.shape).astype(leaf.dtype), state
    )
    return nnx.merge(structure, state)


def write_folders(root: Path) -> dict[str, Path]:
    """The same weights in both layouts."""
    original, diffusers = root / "original", root / "diffusers"
    transformer = fill(lambda: HunyuanTransformer(CONFIG, rngs=nnx.Rngs(0)))
    vae_config = HunyuanVAEConfig.from_dict(VAE)
    vae = fill(lambda: HunyuanVAE(vae_config, rngs=nnx.Rngs(0)))
    weights = export_hunyuan_vae(vae)
    save_hunyuan_transformer(transformer, diffusers / "transformer", dtype=None)
    save_safetensors(weights, diffusers / "vae", stem="diffusion_pytorch_model")
    _write(diffusers / "transformer" / "config.json", CONFIG.to_dict())
    _write(diffusers / "vae" / "config.json", VAE)
    _write(diffusers / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write(diffusers / "model_index.json", {"_class_name": "HunyuanVideoPipeline"})
    folder = original / ORIGINAL
    write_torch(
        folder / "transformers" / "mp_rank_00_model_states.pt",
        {"module": export_hunyuan_transformer(transformer, layout="original")},
    )
    state = {f"vae.{key}": value for key, value in weights.items()}
    write_torch(folder / "vae" / "pytorch_model.pt", {"state_dict": state})
    _write(folder / "vae" / "config.json", VAE)
    return {"original": original, "diffusers": diffusers}


def write_embeddings(file: Path, prompt: str) -> Path:
    """What text encoders would have made of a prompt of five tokens."""
    rng = np.random.default_rng(1)
    embedding = PromptEmbedding(
        rng.normal(size=(5, CONFIG.text_dim)).astype(np.float32),
        rng.normal(size=CONFIG.pooled_dim).astype(np.float32),
    )
    GivenTextEncoder(
        embeddings={prompt: embedding}, text_length=CONFIG.text_length
    ).save(file)
    return file


def _write(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
