"""Sources of a Wan model's text embeddings: its encoder, or the disk."""

import functools
from pathlib import Path
from typing import Any

import jax

from models.checkpoints.scaled import FLOAT8
from models.diffusion.dtypes import default_dtype
from models.diffusion.embeddings import (
    CachedTextEncoder,
    EmbeddingCache,
    GivenTextEncoder,
)
from models.diffusion.folders.layouts import Part
from models.diffusion.interfaces import TextEncoder
from models.diffusion.text_options import TextOptions
from models.umt5.config import UMT5Config
from models.umt5.embeddings import umt5_cache
from models.umt5.text_encoder import UMT5TextEncoder
from models.umt5.tokenizer import UMT5Tokenizer
from models.wan.checkpoint import WanParts

_NARROW = ("bfloat16", *FLOAT8)  # what bfloat16 holds to the last bit
TEXT_PARTS: tuple[Part, ...] = ("text_encoder", "tokenizer")


def load_text_encoder(wan: WanParts, options: TextOptions) -> TextEncoder | None:
    """Returns what makes contexts; `options.prompts` have been through it.

    Args:
      wan: The opened model.
      options: Which encoder, and what happens to it.

    Returns:
      None if `wan` has no text encoder and the options do not stand for it.

    Raises:
      CheckpointError: The encoder, the tokenizer or stored embeddings are damaged.
      ConversionError: The encoder does not fit its configuration.
      UnknownPromptError: A file of embeddings lacks a prompt.
    """
    prompts = options.prompts
    length = wan.config.text_length
    if options.embeddings is not None and options.given:
        encoder: Any = GivenTextEncoder.load(options.embeddings, text_length=length)
    elif wan.text_encoder is None or wan.tokenizer is None:
        return None
    else:
        load = functools.partial(
            UMT5TextEncoder.load,
            wan.text_encoder,
            wan.tokenizer,
            config=_text_config(wan, options.device),
            max_length=length,
            device=options.device,
        )
        if options.embeddings is None:
            encoder = load()
            if prompts is not None:
                vectors = encoder.embed(prompts)
                encoder.free()
                encoder = GivenTextEncoder(embeddings=vectors, text_length=length)
            return encoder
        encoder = CachedTextEncoder(
            cache=_cache(wan, options.embeddings, load.keywords["config"]),
            text_length=length,
            load_encoder=load,
        )
    if prompts is not None:
        encoder.encode(prompts)
    return encoder


def _cache(wan: WanParts, folder: Path, config: UMT5Config) -> EmbeddingCache:
    assert wan.tokenizer is not None
    return umt5_cache(
        folder,
        config,
        UMT5Tokenizer(wan.tokenizer, max_length=wan.config.text_length),
        wan.sources["text_encoder"].files,
    )


def _text_config(wan: WanParts, device: jax.Device | None) -> UMT5Config:
    """Computes in what is fast on the device; stores what the file has, or less."""
    weights = wan.text_encoder
    assert weights is not None
    dtype = default_dtype(device)
    narrow = all(weights[key].dtype.name in _NARROW for key in weights)
    dtypes = {"dtype": dtype, "param_dtype": "bfloat16" if narrow else dtype}
    return wan.read_config(
        "text_encoder", UMT5Config.from_dict, UMT5Config.xxl, **dtypes
    )
