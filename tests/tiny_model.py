"""A random model small enough to run from checkpoint to mp4 in a test."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.diffusion.sampling import Sampling
from models.mini.autoencoder import autoencoder_config
from models.mini.checkpoint import MiniCheckpoint
from models.mini.text import TextEmbedding, Vocabulary
from models.wan.config import WanConfig
from models.wan.transformer import WanTransformer
from models.wan.vae.autoencoder import WanVAE
from models.wan.vae.codec import WanVAECodec

CONFIG = WanConfig(
    dim=24,
    ffn_dim=32,
    num_heads=2,
    num_layers=3,
    text_dim=8,
    text_length=6,
    freq_dim=16,
    tile=(2, 4),
    dtype="float32",
)
WORDS = ("a", "ball", "blue", "boat", "on", "red", "sea", "the")
# 2 x 4 x 6 tokens: in each frame two tiles of 2 x 4 and two of 2 x 2.
SAMPLING = Sampling(frames=3, height=32, width=48, num_steps=4)
NUM_TILES = 8


@functools.cache
def make_checkpoint(seed: int = 0) -> MiniCheckpoint:
    """Random weights; the output layer, zero when untrained, is random too."""
    rngs = nnx.Rngs(seed)
    transformer = WanTransformer(CONFIG, rngs=rngs)
    kernel = transformer.proj_out.kernel
    kernel[...] = jax.random.normal(rngs.params(), kernel.shape) / 5
    vocabulary = Vocabulary(words=WORDS, num_buckets=4, max_length=CONFIG.text_length)
    return MiniCheckpoint(
        transformer=transformer,
        text_embedding=TextEmbedding(
            vocabulary.size, vocabulary.max_length, CONFIG.text_dim, rngs=rngs
        ),
        vocabulary=vocabulary,
        codec=make_codec(),
    )


@functools.cache
def make_codec() -> WanVAECodec:
    """Random weights of a codec, drawn by NumPy: JAX would compile for ten seconds."""
    config = autoencoder_config(base_dim=2, decoder_base_dim=2)
    model = nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1] != "kernel":
            return leaf.replace(jnp.full(leaf.shape, float(path[-1] != "bias")))
        values = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        if "conv_out" in path:  # pixels that rounding in latents hardly moves
            values /= 8
        return leaf.replace(jnp.asarray(values, jnp.float32))

    graph, state = nnx.split(model)
    flat = [(path, draw(path, leaf)) for path, leaf in nnx.to_flat_state(state)]
    return WanVAECodec(model=nnx.merge(graph, nnx.from_flat_state(flat)))


def save_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Writes the model as a checkpoint folder and returns it."""
    make_checkpoint(seed).save(folder)
    return folder


def fail_to_decode(monkeypatch, after=0):
    """Makes the small codec have no memory, after some videos."""
    decode, left = WanVAECodec.decode_to_host, [None] * after

    def fail(self, latents):
        if not left:
            raise MemoryError("so much memory is not there")
        left.pop()
        return decode(self, latents)

    monkeypatch.setattr(WanVAECodec, "decode_to_host", fail)
