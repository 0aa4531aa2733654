"""Wan2.2's models in small, with the weights of fixtures/make_wan2_2_fixtures."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from models.diffusion.interfaces import TextContext
from models.wan.config import WanConfig
from models.wan.convert import export_wan_transformer, load_wan_transformer
from models.wan.transformer import WanTransformer
from models.wan.vae.codec import WanVAECodec
from models.wan.vae.config import WanVAEConfig
from models.wan.vae.convert import load_wan_vae
from tests.fixtures.seeded_arrays import seeded_uniform, seeded_weight
from tests.tiny_vae import checkpoint_shapes

FIXTURES = Path(__file__).parent / "fixtures"
ITEMS, FRAMES, ROWS, COLUMNS, TEXT = 2, 3, 4, 6, 5

TEXT_TO_VIDEO = WanConfig(
    dim=24,
    ffn_dim=40,
    num_heads=2,
    num_layers=2,
    in_channels=4,
    out_channels=4,
    text_dim=10,
    text_length=TEXT,
    freq_dim=16,
    tile=(2, 4),
    dtype="float32",
)


def make_config(model: str) -> WanConfig:
    """Configuration of "t2v", "i2v" or "ti2v"."""
    changes = {"i2v": {"in_channels": 12}, "ti2v": {"holds_first_frame": True}}
    fields = {
        field: getattr(TEXT_TO_VIDEO, field)
        for field in TEXT_TO_VIDEO.__dataclass_fields__
    }
    return WanConfig(**(fields | changes.get(model, {})))


@functools.cache
def load_fixture(file: str = "wan2_2.safetensors") -> dict[str, np.ndarray]:
    """Outputs of diffusers, channels last."""
    stored = safetensors.numpy.load_file(FIXTURES / file)
    return {key: np.moveaxis(value, 1, -1) for key, value in stored.items()}


def make_weights(config: WanConfig, name: str) -> dict[str, np.ndarray]:
    """A transformer's seeded weights by diffusers key."""
    shapes = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    structure, state = nnx.split(shapes)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)
    zeros = export_wan_transformer(nnx.merge(structure, state))
    return {
        key: seeded_weight(f"{name}/{key}", value.shape) for key, value in zeros.items()
    }


def make_transformer(config: WanConfig, name: str) -> WanTransformer:
    """A transformer with its seeded weights."""
    return load_wan_transformer(make_weights(config, name), config)


def draw(name: str, *shape: int) -> jnp.ndarray:
    """A seeded array whose second axis is that of channels, which comes last here."""
    return jnp.asarray(np.moveaxis(seeded_uniform(name, shape), 1, -1))


def make_context(name: str) -> TextContext:
    """Rows of text of every item, none of them padding."""
    rows = jnp.asarray(seeded_uniform(name, (ITEMS, TEXT, 10)))
    return TextContext(rows, jnp.full(ITEMS, TEXT, jnp.int32))


def make_codec(*, averages: bool, name: str | None = None) -> WanVAECodec:
    """The autoencoder of either kind: that of the runs, or another's seed."""
    sizes = {
        "base_dim": 4,
        "latent_channels": 4,
        "dim_mult": (1, 2, 2, 2),
        "num_res_blocks": 1,
        "latents_mean": (0.1, -0.2, 0.3, 0.0),
        "latents_std": (1.2, 0.8, 1.5, 1.0),
    }
    config = WanVAEConfig.wan2_1(**sizes)
    if averages:
        config = WanVAEConfig.wan2_2(**sizes, decoder_base_dim=6)
    name = name or ("vae_2_2" if averages else "vae")
    weights = {
        key: seeded_weight(f"{name}/{key}", shape)
        for key, shape in checkpoint_shapes(config, "diffusers").items()
    }
    return WanVAECodec(model=load_wan_vae(weights, config))


def make_image(name: str, height: int, width: int) -> np.ndarray:
    """The first frame of a run, in [-1, 1]."""
    pixels = seeded_uniform(f"{name}/image", (height, width, 3))
    return 2 * np.clip(0.5 + 0.25 * pixels, 0, 1) - 1
